"""Simulates a scenario: the edge's own planning for any number of users, on the models of cost and quality alone.

There are no processes and no pictures; links are what they are at the start of a round. What each request gets is what
the edge forecasts in a run, by playing the plan through its engine in virtual time; for more than ``PLAYED`` users it
is what the plan itself predicts, by the closed forms of ``semct.cost``. Users take the scenario's prompts as in a run,
so thousands of users ask for what the prompt set holds many times over; other than in a run, each has noise of its
own, so that two users with the same prompt share steps only where a plan says so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.console import Console

from broker import messages
from edge_node.planning import NodeLinks, Planner
from edge_node.process import load_writer
from experiments.links import courses
from experiments.node_settings import device_settings, edge_settings, helper_settings, link_settings
from experiments.record import Provenance, new_folder, provenance
from experiments.runner import drawn_prompts
from experiments.scenario import Scenario, load_prompts, load_scenario, to_yaml
from experiments.summary import render, summarise, write_csv
from netem.course import Setting, resolve
from netem.link import LinkState
from node.settings import NodeSettings
from semct.compute import EMULATED_MODELS, PROFILES, check_names, processor
from semct.cost import Kind, Link
from semct.diffusion import Denoiser
from semct.planner.learned import load_policy
from semct.prompts import SentenceEncoder
from semct.public_prompt import PublicPrompt, Writer
from semct.quality import load_quality_model
from semct.routes import Plan, Request, wording
from semct.simulator import Simulated, Unpredicted, simulate

PLAYED = 200
"""Up to so many users a plan is played through the engine in virtual time; beyond, its own closed forms must do."""

_NOISE = 1_000_003  # a prime between users' seeds: repetitions, which count up by one, get other noise


class Simulation(msgspec.Struct, frozen=True, kw_only=True):
    """What a simulation found: a row per request, and the wall seconds of each framework's planning."""

    requests: pl.DataFrame
    seconds: dict[str, dict[str, float]]


class SimulationInfo(msgspec.Struct, frozen=True, kw_only=True):
    """``simulation.json``: what was simulated, where, and how long each part of planning took."""

    scenario: str
    users: int
    prompts: int
    repetitions: int
    seed: int
    frameworks: tuple[str, ...]
    seconds: dict[str, dict[str, float]]
    provenance: Provenance


class SimulationFailed(RuntimeError):
    """A framework cannot be simulated in this scenario."""


class Encoder(SentenceEncoder):
    """Remembers every prompt: a simulation embeds the same ones over and over."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[str, NDArray[np.float32]] = {}

    def embed(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        """See ``SentenceEncoder.embed``."""
        for prompt in set(prompts) - set(self._known):
            self._known[prompt] = super().embed([prompt])[0]
        return np.stack([self._known[p] for p in prompts]) if prompts else super().embed([])

    def forget(self) -> None:
        """Forget nothing."""


class RememberingWriter:
    """A writer that words the same cluster with the same seed only once."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._known: dict[Hashable, PublicPrompt] = {}

    def write(self, clusters: Sequence[Sequence[str]], seed: int) -> list[PublicPrompt]:
        """See ``Writer.write``."""
        keys = [(seed, tuple(members)) for members in clusters]
        new = {key: members for key, members in zip(keys, clusters, strict=True) if key not in self._known}
        if new:
            self._known.update(zip(new, self._writer.write(list(new.values()), seed), strict=True))
        return [self._known[key] for key in keys]


