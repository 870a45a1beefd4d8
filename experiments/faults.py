"""What a scenario may say of faults: which things break, when in a round, and for how long.

Time begins anew with every round and what is broken is mended at its end, so that all frameworks meet the same.
Random faults are drawn from the scenario's seed, anew for every repetition.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta

from broker.messages import Name
from netem.link import Duration, Probability

What = Literal["dies", "hangs", "outage", "loss", "broker-restarts"]
"""What can happen: a node is killed, and started anew after a while; a node stands still; nothing gets over a node's
link; some of the packets do not; the broker is stopped in order, and started again."""

ON_LINKS: frozenset[What] = frozenset({"outage", "loss"})
BROKER = "broker"

_TRIES = 100  # to find a time at which the thing is not broken already


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of what a scenario says of faults; a key that it does not know is an error."""


class Fault(Part, frozen=True, kw_only=True):
    """One fault, so many seconds after a round begins; without ``lasts`` it is mended when the round ends.

    ``loss`` is the part of packets that a lossy link loses, in both directions.
    """

    at: Duration
    what: What
    node: Name | None = None
    lasts: Duration | None = None
    loss: Probability = msgspec.field(default_factory=lambda: Probability("20%"))


class RandomFaults(Part, frozen=True, kw_only=True):
    """``count`` faults in each round, within so many seconds of its beginning, that last from the first to the second.

    ``what`` are the kinds to draw from, and ``nodes`` whom they may hit: by default all devices, edges and the cloud.
    """

    count: Annotated[int, Meta(ge=1, le=1000)]
    within: Duration
    lasts: tuple[Duration, Duration]
    what: Annotated[tuple[What, ...], Meta(min_length=1)] = get_args(What)
    nodes: tuple[Name, ...] = ()
    loss: Probability = msgspec.field(default_factory=lambda: Probability("20%"))


class Faults(Part, frozen=True, kw_only=True):
    """The faults of a scenario: ``script`` in every round at its times, and ``random`` ones."""

    script: tuple[Fault, ...] = ()
    random: RandomFaults | None = None

    def __bool__(self) -> bool:
        return bool(self.script) or self.random is not None

    @property
    def on_links(self) -> bool:
        """Whether any of them happens to a link."""
        return bool(self._kinds & ON_LINKS)

    @property
    def on_nodes(self) -> bool:
        """Whether any of them happens to a node or the broker, which not every place can break."""
        return bool(self._kinds - ON_LINKS)

    @property
    def _kinds(self) -> set[What]:
        return {fault.what for fault in self.script} | set(self.random.what if self.random else ())

    def problem(self, links: Mapping[str, bool]) -> str:
        """One sentence about what cannot be; ``links`` are the scenario's nodes, and whether each has a link."""
        for fault in self.script:
            wrong = _wrong(fault, links)
            if wrong:
                return f"the fault at {fault.at} cannot be: {wrong}"
        if self.random is not None:
            unknown = [node for node in self.random.nodes if node not in links]
            if unknown:
                return f"random faults cannot hit {unknown[0]!r}: there is {', '.join(links)}"
            least, most = self.random.lasts
            if least > most:
                return f"random faults last from {least} to {most}: the first must not be the longer"
            for what in self.random.what:
                if not _targets(what, self.random.nodes, links):
                    return f"random faults of the kind {what!r} hit nobody: none of their nodes has a link"
        return ""

    def drawn(self, links: Mapping[str, bool], seed: int, repetition: int) -> tuple[Fault, ...]:
        """The faults of a round in the order of their times; no two of them are drawn to break the same at once."""
        found = list(self.script)
        r = self.random
        if r is not None:
            chance = random.Random(f"{seed}/{repetition}/faults")  # noqa: S311  no secret
            for _ in range(r.count):
                for _ in range(_TRIES):
                    what = chance.choice(r.what)
                    node = chance.choice(_targets(what, r.nodes, links))
                    fault = Fault(
                        at=Duration(chance.uniform(0.0, r.within)),
                        what=what,
                        node=None if node == BROKER else node,
                        lasts=Duration(chance.uniform(*r.lasts)),
                        loss=r.loss,
                    )
                    if not any(_clash(fault, other) for other in found):
                        found.append(fault)
                        break
        return tuple(sorted(found, key=lambda fault: fault.at))


def _wrong(fault: Fault, links: Mapping[str, bool]) -> str:
    if fault.what == "broker-restarts":
        return "" if fault.node is None else f"{fault.what!r} happens to the broker, not to {fault.node!r}"
    if fault.node is None:
        return f"{fault.what!r} happens to a `node`: there is {', '.join(links)}"
    if fault.node not in links:
        return f"there is no node {fault.node!r}, but {', '.join(links)}"
    if fault.what in ON_LINKS and not links[fault.node]:
        return f"{fault.node!r} stands at the hub and has no link"
    return ""


def _targets(what: What, nodes: Sequence[str], links: Mapping[str, bool]) -> list[str]:
    if what == "broker-restarts":
        return [BROKER]
    return [node for node in nodes or links if links[node] or what not in ON_LINKS]


def _clash(one: Fault, other: Fault) -> bool:
    """Whether both break the same at the same time."""
    if one.node != other.node:
        return False
    first, second = sorted((one, other), key=lambda fault: fault.at)
    return first.lasts is None or second.at <= first.at + first.lasts
