"""A Llama model's weights as a GGUF file publishes them: in quantised blocks, which become numbers when they are read.

So they take the room that they take in the GGUF file (SmolLM2-135M: 97 MB instead of 270 in bfloat16), and the
numbers are exactly those that transformers reads from it, in a fraction of a second instead of half a minute.

A block is 32 neighbouring values of a row; its numbers are little-endian (ggml's ``block_q4_1`` and ``block_q8_0``):

- Q4_1, 20 bytes: scale and minimum (float16), then 16 bytes with the codes 0..15 in their low and 16..31 in their
  high halves; value = scale x code + minimum
- Q8_0, 34 bytes: scale (float16), then 32 codes (int8); value = scale x code
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

_FILE = "blocks.safetensors"
_Q4_1, _Q8_0 = 20, 34  # bytes of a block: nothing else tells the types apart


def pack(gguf_file: Path, folder: Path) -> None:
    """Write the configuration and the weights of a Llama model from a GGUF file into a folder.

    Weights are float32 or uint8 (rows, blocks, bytes of a block), under transformers' names. Their rows are in its
    order: llama.cpp has those of queries and keys in another, which is undone by the class that does it there.

    Raises:
        ValueError: Some of the weights are of another type than Q4_1, Q8_0 and F32.
        OSError: The file cannot be read, or the folder cannot be written.
    """
    from gguf import MODEL_ARCH, get_tensor_name_map  # noqa: PLC0415 (slow import)
    from safetensors.torch import save_file  # noqa: PLC0415
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 (slow import)
    from transformers.integrations.gguf.dequant import GGML_BLOCK, GGML_NAME  # noqa: PLC0415
    from transformers.integrations.gguf.reader import GgufHeader, load_gguf_state_dict  # noqa: PLC0415
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor  # noqa: PLC0415

    config: Any = LlamaConfig.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    with torch.device("meta"):
        names = [name.removesuffix(".weight") for name in LlamaForCausalLM(config).state_dict()]
    published = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    own_names = {f"{published.get_name(name)}.weight": f"{name}.weight" for name in names}
    order: Any = LlamaTensorProcessor(config.to_dict())  # type: ignore[no-untyped-call]
    weights = {}
    for name, tensor in load_gguf_state_dict(GgufHeader.from_file(str(gguf_file))).items():
        rows = order.process(tensor[:], name).weights
        if rows.dtype == torch.uint8:
            _, size = GGML_BLOCK[tensor.ggml_type]
            if size not in {_Q4_1, _Q8_0}:
                msg = f"{name} is of type {GGML_NAME[tensor.ggml_type]}"
                raise ValueError(msg)
            rows = rows.unflatten(1, (-1, size))
        weights[own_names[name]] = rows.contiguous()
    config.save_pretrained(folder)
    save_file(weights, folder / _FILE)


def load(folder: Path) -> Callable[[str], torch.Tensor]:
    """Return what gives a weight in float32 by its name, from a folder that ``pack`` wrote.

    It is made when it is asked for, so that not all of them need be in memory at once; ``ValueError`` where there is
    none of that name.

    Raises:
        OSError: There is no such file in the folder.
        SafetensorError: It is broken.
    """
    file: Any = safe_open(folder / _FILE, framework="np")
    names = set(file.keys())

    def weight(name: str) -> torch.Tensor:
        if name not in names:
            msg = f"{folder / _FILE} lacks {name}"
            raise ValueError(msg)
        return torch.from_numpy(values(file.get_tensor(name)))

    return weight


def values(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Return the values, float32 (rows, columns), of blocks (rows, blocks, bytes of a block); others as they are.

    In numpy: ``transformers.integrations.gguf.dequant`` has torch's threads wait for each other at each of 1500 small
    steps, which takes seconds where other processes start on the same cores; ``gguf.dequantize`` takes five times
    as long.

    Raises:
        ValueError: The blocks are of another size than those of Q4_1 and Q8_0.
    """
    if rows.dtype != np.uint8:
        return rows
    size = rows.shape[-1]
    if size == _Q4_1:
        scale, minimum = np.split(_float16(rows[..., :4]), 2, axis=-1)
        halves = np.ascontiguousarray(rows[..., 4:])
        codes = np.concatenate((halves & 15, halves >> 4), axis=-1)
        found = codes * scale
        found += minimum
    elif size == _Q8_0:
        found = rows[..., 2:].view(np.int8) * _float16(rows[..., :2])
    else:
        msg = f"no type of weights has blocks of {size} bytes"
        raise ValueError(msg)
    return found.reshape(len(rows), -1)


def _float16(parts: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.ascontiguousarray(parts).view("<f2").astype(np.float32)
