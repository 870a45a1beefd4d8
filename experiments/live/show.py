"""Publishes the scene of a run for its viewers, and has the nodes tell how far they are while there are any."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import msgspec

from broker.messages import AnyMessage, Birth, MalformedMessage, View, Watch
from broker.session import BrokerRefused, Session, Undelivered
from experiments.links import LinkControl
from experiments.live.gate import Gate
from experiments.live.scene import Scene
from experiments.record import RunFolder
from experiments.scenario import Scenario
from experiments.served import Served
from netem.course import Setting, walk
from semct.runs import RequestRow

_PACE = 0.2  # seconds between two looks at what has changed, while somebody watches
_IDLE = 2.0  # seconds between them else: who comes late finds nothing older
_PROGRESS = 0.2  # seconds between two reports of a node's progress
_PATIENCE = 5.0  # seconds for the last word

_logger = logging.getLogger(__name__)


class Show:
    """A run as its viewers see it, while the ``async with`` block lasts. Whatever goes wrong in here ends no run.

    ``settings`` are those of the nodes' links, devices first; ``beside`` is the folder of the scenario file.
    """

    def __init__(
        self,
        gate: Gate,
        scenario: Scenario,
        folder: RunFolder,
        control: LinkControl,
        session: Session,
        *,
        settings: Mapping[str, Setting],
        beside: Path,
    ) -> None:
        self._gate = gate
        self._session = session
        self._run = folder.path.name
        self._sent: dict[str, bytes] = {}
        self._devices = list(settings)
        self._order = Watch(every=0.0)
        self._nodes: set[str] = set()
        self._fresh: set[str] = set()
        self._scene = Scene(
            scenario,
            info=lambda: folder.info,
            links=control.now,
            walks=lambda seed: {n: walk(s, i, seed, beside) for i, (n, s) in enumerate(settings.items(), 1)},
        )
        folder.read_along(partial(self._take_in, self._scene.event))

    async def __aenter__(self) -> Self:
        self._showing = asyncio.create_task(self._keep_showing(), name="live page")
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._showing.cancel()
        await asyncio.wait({self._showing})
        if kind is None:
            self._scene.end("finished", "")
        else:
            stopped = issubclass(kind, asyncio.CancelledError | KeyboardInterrupt)
            self._scene.end("interrupted" if stopped else "failed", "" if stopped else str(error))
        try:
            async with asyncio.timeout(_PATIENCE):
                await self._publish()
        except Exception:
            _logger.exception("the live page was not told of the end of the run")

    def began(self, served: Served) -> None:
        """A round begins."""
        self._take_in(self._scene.began, served)

    def heard(self, message: AnyMessage) -> None:
        """A node has said something."""
        self._take_in(self._scene.message, message)
        if isinstance(message, Birth) and message.state == "ready":
            self._nodes.add(message.name)
            self._fresh.add(message.name)

    def rate(self, rated: Callable[[Sequence[RequestRow]], Sequence[RequestRow]]) -> None:
        """How rows get their utility."""
        self._scene.rated = rated

    async def _keep_showing(self) -> None:
        while True:
            self._gate.changed.clear()
            try:
                await self._have_watched()
                await self._publish()
            except (Undelivered, BrokerRefused) as error:
                _logger.warning("the live page is behind: %s", error)
            except Exception:
                _logger.exception("the live page lacks a part")
            await asyncio.sleep(_PACE)
            if not self._gate.viewers:
                try:
                    async with asyncio.timeout(_IDLE):
                        await self._gate.changed.wait()
                except TimeoutError:
                    continue

    @staticmethod
    def _take_in(take: Callable[..., None], *news: Any) -> None:
        try:
            take(*news)
        except Exception:  # a run does not end because it cannot be watched
            _logger.exception("the live page missed something")

    async def _have_watched(self) -> None:
        """Tell nodes whether anybody watches, where they do not know."""
        order = Watch(every=_PROGRESS if self._gate.viewers else 0.0)
        tell, self._fresh = (self._nodes if order != self._order else self._fresh), set()
        if order.every or order != self._order:
            for node in sorted(tell):
                self._session.mention(self._session.topics.inbox(node, "control"), order)
        self._order = order

    async def _publish(self) -> None:
        """Publish what has changed, the run itself last: who sees its end has seen all."""
        for part in sorted(self._scene.changed, key=lambda part: (part == "run", part)):
            self._scene.changed.discard(part)
            content = msgspec.msgpack.encode(self._scene.take(part))
            if self._sent.get(part) == content:
                continue
            name = part if part not in self._devices else f"of-{self._devices.index(part) + 1}"
            view = View(run=self._run, content=msgspec.Raw(content))
            try:
                await self._session.publish(self._session.topics.view(self._session.name, name), view, retain=True)
            except MalformedMessage as error:
                _logger.warning("the live page lacks %s: %s", name, error)
            except BaseException:  # whoever publishes next begins with it
                self._scene.changed.add(part)
                raise
            self._sent[part] = content