class Simulator:
    """Holds what all rounds of simulations need: an encoder, writers, and models that native nodes measure."""

    def __init__(self, encoder: SentenceEncoder) -> None:
        self._encoder = encoder
        self._writers: dict[str, Writer] = {}
        self._paces: dict[Hashable, tuple[messages.Compute, dict[str, float]]] = {}

    def play(
        self,
        scenario: Scenario,
        prompts: Sequence[str],
        *,
        links: Callable[[int], Mapping[str, NodeLinks]] = lambda _: {},
        played: int = PLAYED,
        watch: Callable[[str, int], None] = lambda *_: None,
    ) -> Simulation:
        """Every framework and repetition of a scenario.

        ``links`` gives the devices' links in a repetition; who has none is not limited. Up to ``played`` users, plans
        are played through the engine. ``watch`` is told before each round which framework and repetition it is.

        Raises:
            SimulationFailed: A framework predicts nothing or cannot plan in this scenario.
            UnknownFramework, UnknownProfile, QualityModelError: The scenario names what is not there.
        """
        frames: list[pl.DataFrame] = []
        seconds: dict[str, dict[str, float]] = {}
        for repetition in range(scenario.repetitions):
            drawn = drawn_prompts(scenario, prompts, repetition)
            asked = [
                messages.Request(
                    round=f"{repetition}",
                    request=f"{repetition}-{number:06}",
                    reply=device.name,
                    prompt=prompt,
                    seed=scenario.seed + repetition + number * _NOISE,
                    steps=scenario.steps,
                    sent=0.0,
                    deadline=0.0,
                )
                for number, (device, prompt) in enumerate(zip(device_settings(scenario), drawn, strict=True))
            ]
            planner, step_tflop = self.planner(scenario, links(repetition))
            for framework in scenario.frameworks:
                watch(framework, repetition)
                found, plan, took = _plan(planner, framework, asked, scenario, repetition=repetition, played=played)
                seconds[framework] = {
                    part: seconds.get(framework, {}).get(part, 0.0) + value for part, value in took.items()
                }
                frames.append(_frame(asked, plan, found, step_tflop, framework=framework, repetition=repetition))
        return Simulation(requests=pl.concat(frames), seconds=seconds)

    def links(self, setting: Setting, scenario: Scenario) -> Callable[[int], Mapping[str, NodeLinks]]:
        """The links of a scenario's devices in each repetition, as they are at its start."""
        radio = scenario.radio

        def drawn(repetition: int) -> dict[str, NodeLinks]:
            seed = scenario.seed + repetition
            links = [resolve(setting, number, seed).at(0.0) for number in range(1, scenario.users + 1)]
            return {
                device.name: NodeLinks(up=_link(link.up, radio.device_watts), down=_link(link.down, radio.edge_watts))
                for device, link in zip(device_settings(scenario), links, strict=True)
            }

        return drawn

    def links_of(self, scenario: Scenario, beside: Path) -> Callable[[int], Mapping[str, NodeLinks]]:
        """The links that a scenario itself gives its nodes, at the start of each repetition, as a run's edge is told.

        ``beside`` is where its trace files lie. Raises ``BadScenario``.
        """
        settings, radio = link_settings(scenario), scenario.radio

        def drawn(repetition: int) -> dict[str, NodeLinks]:
            if scenario.shaping == "none":
                return {}
            found = courses(settings, scenario.seed + repetition, beside)
            links = {node: course.at(0.0) for node, course in found.items()}
            return {
                node: NodeLinks(
                    up=Link(rate=link.up.goodput or math.inf, delay=float(link.up.delay), watts=radio.device_watts),
                    down=Link(rate=link.down.goodput or math.inf, delay=float(link.down.delay), watts=radio.edge_watts),
                )
                for node, link in links.items()
            }

        return drawn

    def planner(self, scenario: Scenario, links: Mapping[str, NodeLinks]) -> tuple[Planner, dict[str, float]]:
        """The planner of a scenario's edge that has met all devices, and the TFLOP of a step by model."""
        settings = edge_settings(scenario)
        compute, step_tflop = self._pace(settings)
        planner = Planner(
            edge=settings.name,
            compute=compute,
            latent_bytes=EMULATED_MODELS[scenario.emulated_model].latent_bytes,
            links=links,
            weights=settings.weights,
            most_shared=settings.most_shared,
            policy=load_policy(settings.tier),
            clusters=settings.clusters,
            model=scenario.model,
            small_model=scenario.small_model,
            quality=load_quality_model(settings.quality),
            encoder=self._encoder,
            writer=self._writer(settings.writer),
            cache=settings.cache,
        )
        others: list[tuple[NodeSettings, Kind]] = [(helper, helper.kind) for helper in helper_settings(scenario)]
        others += [(device, "device") for device in device_settings(scenario)]
        for node, kind in others:
            compute, tflop = self._pace(node)
            planner.meet(node.name, kind, compute)
            step_tflop = step_tflop | tflop
        return planner, step_tflop

    def _writer(self, name: str) -> Writer:
        if name not in self._writers:
            self._writers[name] = RememberingWriter(load_writer(name, self._encoder))
        return self._writers[name]

    def _pace(self, node: NodeSettings) -> tuple[messages.Compute, dict[str, float]]:
        """How a node computes, and the TFLOP of a step by model: from the tables, or measured where it is native."""
        stands_for = tuple(node.emulated_models.get(model, model) for model in node.models)
        key = (node.profile, node.models, stands_for)
        if key not in self._paces:
            check_names(node.profile, stands_for)
            if node.profile in PROFILES:
                hardware, models = PROFILES[node.profile], [EMULATED_MODELS[name] for name in stands_for]
                steps, decode = [hardware.cost(m.step_tflop) for m in models], hardware.cost(models[0].decode_tflop)
                call = hardware.cost(0.0)
            else:
                denoisers = [Denoiser.load(model) for model in node.models]
                pace = processor(node.profile, dict(zip(node.models, stands_for, strict=True)), slowdown=1.0)
                steps, decode = [pace.step_cost(d) for d in denoisers], pace.decode_cost(denoisers[0])
                call = pace.call_cost(denoisers[0])
            first, *rest = (messages.Pace(step_seconds=s.seconds, step_joules=s.joules) for s in steps)
            compute = messages.Compute(
                profile=node.profile,
                step_seconds=first.step_seconds,
                step_joules=first.step_joules,
                decode_seconds=decode.seconds,
                decode_joules=decode.joules,
                call_seconds=call.seconds,
                call_joules=call.joules,
                others=dict(zip(node.models[1:], rest, strict=True)),
            )
            tflop = [s.flops / 1e12 for s in steps]
            self._paces[key] = compute, dict(zip(node.models, tflop, strict=True))
        return self._paces[key]


