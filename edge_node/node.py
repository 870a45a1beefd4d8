"""One edge or cloud node: run segments and pass latents on; the planning one collects requests and plans, too."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from broker.messages import Birth, Close, Planned, Request, Round, Segment, Stage, Work
from broker.session import Incoming, Session
from broker.topics import Topics
from edge_node.planning import Departure, Planner
from node.service import service
from node.serving import Deliveries, deliver
from node.settings import NodeSettings
from node.worker import Worker, received
from semct import frameworks
from semct.cache import CacheSettings, LatentCache
from semct.clustering import Number
from semct.cost import Weights
from semct.planner.learned import Tier
from semct.routes import Plan, Route

_MOST_ROUNDS = 64  # open at once; the oldest is closed for one more, or a flood would fill the memory

_logger = logging.getLogger(__name__)


class EdgeSettings(NodeSettings, frozen=True, kw_only=True):
    """The settings of an edge or cloud node: how it plans, beside how it computes.

    One edge of a testbed ``plans``; to the others, what follows means nothing. ``quality`` names the curves to
    plan with, ``writer`` who words public prompts, ``small_model`` the second size that frameworks may use;
    ``links`` are those of all nodes that do not stand at the hub.
    """

    kind: Literal["edge", "cloud"] = "edge"
    plans: bool = True
    small_model: str = "embedded-small"
    clusters: Number = 3
    most_shared: int = 13
    tier: Tier = "exact"
    weights: Weights = Weights()
    quality: str = "embedded"
    writer: str = "smollm2"
    cache: CacheSettings = CacheSettings()


@dataclass(eq=False)
class _Gathering:
    """A round: its requests that wait for their plan, those that have come and of whom, and devices lost meanwhile.

    ``departures`` are the batches that were planned and sent on their way.
    """

    order: Round
    waiting: dict[str, Incoming] = field(default_factory=dict)
    came: dict[str, str] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    answering: asyncio.Task[None] | None = None
    departures: list[Departure] = field(default_factory=list)

    @property
    def missing(self) -> int:
        """Requests that are still to come: not those of devices that were lost before they asked."""
        return self.order.requests - len(self.came) - len(self.lost.difference(self.came.values()))

    def take(self, request: Request, incoming: Incoming) -> None:
        """A request has come, or come back."""
        self.waiting[request.request] = incoming
        self.came[request.request] = request.reply
        self.news.set()

    async def batch(self, *, online: bool) -> dict[str, Incoming]:
        """The next requests to plan: all of the round, or those of a window; ``online``, whoever is there."""
        while not self.waiting:
            await self._more()
        if not online:
            try:
                async with asyncio.timeout(self.order.window):
                    while self.missing > 0:
                        await self._more()
            except TimeoutError:
                _logger.info("round %s: %d requests did not come in time", self.order.round, self.missing)
        batch, self.waiting = self.waiting, {}
        return batch

    async def _more(self) -> None:
        self.news.clear()
        await self.news.wait()


class EdgeNode:
    """Serves one cell until the runner closes the testbed. Without a ``planner`` it takes work but no requests."""

    def __init__(self, settings: EdgeSettings, worker: Worker, planner: Planner | None) -> None:
        self._settings = settings
        self._worker = worker
        self._plans = planner
        self._gatherings: dict[str, _Gathering] = {}
        self._under_way: set[tuple[str, str]] = set()
        self._holders: dict[str, tuple[str, ...]] = {}
        self._deliveries = Deliveries()

    async def run(self) -> bool:
        """Connect and serve; returns when told to leave, and whether the testbed ends."""
        topics, plans = Topics(self._settings.testbed), self._plans is not None
        also = (topics.every("birth"), *((topics.every("request"),) if plans else ()))
        async with service(self._settings, self._worker, role=self._settings.kind, also=also) as bus:
            async for incoming in bus.messages():
                match incoming.message:
                    case Birth() as other if other.name == incoming.topic.node:
                        self._meet(other)
                    case Round() as order if plans:
                        self._open(order)
                    case Request() as request if plans:
                        self._gather(bus.session, bus.tasks, request, incoming)
                    case Work() as work if self._deliveries.is_first_work(work):
                        bus.tasks.create_task(self._take(bus.session, work, incoming))
                    case Close(round=str() as round_id) if self._deliveries.is_first("close", round_id):
                        bus.tasks.create_task(self._report(bus.session, round_id, self._close(round_id)))
        return bus.ends

    def _open(self, order: Round) -> None:
        """Take requests of this round from now on; the order may come again."""
        self._gatherings.setdefault(order.round, _Gathering(order))
        while len(self._gatherings) > _MOST_ROUNDS:
            self._close(next(iter(self._gatherings)))

    def _close(self, round_id: str) -> _Gathering | None:
        """Take no more requests of this round, and return what came of it if it was open."""
        gathering = self._gatherings.pop(round_id, None)
        if gathering is None:
            return None
        if gathering.answering is not None:
            gathering.answering.cancel()
        self._under_way = {key for key in self._under_way if key[0] != round_id}
        return gathering

    async def _report(self, session: Session, round_id: str, over: _Gathering | None) -> None:
        """Tell what a round has taken; before that, what was to be expected of batches that met each other."""
        spent = self._worker.spent(round_id)
        if over is not None:
            spent = msgspec.structs.replace(spent, cache=self._planner.cache_report(over.order))
            if len(over.departures) > 1:
                await self._foretell(session, over.order, over.departures)
        await deliver(session, session.topics.own(self._settings.name, "spent"), spent)

    async def _foretell(self, session: Session, order: Round, departures: Sequence[Departure]) -> None:
        """Tell the plans of a round again: when each was made, nobody knew what would come after it."""
        try:
            plans = await asyncio.to_thread(self._planner.replay, order, departures, slowdown=self._settings.slowdown)
        except Exception:  # the round is over all the same
            _logger.exception("round %s: the plans of %s cannot be replayed", order.round, order.framework)
            return
        for departure, plan in zip(departures, plans, strict=True):
            await self._tell(session, order, departure, plan)

    def _meet(self, birth: Birth) -> None:
        for gathering in self._gatherings.values():
            if birth.state == "ready":
                gathering.lost.discard(birth.name)
            elif birth.name in self._holders:
                gathering.lost.add(birth.name)
                gathering.news.set()
        if birth.state != "ready" or birth.name == self._settings.name or (birth.models and birth.compute is None):
            return
        self._holders[birth.name] = birth.models
        if self._plans is not None:
            self._plans.meet(birth.name, birth.role, birth.compute)

    @property
    def _planner(self) -> Planner:
        assert self._plans is not None  # noqa: S101  who does not plan takes neither rounds nor requests
        return self._plans

    def _gather(self, session: Session, tasks: asyncio.TaskGroup, request: Request, incoming: Incoming) -> None:
        gathering = self._gatherings.get(request.round)
        if gathering is None:
            _logger.warning("request %s belongs to no open round (%s): ignored", request.request, request.round)
            return
        if not self._deliveries.is_first("request", request.round, request.request, request.attempt):
            return
        key = (request.round, request.request)
        if key in self._under_way:  # who asks again will have the answer to the first time
            return
        if request.request not in gathering.came and len(gathering.came) >= gathering.order.requests:
            _logger.warning("request %s is one more than round %s has: ignored", request.request, request.round)
            return
        self._under_way.add(key)
        if gathering.answering is None:
            gathering.answering = tasks.create_task(self._answer(session, tasks, gathering))
        gathering.take(request, incoming)

    async def _answer(self, session: Session, tasks: asyncio.TaskGroup, gathering: _Gathering) -> None:
        """Plan the round's requests batch by batch, and send every one on its way, until the round is closed."""
        online = self._is_online(gathering.order)
        for number in itertools.count():
            batch = await gathering.batch(online=online)
            await self._serve_batch(session, tasks, gathering, batch, number)

    @staticmethod
    def _is_online(order: Round) -> bool:
        try:
            return frameworks.is_online(order.framework)
        except frameworks.UnknownFramework:
            return False  # planning will say so

    async def _serve_batch(
        self, session: Session, tasks: asyncio.TaskGroup, gathering: _Gathering, batch: dict[str, Incoming], number: int
    ) -> None:
        """Plan the ``number``-th batch of a round, and send every request on its way."""
        await asyncio.sleep(0)  # the worker takes in what was planned last
        planning, order, backlog = time.time(), gathering.order, self._worker.backlog
        messages = [i.message for i in batch.values() if isinstance(i.message, Request)]
        topic = session.topics.own(self._settings.name, "planned")
        try:
            plan, seconds = await asyncio.to_thread(self._planner.plan, order, messages, backlog=backlog)
            legs = {route.request: _legs(route) for route in plan.routes}
        except Exception as error:
            _logger.exception("round %s cannot be planned", order.round)
            reason = f"{order.framework} could not plan: {error}"
            blank = Planned(
                round=order.round,
                framework=order.framework,
                plan=_packed(None),
                seconds={},
                began=planning,
                error=reason,
            )
            await deliver(session, topic, blank)
            for request in messages:
                failed = self._work(request, batch[request.request], (), planning)
                tasks.create_task(self._pass_on(session, msgspec.structs.replace(failed, failure=reason)))
            return
        departure = Departure(
            asked=messages,
            received={request: incoming.received for request, incoming in batch.items()},
            plan=plan,
            began=planning,
            seconds=time.time() - planning,
            parts=seconds,
            backlog=backlog,
        )
        gathering.departures.append(departure)
        tasks.create_task(self._announce(session, order, departure))
        for route in plan.routes:
            incoming = batch[route.request]
            assert isinstance(incoming.message, Request)  # noqa: S101  only requests are gathered
            work = self._work(incoming.message, incoming, legs[route.request], planning)
            work = msgspec.structs.replace(work, seed=route.seed, steps=route.steps)
            cluster = next((i for i, c in enumerate(plan.clusters) if route.request in c.members), None)
            weight, cache = plan.share(route.request), self._planner.cache(order) if plan.caching else None
            group = (order.round, number, cluster)
            tasks.create_task(self._serve(session, work, group=group, weight=weight, cache=cache))

    async def _announce(self, session: Session, order: Round, departure: Departure) -> None:
        """Tell a plan with what is expected of it, now that the seconds of planning are known."""
        plan = departure.plan
        try:
            plan = await asyncio.to_thread(
                self._planner.forecast,
                order,
                departure.asked,
                plan,
                planning=departure.seconds,
                backlog=departure.backlog,
            )
        except Exception:  # the requests are served all the same
            _logger.exception("round %s: the plan of %s cannot be forecast", order.round, order.framework)
        await self._tell(session, order, departure, plan)

    async def _tell(self, session: Session, order: Round, departure: Departure, plan: Plan) -> None:
        planned = Planned(
            round=order.round,
            framework=order.framework,
            plan=_packed(plan),
            seconds=departure.parts,
            began=departure.began,
        )
        await deliver(session, session.topics.own(self._settings.name, "planned"), planned)

    def _work(
        self,
        request: Request,
        incoming: Incoming,
        legs: tuple[Segment, ...],
        planning: float,
    ) -> Work:
        """The work of a request whose planning began at ``planning`` and has just ended."""
        now = time.time()
        name = self._settings.name
        stages = (
            Stage(
                name="transfer",
                node=request.reply,
                to=name,
                start=request.sent,
                stop=incoming.received,
                size=incoming.size,
            ),
            Stage(name="collect", node=name, start=incoming.received, stop=planning),
            Stage(name="plan", node=name, start=planning, stop=now),
        )
        return Work(
            round=request.round,
            request=request.request,
            reply=request.reply,
            seed=request.seed,
            steps=request.steps,
            route=legs,
            stages=stages,
            sent=now,
            deadline=request.deadline,
        )

    async def _serve(
        self, session: Session, work: Work, *, group: object, weight: float, cache: LatentCache | None = None
    ) -> None:
        try:
            if time.time() > work.deadline:
                raise ValueError(f"the deadline passed before {self._settings.name} began")
            work = await self._worker.carry(work, group=group, weight=weight, cache=cache)
            if not work.route and not self._holders.get(work.reply):  # the device holds no decoder either
                work = await self._worker.decode(work)
        except ValueError as error:
            await self._give_up(session, work, error)
            return
        await self._pass_on(session, work)

    async def _take(self, session: Session, work: Work, incoming: Incoming) -> None:
        """Serve what another node passed on."""
        try:
            arrived = received(work, incoming, self._settings.name)
        except ValueError as error:
            await self._give_up(session, work, error)
            return
        await self._serve(session, arrived, group=work.request, weight=1.0)

    async def _give_up(self, session: Session, work: Work, error: ValueError) -> None:
        _logger.warning("request %s failed: %s", work.request, error)
        await self._pass_on(session, msgspec.structs.replace(work, route=(), latent=None, failure=str(error)))

    async def _pass_on(self, session: Session, work: Work) -> None:
        receiver = work.route[0].node if work.route else work.reply
        leaving = msgspec.structs.replace(work, sender=self._settings.name, sent=time.time())
        await deliver(session, session.topics.inbox(receiver, "work"), leaving)
        self._under_way.discard((work.round, work.request))


def _legs(route: Route) -> tuple[Segment, ...]:
    return tuple(msgspec.convert(s, Segment, from_attributes=True) for s in route.segments)


def _packed(plan: Plan | None) -> msgspec.Raw:
    return msgspec.Raw(msgspec.msgpack.encode(plan))
