"""What a node program is started with: one JSON document, the same on this machine and in a container."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from broker.credentials import Credentials, load_credentials
from broker.messages import Name

TorchDevice = Annotated[str, Meta(pattern=r"^(auto|cpu|cuda(:[0-9]{1,2})?)(?!\n)$")]
"""Where a node's models run."""


class NodeSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the node belongs and how it computes.

    ``models`` are the diffusion models that it holds, the testbed's main one first; they share one latent space.
    ``profile`` is ``native`` or hardware to emulate, ``emulated_models`` says for a model whose size and pace
    the emulation shows, where that is not what ``semct.compute.STANDS_FOR`` says; ``slowdown`` stretches emulated
    time; ``rows`` bounds a denoiser call; ``latent_dtype`` is what latents travel as; ``threads`` are torch's.
    ``measured`` is a profile file that says what a native node is expected to take, where that was measured before.
    ``credentials`` is the file with what the node shows the broker, where that asks for it.
    ``torch_device`` is where the models run: ``auto`` is the first GPU, where torch sees one, else the processor.
    ``metrics`` is where Prometheus may ask: ``PORT``, which is on loopback, or ``HOST:PORT``; by default nowhere.
    """

    testbed: Name
    name: Name
    host: str
    port: int
    credentials: str = ""
    models: Annotated[tuple[str, ...], Meta(min_length=1)] = ("embedded",)
    profile: str = "native"
    measured: str = ""
    emulated_models: dict[str, str] = {}
    slowdown: float = 1.0
    rows: Annotated[int, Meta(ge=1)] = 8
    latent_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    threads: Annotated[int, Meta(ge=1)] = 1
    torch_device: TorchDevice = "cpu"
    metrics: str = ""

    def shown(self) -> Credentials | None:
        """What the node shows the broker; raises ``BadCredentials``."""
        return load_credentials(Path(self.credentials)) if self.credentials else None


Settings = TypeVar("Settings", bound=NodeSettings)


def read_settings(kind: type[Settings], file: str) -> Settings:
    """The settings in a file; exits with one sentence where they are not right."""
    path = Path(file)
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        sys.exit(f"the settings {path} cannot be read: {error.strerror}")
    except msgspec.DecodeError as error:
        sys.exit(f"the settings {path} are not right: {error}")


def start_logging() -> None:
    """Lines with time and level on standard error, which whoever starts a node keeps."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
        force=True,
    )
