"""Runs a scenario: brings a testbed up, lets every framework serve the same users, and keeps what they got."""

from __future__ import annotations

import asyncio
import functools
import random
import signal
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import msgspec

from broker.address import Address
from broker.messages import Ask, Birth, Close, LinkNow, Picture, Ping, Planned, Pong, Result, Round, Spent
from broker.session import Incoming, Session
from broker.topics import Topics
from experiments import rows
from experiments.breaking import Breaker
from experiments.clocks import PATIENCE, PINGS, Clocks
from experiments.doors import Doors
from experiments.judging import Judge, with_difference
from experiments.links import LinkControl, courses
from experiments.live.gate import Gate
from experiments.live.show import Show
from experiments.metering import share_out, without_meter
from experiments.node_settings import (
    EDGE,
    TESTBED,
    device_settings,
    edge_settings,
    helper_settings,
    link_settings,
    weights,
)
from experiments.places import Place, PlaceFailed
from experiments.places.compose import ComposePlace, TendedPlace, Whom
from experiments.places.local import LocalPlace
from experiments.progress import Watcher
from experiments.record import RunFolder
from experiments.scenario import Scenario, arrival_times, load_prompts, to_yaml
from experiments.served import Served
from netem.choice import choose
from netem.container_control import LinksClient
from node.serving import tasks_until_end
from semct import frameworks
from semct.compute import check_names
from semct.cost import Kind
from semct.quality import load_quality_model
from semct.runs import RequestRow, Row

RUNNER = "runner"

LINKS_SERVICE = Path("/run/semct/links.sock")
"""Where the service answers that shapes the links of containers and breaks them."""

_START = 180.0  # seconds until all nodes must have announced themselves
_LONGEST_WINDOW = 3600.0  # seconds; what a round's order may ask for
_GRACE = 2.0  # seconds after the deadline for what devices have to say of it
_AFTERMATH = 10.0  # seconds for pictures after the last result, and for the nodes' reports
_FAREWELL = 5.0  # seconds for the nodes to leave by themselves


class RunFailed(RuntimeError):
    """The run could not be finished; what it has is kept."""


