"""From what a round left to the rows of the record: where each request's time and energy went."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from statistics import median
from typing import Any, get_args

import msgspec

from broker.messages import Compute, Spent, Stage
from experiments.clocks import Offset
from experiments.judging import Judgement
from experiments.links import LinkControl
from experiments.scenario import Scenario
from experiments.served import Served
from netem.control import Counters
from netem.link import Link
from semct.cost import Kind, Network, NodeState, Outcome, Weights, device_only, utility
from semct.routes import Plan, wording
from semct.runs import CallRow, LinkRow, NodeRow, PlanningRow, RequestRow, StageRow, TransferRow

_LARGE = 100_000  # bytes from which a transfer's time is the rate's rather than the delay's
_COMPUTING = {"denoise", "decode"}  # stages that take a node's energy
_SMALL = 1400  # bytes that one packet carries, about


def request_rows(
    served: Served,
    scenario: Scenario,
    *,
    kinds: Mapping[str, Kind],
    unmetered: Set[str] = frozenset(),
    judged: Mapping[str, Judgement],
    images: Mapping[str, str],
) -> list[RequestRow]:
    """A row for every request of a round, still without its measured utility.

    ``kinds`` says what each node is, ``unmetered`` names nodes whose energy nobody knows; ``judged`` holds what the
    pictures are worth and ``images`` their paths, by request. Durations are those of the emulated world: wall time
    divided by the scenario's slowdown, but for planning, which is not slowed down.
    """
    plan = served.plan
    return [
        _row(
            served,
            scenario,
            request,
            plan,
            kinds=kinds,
            unmetered=unmetered,
            judged=judged.get(request),
            image=images.get(request),
        )
        for request in served.prompts
    ]


def node_rows(
    served: Served,
    *,
    kinds: Mapping[str, Kind],
    unmetered: Set[str] = frozenset(),
    clocks: Mapping[str, Offset],
    memory: Mapping[str, float],
    ended: Mapping[str, str],
) -> list[NodeRow]:
    """A row for every node of a round; ``memory`` is their private memory in MiB, ``ended`` names the dead."""
    found = []
    for node in (*sorted(n for n, kind in kinds.items() if kind != "device"), *served.devices.values()):
        spent = served.spent.get(node)
        found.append(
            NodeRow(
                round=served.round,
                framework=served.framework,
                node=node,
                role=kinds.get(node, "device"),
                denoiser_calls=spent.denoiser_calls if spent else 0,
                rows=spent.rows if spent else 0,
                tflop=spent.flops / 1e12 if spent else 0.0,
                busy_s=spent.busy if spent else 0.0,
                energy_j=None if node in unmetered else spent.joules if spent else 0.0,
                overruns=spent.overruns if spent else 0,
                shortages=spent.shortages if spent else 0,
                **_cached(spent),
                clock_ahead_s=clocks[node].ahead if node in clocks else None,
                clock_uncertainty_s=clocks[node].uncertainty if node in clocks else None,
                memory_mib=memory.get(node),
                alive=node not in ended,
            )
        )
    return found


def _cached(spent: Spent | None) -> dict[str, Any]:
    """The cache's columns of a node's row."""
    if spent is None or spent.cache is None:
        return {}
    c = spent.cache
    return {
        "cache_hits": c.hits,
        "cache_misses": c.misses,
        "cache_steps_saved": c.steps_saved,
        "cache_evictions": c.evictions,
        "cache_mb": c.bytes / 1e6,
    }


def transfer_rows(served: Served, links: Callable[[str, float], Link | None], *, slowdown: float) -> list[TransferRow]:
    """A row for every message that carried a request, from a node to another.

    ``links`` gives a node's link at a time of the epoch, none where it has none.
    """
    found = []
    for request, result in served.results.items():
        for stage in result.stages:
            if stage.name != "transfer":
                continue
            receiver = stage.to or served.devices[request]
            here, there = links(stage.node, stage.start), links(receiver, stage.start)
            ways = [*([here.up] if here else []), *([there.down] if there else [])]
            seconds = (stage.stop - stage.start) / slowdown
            found.append(
                TransferRow(
                    round=served.round,
                    framework=served.framework,
                    request=request,
                    sender=stage.node,
                    receiver=receiver,
                    sent=stage.start,
                    size=stage.size,
                    seconds=seconds,
                    goodput_bps=8 * stage.size / seconds if seconds > 0 else 0.0,
                    limit_bps=min((float(way.rate) for way in ways if way.rate is not None), default=None),
                    delay_s=float(sum(way.delay for way in ways)) if ways else None,
                )
            )
    return found


def stage_rows(served: Served, *, slowdown: float, unmetered: Set[str] = frozenset()) -> list[StageRow]:
    """A row for every stretch of every request's time."""
    return [
        StageRow(
            round=served.round,
            framework=served.framework,
            request=request,
            name=s.name,
            node=s.node,
            start=s.start,
            stop=s.stop,
            seconds=(s.stop - s.start) / (1.0 if s.name == "plan" else slowdown),
            joules=None if s.name in _COMPUTING and s.node in unmetered else s.joules,
            tflop=s.flops / 1e12,
            steps=s.steps,
            size=s.size,
            to=s.to,
            overruns=s.overruns,
            modelled=s.modelled,
        )
        for request, result in served.results.items()
        for s in result.stages
    ]


