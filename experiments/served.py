"""What one round left: its framework's plan and every message about its requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from broker.messages import Planned, Result, Spent
from semct.routes import Plan


@dataclass(kw_only=True)
class Served:
    """One round, filled while it goes on. ``prompts`` and ``devices`` are by request; so is all below.

    ``reasons`` say why a request has no result.
    """

    round: str
    framework: str
    repetition: int
    seed: int
    prompts: Mapping[str, str]
    devices: Mapping[str, str]
    planned: Planned | None = None
    results: dict[str, Result] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)
    spent: dict[str, Spent] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def plan(self) -> Plan | None:
        """The edge's plan, where it made one."""
        if self.planned is None or self.planned.error:
            return None
        return msgspec.msgpack.decode(self.planned.plan, type=Plan)

    @property
    def answered(self) -> set[str]:
        """The requests whose users have their picture."""
        return {r for r, result in self.results.items() if result.outcome == "answered"}

    @property
    def unanswered(self) -> dict[str, str]:
        """The requests whose users have none, and why."""
        failed = {r: result.reason for r, result in self.results.items() if result.outcome == "failed"}
        return {**failed, **self.reasons}