class Runner:
    """Plays a scenario's rounds on a testbed that is up. ``listen`` must run beside its users."""

    def __init__(
        self,
        scenario: Scenario,
        prompts: Sequence[str],
        session: Session,
        place: Place,
        *,
        breaker: Breaker,
        show: Show,
    ) -> None:
        self._scenario = scenario
        self._prompts = prompts
        self._session = session
        self._place = place
        self._breaker = breaker
        self._show = show
        self.devices = tuple(d.name for d in device_settings(scenario))
        self.nodes = frozenset({EDGE, *(s.name for s in helper_settings(scenario)), *self.devices})
        self.clocks = Clocks()
        self._births: dict[str, Birth] = {}
        self._served: Served | None = None
        self._asked: dict[str, tuple[Ask, float]] = {}
        self._forgot: set[str] = set()
        self._news = asyncio.Condition()

    @property
    def births(self) -> Mapping[str, Birth]:
        """The nodes' latest births."""
        return self._births

    async def listen(self) -> None:
        """Take in what the nodes say."""
        async for incoming in self._session:
            async with self._news:
                self._take(incoming)
                self._news.notify_all()
            self._show.heard(incoming.message)

    async def all_ready(self) -> None:
        """Wait until all nodes have announced themselves; raises ``RunFailed``."""

        def missing() -> frozenset[str]:
            return self.nodes - {n for n, b in self._births.items() if b.state == "ready"}

        await self._wait(lambda: not missing() or bool(self._place.ended), _START)
        if missing():
            ended = [self._place.ended[n] for n in sorted(missing() & set(self._place.ended))]
            late = f"{', '.join(sorted(missing()))} did not announce themselves within {_START:g} s"
            raise RunFailed(ended[0] if ended else late)

    async def serve(self, framework: str, repetition: int, watcher: Watcher, *, links: Mapping[str, LinkNow]) -> Served:
        """One round: every user asks, and has an outcome at the end of it. ``links`` is what the edge is told."""
        scenario = self._scenario
        name = f"{framework}-{repetition}"
        devices = {f"{name}-{d}": d for d in self.devices}
        served = self._served = Served(
            round=name,
            framework=framework,
            repetition=repetition,
            seed=scenario.seed + repetition,
            prompts=dict(zip(devices, drawn_prompts(self._scenario, self._prompts, repetition), strict=True)),
            devices=devices,
        )
        self._show.began(served)
        order = Round(
            round=name,
            framework=framework,
            seed=served.seed,
            requests=max(1, len(set(self.devices) - set(self._place.ended))),
            window=min(scenario.window * scenario.slowdown, _LONGEST_WINDOW),
            links=dict(links),
        )

        def settled() -> bool:
            watcher.answered(framework, len(served.results), len(devices))
            gone = set(self._place.ended) - self._breaker.returning
            return all(r in served.results or d in gone for r, d in devices.items())

        faults = scenario.faults.drawn(scenario.nodes, scenario.seed, repetition)
        async with self._breaker.played(faults, round_id=name, framework=framework), tasks_until_end() as tasks:
            tasks.create_task(self._remind(order))
            await self._ask(served, order)
            await self._wait(settled, scenario.timeout + _GRACE)
            await self._wait(lambda: served.answered <= set(served.pictures), _AFTERMATH)
            gone = dict(self._place.ended)
        await self._mended()
        late = f"no answer within {scenario.timeout:g} s"
        served.reasons = {r: gone.get(d, late) for r, d in devices.items() if r not in served.results}
        nodes = self.nodes - set(self._place.ended)
        await self._tell(nodes, Close(round=name))
        await self._wait(lambda: nodes - set(self._place.ended) <= set(served.spent), _AFTERMATH)
        self._served = None
        return served

    async def compare_clocks(self) -> None:
        """Learn how far the nodes' clocks are ahead of this one."""
        self.clocks.forget()
        for number in range(1, PINGS + 1):
            await self._tell(self.nodes - set(self._place.ended), Ping(sent=0.0))
            await self._wait(functools.partial(self._all_answered, number), PATIENCE)

    def _all_answered(self, times: int) -> bool:
        return all(self.clocks.answers(node) >= times for node in self.nodes - set(self._place.ended))

    async def dismiss(self) -> None:
        """Tell all nodes to leave, and give them a moment to do so."""
        nodes = self.nodes - set(self._place.ended)
        await self._tell(nodes, Close())
        await self._wait(lambda: all(self._births[n].state != "ready" for n in nodes), _FAREWELL)

    async def _mended(self) -> None:
        """Wait until all nodes that faults had hit are there again; raises ``RunFailed``."""

        def missing() -> list[str]:
            back = {n for n, b in self._births.items() if b.started >= self._breaker.restarted.get(n, 0.0)}
            ready = {n for n in back if self._births[n].state == "ready"}
            return sorted(set(self._breaker.restarted) - ready - set(self._place.ended))

        await self._wait(lambda: not missing(), _START)
        if missing():
            raise RunFailed(f"{', '.join(missing())} did not come back within {_START:g} s after a fault")

    async def _ask(self, served: Served, order: Round) -> None:
        scenario = self._scenario
        self._asked.clear()
        self._forgot.clear()
        await self._session.publish(self._session.topics.inbox(EDGE, "control"), order)
        began = time.time()
        times = arrival_times(scenario, served.repetition)
        async with asyncio.TaskGroup() as tasks:
            for (request, prompt), at in zip(served.prompts.items(), times, strict=True):
                due = began + at * scenario.slowdown
                ask = Ask(
                    round=served.round,
                    request=request,
                    prompt=prompt,
                    seed=served.seed,
                    steps=scenario.steps,
                    deadline=due + scenario.timeout + self.clocks.ahead(served.devices[request]),
                    patience=scenario.patience,
                )
                tasks.create_task(self._ask_at(due, served.devices[request], ask))

    async def _ask_at(self, due: float, device: str, ask: Ask) -> None:
        await asyncio.sleep(max(0.0, due - time.time()))
        self._asked[device] = ask, time.time()
        # Whoever comes in the place of one that has ended is reminded of it.
        if device not in self._place.ended or self._births[device].state == "ready":
            await self._session.publish(self._session.topics.inbox(device, "control"), ask)

    async def _remind(self, order: Round) -> None:
        """Say again what nodes that were started anew have forgotten, as long as the round goes on.

        What a device knew is its user's wish; what the edge knew is the round and all requests in it, and what another
        node knew is some of them.
        """
        while True:
            async with self._news:
                await self._news.wait_for(lambda: self._forgot)
                forgot, self._forgot = self._forgot, set()
            if EDGE in forgot:
                await self._session.publish(self._session.topics.inbox(EDGE, "control"), order)
            served = self._served
            for device, (ask, at) in list(self._asked.items()):
                answered = served is None or ask.request in served.results
                if not answered and (device in forgot or forgot - set(self.devices)):
                    again = msgspec.structs.replace(ask, attempt=ask.attempt + 1, waited=time.time() - at)
                    self._asked[device] = again, at
                    await self._session.publish(self._session.topics.inbox(device, "control"), again)

    async def _tell(self, nodes: Set[str], message: Close | Ping) -> None:
        async with asyncio.TaskGroup() as tasks:
            for node in sorted(nodes):
                saying = Ping(sent=time.time()) if isinstance(message, Ping) else message
                tasks.create_task(self._session.publish(self._session.topics.inbox(node, "control"), saying))

    async def _wait(self, settled: Callable[[], bool], seconds: float) -> None:
        """Until ``settled`` or out of time; asked at every message, and twice a second for what sends none."""
        until = time.monotonic() + seconds
        async with self._news:
            while not settled() and time.monotonic() < until:
                try:
                    async with asyncio.timeout(0.5):
                        await self._news.wait()
                except TimeoutError:
                    continue

    def _take(self, incoming: Incoming) -> None:
        message, author = incoming.message, incoming.topic.node
        if isinstance(message, Birth) and message.name == author:
            before = self._births.get(author)
            self._births[author] = message
            if before is not None and before.started != message.started:
                self._forgot.add(author)
        if isinstance(message, Pong):
            self.clocks.heard(message, incoming.received)
        served = self._served
        if served is None or getattr(message, "round", None) != served.round:
            return
        match message:
            case Planned() if author == EDGE:
                served.planned[message.began] = message
            case Result() if served.devices.get(message.request) == author:
                served.results.setdefault(message.request, self.clocks.corrected(message))
            case Picture() if served.devices.get(message.request) == author:
                served.pictures.setdefault(message.request, message.png)
            case Spent() if message.node == author:
                served.spent[message.node] = self.clocks.on_runners_clock(message)