def call_rows(served: Served) -> list[CallRow]:
    """A row for every denoiser call that the nodes told of."""
    return [
        CallRow(
            round=served.round,
            framework=served.framework,
            node=node,
            start=c.start,
            stop=c.stop,
            model=c.model,
            rows=len(c.steps),
            first_step=min(c.steps),
            last_step=max(c.steps),
        )
        for node, spent in served.spent.items()
        for c in spent.calls
        if c.steps
    ]


def planning_rows(served: Served, *, edge: str) -> list[PlanningRow]:
    """A row for every part of planning on the ``edge``, batch by batch."""
    return [
        PlanningRow(
            round=served.round,
            framework=served.framework,
            node=edge,
            batch=number,
            part=part,
            began=planned.began,
            seconds=seconds,
        )
        for number, planned in enumerate(served.planned.values())
        for part, seconds in planned.seconds.items()
    ]


def link_rows(
    served: Served,
    control: LinkControl,
    transfers: Sequence[TransferRow],
    *,
    shaped_by: str,
    applied: Mapping[str, Link],
    counted: Mapping[str, tuple[Counters, Counters]],
) -> list[LinkRow]:
    """A row for every link of a round.

    ``applied`` is what was read back when it began, ``counted`` what had been counted when it began and ended.
    """
    found = []
    for node in control.nodes:
        asked, now = control.start(node), applied.get(node)
        found.append(
            LinkRow(
                round=served.round,
                framework=served.framework,
                node=node,
                implementation=shaped_by,
                changes=control.changes(node),
                requested_up=str(asked.up),
                requested_down=str(asked.down),
                applied_up=str(now.up) if now else "",
                applied_down=str(now.down) if now else "",
                requested_up_rate_bps=_number(asked.up.rate),
                requested_up_delay_s=_number(asked.up.delay),
                requested_down_rate_bps=_number(asked.down.rate),
                requested_down_delay_s=_number(asked.down.delay),
                **_measured("up", [t for t in transfers if t.sender == node]),
                **_measured("down", [t for t in transfers if t.receiver == node]),
                **_counted(counted.get(node)),
            )
        )
    return found


def _counted(counters: tuple[Counters, Counters] | None) -> dict[str, Any]:
    if counters is None:
        return {}
    before, after = counters
    return {
        "up_lost": after.up.lost - before.up.lost,
        "up_dropped": after.up.dropped - before.up.dropped,
        "up_late_s": after.up.late.p99,
        "down_lost": after.down.lost - before.down.lost,
        "down_dropped": after.down.dropped - before.down.dropped,
        "down_late_s": after.down.late.p99,
    }


