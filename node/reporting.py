"""Lets those who watch a run see how far its requests have come."""

from __future__ import annotations

import time
from collections.abc import Mapping

from broker.messages import Progress, Watch
from broker.session import Session


class Reporter:
    """Says how far requests have come on a node, as often as the runner asked for; nothing while nobody watches."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._every = 0.0
        self._due = 0.0
        self._left: dict[str, int] = {}

    @property
    def is_watched(self) -> bool:
        """Whether anybody wants to know."""
        return self._every > 0

    def watch(self, order: Watch) -> None:
        """Report so often from now on."""
        self._every = order.every

    def report(self, under_way: Mapping[str, int], left: Mapping[str, int]) -> None:
        """The steps that requests have behind them, of those still here and of those that have just left."""
        self._left |= left
        now = time.monotonic()
        if now < self._due:
            return
        name = self._session.name
        news = Progress(node=name, requests={**self._left, **under_way})
        self._session.mention(self._session.topics.own(name, "progress"), news)
        self._due = now + self._every
        self._left.clear()
