"""The denoiser: a flow-matching diffusion model that can stop and go on at any step.

Rows of one batch may stand at different steps and carry different prompts, which is what lets requests of
different clusters ride in one call. A run that is split at any step gives the latents of the unsplit run.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, TypeVar, cast

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from semct.networks.decoder import TinyDecoder, TinyDecoderConfig
from semct.networks.flops import FlopCounter
from semct.networks.mmdit import MMDiT, MMDiTConfig
from semct.networks.schedule import FlowSchedule
from semct.networks.weights import Weights
from semct.prompts import SentenceEncoder, load_sentence_encoder
from semct.routes import Prompt


@contextmanager
def _no_gpu_asked_for() -> Iterator[None]:
    """Whoever asks torch for GPUs starts CUDA, and a process that did so cannot fork children that use one."""
    asked = torch.cuda.is_available
    torch.cuda.is_available = lambda: False
    try:
        yield
    finally:
        torch.cuda.is_available = asked


@functools.cache
def _diffusers() -> Any:
    """diffusers, which takes seconds to import and is for full models only."""
    import diffusers  # noqa: PLC0415 (slow import)

    diffusers.utils.logging.disable_progress_bar()
    return diffusers


EMBEDDED = "embedded"
"""The name of the small model that comes with the package."""

EMBEDDED_SMALL = "embedded-small"
"""The name of its smaller sister: another denoiser of the same latents."""

ASSETS = Path(__file__).parent / "assets"

_TEXT, _PARTS = "text.json", "parts.json"  # what a model's folder may have beside diffusers' own files
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_BROKEN = (OSError, ValueError, TypeError, AttributeError, KeyError, SafetensorError, msgspec.MsgspecError)
_Settings = TypeVar("_Settings", bound=msgspec.Struct)

_PROMPTS_KEPT = 1024
_BLENDS_KEPT = 128


class NoSuchDevice(ValueError):
    """A model is to run on a GPU that is not there."""


class ModelNotFound(ValueError):
    """No diffusion model of that name can be loaded here."""


def place(device: str) -> str:
    """The torch device that ``auto`` means here, or ``device`` itself. A process that asked for a GPU must not fork.

    Raises ``NoSuchDevice`` for a GPU that torch cannot use.
    """
    if device == "cpu":
        return device
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if there else "cpu"
    if (torch.device(device).index or 0) >= there:
        raise NoSuchDevice(f"torch {torch.__version__} sees {there} GPUs here, and is to run a model on {device!r}")
    return device


def weights_type(model: str, device: str) -> torch.dtype:
    """What a model's weights are kept in on a torch device: bfloat16 on a GPU, as full models are published to be run.

    float32 on the processor; the package's own models, and what was trained as they were, are that everywhere: their
    measured quality belongs to it.
    """
    small = (_other_parts(_source(model)) / _TEXT).exists()
    return torch.float32 if small or torch.device(device).type == "cpu" else torch.bfloat16


def _source(model: str) -> Path:
    """The folder of a model, if it is in one."""
    return ASSETS / model if model in {EMBEDDED, EMBEDDED_SMALL} else Path(model)


def _other_parts(source: Path) -> Path:
    """The folder of what a model has beside its transformer: its own, or another one."""
    parts = source / _PARTS
    return source / _settings(parts, OtherParts).of if parts.exists() else source


def _left_out(folder: Path) -> dict[str, Any]:
    """What a pipeline was saved without, such as T5: diffusers wants to be told when it loads it."""
    index = folder / "model_index.json"
    parts = msgspec.json.decode(index.read_bytes(), type=dict[str, Any]) if index.exists() else {}
    return {name: None for name, kind in parts.items() if kind == [None, None]}


def _settings(path: Path, kind: type[_Settings]) -> _Settings:
    return msgspec.json.decode(path.read_bytes(), type=kind)


class Conditioning(NamedTuple):
    """What the text says to the denoiser: token states (length, d) and a pooled vector (p,)."""

    tokens: Tensor
    pooled: Tensor


class TextEncoder(Protocol):
    """Turns one prompt into its conditioning."""

    def __call__(self, prompt: str) -> Conditioning: ...


class SentenceConditioning(msgspec.Struct, frozen=True, kw_only=True):
    """``text.json`` of a model that is conditioned on a sentence encoder instead of CLIP and T5."""

    encoder: str
    tokens: int
    token_scale: float
    pooled_scale: float
    guidance: float
    steps: int


class OtherParts(msgspec.Struct, frozen=True, kw_only=True):
    """``parts.json`` of a folder that holds a transformer alone.

    All other parts (autoencoder, scheduler, text) are those of the model in the folder ``of``, relative to this
    one: the two work on the same latents.
    """

    of: str


class _Network(Protocol):
    """What a denoiser computes with: its latents are (n, channels, height, width), in float32 on the CPU."""

    @property
    def latent_shape(self) -> tuple[int, int, int]: ...

    def sigmas(self, steps: int) -> Tensor: ...

    def velocity(self, latents: Tensor, levels: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor: ...

    def pixels(self, latents: Tensor) -> Tensor: ...

    def flops_of(self, work: Callable[[], object]) -> int: ...


class _Small:
    """The networks of a model with ``text.json``: the transformer of the folder ``source``, the rest of ``others``."""

    def __init__(self, source: Path, others: Path, device: str, dtype: torch.dtype) -> None:
        self._config = _settings(source / "transformer" / "config.json", MMDiTConfig)
        self._schedule = _settings(others / "scheduler" / "scheduler_config.json", FlowSchedule)
        self._device, self._dtype = device, dtype
        transformer = Weights.read(source / "transformer" / _WEIGHTS, dtype=dtype).to(device)
        self._transformer = MMDiT(transformer, self._config)
        decoder = Weights.read(others / "vae" / _WEIGHTS, below="decoder.", dtype=dtype).to(device)
        self._decoder = TinyDecoder(decoder, _settings(others / "vae" / "config.json", TinyDecoderConfig))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self._config.in_channels, self._config.sample_size, self._config.sample_size

    def sigmas(self, steps: int) -> Tensor:
        return self._schedule.sigmas(steps)

    def velocity(self, latents: Tensor, levels: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
        times = (levels * self._schedule.num_train_timesteps).to(self._device)
        latents, tokens, pooled = (x.to(self._device, self._dtype) for x in (latents, tokens, pooled))
        return self._transformer(latents, tokens, pooled, times).float().cpu()

    def pixels(self, latents: Tensor) -> Tensor:
        return self._decoder(latents.to(self._device, self._dtype))

    def flops_of(self, work: Callable[[], object]) -> int:
        counter = FlopCounter()
        with counter:
            work()
        return counter.total


class _Full:
    """The networks of a diffusers pipeline."""

    def __init__(self, pipeline: Any) -> None:
        self._transformer = pipeline.transformer
        self._vae = pipeline.vae
        self._scheduler = pipeline.scheduler

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        config = self._transformer.config
        return config.in_channels, config.sample_size, config.sample_size

    def sigmas(self, steps: int) -> Tensor:
        scheduler = copy.deepcopy(self._scheduler)
        scheduler.set_timesteps(steps)
        return cast("Tensor", scheduler.sigmas)

    def velocity(self, latents: Tensor, levels: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
        device, dtype = self._transformer.device, self._transformer.dtype
        velocity = self._transformer(
            hidden_states=latents.to(device, dtype),
            encoder_hidden_states=tokens.to(device, dtype),
            pooled_projections=pooled.to(device, dtype),
            timestep=(levels * self._scheduler.config.num_train_timesteps).to(device),
            return_dict=False,
        )[0]
        return cast("Tensor", velocity.float().cpu())

    def pixels(self, latents: Tensor) -> Tensor:
        config = self._vae.config
        x = latents.to(self._vae.device, self._vae.dtype) / config.scaling_factor + config.shift_factor
        return cast("Tensor", self._vae.decode(x, return_dict=False)[0])

    def flops_of(self, work: Callable[[], object]) -> int:
        from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count  # noqa: PLC0415 (slow import)

        # The one kernel of attention that torch does not count.
        for_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        mapping = {for_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)}  # type: ignore[no-untyped-call]
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            work()
        return int(counter.get_total_flops())


class _SentenceText:
    def __init__(self, encoder: SentenceEncoder, settings: SentenceConditioning) -> None:
        self._encoder = encoder
        self._settings = settings

    def __call__(self, prompt: str) -> Conditioning:
        tokens, pooled = self._encoder.tokens([prompt], self._settings.tokens)
        return Conditioning(tokens[0] * self._settings.token_scale, pooled[0] * self._settings.pooled_scale)


class _PipelineText:
    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline

    def __call__(self, prompt: str) -> Conditioning:
        tokens, _, pooled, _ = self._pipeline.encode_prompt(
            prompt, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False
        )
        return Conditioning(tokens[0], pooled[0])


class Denoiser:
    """A loaded diffusion model on one torch device.

    Latents are float32 (channels, height, width) on the CPU at its border, whatever runs inside.
    """

    def __init__(self, network: _Network, text: TextEncoder, *, name: str, guidance: float) -> None:
        self.name = name
        self.guidance = guidance
        self._network = network
        self._encode = functools.lru_cache(maxsize=_PROMPTS_KEPT)(text)
        self._blend = functools.lru_cache(maxsize=_BLENDS_KEPT)(self._mean)

    @classmethod
    def load(cls, model: str, *, device: str = "cpu", dtype: torch.dtype | None = None) -> Self:
        """Load ``"embedded"``, a local diffusers folder or a Hugging Face id, all the same way.

        The weights become ``dtype``; without one it is what ``weights_type`` says.
        Raises ``ModelNotFound``, in one sentence, where there is no such model.
        """
        source = _source(model)
        try:
            others = _other_parts(source)
            dtype = dtype or weights_type(model, device)
            if (others / _TEXT).exists():
                return cls._load_small(model, source, others, device, dtype)
            with _no_gpu_asked_for() if device == "cpu" else nullcontext():
                return cls._load_full(model, source, others, device, dtype)
        except _BROKEN as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelNotFound(
                f"diffusion model {model!r} cannot be loaded: it is neither {EMBEDDED!r} nor {EMBEDDED_SMALL!r}, nor a "
                "diffusers folder with a Stable Diffusion 3 pipeline, nor a Hugging Face id that is reachable here "
                f"({reason})"
            ) from error

    @classmethod
    def _load_small(cls, model: str, source: Path, others: Path, device: str, dtype: torch.dtype) -> Self:
        network = _Small(source, others, device, dtype)
        conditioning = _settings(others / _TEXT, SentenceConditioning)
        text = _SentenceText(load_sentence_encoder(), conditioning)
        denoiser = cls(network, text, name=model, guidance=conditioning.guidance)
        try:
            denoiser.warm_up()  # what does not fit together says so
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        return denoiser

    @classmethod
    def _load_full(cls, model: str, source: Path, others: Path, device: str, dtype: torch.dtype) -> Self:
        options: dict[str, Any] = {"dtype": dtype, "local_files_only": os.environ.get("HF_HUB_OFFLINE") == "1"}
        diffusers, own = _diffusers(), _left_out(others)
        if others != source:
            transformer = diffusers.SD3Transformer2DModel
            own["transformer"] = transformer.from_pretrained(source, subfolder="transformer", **options)
        pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(str(others), **own, **options).to(device)
        return cls(_Full(pipeline), _PipelineText(pipeline), name=model, guidance=7.0)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        return self._network.latent_shape

    @torch.inference_mode()
    def encode(self, prompt: Prompt) -> Conditioning:
        """The conditioning of one prompt, or the mean of those of a blend; the most recent prompts' are remembered."""
        return self._encode(prompt) if isinstance(prompt, str) else self._blend(prompt)

    def forget(self) -> None:
        """Forget the prompts that were encoded, so that the next round pays for its own."""
        self._encode.cache_clear()
        self._blend.cache_clear()
        self.encode("")

    def warm_up(self) -> None:
        """One step and one decode, so that the first request is like the others."""
        self.decode(self.run([self.noise(0)], 0, 1, 1, [""]))

    def noise(self, seed: int) -> Tensor:
        """The latent at step 0: the same numbers on every device."""
        return torch.randn(self.latent_shape, generator=torch.Generator().manual_seed(seed))

    @functools.lru_cache(maxsize=16)  # noqa: B019  a handful of step counts, as long as the model
    def sigmas(self, steps: int) -> Tensor:
        """The noise levels at steps 0..T, shape (T + 1,), as diffusers' scheduler lays them out."""
        return self._network.sigmas(steps)

    @torch.inference_mode()
    def step(
        self,
        latents: Sequence[Tensor],
        at: Sequence[int],
        of: Sequence[int],
        conditionings: Sequence[Conditioning],
    ) -> list[Tensor]:
        """One denoising step of every row: row i goes from step ``at[i]`` to ``at[i] + 1`` of ``of[i]``.

        One call of the transformer, with classifier-free guidance (twice the rows); rows do not influence
        each other. The update is flow matching's Euler step, x += (sigma[k+1] - sigma[k]) v.
        """
        levels = torch.stack([self.sigmas(t)[k : k + 2] for k, t in zip(at, of, strict=True)])
        x = torch.stack(list(latents))
        velocity = self._velocity(x, levels[:, 0], conditionings)
        return list(x + (levels[:, 1] - levels[:, 0]).view(-1, 1, 1, 1) * velocity)

    def run(
        self, latents: Sequence[Tensor], start: int, stop: int, steps: int, prompts: Sequence[Prompt]
    ) -> list[Tensor]:
        """Steps [start, stop) of ``steps`` on rows that keep pace with each other, one prompt per row."""
        conditionings = [self.encode(prompt) for prompt in prompts]
        rows = list(latents)
        for k in range(start, stop):
            rows = self.step(rows, [k] * len(rows), [steps] * len(rows), conditionings)
        return rows

    @torch.inference_mode()
    def decode(self, latents: Sequence[Tensor]) -> NDArray[np.uint8]:
        """Pictures (n, height, width, 3) of finished latents."""
        unit = (self._network.pixels(torch.stack(list(latents))).float() * 0.5 + 0.5).clamp(0, 1)
        return cast("NDArray[np.uint8]", (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())

    @functools.cached_property
    def flops_per_step(self) -> int:
        """Floating-point operations of one row's step, guidance included: matrices, convolutions, attention."""
        text = self.encode("")  # outside the counter: encoding is not part of a step
        noise = self.noise(0)
        return self._network.flops_of(lambda: self.step([noise], [0], [1], [text]))

    @functools.cached_property
    def flops_per_decode(self) -> int:
        """Floating-point operations of decoding one latent."""
        noise = self.noise(0)
        return self._network.flops_of(lambda: self.decode([noise]))

    def _mean(self, prompts: tuple[str, ...]) -> Conditioning:
        each = [self._encode(prompt) for prompt in prompts]
        tokens, pooled = (torch.stack(parts).mean(dim=0) for parts in zip(*each, strict=True))
        return Conditioning(tokens, pooled)

    def _velocity(self, x: Tensor, level: Tensor, conditionings: Sequence[Conditioning]) -> Tensor:
        guided = self.guidance > 1
        rows = [self.encode("")] * len(conditionings) * guided + list(conditionings)
        repeat = 1 + guided
        velocity = self._network.velocity(
            x.repeat(repeat, 1, 1, 1),
            level.repeat(repeat),
            torch.stack([c.tokens for c in rows]),
            torch.stack([c.pooled for c in rows]),
        )
        if not guided:
            return velocity
        free, bound = velocity.chunk(2)
        return free + self.guidance * (bound - free)