def with_users(scenario: Scenario, users: int) -> Scenario:
    """The scenario with so many users, groups of devices in proportion to what they were."""
    shares = np.cumsum([group.count for group in scenario.devices]) / scenario.users
    ends = np.rint(shares * users).astype(int)
    counts = np.diff(ends, prepend=0).tolist()
    groups = (msgspec.structs.replace(g, count=n) for g, n in zip(scenario.devices, counts, strict=True) if n)
    return msgspec.structs.replace(scenario, devices=tuple(groups))


def write_simulation(root: Path, scenario: Scenario, found: Simulation) -> Path:
    """Leave a folder with ``summary.csv``, ``requests.parquet``, ``scenario.yaml`` and ``simulation.json``.

    Raises:
        OSError: It cannot be written.
    """
    folder = new_folder(root, scenario.name, datetime.now(UTC))
    folder.mkdir(parents=True)
    (folder / "scenario.yaml").write_text(to_yaml(scenario), encoding="utf-8")
    found.requests.write_parquet(folder / "requests.parquet")
    (folder / "summary.csv").write_text(write_csv(summarise(found.requests, frameworks=scenario.frameworks)))
    info = SimulationInfo(
        scenario=scenario.name,
        users=scenario.users,
        prompts=found.requests["prompt"].n_unique(),
        repetitions=scenario.repetitions,
        seed=scenario.seed,
        frameworks=scenario.frameworks,
        seconds=found.seconds,
        provenance=provenance(),
    )
    (folder / "simulation.json").write_bytes(msgspec.json.format(msgspec.json.encode(info)) + b"\n")
    return folder


def _link(state: LinkState, watts: float) -> Link:
    """The planner's view of a link: what gets through in the mean, at least a bit in a second."""
    rate = math.inf if state.rate is None else float(state.rate)
    return Link(rate=max(rate * (1 - float(state.loss)), 1.0), delay=float(state.delay), watts=watts)


