"""A bounded cache of intermediate latents: what earlier requests' shared steps left, for later ones to start from.

A *prefix* is the run from the noise of a seed with one prompt; the cache keeps its latent at every few steps. The
planner notes a prefix when it plans one, together with the prompt's embedding, so that a later request may already
count on steps that are still running; the engine fills in the latents as it makes them and finds those that are there.
Whatever was evicted in between, the engine computes again.

Eviction policies, each for single latents: ``lru`` drops the least recently used one, ``lfu`` the least often used one,
``lcbfu`` the one with the least uses times steps saved (NIRVANA, NSDI 2024), ``gain`` that with the least uses times
steps saved per byte and age.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray
from torch import Tensor

from semct.routes import Prompt

Policy = Literal["lru", "lfu", "lcbfu", "gain"]

STRIDE = 4
"""A prefix's latent is kept at every so many steps, as at every tenth of its steps in NIRVANA."""


_RECENT = 256  # prompts


class CacheSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How large the cache is, what it drops, and how long it lasts.

    A cache belongs to one framework; it lasts a ``round``, or the whole ``run``, so that later repetitions find
    what earlier ones left.
    """

    megabytes: Annotated[float, Meta(gt=0)] = 256.0
    policy: Policy = "gain"
    lasts: Literal["round", "run"] = "round"


class Prefix(msgspec.Struct, frozen=True, kw_only=True):
    """The first steps of a trajectory of ``steps`` in all, from the noise of ``seed`` with one model and prompt."""

    seed: int
    steps: int
    model: str
    prompt: Prompt


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """What a cache did: requests that started from a prefix and those that did not, steps saved, latents dropped.

    ``bytes`` are those of the latents that it holds now, at the size that they have on the wire.
    """

    hits: int = 0
    misses: int = 0
    steps_saved: int = 0
    evictions: int = 0
    bytes: int = 0


@dataclass(eq=False)
class _Latent:
    step: int
    value: Tensor
    uses: int
    used: int  # the cache's clock: it ticks with every use


@dataclass(eq=False)
class _Entry:
    vector: NDArray[np.float32]
    running: dict[int, int] = field(default_factory=dict)  # by step: requests that will take the prefix there
    latents: dict[int, _Latent] = field(default_factory=dict)
    fresh: NDArray[np.int64] | None = None  # what ``fresh_steps`` says, until something changes

    def count_fresh(self, steps: int) -> NDArray[np.int64]:
        if self.fresh is None:
            at, reach = np.arange(steps + 1), max(self.running, default=0)
            held = np.array([0, *self.latents])
            nearest = np.where(held[None, :] <= at[:, None], held[None, :], 0).max(axis=1)
            self.fresh = at - np.maximum(nearest, np.minimum(at, reach))
        return self.fresh


class LatentCache:
    """Latents of prefixes, at most ``settings.megabytes`` of them, each counted as ``latent_bytes``. Thread-safe.

    ``recent`` are the latest prompts with their unit vectors: what is asked for, as far as the edge can tell.
    """

    def __init__(self, settings: CacheSettings, *, latent_bytes: int) -> None:
        self._most = int(settings.megabytes * 1e6 // latent_bytes)
        self._latent_bytes = latent_bytes
        self._policy = settings.policy
        self._entries: dict[Prefix, _Entry] = {}
        self._clock = 0
        self._active = 0
        self._counts = Counts()
        self._lock = threading.RLock()
        self.recent: deque[tuple[str, NDArray[np.float32]]] = deque(maxlen=_RECENT)

    @property
    def counts(self) -> Counts:
        """What it has done since it was made, or last reported."""
        with self._lock:
            return msgspec.structs.replace(self._counts, bytes=self._held() * self._latent_bytes)

    def report(self) -> Counts:
        """What it has done since the last report."""
        with self._lock:
            counts, self._counts = self.counts, Counts()
            return counts

    @property
    def active(self) -> int:
        """How many requests are under way on the node, on a prefix or behind it."""
        with self._lock:
            return self._active

    def begin(self) -> None:
        """Note that the node has got one more request to work on."""
        with self._lock:
            self._active += 1

    def end(self) -> None:
        """Note that the node is through with a request."""
        with self._lock:
            self._active -= 1

    def prefixes(self, steps: int, model: str) -> tuple[list[Prefix], NDArray[np.float32]]:
        """The known prefixes of such trajectories, and their prompts' unit vectors (n, d)."""
        with self._lock:
            found = {p: e.vector for p, e in self._entries.items() if (p.steps, p.model) == (steps, model)}
        return list(found), np.stack(list(found.values())) if found else np.empty((0, 0), np.float32)

    def fresh_steps(self, prefix: Prefix) -> NDArray[np.int64]:
        """How many steps (T + 1,) the node still has to run for the prefix's latent at each step."""
        with self._lock:
            entry = self._entries.get(prefix)
            return np.arange(prefix.steps + 1) if entry is None else entry.count_fresh(prefix.steps)

    def plan(self, prefix: Prefix, vector: NDArray[np.float32], step: int) -> None:
        """Note that a request will take the prefix's latent at this step; what is there or coming counts as a hit."""
        with self._lock:
            self._clock += 1
            fresh = int(self.fresh_steps(prefix)[step])
            hit = fresh < step
            c = self._counts
            self._counts = msgspec.structs.replace(
                c, hits=c.hits + hit, misses=c.misses + (not hit), steps_saved=c.steps_saved + step - fresh
            )
            entry = self._entries.setdefault(prefix, _Entry(vector))
            entry.running[step] = entry.running.get(step, 0) + 1
            entry.fresh = None
            below = [s for s in entry.latents if s <= step]
            if below:
                latent = entry.latents[max(below)]
                latent.uses += 1
                latent.used = self._clock

    def miss(self) -> None:
        """Note that a request starts from no prefix at all."""
        with self._lock:
            self._counts = msgspec.structs.replace(self._counts, misses=self._counts.misses + 1)

    def find(self, prefix: Prefix, stop: int) -> tuple[int, Tensor] | None:
        """The prefix's latest latent up to a step, with its step."""
        with self._lock:
            entry = self._entries.get(prefix)
            steps = [s for s in entry.latents if s <= stop] if entry else []
            return (max(steps), entry.latents[max(steps)].value) if entry and steps else None

    def keep(self, prefix: Prefix, step: int, latent: Tensor) -> None:
        """Take in a latent of a noted prefix, if it is one of the steps that are kept; drop what is too much."""
        with self._lock:
            entry = self._entries.get(prefix)
            if entry is None or step % STRIDE or step in entry.latents:
                return
            self._clock += 1
            entry.latents[step] = _Latent(step, latent, uses=1, used=self._clock)
            entry.fresh = None
            while self._held() > self._most:
                self._evict()

    def reached(self, prefix: Prefix, step: int) -> None:
        """Note that a request has taken the prefix's latent at this step: nobody may count on it any longer."""
        with self._lock:
            entry = self._entries.get(prefix)
            if entry is None:
                return
            entry.fresh = None
            left = entry.running.pop(step, 0) - 1
            if left > 0:
                entry.running[step] = left
            self._forget(prefix)

    def _held(self) -> int:
        return sum(len(e.latents) for e in self._entries.values())

    def _evict(self) -> None:
        """Drop the latent that the policy values least; of equals the one unused for longest."""
        value = self._value()
        latents = [(prefix, latent) for prefix, e in self._entries.items() for latent in e.latents.values()]
        prefix, worst = min(latents, key=lambda pair: (value(pair[1]), pair[1].used, pair[1].step))
        del self._entries[prefix].latents[worst.step]
        self._entries[prefix].fresh = None
        self._counts = msgspec.structs.replace(self._counts, evictions=self._counts.evictions + 1)
        self._forget(prefix)

    def _value(self) -> Callable[[_Latent], float]:
        match self._policy:
            case "lru":
                return lambda latent: latent.used
            case "lfu":
                return lambda latent: latent.uses
            case "lcbfu":
                return lambda latent: latent.uses * latent.step
            case "gain":
                return lambda latent: latent.uses * latent.step / (self._latent_bytes * (1 + self._clock - latent.used))

    def _forget(self, prefix: Prefix) -> None:
        """Forget a prefix of which nothing is left."""
        entry = self._entries[prefix]
        if not entry.latents and not entry.running:
            del self._entries[prefix]