def local_place(scenario: Scenario, logs: Path, *, refused: str = "", doors: Doors | None = None) -> Place:
    """This machine; attached devices come in by the ``doors``.

    ``refused`` says why it permits no network namespaces, if so: raises ``PlaceFailed`` where some are needed.
    """
    if refused and (scenario.shaping != "none" or doors is not None):
        raise PlaceFailed(f"{refused}; without links to shape (`links: {{shaped_by: none}}`) none are needed")
    if scenario.attached and doors is None:
        raise PlaceFailed(f"{scenario.attached[0]} is a device from outside: say with --listen where it comes in")
    return LocalPlace(
        edge=edge_settings(scenario),
        helpers=helper_settings(scenario),
        devices=device_settings(scenario),
        doors=doors,
        links=choose(scenario.shaping, seed=scenario.seed),
        congestion=scenario.links.congestion,
        implementation=scenario.broker.implementation,
        logs=logs,
        namespaces=not refused,
    )


def compose_place(scenario: Scenario, logs: Path, *, broker: Address) -> Place:  # noqa: ARG001  docker keeps the logs
    """The containers whose nodes enrol at a broker, where attached devices come in, too."""
    devices = device_settings(scenario)
    whom: Whom = {
        "testbed": TESTBED,
        "edge": edge_settings(scenario),
        "helpers": helper_settings(scenario),
        "devices": [device for device in devices if device.name not in scenario.attached],
        "attached": [device for device in devices if device.name in scenario.attached],
    }
    # Where the folder of its socket is, the service is, or will be soon.
    if scenario.shaping != "none" or (scenario.faults.on_nodes and LINKS_SERVICE.parent.exists()):
        links = LinksClient(LINKS_SERVICE)
        return TendedPlace(broker, links=links, shaped_by=scenario.shaping, seed=scenario.seed, **whom)
    return ComposePlace(broker, **whom)


