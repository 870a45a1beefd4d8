"""What all tests share: one torch thread, since tests and their children share few cores; a tiny model; a bus."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, settings

from broker.local import LocalBroker
from broker.messages import Birth, Message
from broker.session import Incoming, Session

if TYPE_CHECKING:
    from semct.diffusion import Denoiser

torch.set_num_threads(1)
logging.getLogger("diffusers").setLevel(logging.ERROR)
# How long an example takes says more about the machine's other load than about the code.
settings.register_profile("shared-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared-machine")


def save_tiny_model(folder: Path, *, latent: int = 4, seed: int = 0) -> Path:
    """Write a model with random weights: the embedded one's architecture, conditioned on MiniLM, in milliseconds."""
    from diffusers import (  # noqa: PLC0415 (slow import)
        AutoencoderTiny,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=latent,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=384,
        caption_projection_dim=32,
        pooled_projection_dim=384,
        pos_embed_max_size=latent,
        qk_norm="rms_norm",
    )
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
        latent_channels=4,
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        **dict.fromkeys([f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")]),
    )
    pipeline.save_pretrained(folder)
    settings = {
        "encoder": "all-MiniLM-L6-v2",
        "tokens": 8,
        "token_scale": 2.5,
        "pooled_scale": 19.6,
        "guidance": 4.0,
        "steps": 28,
    }
    (folder / "text.json").write_bytes(msgspec.json.encode(settings))
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Denoiser:
    from semct.diffusion import Denoiser  # noqa: PLC0415 (slow import)

    return Denoiser.load(str(tiny_folder))


@pytest.fixture
def make_tiny(tmp_path: Path) -> Callable[..., Denoiser]:
    """Makes another model such as ``tiny``, with other weights or latents of another size."""
    from semct.diffusion import Denoiser  # noqa: PLC0415 (slow import)

    return lambda **change: Denoiser.load(str(save_tiny_model(tmp_path / "other", **change)))


Kind = TypeVar("Kind", bound=Message)

_PATIENCE = 20.0  # seconds for what must come


class Ear:
    """A session that keeps all it hears, for tests to wait for."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.heard: list[Incoming] = []
        self._news = asyncio.Condition()

    async def listen(self) -> None:
        async for incoming in self.session:
            async with self._news:
                self.heard.append(incoming)
                self._news.notify_all()

    def all(self, kind: type[Kind], **fields: Any) -> list[Kind]:
        """The messages of a kind with these values, heard so far."""
        return [
            m
            for m in (incoming.message for incoming in self.heard)
            if isinstance(m, kind) and all(getattr(m, field) == value for field, value in fields.items())
        ]

    async def until(self, kind: type[Kind], count: int = 1, **fields: Any) -> list[Kind]:
        """Wait for so many of them."""
        try:
            async with asyncio.timeout(_PATIENCE), self._news:
                await self._news.wait_for(lambda: len(self.all(kind, **fields)) >= count)
        except TimeoutError:
            heard = [type(incoming.message).__name__ for incoming in self.heard]
            raise AssertionError(f"{count} x {kind.__name__} {fields} did not come, but {heard}") from None
        return self.all(kind, **fields)


@pytest.fixture
async def bus(tmp_path: Path) -> AsyncIterator[tuple[str, int]]:
    """The address of a real broker of this test's own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    async with LocalBroker(hosts=["127.0.0.1"], port=port, directory=tmp_path / "broker"):
        yield "127.0.0.1", port


@pytest.fixture
def ear(bus: tuple[str, int]) -> Callable[..., AbstractAsyncContextManager[Ear]]:
    """Opens a session of testbed ``t`` that listens to some topics, under a node's name."""

    @asynccontextmanager
    async def opened(name: str, *subscriptions: str, birth: Birth | None = None) -> AsyncIterator[Ear]:
        async with Session(*bus, testbed="t", name=name, birth=birth, subscriptions=subscriptions) as session:
            heard = Ear(session)
            listening = asyncio.create_task(heard.listen())
            yield heard
            listening.cancel()
            await asyncio.wait({listening})

    return opened


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI a skipped test is a failure: everything that is needed is installed there."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter is not None else []
    if skipped and os.environ.get("CI"):
        reporter.write_line(f"{len(skipped)} tests were skipped, which CI does not allow", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model of random weights whose vocabulary is letters."""
    from transformers import (  # noqa: PLC0415 (slow import)
        CLIPConfig,
        CLIPModel,
        CLIPProcessor,
        CLIPTokenizer,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **size,
            "vocab_size": len(words),
            "max_position_embeddings": 16,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
        vision_config={**size, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(pictures, tokenizer).save_pretrained(folder)
    return folder
