"""``semct plan``: what a framework would decide for a file of prompts, without running anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from broker import messages
from experiments.node_settings import device_settings
from experiments.scenario import BadScenario, PromptSet, Scenario
from experiments.simulation import Simulator, with_users
from semct.routes import Plan, Prediction, shared_steps, wording


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a plan: its split x, y, z, and what is predicted for it."""

    device: str
    prompt: str
    similarity: float | None
    shared: int
    edge: int
    on_device: int
    quality: float
    latency: float
    energy: float
    utility: float


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """A cluster of a plan; requests without one stand together under none."""

    public_prompt: str | None
    source: str | None
    share: float | None
    requests: tuple[Line, ...]


class Preview(msgspec.Struct, frozen=True, kw_only=True):
    """A plan as people and programs read it; ``gap`` is the planner's proven distance to the best mean utility."""

    framework: str
    scenario: str
    seconds: dict[str, float]
    gap: float | None
    utility: float
    clusters: tuple[Shown, ...]


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a text file, one a line, or of a YAML file: a list, or a prompt set. Raises ``BadScenario``."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadScenario(f"the prompts {path} cannot be read: {error}") from error
    if path.suffix in {".yaml", ".yml"}:
        try:
            found = msgspec.convert(yaml.safe_load(text), tuple[str, ...] | PromptSet)
        except (yaml.YAMLError, msgspec.ValidationError) as error:
            raise BadScenario(f"{path} is neither a list of prompts nor a prompt set: {error}") from error
        prompts = found if isinstance(found, tuple) else tuple(p for g in found.groups for p in g.prompts)
    else:
        prompts = tuple(line.strip() for line in text.splitlines())
    prompts = tuple(p for p in prompts if p)
    if not prompts:
        raise BadScenario(f"{path} holds no prompts")
    return prompts


def preview(prompts: Sequence[str], scenario: Scenario, framework: str, simulator: Simulator, beside: Path) -> Preview:
    """Plan these prompts as the scenario's edge would, a device of the scenario's kinds for each.

    The scenario's groups of devices keep their proportions, and links are as when a run's first round begins; trace
    files lie ``beside`` the scenario. Latency is without the time of planning, which a cold start here would
    overstate. Raises what the framework, the scenario's names and its links raise.
    """
    fitted = with_users(scenario, len(prompts))
    planner, _ = simulator.planner(fitted, simulator.links_of(fitted, beside)(0))
    asked = [
        messages.Request(
            round="plan",
            request=f"{number:05}",
            reply=device.name,
            prompt=prompt,
            seed=scenario.seed,
            steps=scenario.steps,
            sent=0.0,
            deadline=0.0,
        )
        for number, (device, prompt) in enumerate(zip(device_settings(fitted), prompts, strict=True))
    ]
    order = messages.Round(
        round="plan", framework=framework, seed=scenario.seed, requests=len(asked), window=scenario.window
    )
    plan, seconds = planner.plan(order, asked)
    expected = planner.forecast(order, asked, plan, planning=0.0)
    clusters = _clusters(expected, asked)
    utility = sum(p.utility for p in expected.predictions.values()) / len(asked)
    return Preview(
        framework=framework,
        scenario=scenario.name,
        seconds=seconds,
        gap=plan.gap,
        utility=utility,
        clusters=tuple(clusters),
    )


def render(found: Preview) -> Group:
    """The plan for a terminal: a table per cluster."""
    parts: list[Table | Text] = []
    for cluster in found.clusters:
        title = Text("no cluster" if cluster.public_prompt is None else cluster.public_prompt, "bold")
        if cluster.share is not None:
            title.append(f"  ({cluster.source}; {100 * cluster.share:.0f} % of the edge)", "dim not bold")
        table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", header_style="bold")
        table.add_column("prompt", ratio=1)
        for name in ("cosine", "x / y / z", "quality", "seconds", "joules", "utility"):
            table.add_column(name, justify="right", no_wrap=True)
        for r in cluster.requests:
            cosine = "-" if r.similarity is None else f"{r.similarity:.2f}"
            split = f"{r.shared} / {r.edge} / {r.on_device}"
            numbers = (f"{r.quality:.3f}", f"{r.latency:.1f}", f"{r.energy:.0f}", f"{r.utility:.3f}")
            table.add_row(Text(r.prompt), cosine, split, *numbers)
        parts.append(table)
    proof = "" if found.gap is None else f", proven to be within {found.gap:.1g} of the best in the planner's model"
    parts.append(
        Text(
            f"{found.framework} in {found.scenario}: mean utility {found.utility:.3f}{proof}; "
            f"planned in {found.seconds['total']:.2f} s. "
            "x shared steps, y own steps on the edge, z on the device; seconds without planning.",
            "dim",
        )
    )
    return Group(*parts)


def _clusters(plan: Plan, asked: Sequence[messages.Request]) -> list[Shown]:
    shared = shared_steps(plan.routes)
    routes = {r.request: r for r in plan.routes}
    similarity = {m: phi for c in plan.clusters for m, phi in zip(c.members, c.similarity, strict=True)}

    def line(request: messages.Request) -> Line:
        route = routes[request.request]
        told: Prediction = plan.predictions[request.request]
        on_device = sum(s.stop - s.start for s in route.segments if s.node == request.reply)
        return Line(
            device=request.reply,
            prompt=request.prompt,
            similarity=similarity.get(request.request),
            shared=shared[request.request],
            edge=request.steps - shared[request.request] - on_device,
            on_device=on_device,
            quality=told.quality,
            latency=told.latency,
            energy=told.energy,
            utility=told.utility,
        )

    lines = {r.request: line(r) for r in asked}
    clusters = [
        Shown(
            public_prompt=wording(c.public_prompt),
            source=c.source,
            share=c.share,
            requests=tuple(lines[m] for m in c.members),
        )
        for c in plan.clusters
    ]
    members = {m for c in plan.clusters for m in c.members}
    rest = tuple(found for request, found in lines.items() if request not in members)
    return [*clusters, *([Shown(public_prompt=None, source=None, share=None, requests=rest)] if rest else [])]
