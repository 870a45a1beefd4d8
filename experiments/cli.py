"""The command line: ``semct run SCENARIO`` and what helps with it."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import msgspec
import typer
from rich.console import Console

from broker.address import Address, BadAddress
from broker.local import BrokerFailed
from broker.session import BrokerRefused, BrokerUnreachable, Undelivered
from experiments.doors import Doors, NoDoor
from experiments.live.gate import Gate, NoGate, open_gate, url
from experiments.places import PlaceFailed
from experiments.scenario import FOLDER, BadScenario, Scenario, load_scenario, schema
from netem.hosts import NamespaceError, enter_hub

if TYPE_CHECKING:
    from experiments.links import Replay, Set, Show

# What runs the method is imported where it is used: importing it starts threads, and the hub has to be entered
# before there are any; and `--help` answers at once.

app = typer.Typer(
    help="Measures collaborative diffusion inference at the mobile edge on real processes, over a real broker.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def run(
    scenario: Annotated[Path, typer.Argument(help="A scenario file (YAML); see experiments/scenarios/.")],
    *,
    runs: Annotated[Path, typer.Option(help="Where the run folder goes.")] = Path("runs"),
    seed: Annotated[int | None, typer.Option(help="Another seed than the scenario's.")] = None,
    live: Annotated[
        str, typer.Option(metavar="[ADDRESS:]PORT", help="Where the live page is; 0: any free port of loopback.")
    ] = "0",
    listen: Annotated[
        str | None, typer.Option(metavar="ADDRESS[:PORT]", help="Where the scenario's attached devices come in.")
    ] = None,
    authority: Annotated[Path | None, typer.Option(help="Who may come in there: a folder of `semct enroll`.")] = None,
    place: Annotated[
        Literal["local", "compose", "swarm"],
        typer.Option(help="Processes of this machine, containers, or containers on all hosts of a swarm."),
    ] = "local",
    broker: Annotated[
        str | None,
        typer.Option(help="With --place compose, where containers enrol that are up; else they are brought up."),
    ] = None,
) -> None:
    """Run a scenario, print the table, and leave a run folder with a report."""
    try:
        wanted = load_scenario(scenario)
        address = None if broker is None else Address.parse(broker)
    except (BadScenario, BadAddress) as error:
        _give_up(error)
    if seed is not None:
        wanted = msgspec.structs.replace(wanted, seed=seed)
    if place != "local" and address is None:
        _run_in_containers(place, wanted, scenario, seed)
    refused = ""
    try:
        listening = open_gate(live)
        doors = Doors.open(listen, wanted.attached, authority) if listen else None
    except (NoDoor, NoGate) as error:
        _give_up(error)
    if place == "local":
        try:
            enter_hub()
        except NamespaceError as error:
            refused = str(error)
    from experiments.progress import Watcher  # noqa: PLC0415
    from experiments.record import RunFolder, Unwritable  # noqa: PLC0415
    from experiments.runner import RunFailed, compose_place, local_place, play  # noqa: PLC0415
    from semct.compute import UnknownProfile  # noqa: PLC0415
    from semct.diffusion import ModelNotFound  # noqa: PLC0415
    from semct.frameworks import UnknownFramework, UnmetNeed  # noqa: PLC0415
    from semct.quality import QualityModelError, ScorerError  # noqa: PLC0415

    console = Console()
    folder = RunFolder.create(runs, wanted.name)
    place_for = (
        partial(local_place, refused=refused, doors=doors)
        if address is None
        else partial(compose_place, broker=address)
    )
    failure: BaseException | None = None
    try:
        with Watcher(console) as watcher:
            watcher.note(f"watch it at {url(listening)}")
            gate = Gate(listening)
            playing = play(
                wanted, place_for, beside=scenario.parent, folder=folder, watcher=watcher, gate=gate, doors=doors
            )
            asyncio.run(playing)
    except (KeyboardInterrupt, asyncio.CancelledError) as error:
        failure = error
    except (
        BadScenario,
        BrokerFailed,
        BrokerRefused,
        BrokerUnreachable,
        ModelNotFound,
        PlaceFailed,
        QualityModelError,
        RunFailed,
        ScorerError,
        UnknownFramework,
        UnknownProfile,
        UnmetNeed,
        Undelivered,
        Unwritable,
    ) as error:
        failure = error
    _show(console, folder.path)
    if isinstance(failure, KeyboardInterrupt | asyncio.CancelledError):
        sys.exit(130 if isinstance(failure, KeyboardInterrupt) else 143)
    if failure is not None:
        _give_up(failure)


def _run_in_containers(place: str, scenario: Scenario, file: Path, seed: int | None) -> NoReturn:
    """Have Docker run it, and end as it ends."""
    from experiments.places.engine import up  # noqa: PLC0415
    from experiments.places.swarm import deploy  # noqa: PLC0415

    try:
        sys.exit((deploy if place == "swarm" else up)(scenario, file, seed))
    except KeyboardInterrupt:
        sys.exit(130)
    except PlaceFailed as error:
        _give_up(error)


@app.command()
def simulate(
    scenario: Annotated[Path, typer.Argument(help="A scenario file (YAML); see experiments/scenarios/.")],
    users: Annotated[
        int | None, typer.Option(min=1, max=100_000, help="Another number of users than the scenario's.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Another number of repetitions than the scenario's.")] = None,
    runs: Annotated[Path, typer.Option(help="Where the folder with tables goes.")] = Path("runs"),
) -> None:
    """Plan a scenario as its edge would, and print what the models predict: no nodes, up to 100,000 users."""
    from experiments.simulation import play  # noqa: PLC0415

    with _simulating():
        play(scenario, Console(), users=users, repetitions=seeds, runs=runs)


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="A study that comes with the package (paper-table1, ...), or a file.")],
    seeds: Annotated[int | None, typer.Option(min=1, help="Another number of seeds than the study's.")] = None,
    axis: Annotated[list[str] | None, typer.Option(help="Only along this axis (may be given several times).")] = None,
    runs: Annotated[Path, typer.Option(help="Where the folder with tables and figures goes.")] = Path("runs"),
) -> None:
    """Repeat a study of the paper on the models, beside the paper's numbers."""
    from experiments.study_output import play  # noqa: PLC0415

    with _simulating():
        play(name, Console(), seeds=seeds, axes=axis or (), runs=runs)


