"""Inference frameworks: each is a function from a batch of requests to a plan, in one file, found by name.

A file of this folder, or of an installed package, registers its function::

    @framework("my-framework")
    def plan(batch: Batch) -> Plan: ...

Another package announces the module in its entry points, group ``semct.frameworks``.
"""

from __future__ import annotations

import importlib
import pkgutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import entry_points

import msgspec
import numpy as np
from numpy.typing import NDArray

from semct.cache import LatentCache
from semct.clustering import Dendrogram, Number, Partition, best_silhouette, dendrogram
from semct.cost import Network, Weights
from semct.forecast import forecast
from semct.planner import online, tree, two_tier
from semct.planner.learned import Policy
from semct.planner.predict import predict
from semct.prompts import SentenceEncoder
from semct.public_prompt import MeanWriter, PublicPrompt, Writer, embed_prompts
from semct.quality import QualityModel
from semct.routes import Cluster, Plan, Request, Route

ENTRY_POINTS = "semct.frameworks"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a framework plans on: the requests of a round, the state of the network, and its tools.

    ``model`` is the diffusion model that every node holds, ``small_model`` the smaller one of the same latents
    (empty where there is none).
    ``clusters`` is the wanted number of clusters K, or how to find it, ``most_shared`` bounds a request's shared
    steps, ``seed`` drives every random choice, ``cache`` holds what earlier requests of this framework left on the
    edge, ``policy`` decides splits where the learned planner is wanted, ``seconds`` collects the wall time of each
    part of planning.
    """

    requests: tuple[Request, ...]
    network: Network
    weights: Weights
    quality: QualityModel
    encoder: SentenceEncoder
    writer: Writer
    model: str
    clusters: Number
    most_shared: int
    seed: int
    cache: LatentCache
    small_model: str = ""
    policy: Policy | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def prompts(self) -> list[str]:
        """The personal prompts, in the order of the requests."""
        return [r.prompt for r in self.requests]

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the wall time of the block to ``seconds[part]``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

    def embed(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors (n, d) of prompts, timed as ``embed``."""
        with self.timed("embed"):
            return self.encoder.embed(prompts)

    def cluster(self, vectors: NDArray[np.float32]) -> Partition:
        """As many clusters of similar meaning as are wanted, by the prompts' vectors (n, d); timed as ``cluster``."""
        with self.timed("cluster"):
            grown = dendrogram(vectors)
            if self.clusters == "silhouette":
                return grown.cut(best_silhouette(vectors, grown))
            if self.clusters == "utility":
                return grown.cut(self._best_number(vectors, grown))
            return grown.cut(self.clusters)

    def _best_number(self, vectors: NDArray[np.float32], grown: Dendrogram) -> int:
        """The number of clusters of highest predicted utility.

        Public prompts are not written yet: a cluster's similarity is that to the mean of its prompts where that is
        what the writer takes, and else that to the medoid.
        """
        prompts = tree.PromptTree(grown, self.prompts, vectors, words=not isinstance(self.writer, MeanWriter))
        price = tree.prices(
            self.requests,
            network=self.network,
            weights=self.weights,
            quality=self.quality,
            waiting=len(self.requests),
        )
        return tree.best_clusters(prompts, price, self.quality, self.most_shared)

    def write(self, writer: Writer, groups: Sequence[Sequence[int]]) -> list[PublicPrompt]:
        """The public prompt of each group of request indices, timed as ``write``."""
        with self.timed("write"):
            return writer.write([[self.requests[i].prompt for i in group] for group in groups], self.seed)

    def similarity(self, groups: Sequence[Sequence[int]], public: Sequence[PublicPrompt]) -> list[NDArray[np.float64]]:
        """The cosine (members,) of each member's prompt to its group's public prompt, group by group."""
        vectors = self.embed(self.prompts)
        with self.timed("embed"):
            targets = embed_prompts(self.encoder, [p.text for p in public])
        return [np.clip(vectors[list(g)] @ targets[m], -1, 1).astype(np.float64) for m, g in enumerate(groups)]

    def plan_online(self, *, foresee: bool) -> Plan:
        """Each request onto a running or cached prefix, or onto one of its own, timed as ``plan``; see ``online.plan``.

        With ``foresee`` a request may found a public prompt for later ones.
        """
        vectors = self.embed(self.prompts)
        with self.timed("plan"):
            return online.plan(
                self.requests,
                vectors,
                self.cache,
                model=self.model,
                network=self.network,
                weights=self.weights,
                quality=self.quality,
                most_shared=self.most_shared,
                foresee=foresee,
            )

    def plan(
        self,
        groups: Sequence[Sequence[int]],
        public: Sequence[PublicPrompt],
        *,
        similarity: Sequence[NDArray[np.float64]] | None = None,
        sharing: bool = True,
        uniform: bool = False,
    ) -> Plan:
        """The two-tier planner on these clusters and public prompts, timed as ``plan``.

        ``similarity`` is measured where it is not given; see ``two_tier.plan`` for the rest.
        """
        if similarity is None:
            similarity = self.similarity(groups, public)
        with self.timed("plan"):
            return two_tier.plan(
                self.requests,
                groups,
                public,
                similarity,
                model=self.model,
                network=self.network,
                weights=self.weights,
                quality=self.quality,
                most_shared=self.most_shared,
                sharing=sharing,
                uniform=uniform,
                policy=self.policy,
            )

    def forecast(self, plan: Plan, *, planning: float = 0.0) -> Plan:
        """The plan with what every request is expected to get from engines and links after so long a ``planning``."""
        predictions = forecast(
            plan,
            self.requests,
            network=self.network,
            weights=self.weights,
            quality=self.quality,
            planning=planning,
        )
        return msgspec.structs.replace(plan, predictions=predictions)

    def predicted(
        self, routes: Sequence[Route], quality: Mapping[str, float], clusters: Sequence[Cluster] = ()
    ) -> Plan:
        """The plan of any routes, with what is expected of them; ``quality`` is the content quality by request."""
        predictions = predict(
            self.requests,
            routes,
            clusters=clusters,
            quality=quality,
            alone=self.alone,
            network=self.network,
            weights=self.weights,
        )
        return Plan(clusters=tuple(clusters), routes=tuple(routes), predictions=predictions)

    @property
    def steps(self) -> int:
        """The number of steps T of the requests; raises ``ValueError`` where they differ."""
        (first, *others) = {r.steps for r in self.requests}
        if others:
            raise ValueError(f"the requests of one batch must have the same number of steps, not {first} and {others}")
        return first

    @property
    def alone(self) -> float:
        """The content quality of a picture that one node makes of the personal prompt."""
        return float(self.quality.quality(1.0, 0.0))