def _plan(
    planner: Planner,
    framework: str,
    asked: Sequence[messages.Request],
    scenario: Scenario,
    *,
    repetition: int,
    played: int,
) -> tuple[Simulated, Plan, dict[str, float]]:
    order = messages.Round(
        round=f"{repetition}",
        framework=framework,
        seed=scenario.seed + repetition,
        requests=len(asked),
        window=scenario.window,
    )
    requests = [Request(id=r.request, device=r.reply, prompt=r.prompt, seed=r.seed, steps=r.steps) for r in asked]
    try:
        plan, seconds = planner.plan(order, asked)
        start = time.perf_counter()
        if len(asked) <= played or len(plan.predictions) < len(asked):
            plan = planner.forecast(order, asked, plan, planning=0.0)
        found = simulate(plan, requests)
    except (Unpredicted, ValueError) as error:
        raise SimulationFailed(f"{framework} cannot be simulated in scenario {scenario.name}: {error}") from error
    return found, plan, {**seconds, "simulate": time.perf_counter() - start}


def _frame(
    asked: Sequence[messages.Request],
    plan: Plan,
    found: Simulated,
    step_tflop: Mapping[str, float],
    *,
    framework: str,
    repetition: int,
) -> pl.DataFrame:
    """The rows of a round, with the columns that they have in common with a run's requests."""
    clusters = np.where(found.cluster >= 0, found.cluster, len(plan.clusters))
    worded = np.array([*(wording(c.public_prompt) for c in plan.clusters), None], dtype=object)[clusters]
    source = np.array([*(c.source for c in plan.clusters), None], dtype=object)[clusters]
    tflop = sum((step_tflop[model] * part for model, part in found.work.parts.items()), np.zeros(len(asked)))
    columns: dict[str, Any] = {
        "framework": pl.Series([framework], dtype=pl.String).new_from_index(0, len(asked)),
        "repetition": np.full(len(asked), repetition, dtype=np.int64),
        "request": [r.request for r in asked],
        "device": [r.reply for r in asked],
        "prompt": [r.prompt for r in asked],
        "seed": [r.seed for r in asked],
        "steps": found.work.steps,
        "outcome": ["answered"] * len(asked),
        "cluster": pl.Series(found.cluster).replace(-1, None),
        "public_prompt": pl.Series(worded.tolist(), dtype=pl.String),
        "public_source": pl.Series(source.tolist(), dtype=pl.String),
        "similarity": pl.Series(found.similarity).fill_nan(None),
        "shared_steps": found.work.shared,
        "device_steps": found.work.device,
        "quality": found.quality,
        "latency_s": found.latency,
        "energy_j": found.energy,
        "tflop": tflop,
        "utility": found.utility,
    }
    return pl.DataFrame(columns)


def play(path: Path, console: Console, *, users: int | None, repetitions: int | None, runs: Path) -> Path:
    """Simulate a scenario file, print its table, and return the folder with what was found.

    Raises what ``load_scenario``, ``Simulator.play`` and ``write_simulation`` raise.
    """
    scenario = load_scenario(path)
    if repetitions is not None:
        scenario = msgspec.structs.replace(scenario, repetitions=repetitions)
    if users is not None:
        scenario = with_users(scenario, users)
    prompts = load_prompts(scenario, path.parent)
    if scenario.faults:
        console.print(f"the `faults` of {scenario.name} are left out: in a simulation nothing breaks")
    with console.status("loading") as status:
        simulator = Simulator(Encoder())
        found = simulator.play(
            scenario,
            prompts,
            links=simulator.links_of(scenario, path.parent),
            watch=lambda framework, repetition: status.update(f"{framework}, seed {repetition + 1}"),
        )
    summary = summarise(found.requests, frameworks=scenario.frameworks)
    console.print(render(summary))
    intervals = ", ".join(
        f"{framework} ± {half:.3f}"
        for framework, half in summary.select("framework", "utility_ci95").iter_rows()
        if half
    )
    console.print(
        f"95 % confidence of the mean utility over users: {intervals}\n"
        f"{scenario.users} users ask for {found.requests['prompt'].n_unique()} different prompts; "
        "predicted by the models of cost and quality, nothing was run",
        highlight=False,
    )
    folder = write_simulation(runs, scenario, found)
    console.print(f"tables: {folder}", highlight=False, soft_wrap=True)
    return folder
