"""What time it is on every node: how far their clocks are ahead of the runner's, and how sure that is.

As NTP does it: the runner sends a ping at t1, the node gets it at t2 and answers at t3, and the answer is here at t4.
The node is ahead by ((t2 - t1) + (t3 - t4)) / 2, give or take half the round trip (t4 - t1) - (t3 - t2), which is the
error if one way took all of it. Of several pings the one with the shortest round trip counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import msgspec

from broker.messages import Pong, Result, Spent, Stage

PINGS = 5
"""How often a node is asked before each round."""

PATIENCE = 2.0
"""Seconds for the answers to one ping."""


class Offset(msgspec.Struct, frozen=True):
    """Seconds that a node's clock is ahead of the runner's, and how far that may be off."""

    ahead: float
    uncertainty: float

    @property
    def applied(self) -> float:
        """What its times are corrected by: nothing, where it may as well be none."""
        return self.ahead if abs(self.ahead) > self.uncertainty else 0.0


class Clocks:
    """The nodes' clocks in one round."""

    def __init__(self) -> None:
        self._offsets: dict[str, Offset] = {}
        self._answers: dict[str, int] = {}

    @property
    def offsets(self) -> Mapping[str, Offset]:
        """What is known of each node's clock."""
        return MappingProxyType(self._offsets)

    def forget(self) -> None:
        """A new round begins: clocks drift."""
        self._offsets.clear()
        self._answers.clear()

    def heard(self, pong: Pong, received: float) -> None:
        """Take in a node's answer, which came at a time of the runner's clock."""
        self._answers[pong.node] = self._answers.get(pong.node, 0) + 1
        uncertainty = ((received - pong.sent) - (pong.replied - pong.received)) / 2
        if uncertainty < 0:  # a clock was set meanwhile, or the answer is made up
            return
        best = self._offsets.get(pong.node)
        if best is None or uncertainty < best.uncertainty:
            ahead = ((pong.received - pong.sent) + (pong.replied - received)) / 2
            self._offsets[pong.node] = Offset(ahead, uncertainty)

    def answers(self, node: str) -> int:
        """How many answers a node has given in this round."""
        return self._answers.get(node, 0)

    def ahead(self, node: str) -> float:
        """What a node's times are corrected by."""
        offset = self._offsets.get(node)
        return 0.0 if offset is None else offset.applied

    def on_runners_clock(self, spent: Spent) -> Spent:
        """A report with the times of its calls by the runner's clock."""
        ahead = self.ahead(spent.node)
        calls = (
            msgspec.structs.replace(call, start=max(0.0, call.start - ahead), stop=max(0.0, call.stop - ahead))
            for call in spent.calls
        )
        return msgspec.structs.replace(spent, calls=tuple(calls)) if ahead else spent

    def corrected(self, result: Result) -> Result:
        """A result with all its times by the runner's clock; no stretch of time is negative."""
        device = self.ahead(result.device)
        return msgspec.structs.replace(
            result,
            asked=max(0.0, result.asked - device),
            finished=max(0.0, result.finished - device),
            stages=tuple(self._corrected(stage, result.device) for stage in result.stages),
        )

    def _corrected(self, stage: Stage, device: str) -> Stage:
        ends_at = (stage.to or device) if stage.name == "transfer" else stage.node
        start = max(0.0, stage.start - self.ahead(stage.node))
        return msgspec.structs.replace(stage, start=start, stop=max(start, stage.stop - self.ahead(ends_at)))