@app.command()
def plan(
    prompts: Annotated[Path, typer.Argument(help="A text file with a prompt a line, or YAML: a list or a prompt set.")],
    scenario: Annotated[Path, typer.Option(help="Whose hardware, links, weights and planning.")] = FOLDER
    / "scenarios"
    / "quickstart.yaml",
    framework: Annotated[str, typer.Option(help="`semct frameworks` lists them.")] = "semct",
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show what a framework decides for some prompts: clusters, public prompts, splits, shares, and predictions."""
    from experiments.preview import preview, read_prompts, render  # noqa: PLC0415
    from experiments.simulation import Simulator  # noqa: PLC0415
    from semct.compute import UnknownProfile  # noqa: PLC0415
    from semct.diffusion import ModelNotFound  # noqa: PLC0415
    from semct.frameworks import UnknownFramework  # noqa: PLC0415
    from semct.language_model import LanguageModelError  # noqa: PLC0415
    from semct.prompts import load_sentence_encoder  # noqa: PLC0415
    from semct.quality import QualityModelError  # noqa: PLC0415

    try:
        wanted = load_scenario(scenario)
        asked, simulator = read_prompts(prompts), Simulator(load_sentence_encoder())
        found = preview(asked, wanted, framework, simulator, scenario.parent)
    except (
        BadScenario,
        LanguageModelError,
        ModelNotFound,
        QualityModelError,
        UnknownFramework,
        UnknownProfile,
    ) as error:
        _give_up(error)
    if json:
        typer.echo(msgspec.json.format(msgspec.json.encode(found)).decode())
    else:
        Console().print(render(found))


@app.command()
def calibrate(
    profile: Annotated[Path, typer.Argument(help="The profile file to write, such as my-machine.json.")],
    *,
    model: Annotated[str, typer.Option(help="embedded, a diffusers folder, or a Hugging Face id.")] = "embedded",
    rows: Annotated[list[int], typer.Option(min=1, help="Rows of the calls to measure; give it several times.")] = [  # noqa: B006
        1,
        2,
        4,
        8,
    ],
    repeats: Annotated[int, typer.Option(min=1, help="Calls of each size; the fastest counts.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="torch's threads.")] = 1,
    device: Annotated[str, typer.Option(help="torch's device: cpu, cuda, cuda:1.")] = "cpu",
) -> None:
    """Measure this machine's pace with a model into a compute profile that a scenario can name."""
    from experiments.calibrating import measure, render  # noqa: PLC0415
    from semct.diffusion import ModelNotFound  # noqa: PLC0415

    console = Console()
    try:
        found = measure(
            profile, model=model, rows=rows, repeats=repeats, threads=threads, device=device, console=console
        )
    except (ModelNotFound, OSError, ValueError) as error:
        _give_up(error)
    console.print(render(found))
    console.print(f"written to {profile}; name it as `compute:` of an edge or of devices", highlight=False)


@app.command("train-planner")
def train_planner(
    folder: Annotated[Path, typer.Argument(help="Where checkpoint and learning curve go.")],
    *,
    episodes: Annotated[int, typer.Option(min=1)] = 200,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    every: Annotated[int, typer.Option(min=1, help="Episodes between two points of the learning curve.")] = 25,
    quality: Annotated[list[str] | None, typer.Option(help="Quality curves to learn on; sd3-medium, embedded.")] = None,
) -> None:
    """Let agents learn the planner's splits (IPPO) on the cost model, and compare them with the exact planner."""
    from experiments.planner_training import train  # noqa: PLC0415
    from semct.planner.learning import Settings  # noqa: PLC0415
    from semct.quality import QualityModelError  # noqa: PLC0415

    console = Console()
    try:
        missed = train(
            folder,
            Settings(episodes=episodes, seed=seed),
            qualities=quality or ("sd3-medium", "embedded"),
            every=every,
            console=console,
        )
    except (OSError, QualityModelError) as error:
        _give_up(error)
    console.print(f"{100 * missed:.2f} % below the exact planner's utility; left in {folder}", highlight=False)


@app.command()
def quality(
    *,
    model: Annotated[
        str, typer.Option(help="Diffusion model: 'embedded', a folder or a Hugging Face id.")
    ] = "embedded",
    scorer: Annotated[str, typer.Option(help="'embedded', or a CLIP model's folder or Hugging Face id.")] = "embedded",
    prompts: Annotated[str, typer.Option(help="Prompt set to draw pairs from: a name or a YAML file.")] = "embedded",
    pairs: Annotated[
        Path | None, typer.Option(help="CSV with columns public,personal, or root,public,personal, instead of a set.")
    ] = None,
    per_band: Annotated[int, typer.Option(min=1, help="Pairs drawn from a set in each 0.1 of similarity.")] = 24,
    blends: Annotated[int, typer.Option(min=0, help="Means of 2, 3, 4, 8 and 16 prompts drawn from it, each.")] = 24,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each pair.")] = 1,
    at: Annotated[str, typer.Option(help="Shared steps, like '0 4 8'; of triples '0-0 4-12'; else every 4th.")] = "",
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps T.")] = 28,
    batch: Annotated[int, typer.Option(min=1, help="Pairs in one denoiser call.")] = 12,
    device: Annotated[str, typer.Option(help="Torch device.")] = "cpu",
    dtype: Annotated[Literal["float32", "float16", "bfloat16"], typer.Option(help="Of the model.")] = "float32",
    against: Annotated[str, typer.Option(help="Quality model that triples are compared with.")] = "embedded",
    fit: Annotated[Path | None, typer.Option(help="Measure nothing: fit a CSV (public,personal,k0,k1,...).")] = None,
    similarity: Annotated[
        Path | None, typer.Option(help="CSV of cosines of the prompts that --fit names by number.")
    ] = None,
    source: Annotated[str, typer.Option(help="Where what --fit names is from; it stands in the curve file.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for measurements, curves and their plot.")] = Path("quality"),
) -> None:
    """Measure content quality against shared steps, fit the curves that planning uses, and draw them.

    A measurement that was stopped goes on where it was when the same command is given again.
    """
    from experiments import quality as curves  # noqa: PLC0415
    from experiments.measuring import JournalError  # noqa: PLC0415
    from semct.diffusion import ModelNotFound  # noqa: PLC0415
    from semct.quality import QualityModelError, ScorerError  # noqa: PLC0415

    console = Console()
    try:
        if fit is not None:
            curves.fit_file(fit, similarity, out, console, model=model, scorer=scorer, steps=steps, source=source)
            return
        courses = curves.choose(pairs, prompts, per_band, blends)
        order = curves.Order(
            model=model,
            scorer=scorer,
            courses=courses,
            seeds=tuple(range(seeds)),
            cuts=curves.parse_cuts(at, len(courses[0]) - 1, steps),
            steps=steps,
            rows=batch,
            device=device,
            dtype=dtype,
        )
        curves.measure_and_fit(order, out, console, against=against)
    except KeyboardInterrupt:
        typer.echo("semct: stopped; the same command goes on from here", err=True)
        sys.exit(130)
    except (
        BadScenario,
        JournalError,
        ModelNotFound,
        OSError,
        QualityModelError,
        ScorerError,
        curves.BadQualityOrder,
    ) as error:
        _give_up(error)


@app.command("device")
def attach_device(
    broker: Annotated[str, typer.Option(help="Where the testbed's broker is: mqtt://HOST:PORT, mqtts:// with TLS.")],
    name: Annotated[str, typer.Option(help="The place to take, as the scenario's `attached` names it.")],
    *,
    credentials: Annotated[Path | None, typer.Option(help="What to show the broker: a file by `semct enroll`.")] = None,
    testbed: Annotated[str, typer.Option(help="The testbed's name on the broker.")] = "local",
    model: Annotated[str, typer.Option(help="The model to measure this machine's pace with beforehand.")] = "embedded",
    threads: Annotated[int, typer.Option(min=1, help="torch's threads.")] = 1,
    device: Annotated[str, typer.Option(help="auto (a GPU where torch sees one), cpu, or cuda:N.")] = "auto",
    metrics: Annotated[str, typer.Option(help="Where Prometheus may ask: PORT (on loopback) or HOST:PORT.")] = "",
) -> None:
    """Take a place in a running testbed with this machine, which runs its own steps at its own pace."""
    from broker.address import BadAddress  # noqa: PLC0415
    from broker.credentials import BadCredentials  # noqa: PLC0415
    from experiments.attaching import attach  # noqa: PLC0415
    from node.enrolment import make_door  # noqa: PLC0415
    from semct.compute import UnknownProfile  # noqa: PLC0415
    from semct.diffusion import ModelNotFound  # noqa: PLC0415

    try:
        door = make_door(broker, "device", testbed, name, credentials=str(credentials or ""), metrics=metrics)
        attach(door, model=model, device=device, threads=threads, console=Console())
    except KeyboardInterrupt:
        sys.exit(130)
    except (
        BadAddress,
        BadCredentials,
        BrokerRefused,
        BrokerUnreachable,
        ModelNotFound,
        OSError,
        UnknownProfile,
        ValueError,
    ) as error:
        _give_up(error)


@app.command("enroll")
def enroll_name(
    name: Annotated[str, typer.Argument(help="The name of the device, as a scenario's `attached` has it.")] = "",
    *,
    ca: Annotated[
        list[str] | None, typer.Option(help="Make the authority, for a broker at this name or address; repeatable.")
    ] = None,
    role: Annotated[Literal["device", "edge", "runner"], typer.Option(help="What the name is to be.")] = "device",
    folder: Annotated[Path, typer.Option(help="Where the authority is.")] = Path("authority"),
) -> None:
    """Make a device's credentials, and with --ca ADDRESS the local authority that vouches for the broker."""
    from broker.authority import NoAuthority, enroll, make_authority  # noqa: PLC0415

    if not name and not ca:
        _give_up(ValueError("name a device, or give --ca with the address of the broker"))
    try:
        if ca:
            make_authority(folder, ca)
            typer.echo(f"{folder} vouches for a broker at {', '.join(ca)}")
        if name:
            path = enroll(folder, name, role=role)
            typer.echo(f"carry {path} to {name} over a way that you trust, and delete it here")
    except NoAuthority as error:
        _give_up(error)


@app.command("frameworks")
def list_frameworks() -> None:
    """List the inference frameworks that a scenario can name."""
    from semct import frameworks  # noqa: PLC0415

    for name in frameworks.names():
        summary = (sys.modules[frameworks.load(name).__module__].__doc__ or "").strip().splitlines()
        typer.echo(f"{name:18} {summary[0] if summary else ''}")


@app.command("scenarios")
def list_scenarios() -> None:
    """List the scenarios that come with the package."""
    for path in sorted((FOLDER / "scenarios").glob("*.yaml")):
        typer.echo(f"{path}  {load_scenario(path).description}")


@app.command("schema")
def print_schema() -> None:
    """Print the JSON schema of scenario files."""
    typer.echo(msgspec.json.format(msgspec.json.encode(schema())).decode())


@app.command()
def doctor() -> None:
    """Tell what this machine can do for a testbed, and how to get what is missing."""
    from experiments.doctor import examine, render  # noqa: PLC0415

    console = Console()
    with console.status("looking around"):
        findings = list(examine())
    console.print(render(findings))
    if any(f.verdict == "no" for f in findings):
        sys.exit(1)


links = typer.Typer(help="Look at the links of a running testbed, and change them by hand.", no_args_is_help=True)
app.add_typer(links, name="link")

_Node = Annotated[str, typer.Argument(help="A node of the testbed, such as device-3.")]
_Run = Annotated[Path | None, typer.Option(help="The run folder of the testbed; by default the newest that runs.")]
_Runs = Annotated[Path, typer.Option(help="Where run folders are.")]


@links.command("show")
def show_links(run: _Run = None, runs: _Runs = Path("runs")) -> None:
    """Show every link: what was asked for, what shapes it, and what is measured now."""
    from experiments.links import Show  # noqa: PLC0415

    _ask_links(Show(), run, runs)


@links.command("set")
def set_link(
    node: _Node,
    up: Annotated[str | None, typer.Option(help="What it sends, such as 'rate 2mbit delay 50ms loss 1%'.")] = None,
    down: Annotated[str | None, typer.Option(help="What the node receives, in the same words.")] = None,
    run: _Run = None,
    runs: _Runs = Path("runs"),
) -> None:
    """Change a link by hand, whatever the scenario says; with neither --up nor --down it is the scenario's again."""
    from experiments.links import Set, parse_change  # noqa: PLC0415
    from netem.link import BadLink  # noqa: PLC0415

    try:
        question = Set(node=node, up=parse_change(up) if up else None, down=parse_change(down) if down else None)
    except BadLink as error:
        _give_up(error)
    _ask_links(question, run, runs)


@links.command("replay")
def replay_link(
    node: _Node,
    trace: Annotated[Path, typer.Argument(help="A CSV trace; see docs/channels.md.")],
    run: _Run = None,
    runs: _Runs = Path("runs"),
) -> None:
    """Let a link follow a trace from now on, for the rest of the round."""
    from experiments.links import Replay  # noqa: PLC0415

    _ask_links(Replay(node=node, trace=str(trace.resolve())), run, runs)


composing = typer.Typer(help="Compose files for GPUs and swarms.", no_args_is_help=True)
app.add_typer(composing, name="compose")


@composing.command("render")
def render_compose(
    scenario: Annotated[Path, typer.Argument(help="The scenario whose devices it is for.")],
    gpus: Annotated[
        str, typer.Option(help="How many GPUs, or which (indices or UUIDs between commas): the first is the edge's.")
    ] = "",
    *,
    swarm: Annotated[bool, typer.Option("--swarm", help="A stack for `docker stack deploy`.")] = False,
    file: Annotated[Path, typer.Option(help="The testbed's compose file.")] = Path("compose.yaml"),
    out: Annotated[Path | None, typer.Option(help="Where it goes; by default it is printed.")] = None,
) -> None:
    """Make a compose file that gives every device its GPU, or a stack for the hosts of a swarm."""
    from experiments.composing import (  # noqa: PLC0415
        CannotCompose,
        as_stack,
        parse_gpus,
        pin,
        read_compose,
        to_yaml,
        with_gpus,
    )
    from experiments.record import gpus as gpus_here  # noqa: PLC0415

    try:
        wanted = load_scenario(scenario)
        made = read_compose(file, scenario)
        if swarm:
            made = as_stack(made, devices=wanted.users, gpus=bool(gpus))
            use = f"docker stack deploy --resolve-image never -c {out or 'THIS-FILE'} semct"
        elif gpus:
            present = tuple(gpus_here())
            if not present:
                typer.echo("semct: no GPU is seen here, so the file is taken to be for another machine", err=True)
            made = with_gpus(made, pin(wanted.users, parse_gpus(gpus, present)))
            use = f"docker compose -f {out or 'THIS-FILE'} up --exit-code-from experiment"
        else:
            raise CannotCompose(f"without GPUs {file} is used as it is: give --gpus or --swarm")
        text = to_yaml(made, f"Made by `semct compose render` for {wanted.users} devices of {scenario}.\nUse: {use}")
        if out is None:
            typer.echo(text, nl=False)
        else:
            out.write_text(text, encoding="utf-8")
    except (BadScenario, CannotCompose, OSError) as error:
        _give_up(error)


@app.command()
def report(
    run_folders: Annotated[list[Path], typer.Argument(help="A run folder, finished or not; or several to compare.")],
    to: Annotated[Path, typer.Option(help="Of several runs: the folder that gets the page and its figures.")] = Path(
        "comparison"
    ),
) -> None:
    """Write the report of a run again, or one page that compares several.

    Runs are compared framework by framework: their means, and the differences to the first run where the same user
    asked for the same with the same noise; beside them what their scenarios and machines differ in.
    """
    from experiments.comparison import write_comparison  # noqa: PLC0415
    from experiments.record import Unwritable  # noqa: PLC0415
    from experiments.report import write_report  # noqa: PLC0415
    from semct.runs import NotARun  # noqa: PLC0415

    try:
        typer.echo(write_report(run_folders[0]) if len(run_folders) == 1 else write_comparison(run_folders, to))
    except (NotARun, Unwritable) as error:
        _give_up(error)


def main() -> None:
    """The installed command."""
    # What the model libraries have to say at import helps nobody here; the nodes inherit it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    app()


def _show(console: Console, folder: Path) -> None:
    """Print the table of a run, finished or not, and write its report."""
    from experiments.record import Unwritable  # noqa: PLC0415
    from experiments.report import write_report  # noqa: PLC0415
    from experiments.summary import prediction_errors, render, render_errors, summarise  # noqa: PLC0415
    from experiments.trace import write_trace  # noqa: PLC0415
    from semct.runs import NotARun, load_run  # noqa: PLC0415

    try:
        run = load_run(folder)
        if run.requests.height:
            console.print(render(summarise(run.requests, frameworks=run.info.frameworks)))
            console.print(render_errors(prediction_errors(run.requests)))
        if run.info.overruns:
            console.print(f"[bold red]{run.info.overruns} overruns: emulated times are too long; raise `slowdown`[/]")
        write_trace(run)
        console.print(f"report: {write_report(folder)}", highlight=False, soft_wrap=True)
    except (NotARun, Unwritable) as error:
        typer.echo(f"semct: {error}", err=True)


@contextmanager
def _simulating() -> Iterator[None]:
    """Give up in one sentence on what a simulation can fail of."""
    from experiments.simulation import SimulationFailed  # noqa: PLC0415
    from semct.compute import UnknownProfile  # noqa: PLC0415
    from semct.frameworks import UnknownFramework  # noqa: PLC0415
    from semct.language_model import LanguageModelError  # noqa: PLC0415
    from semct.quality import QualityModelError  # noqa: PLC0415

    try:
        yield
    except (
        BadScenario,
        LanguageModelError,
        OSError,
        QualityModelError,
        SimulationFailed,
        UnknownFramework,
        UnknownProfile,
    ) as error:
        _give_up(error)


def _ask_links(question: Show | Set | Replay, run: Path | None, runs: Path) -> None:
    """Put a question to a running testbed, and print what comes back."""
    from experiments.links import ask, newest_running, render  # noqa: PLC0415

    try:
        answer = ask(run or newest_running(runs), question)
    except PlaceFailed as error:
        _give_up(error)
    if answer.error:
        _give_up(ValueError(answer.error))
    Console().print(render(answer.links))


def _give_up(error: BaseException) -> NoReturn:
    typer.echo(f"semct: {error}", err=True)
    sys.exit(1)