async def play(
    scenario: Scenario,
    place_for: Callable[[Scenario, Path], Place],
    *,
    beside: Path,
    folder: RunFolder,
    watcher: Watcher,
    gate: Gate,
    doors: Doors | None = None,
) -> None:
    """Run a scenario in a place, made for the scenario and a folder for logs, into a run folder.

    ``beside`` is the folder of the scenario file; viewers come in by the ``gate``, attached devices by the ``doors``.
    Whatever goes wrong, the record is kept: raises ``RunFailed`` where requests failed though the scenario has no
    faults, and what the scenario, the place and the models raise.
    """
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, _cancel, asyncio.current_task())
    with folder:
        watcher.note(f"run folder {folder.path}")
        folder.scenario(to_yaml(scenario))
        folder.update(
            seed=scenario.seed,
            frameworks=scenario.frameworks,
            model=scenario.model,
            slowdown=scenario.slowdown,
        )
        helpers = helper_settings(scenario)
        for name in scenario.frameworks:
            frameworks.check_needs(
                name,
                edges=1 + sum(h.kind == "edge" for h in helpers),
                clouds=sum(h.kind == "cloud" for h in helpers),
                small=scenario.small_model in edge_settings(scenario).models,
            )
        for node in (edge_settings(scenario), *helpers, *device_settings(scenario)):
            check_names(node.profile, (node.emulated_models.get(model, model) for model in node.models))
        prompts = load_prompts(scenario, beside)
        place = place_for(scenario, folder.logs)
        control = LinkControl(place, slowdown=scenario.slowdown, journal=folder.event)
        async with gate, place, control.served(folder.path):
            gate.lead_to(place.host, place.port)
            watcher.note("the broker and all nodes have started")
            if doors is not None:
                for name in scenario.attached:
                    watcher.note(f"waiting for {name} at {doors.address(name)}")
            folder.update(broker=place.described.broker, link=place.described.links, hosts=place.described.hosts)
            subscriptions = [
                Topics(TESTBED).every(w) for w in ("birth", "result", "picture", "planned", "spent", "clock")
            ]
            breaker = Breaker(
                place, control, scenario.faults, slowdown=scenario.slowdown, keep=folder.add, journal=folder.event
            )
            async with (
                Session(place.host, place.port, testbed=TESTBED, name=RUNNER, subscriptions=subscriptions) as session,
                Show(gate, scenario, folder, control, session, settings=link_settings(scenario), beside=beside) as show,
            ):
                runner = Runner(scenario, prompts, session, place, breaker=breaker, show=show)
                rounds = _rounds(
                    scenario,
                    runner,
                    place,
                    control,
                    breaker=breaker,
                    show=show,
                    beside=beside,
                    folder=folder,
                    watcher=watcher,
                )
                await _beside(rounds, runner.listen(), place.watch())


def _cancel(task: asyncio.Task[Any] | None) -> None:
    """End a run in order when it is asked to terminate, as Ctrl-C does."""
    if task is not None:
        task.cancel()


async def _beside(main: Coroutine[Any, Any, None], *watches: Coroutine[Any, Any, None]) -> None:
    """Run the main part while the watches run, and end them with it; the first error of any of them ends all."""
    try:
        async with asyncio.TaskGroup() as tasks:
            watching = [tasks.create_task(w) for w in watches]
            await main
            for task in watching:
                task.cancel()
    except ExceptionGroup as group:  # not except*: Python 3.11.2 wraps what is raised there
        raise _first(group) from group


def _first(error: BaseException) -> BaseException:
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


