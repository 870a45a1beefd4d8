"""An edge or cloud node as a process: the planning edge on its own, the others forked from a warm parent."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import msgspec
import torch

from edge_node.node import EdgeNode, EdgeSettings
from edge_node.planning import Planner
from node.settings import start_logging
from node.worker import Worker, make_worker
from semct.clustering import by_entity
from semct.diffusion import Denoiser, place
from semct.language_model import SMOLLM2
from semct.planner.learned import load_policy
from semct.prompts import SentenceEncoder, load_sentence_encoder
from semct.public_prompt import LanguageModelWriter, MeanWriter, MedoidWriter, RandomMemberWriter, Writer
from semct.quality import load_quality_model

_REHEARSAL = [["a cat on a beach", "a dog on a beach"]]


_load = functools.cache(Denoiser.load)


def warm(arguments: dict[str, Any]) -> None:
    """Load what the nodes of this machine share, before the first is forked: ``models`` names it.

    The planning edge is the only one of its kind and loads for itself, since what it loads wants threads; and so do
    nodes on a GPU, whose context does not outlive a fork.
    """
    torch.set_num_threads(1)
    for model in arguments["models"]:
        _load(model, device="cpu").warm_up()


def main(arguments: dict[str, Any]) -> int:
    """Run one edge or cloud node with its settings (as plain data) until it is told to leave."""
    start_logging()
    serve(msgspec.convert(arguments, EdgeSettings))
    return 0


def prepare() -> None:
    """Load what an edge that plans needs in any place: a second's work, for which it has time while it waits."""
    load_sentence_encoder()
    by_entity(_REHEARSAL[0])  # its tagger loads on first use


def serve(settings: EdgeSettings) -> bool:
    """Load everything, warm it up, then serve: the birth says that the edge is ready. Whether the testbed ends."""
    torch.set_num_threads(settings.threads)
    device = place(settings.torch_device)
    denoisers = {model: _load(model, device=device) for model in settings.models}
    for denoiser in denoisers.values():
        denoiser.warm_up()
    worker = make_worker(settings, denoisers)
    planner = _planner(settings, worker, device) if settings.plans else None
    return asyncio.run(EdgeNode(settings, worker, planner).run())


def _planner(settings: EdgeSettings, worker: Worker, device: str) -> Planner:
    prepare()
    encoder = load_sentence_encoder()
    writer = load_writer(settings.writer, encoder, device=device)
    writer.write(_REHEARSAL, 0)
    return Planner(
        edge=settings.name,
        compute=worker.compute,
        latent_bytes=worker.latent_bytes,
        weights=settings.weights,
        most_shared=settings.most_shared,
        policy=load_policy(settings.tier),
        clusters=settings.clusters,
        model=settings.models[0],
        small_model=settings.small_model,
        quality=load_quality_model(settings.quality),
        encoder=encoder,
        writer=writer,
        cache=settings.cache,
    )


def load_writer(name: str, encoder: SentenceEncoder, *, device: str = "cpu") -> Writer:
    """Who words public prompts: a rule, or a language model by name; others than the packaged one on a torch device."""
    match name:
        case "mean":
            return MeanWriter(encoder)
        case "medoid":
            return MedoidWriter(encoder)
        case "random":
            return RandomMemberWriter(encoder)
        case "best-of-n":
            return LanguageModelWriter.load(SMOLLM2, encoder, plain=True)
        case _:
            return LanguageModelWriter.load(name, encoder, device=device)
