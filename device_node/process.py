"""The device as a process: on its own, or forked from a parent that has everything loaded."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import msgspec
import torch

from device_node.node import DeviceNode, DeviceSettings
from node.settings import start_logging
from node.worker import make_worker
from semct.diffusion import Denoiser, place

_load = functools.cache(Denoiser.load)


def warm(arguments: dict[str, Any]) -> None:
    """Load what the devices of this machine share, before the first is forked: ``models`` names it.

    Those are the models that run on the processor; a GPU's context does not outlive a fork.
    """
    torch.set_num_threads(1)
    for model in arguments["models"]:
        _load(model, device="cpu").warm_up()


def main(arguments: dict[str, Any]) -> int:
    """Run one device with its settings (as plain data) until it is told to leave."""
    start_logging()
    serve(msgspec.convert(arguments, DeviceSettings))
    return 0


def serve(settings: DeviceSettings) -> bool:
    """Run one device until it is told to leave; whether the testbed ends."""
    torch.set_num_threads(settings.threads)
    device = place(settings.torch_device)
    denoisers = {model: _load(model, device=device) for model in settings.models}
    if device != "cpu":
        for denoiser in denoisers.values():
            denoiser.warm_up()
    worker = make_worker(settings, denoisers)
    return asyncio.run(DeviceNode(settings, worker).run())