async def _rounds(
    scenario: Scenario,
    runner: Runner,
    place: Place,
    control: LinkControl,
    *,
    breaker: Breaker,
    show: Show,
    beside: Path,
    folder: RunFolder,
    watcher: Watcher,
) -> None:
    judge = await asyncio.to_thread(Judge.load, scenario.scorer, scenario.objective_scorer)
    await runner.all_ready()
    computes = {name: birth.compute for name, birth in runner.births.items() if birth.compute is not None}
    profiles = {name: compute.profile for name, compute in computes.items()}
    meters = {name: compute.meter for name, compute in computes.items() if compute.meter}
    folder.update(profiles=profiles, compute=_pace(set(profiles.values())), meters=meters)
    watcher.note(f"all {len(profiles)} nodes are ready")
    alone = load_quality_model(scenario.planning.quality).quality(1.0, 0.0)
    references = rows.predicted_references(
        {d: computes.get(d, computes[EDGE]) for d in runner.devices}, scenario, edge=EDGE, quality=float(alone)
    )
    rated = functools.partial(rows.with_utility, weights=weights(scenario), references=references)
    show.rate(rated)
    settings = link_settings(scenario)
    unanswered: dict[str, str] = {}
    total = scenario.repetitions * len(scenario.frameworks)
    for repetition in range(scenario.repetitions):
        found: list[RequestRow] = []
        for done, framework in enumerate(scenario.frameworks, repetition * len(scenario.frameworks)):
            watcher.rounds(done, total)
            folder.event("round", framework=framework, repetition=repetition)
            await runner.compare_clocks()
            async with control.played(courses(settings, scenario.seed + repetition, beside)):
                applied, before = await control.applied(), await control.counted()
                served = await runner.serve(framework, repetition, watcher, links=control.told(scenario.radio))
                share_out(served, computes)
                found += await _keep(
                    served, scenario, judge, place, folder, runner=runner, unmetered=without_meter(computes)
                )
                for transfer in (transfers := rows.transfer_rows(served, control.during, slowdown=scenario.slowdown)):
                    folder.add(transfer)
                after = await control.counted()
                for link in rows.link_rows(
                    served,
                    control,
                    transfers,
                    shaped_by=place.described.links,
                    applied=applied,
                    # Who was started anew has a new link that counts from 0.
                    counted={n: (before[n], after[n]) for n in before.keys() & after.keys() - breaker.restarted.keys()},
                ):
                    folder.add(link)
            unanswered |= served.unanswered
            watcher.note(f"{framework}: {len(served.answered)} of {len(served.prompts)} users have their picture")
        found = await asyncio.to_thread(with_difference, found, folder.path)
        for row in rated(found):
            folder.add(row)
    watcher.rounds(total, total)
    await runner.dismiss()
    if unanswered and not scenario.faults:
        request, reason = next(iter(unanswered.items()))
        raise RunFailed(f"{len(unanswered)} requests have no picture, the first is {request}: {reason}")


async def _keep(
    served: Served,
    scenario: Scenario,
    judge: Judge,
    place: Place,
    folder: RunFolder,
    *,
    runner: Runner,
    unmetered: Set[str],
) -> list[RequestRow]:
    """Score a round's pictures, and keep all that the round left."""
    kinds: dict[str, Kind] = {name: birth.role for name, birth in runner.births.items()}
    folder.event("planned", round=served.round, plan=served.plan, seconds=served.seconds)
    shown = sorted(served.answered & set(served.pictures))
    judged = await asyncio.to_thread(judge.judge, {r: served.pictures[r] for r in shown}, served.prompts)
    images = {r: folder.image(served.framework, r, served.pictures[r]) for r in shown}
    found = rows.request_rows(served, scenario, kinds=kinds, unmetered=unmetered, judged=judged, images=images)
    memory = await place.memory()
    for row in found:
        folder.add(row)
    nodes = rows.node_rows(
        served,
        kinds=kinds,
        unmetered=unmetered,
        clocks=runner.clocks.offsets,
        memory=memory,
        ended=place.ended,
    )
    for node in nodes:
        folder.add(node)
    told: list[Row] = [
        *rows.stage_rows(served, unmetered=unmetered, slowdown=scenario.slowdown),
        *rows.call_rows(served),
        *rows.planning_rows(served, edge=EDGE),
    ]
    for stretch in told:
        folder.add(stretch)
    folder.update(
        overruns=folder.info.overruns + sum(spent.overruns for spent in served.spent.values()),
        device_memory_mib=tuple(memory[d] for d in sorted(served.devices.values()) if d in memory),
    )
    return found


def drawn_prompts(scenario: Scenario, prompts: Sequence[str], repetition: int) -> list[str]:
    """What each user asks for in a repetition, device by device."""
    drawn = list(prompts)
    if scenario.prompts.shuffle:
        random.Random(f"{scenario.seed}/{repetition}").shuffle(drawn)  # noqa: S311  no secret
    return [drawn[i % len(drawn)] for i in range(scenario.users)]


def _pace(profiles: set[str]) -> str:
    if profiles == {"native"}:
        return "native"
    return "mixed" if "native" in profiles else "emulated"
