"""Weights in blocks take the room of their GGUF file and are the numbers that other readers of it get."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import load_file

from semct import packed_weights

WIDTH, INNER, WORDS, HEADS, KEY_HEADS, LAYERS = 128, 64, 40, 4, 2, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed form of a small model, whose GGUF file lies beside it."""
    folder = tmp_path_factory.mktemp("packed")
    packed_weights.pack(write_gguf(folder.parent / "small.gguf"), folder)
    return folder


def write_gguf(path: Path, *, of_attention: Type = Type.Q4_1) -> Path:
    """Write a Llama model with random weights, of types like those of SmolLM2."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(WORDS)
    rng = np.random.default_rng(0)

    def add(name: str, shape: tuple[int, ...], kind: Type) -> None:
        numbers = rng.normal(size=shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quantize(numbers, kind), raw_dtype=kind)

    add("token_embd", (WORDS, WIDTH), Type.Q8_0)
    add("output_norm", (WIDTH,), Type.F32)
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{name}", (WIDTH,), Type.F32)
        for name, rows in (("q", WIDTH), ("k", WIDTH * KEY_HEADS // HEADS), ("v", WIDTH * KEY_HEADS // HEADS)):
            add(f"blk.{layer}.attn_{name}", (rows, WIDTH), of_attention)
        add(f"blk.{layer}.attn_output", (WIDTH, WIDTH), of_attention)
        for name, matrix in (("gate", (INNER, WIDTH)), ("up", (INNER, WIDTH)), ("down", (WIDTH, INNER))):
            add(f"blk.{layer}.ffn_{name}", matrix, Type.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_packed_weights_are_those_that_transformers_reads(folder: Path) -> None:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 (slow import)

    theirs: Any = AutoModelForCausalLM.from_pretrained(folder.parent, gguf_file="small.gguf", dtype=torch.float32)
    weight = packed_weights.load(folder)
    expected = theirs.state_dict()
    assert expected.pop("lm_head.weight") is not None
    for name, tensor in expected.items():
        assert weight(name).dtype == torch.float32
        assert torch.equal(weight(name), tensor), name


def test_packed_weights_take_the_room_that_they_take_in_the_gguf_file(folder: Path) -> None:
    read = gguf.GGUFReader(folder.parent / "small.gguf")
    packed = load_file(folder / "blocks.safetensors")
    assert sum(rows.nbytes for rows in packed.values()) == sum(tensor.n_bytes for tensor in read.tensors)


@pytest.mark.parametrize("kind", [Type.Q4_1, Type.Q8_0])
def test_blocks_have_the_values_that_ggml_gives_them(kind: Type) -> None:
    numbers = np.random.default_rng(1).normal(size=(7, 96)).astype(np.float32)
    blocks = gguf.quantize(numbers, kind)
    found = packed_weights.values(blocks.reshape(7, 3, -1))
    assert found.dtype == np.float32
    assert np.array_equal(found, gguf.dequantize(blocks, kind))
    np.testing.assert_allclose(found, numbers, atol=0.25)


def test_other_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"blk\.0\.attn_q\.weight is of type Q4_0"):
        packed_weights.pack(write_gguf(tmp_path / "other.gguf", of_attention=Type.Q4_0), tmp_path / "packed")
    with pytest.raises(ValueError, match="no type of weights has blocks of 17 bytes"):
        packed_weights.values(np.zeros((1, 1, 17), np.uint8))


def test_a_weight_that_lacks_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"blocks\.safetensors lacks model\.norm\.bias"):
        packed_weights.load(folder)("model.norm.bias")