class Needs(msgspec.Struct, frozen=True, kw_only=True):
    """What a framework cannot do without, beside a planning edge and devices that hold the main model.

    ``edges`` are edge nodes, the planning one included; ``small``: the planning edge holds the small model, too.
    """

    edges: int = 1
    cloud: bool = False
    small: bool = False


Framework = Callable[[Batch], Plan]

_registered: dict[str, Framework] = {}
_online: set[str] = set()
_needs: dict[str, Needs] = {}


class UnknownFramework(ValueError):
    """No framework of that name is here or in an installed package."""


class UnmetNeed(ValueError):
    """A framework needs a node or a model that the testbed does not have."""


def framework(name: str, *, needs: Needs | None = None, online: bool = False) -> Callable[[Framework], Framework]:
    """Register a planning function under a name, with what it needs; ``ValueError`` where the name is taken.

    One that is ``online`` plans requests as they come, whoever is there, instead of a batch of them.
    """

    def register(function: Framework) -> Framework:
        taken = _registered.get(name)
        if taken is not None and taken.__module__ != function.__module__:
            raise ValueError(f"framework {name!r} of {function.__module__} is already in {taken.__module__}")
        _registered[name] = function
        _needs[name] = needs or Needs()
        if online:
            _online.add(name)
        return function

    return register


def names() -> list[str]:
    """The names of all frameworks, those of installed packages too."""
    _discover()
    return sorted(_registered)


def is_online(name: str) -> bool:
    """Whether the framework of that name plans requests as they come; raises ``UnknownFramework``."""
    load(name)
    return name in _online


def load(name: str) -> Framework:
    """The framework of that name; raises ``UnknownFramework``."""
    if name not in _registered:
        _discover()
    if name not in _registered:
        raise UnknownFramework(f"framework {name!r} is not known; there is {', '.join(sorted(_registered))}")
    return _registered[name]


def check_needs(name: str, *, edges: int, clouds: int, small: bool) -> None:
    """Raise ``UnmetNeed`` unless the framework can serve a testbed with so many edge and cloud nodes.

    ``small`` says whether the planning edge holds the small model. Raises ``UnknownFramework``, too.
    """
    load(name)
    needs = _needs.get(name, Needs())
    if needs.cloud and not clouds:
        raise UnmetNeed(f"framework {name!r} needs a cloud node: give the scenario a `cloud:` part")
    if edges < needs.edges:
        raise UnmetNeed(
            f"framework {name!r} needs {needs.edges} edge nodes and there is {edges}: add some under `edges:`"
        )
    if needs.small and not small:
        raise UnmetNeed(
            f"framework {name!r} needs the small model on the edge: name it under `edge: {{models: [...]}}`, "
            f"as `small_model` does"
        )


def _discover() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    for entry in entry_points(group=ENTRY_POINTS):
        entry.load()