def _number(quantity: float | None) -> float | None:
    """A rate or time without its unit."""
    return None if quantity is None else float(quantity)


def _measured(way: str, transfers: Sequence[TransferRow]) -> dict[str, Any]:
    """The median goodput of large messages, without the delay, and the median time of small ones."""
    large = [8 * t.size / max(t.seconds - (t.delay_s or 0.0), 1e-6) for t in transfers if t.size >= _LARGE]
    small = [t.seconds for t in transfers if t.size <= _SMALL]
    return {
        f"measured_{way}_rate_bps": median(large) if large else None,
        f"measured_{way}_delay_s": median(small) if small else None,
    }


def with_utility(rows: Sequence[RequestRow], weights: Weights, references: Mapping[str, Outcome]) -> list[RequestRow]:
    """The rows with their measured utility.

    The reference is the same user's measured device-only inference of the same repetition; where there is
    none, what ``references`` predicts for the device, with the user's own measured quality.
    """
    measured = {
        (r.repetition, r.device): _outcome(r) for r in rows if r.framework == "device-only" and r.outcome == "answered"
    }
    done = []
    for row in rows:
        outcome = _outcome(row)
        reference = measured.get((row.repetition, row.device)) or references.get(row.device)
        if outcome is not None and reference is not None and reference.quality > 0:
            if row.energy_j is None:  # an energy that nobody knows counts as unchanged
                outcome = msgspec.structs.replace(outcome, energy=reference.energy)
            value = utility(outcome, reference, weights)
            row = msgspec.structs.replace(row, utility=value)  # noqa: PLW2901  the row, completed
        done.append(row)
    return done


def predicted_references(
    computes: Mapping[str, Compute], scenario: Scenario, *, edge: str, quality: float
) -> dict[str, Outcome]:
    """What device-only inference would give each device by its compute profile, with this quality."""
    nodes = {
        name: NodeState(
            step_seconds=c.step_seconds,
            step_joules=c.step_joules,
            decode_seconds=c.decode_seconds,
            decode_joules=c.decode_joules,
            call_seconds=c.call_seconds,
            call_joules=c.call_joules,
        )
        for name, c in computes.items()
    }
    network = Network(edge=edge, nodes=nodes, uplinks={}, downlinks={}, latent_bytes=0)
    return {name: device_only(network, name, scenario.steps, quality) for name in nodes if name != edge}


