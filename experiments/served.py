"""What one round left: its framework's plan and every message about its requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import msgspec

from broker.messages import Planned, Result, Spent
from semct.routes import Plan, merged, own_steps, shared_steps


@dataclass(kw_only=True)
class Served:
    """One round, filled while it goes on. ``prompts`` and ``devices`` are by request; so is all below.

    ``reasons`` say why a request has no result; ``planned`` is by when planning began.
    """

    round: str
    framework: str
    repetition: int
    seed: int
    prompts: Mapping[str, str]
    devices: Mapping[str, str]
    planned: dict[float, Planned] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)
    spent: dict[str, Spent] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    @cached_property
    def plan(self) -> Plan | None:
        """The edge's plan, where it made one: all of them as one, if it planned more than once."""
        return merged(self._plans) if self._plans else None

    @cached_property
    def _plans(self) -> list[Plan]:
        return [msgspec.msgpack.decode(p.plan, type=Plan) for p in self.planned.values() if not p.error]

    @cached_property
    def shared_steps(self) -> dict[str, int]:
        """How many steps of each planned request another one shares; only over a cache one of another batch does."""
        return {request: steps for p in self._batches for request, steps in shared_steps(p.routes).items()}

    @cached_property
    def own_steps(self) -> dict[str, dict[str, int]]:
        """How many steps of each planned request no other one shares, by node."""
        return {request: steps for p in self._batches for request, steps in own_steps(p.routes).items()}

    @property
    def _batches(self) -> list[Plan]:
        """The plans within which requests share steps."""
        return [merged(self._plans)] if any(p.caching for p in self._plans) else self._plans

    @property
    def seconds(self) -> dict[str, float]:
        """The wall seconds of each part of planning, in all."""
        parts = [(name, seconds) for p in self.planned.values() for name, seconds in p.seconds.items()]
        return {name: sum(s for n, s in parts if n == name) for name, _ in parts}

    @property
    def answered(self) -> set[str]:
        """The requests whose users have their picture, degraded or not."""
        return {r for r, result in self.results.items() if result.outcome != "failed"}

    @property
    def unanswered(self) -> dict[str, str]:
        """The requests whose users have none, and why."""
        failed = {r: result.reason for r, result in self.results.items() if result.outcome == "failed"}
        return {**failed, **self.reasons}
