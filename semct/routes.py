"""Requests, and the routes of denoising segments that carry them.

Requests whose routes begin with the same (node, model, prompt, seed) share those steps: the node computes
them once and hands each request the latent at its own split. Every framework is a way to make a ``Plan``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from itertools import pairwise

import msgspec

MOST_BLENDED = 64
"""Prompts of a blend; a route on the wire stays small with that many."""

Prompt = str | tuple[str, ...]
"""What conditions denoising: a prompt in words, or a *blend*, the mean of several prompts' conditionings.

A blend is a tuple as ``blend`` makes it: equal blends are equal tuples, so that their steps are shared.
"""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One user's wish: a personal prompt, to be denoised in ``steps`` steps from the noise of ``seed``."""

    id: str
    device: str
    prompt: str
    seed: int
    steps: int


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """Denoising steps [start, stop) of one prompt with one model on one node."""

    node: str
    model: str
    prompt: Prompt
    start: int
    stop: int


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """The segments that carry one request from step 0 to its last."""

    request: str
    seed: int
    steps: int
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        bounds = [0, *(edge for s in self.segments for edge in (s.start, s.stop)), self.steps]
        joined = all(left == right for left, right in zip(bounds[::2], bounds[1::2], strict=True))
        if not joined or any(s.start >= s.stop for s in self.segments):
            spans = ", ".join(f"[{s.start}, {s.stop}) on {s.node}" for s in self.segments)
            raise ValueError(f"the route of {self.request} does not lead from 0 to {self.steps}: {spans}")

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes in the order in which the request visits them."""
        names = [s.node for s in self.segments]
        return tuple(names[:1] + [b for a, b in pairwise(names) if a != b])


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that share early denoising, and the edge compute they get together.

    ``similarity`` holds, member by member, the cosine of personal and public prompt; ``share`` is the part
    of the edge's compute, in (0, 1]; ``source`` says who worded the public prompt.
    """

    members: tuple[str, ...]
    public_prompt: Prompt
    source: str
    similarity: tuple[float, ...]
    share: float


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """What the models of quality and cost expect for one request: score, seconds, joules, utility."""

    quality: float
    latency: float
    energy: float
    utility: float


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The routes of a batch of requests, with the edge's compute share of each cluster.

    ``predictions`` are the framework's; a testbed replaces all but the quality by its own (``semct.forecast``).
    ``gap`` is how much a user's utility may fall short of the best on average, where the planner has proven that.
    ``caching`` says that the edge looks their first segments up in the framework's cache, and keeps them there;
    ``spared`` are the steps of requests, from the first, that earlier batches leave there.
    """

    clusters: tuple[Cluster, ...]
    routes: tuple[Route, ...]
    predictions: dict[str, Prediction] = {}
    gap: float | None = None
    caching: bool = False
    spared: dict[str, int] = {}

    def share(self, request: str) -> float:
        """The compute share of the request's cluster (1 where it belongs to none)."""
        return next((c.share for c in self.clusters if request in c.members), 1.0)


def merged(plans: Sequence[Plan]) -> Plan:
    """Several plans of one round as one; clusters over a cache that ride on the same public prompt become one.

    A cluster's share is then the latest plan's.
    """
    clusters: dict[Hashable, Cluster] = {}
    gaps = [p.gap for p in plans if p.gap is not None]
    for number, plan in enumerate(plans):
        for index, c in enumerate(plan.clusters):
            key: Hashable = c.public_prompt if plan.caching else (number, index)
            before = clusters.get(key)
            if before is not None:
                members, similarity = (*before.members, *c.members), (*before.similarity, *c.similarity)
                c = msgspec.structs.replace(before, members=members, similarity=similarity, share=c.share)  # noqa: PLW2901
            clusters[key] = c
    return Plan(
        clusters=tuple(clusters.values()),
        routes=tuple(r for p in plans for r in p.routes),
        predictions={request: found for p in plans for request, found in p.predictions.items()},
        gap=max(gaps) if gaps and len(gaps) == len(plans) else None,
        caching=any(p.caching for p in plans),
        spared={request: steps for p in plans for request, steps in p.spared.items()},
    )


def blend(prompts: Sequence[str]) -> Prompt:
    """The mean of prompts, each as often as it stands here; one and the same prompt is its own mean.

    Of more than ``MOST_BLENDED`` it takes that many, evenly spaced in alphabetical order.
    """
    ordered = sorted(prompts)
    if len(set(ordered)) == 1:
        return ordered[0]
    taken = min(len(ordered), MOST_BLENDED)
    return tuple(ordered[i * len(ordered) // taken] for i in range(taken))


def part(prompt: str, public: Prompt) -> float:
    """The part of a prompt in a blend, 0 to 1; nothing in one that is in words."""
    return public.count(prompt) / len(public) if isinstance(public, tuple) else 0.0


def wording(prompt: Prompt) -> str:
    """A prompt as people read it."""
    return prompt if isinstance(prompt, str) else f"mean of: {'; '.join(prompt)}"


def route(request: Request, *spans: tuple[str, str, Prompt, int]) -> Route:
    """A route from (node, model, prompt, steps) spans laid end to end; empty spans vanish, twins merge."""
    segments: list[Segment] = []
    position = 0
    for node, model, prompt, length in spans:
        if length == 0:
            continue
        last = segments[-1] if segments else None
        if last and (last.node, last.model, last.prompt) == (node, model, prompt):
            segments[-1] = msgspec.structs.replace(last, stop=position + length)
        else:
            stop = position + length
            segments.append(Segment(node=node, model=model, prompt=prompt, start=position, stop=stop))
        position += length
    return Route(request=request.id, seed=request.seed, steps=request.steps, segments=tuple(segments))


def steps_by_node(routes: Sequence[Route]) -> dict[str, int]:
    """Denoising steps that each node has to run, shared ones once."""
    return dict(Counter(node for node, *_ in {key for r in routes for key in steps_of(r)}))


def shared_steps(routes: Sequence[Route]) -> dict[str, int]:
    """How many steps of each request at least one other request shares."""
    riders = Counter(key for r in routes for key in steps_of(r))
    return {r.request: sum(riders[key] > 1 for key in steps_of(r)) for r in routes}


def own_steps(routes: Sequence[Route]) -> dict[str, dict[str, int]]:
    """How many steps of each request no other request shares, by node."""
    riders = Counter(key for r in routes for key in steps_of(r))
    return {r.request: dict(Counter(node for node, *_ in (k for k in steps_of(r) if riders[k] == 1))) for r in routes}


def steps_of(route: Route) -> Iterator[tuple[str, Hashable]]:
    """Each step with its node and all that its result depends on: equal keys are shared steps."""
    history: Hashable = (route.seed, route.steps)
    for s in route.segments:
        for step in range(s.start, s.stop):
            yield s.node, (history, s.model, s.prompt, step)
        history = (history, s.node, s.model, s.prompt, s.stop)