def _row(
    served: Served,
    scenario: Scenario,
    request: str,
    plan: Plan | None,
    *,
    kinds: Mapping[str, Kind],
    unmetered: Set[str] = frozenset(),
    judged: Judgement | None,
    image: str | None,
) -> RequestRow:
    result = served.results.get(request)
    device = served.devices[request]
    alone = result is not None and result.outcome == "degraded"
    if alone:
        plan = None  # what was planned is not what was done
    route = next((r for r in plan.routes if r.request == request), None) if plan else None
    clusters = plan.clusters if plan else ()
    index = next((i for i, c in enumerate(clusters) if request in c.members), None)
    cluster = None if index is None else clusters[index]
    predicted = plan.predictions.get(request) if plan else None
    stages = result.stages if result else ()
    answered = result is not None and result.outcome != "failed"
    pace = scenario.slowdown
    planning = _seconds(stages, "plan", 1.0)  # this machine's own work: nothing slows it down
    by_kind = {kind: [s for s in stages if kinds.get(s.node, "device") == kind] for kind in get_args(Kind)}
    joules = {kind: _joules(some, unmetered) for kind, some in by_kind.items()}
    known = [j for j in joules.values() if j is not None]
    metered = len(known) == len(joules)
    up, down, between = _transfers(stages, device)
    radio = (scenario.radio.device_watts * _total(up) + scenario.radio.edge_watts * _total(down)) / pace
    shared = served.shared_steps[request] if route else None
    own = _own_steps(served, request, kinds) if route else None
    if alone:
        shared, own = 0, {"edge": 0, "cloud": 0, "device": scenario.steps}
    return RequestRow(
        round=served.round,
        framework=served.framework,
        repetition=served.repetition,
        request=request,
        device=device,
        prompt=served.prompts[request],
        seed=served.seed,
        steps=route.steps if route else scenario.steps,
        outcome=result.outcome if result else "failed",
        reason=result.reason if result else served.reasons.get(request, ""),
        cluster=index,
        public_prompt=wording(cluster.public_prompt) if cluster else None,
        public_source=cluster.source if cluster else None,
        similarity=cluster.similarity[cluster.members.index(request)] if cluster else None,
        shared_steps=shared,
        edge_steps=own["edge"] if own else None,
        cloud_steps=own["cloud"] if own else None,
        device_steps=own["device"] if own else None,
        quality=judged.quality if judged else None,
        fidelity=judged.fidelity if judged else None,
        latency_s=(result.finished - result.asked - planning) / pace + planning if result and answered else None,
        energy_j=sum(known) + radio if answered and metered else None,
        tflop=sum(s.flops for s in stages if s.name == "denoise") / 1e12 if answered else None,
        utility=None,
        predicted_quality=predicted.quality if predicted else None,
        predicted_latency_s=predicted.latency if predicted else None,
        predicted_energy_j=predicted.energy if predicted and metered else None,
        predicted_utility=predicted.utility if predicted else None,
        upload_s=_total(up) / pace,
        collect_s=_seconds(stages, "collect", pace),
        plan_s=planning,
        queue_s=_seconds(stages, "queue", pace),
        edge_denoise_s=_seconds(by_kind["edge"], "denoise", pace),
        cloud_denoise_s=_seconds(by_kind["cloud"], "denoise", pace),
        relay_s=_total(between) / pace,
        download_s=_total(down) / pace,
        device_denoise_s=_seconds(by_kind["device"], "denoise", pace),
        decode_s=_seconds(stages, "decode", pace),
        energy_edge_j=joules["edge"],
        energy_cloud_j=joules["cloud"],
        energy_device_j=joules["device"],
        energy_radio_j=radio,
        bytes_up=sum(s.size for s in up),
        bytes_relayed=sum(s.size for s in between),
        bytes_down=sum(s.size for s in down),
        overruns=sum(s.overruns for s in stages),
        modelled=any(s.modelled for s in stages),
        image=image,
    )


def _outcome(row: RequestRow) -> Outcome | None:
    if row.quality is None or row.latency_s is None:
        return None
    return Outcome(quality=row.quality, latency=row.latency_s, energy=row.energy_j or 0.0)


def _joules(stages: Sequence[Stage], unmetered: Set[str]) -> float | None:
    """What these stages took; none where a node without a meter computed in one."""
    if any(s.name in _COMPUTING and s.node in unmetered for s in stages):
        return None
    return sum(s.joules for s in stages)


def _seconds(stages: Iterable[Stage], name: str, pace: float) -> float:
    return _total([s for s in stages if s.name == name]) / pace


def _total(stages: Sequence[Stage]) -> float:
    return sum(s.stop - s.start for s in stages)


def _transfers(stages: Iterable[Stage], device: str) -> tuple[list[Stage], list[Stage], list[Stage]]:
    """Transfers from the device, to it, and between other nodes: the first two go by radio."""
    transfers = [s for s in stages if s.name == "transfer"]
    up = [s for s in transfers if s.node == device]
    down = [s for s in transfers if s.node != device and s.to == device]
    return up, down, [s for s in transfers if device not in {s.node, s.to}]


def _own_steps(served: Served, request: str, kinds: Mapping[str, Kind]) -> dict[Kind, int]:
    """The steps that the request shares with no other, by kind of node."""
    found: dict[Kind, int] = dict.fromkeys(get_args(Kind), 0)
    for node, steps in served.own_steps[request].items():
        found[kinds.get(node, "device")] += steps
    return found
