"""What a run left, read back as DataFrames: the types of its tables' rows, and how it stood.

The one reader of run folders, for researchers as ``semct.load_run``. It lives with the method, and not with the
experiments that write the folders, so that reading a result takes polars and nothing of the testbed.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from itertools import islice
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import msgspec
import polars as pl

Status = Literal["running", "finished", "failed", "interrupted"]


class NotARun(ValueError):
    """A folder is no run's, or lacks what makes it readable."""


class RequestRow(msgspec.Struct, frozen=True, kw_only=True):
    """One request of one framework in one repetition.

    Suffixes name the units: ``_s`` seconds of the emulated world (divided by the slowdown), ``_j`` joules,
    ``bytes_`` bytes on the wire; ``tflop`` is the request's part of denoising, a step shared by n requests
    counted 1/n. ``quality`` is the content quality in the scorer's unit; ``fidelity`` (CLIP-IQA, 0 to 1) judges the
    picture by itself, where the scenario names a scorer for that; ``pixel_difference`` is the mean absolute difference
    of its channels, 0 to 255, from the user's device-only picture of the same noise. ``similarity`` is the cosine of
    personal and public prompt. ``shared_steps``, ``edge_steps`` and ``device_steps`` are the paper's x, y and
    z: steps that others share, wherever they run, and own ones on edges and device; ``cloud_steps`` are own ones in
    the cloud. The stages ``upload_s`` ... ``decode_s`` say where the time went; ``relay_s`` and ``bytes_relayed``
    are transfers between edge and cloud nodes, which take no radio energy. ``modelled``: compute time and energy
    come from a compute profile, not from a clock and a meter; what a node without a meter took is null, and so is then
    the energy of the whole. ``image`` is a path inside the run folder.
    An outcome is ``degraded`` where the edge did not answer in time and the device did it alone: then what was planned
    and predicted is not what was done, and stands empty. ``reason`` says why an outcome is not ``answered``.
    """

    round: str
    framework: str
    repetition: int
    request: str
    device: str
    prompt: str
    seed: int
    steps: int
    outcome: Literal["answered", "degraded", "failed"]
    reason: str = ""
    cluster: int | None = None
    public_prompt: str | None = None
    public_source: str | None = None
    similarity: float | None = None
    shared_steps: int | None = None
    edge_steps: int | None = None
    cloud_steps: int | None = None
    device_steps: int | None = None
    quality: float | None = None
    fidelity: float | None = None
    pixel_difference: float | None = None
    latency_s: float | None = None
    energy_j: float | None = None
    tflop: float | None = None
    utility: float | None = None
    predicted_quality: float | None = None
    predicted_latency_s: float | None = None
    predicted_energy_j: float | None = None
    predicted_utility: float | None = None
    upload_s: float = 0.0
    collect_s: float = 0.0
    plan_s: float = 0.0
    queue_s: float = 0.0
    edge_denoise_s: float = 0.0
    cloud_denoise_s: float = 0.0
    relay_s: float = 0.0
    download_s: float = 0.0
    device_denoise_s: float = 0.0
    decode_s: float = 0.0
    energy_edge_j: float | None = 0.0
    energy_cloud_j: float | None = 0.0
    energy_device_j: float | None = 0.0
    energy_radio_j: float = 0.0
    bytes_up: int = 0
    bytes_relayed: int = 0
    bytes_down: int = 0
    overruns: int = 0
    modelled: bool = False
    image: str | None = None


class NodeRow(msgspec.Struct, frozen=True, kw_only=True):
    """What one node spent on one round.

    ``rows`` are denoised latents summed over the ``denoiser_calls``; ``busy_s`` seconds of the emulated
    world; ``energy_j`` what denoising took, null where nothing measures it; ``memory_mib`` the process's private
    memory (USS; of a container its anonymous memory) in MiB; ``alive`` whether it lived at the end.
    ``shortages`` are denoiser calls for which memory did not suffice, after which calls had half as many rows.
    ``clock_ahead_s`` is how far the node's clock was ahead of the runner's, give or take ``clock_uncertainty_s``; all
    times in the record are the runner's, with what is beyond the uncertainty taken off. ``cache_*`` are the edge's,
    where the framework caches latents: requests that started from what was there or coming and those that did not,
    denoising steps that this saved, latents dropped, and the MB that are held at the end.
    """

    round: str
    framework: str
    node: str
    role: str
    denoiser_calls: int
    rows: int
    tflop: float
    busy_s: float
    energy_j: float | None
    overruns: int
    shortages: int = 0
    cache_hits: int | None = None
    cache_misses: int | None = None
    cache_steps_saved: int | None = None
    cache_evictions: int | None = None
    cache_mb: float | None = None
    clock_ahead_s: float | None = None
    clock_uncertainty_s: float | None = None
    memory_mib: float | None = None
    alive: bool = True


class LinkRow(msgspec.Struct, frozen=True, kw_only=True):
    """A node's link in one round: as asked for when the round began, as read back from what shaped it, as measured.

    ``up`` is what the node sends, ``down`` what it receives. ``requested_up`` and the like are whole states in
    words; rates are bit/s, delays one-way seconds (without the jitter), all of the emulated world. ``changes``
    counts those within the round. Measured are the median goodput of large transfers, headers not counted, and
    the median of the time that small messages took over the whole way; null where there was none. What follows
    is known of userspace links only: packets lost as asked and packets dropped by a full queue in the round, and
    how late the 99th percentile of the run's packets left so far, in wall seconds: large where the machine was
    too slow for its links.
    """

    round: str
    framework: str
    node: str
    implementation: str
    changes: int = 0
    requested_up: str = ""
    requested_down: str = ""
    applied_up: str = ""
    applied_down: str = ""
    requested_up_rate_bps: float | None = None
    requested_up_delay_s: float | None = None
    requested_down_rate_bps: float | None = None
    requested_down_delay_s: float | None = None
    measured_up_rate_bps: float | None = None
    measured_up_delay_s: float | None = None
    measured_down_rate_bps: float | None = None
    measured_down_delay_s: float | None = None
    up_lost: int | None = None
    up_dropped: int | None = None
    up_late_s: float | None = None
    down_lost: int | None = None
    down_dropped: int | None = None
    down_late_s: float | None = None


class TransferRow(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a request on its way between two nodes, beside what the links on it were asked to give.

    ``seconds`` are from handing it to the sender's session to its arrival, of the emulated world; ``size`` its
    payload in bytes. ``limit_bps`` is the lowest rate of the links on the way and ``delay_s`` the sum of their
    delays when it was sent; null where nothing limits them.
    """

    round: str
    framework: str
    request: str
    sender: str
    receiver: str
    sent: float
    size: int
    seconds: float
    goodput_bps: float
    limit_bps: float | None = None
    delay_s: float | None = None


class FaultRow(msgspec.Struct, frozen=True, kw_only=True):
    """A fault of a round: what the scenario had happen to ``node`` (a node or ``broker``).

    ``at_s`` and ``lasts_s`` are as the scenario has them, seconds after the round began and of the emulated world
    (null: to the end of the round); ``began`` and ``ended`` when it really happened (wall clock, epoch), null where it
    did not: ``note`` says why. ``loss`` is the part of packets that a lossy link lost.
    """

    round: str
    framework: str
    fault: int
    what: str
    node: str
    at_s: float
    lasts_s: float | None = None
    loss: float | None = None
    began: float | None = None
    ended: float | None = None
    note: str = ""


class StageRow(msgspec.Struct, frozen=True, kw_only=True):
    """One stretch of a request's time on one node: what ``name`` says, from ``start`` to ``stop`` (wall clock, epoch).

    ``seconds`` are of the emulated world: the slowdown divided out, but for planning, which is not slowed down.
    ``joules``, ``tflop`` and ``steps`` are the request's own part where the work was shared; joules that nothing
    measured are null. ``to`` is a transfer's
    receiver and ``size`` what it put on the wire, in bytes.
    """

    round: str
    framework: str
    request: str
    name: str
    node: str
    start: float
    stop: float
    seconds: float
    joules: float | None = 0.0
    tflop: float = 0.0
    steps: float = 0.0
    size: int = 0
    to: str | None = None
    overruns: int = 0
    modelled: bool = False


class CallRow(msgspec.Struct, frozen=True, kw_only=True):
    """One denoiser call of a node: from ``start`` to ``stop`` (wall clock, epoch), with so many ``rows``.

    ``first_step`` and ``last_step`` are the lowest and the highest denoising step among its rows.
    """

    round: str
    framework: str
    node: str
    start: float
    stop: float
    model: str
    rows: int
    first_step: int
    last_step: int


class PlanningRow(msgspec.Struct, frozen=True, kw_only=True):
    """One part of planning a batch of requests: how many wall seconds it took in all.

    ``began`` is when planning of the batch began (wall clock, epoch); the parts follow each other in their order, and
    what one of them did in several goes stands as one.
    """

    round: str
    framework: str
    node: str
    batch: int
    part: str
    began: float
    seconds: float


Row = RequestRow | NodeRow | LinkRow | TransferRow | StageRow | CallRow | PlanningRow | FaultRow

TABLES: dict[str, tuple[type[Row], tuple[str, ...]]] = {
    "requests": (RequestRow, ("round", "framework", "request")),
    "nodes": (NodeRow, ("round", "framework", "node")),
    "links": (LinkRow, ("round", "framework", "node")),
    "transfers": (TransferRow, ("round", "framework", "request", "sent")),
    "stages": (StageRow, ("round", "framework", "request", "node", "name", "start")),
    "calls": (CallRow, ("round", "framework", "node", "start")),
    "planning": (PlanningRow, ("round", "framework", "batch", "part")),
    "faults": (FaultRow, ("round", "framework", "fault")),
}
"""Each table's row type, and the fields that tell its rows apart."""

_AT_ONCE = 4096  # rows of the journal that are Python's objects

_DTYPES: dict[Any, Any] = {str: pl.String, int: pl.Int64, float: pl.Float64, bool: pl.Boolean}


def schema(row: type[Row]) -> pl.Schema:
    """The columns of a table of these rows; the struct is their one source."""
    return pl.Schema({name: _dtype(hint) for name, hint in get_type_hints(row).items()})


def _dtype(hint: Any) -> Any:
    if isinstance(hint, UnionType):
        (hint,) = (part for part in get_args(hint) if part is not NoneType)
    return _DTYPES.get(hint, pl.String)  # what remains are literals of strings


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """The machine of a run; ``cores`` are those this process may use, ``memory_bytes`` the machine's RAM."""

    cpu: str
    cores: int
    memory_bytes: int
    gpus: tuple[str, ...] = ()


class Commit(msgspec.Struct, frozen=True, kw_only=True):
    """The git commit the code ran from; ``dirty`` says that files differed from it."""

    id: str
    dirty: bool


class RunInfo(msgspec.Struct, frozen=True, kw_only=True):
    """``run.json``: how a run stands, what was asked of it, and what it ran on.

    ``reason`` is one sentence where the status needs one. ``frameworks`` stand in the scenario's order.
    ``profiles`` maps nodes to their compute profiles, and ``meters`` native ones to what measured their energy, where
    something did. ``overruns`` counts calls that took longer than the
    hardware they emulate. ``device_memory_mib`` is the private memory (USS) of each device process in MiB.
    """

    status: Status = "running"
    reason: str = ""
    started: datetime
    finished: datetime | None = None
    scenario: str
    seed: int | None = None
    frameworks: tuple[str, ...] = ()
    model: str | None = None
    compute: Literal["native", "emulated", "mixed"] | None = None
    profiles: dict[str, str] = {}
    meters: dict[str, str] = {}
    slowdown: float = 1.0
    overruns: int = 0
    broker: str | None = None
    link: str | None = None
    hosts: str | None = None
    device_memory_mib: tuple[float, ...] = ()
    versions: dict[str, str] = {}
    kernel: str = ""
    hardware: Hardware | None = None
    commit: Commit | None = None


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A run that was read back: ``events`` has the columns time, kind and data (the line as JSON)."""

    path: Path
    info: RunInfo
    scenario: str
    requests: pl.DataFrame
    nodes: pl.DataFrame
    links: pl.DataFrame
    transfers: pl.DataFrame
    stages: pl.DataFrame
    calls: pl.DataFrame
    planning: pl.DataFrame
    faults: pl.DataFrame
    events: pl.DataFrame


def load_run(path: str | Path) -> Run:
    """Read a run, finished or not; tables that a killed run left unwritten are made from its journal.

    Raises ``NotARun`` with one sentence where the folder is none or a file of it cannot be read.
    """
    path = Path(path)
    if not (path / "run.json").is_file():
        raise NotARun(f"{path} is no run: it has no run.json")
    try:
        info = msgspec.json.decode((path / "run.json").read_bytes(), type=RunInfo)
        scenario = _text(path / "scenario.yaml")
    except (OSError, ValueError) as error:
        raise NotARun(f"{path} is no readable run: {error}") from error
    unwritten = [table for table in TABLES if not (path / f"{table}.parquet").exists()]
    journal = journalled(path) if unwritten else {}
    tables = {table: journal[table] if table in unwritten else _table(path, table) for table in TABLES}
    return Run(path=path, info=info, scenario=scenario, events=_events(path), **tables)


def journalled(path: Path) -> dict[str, pl.DataFrame]:
    """The tables that the journal of a run's folder holds; a later row of the same key replaces the earlier one.

    Only some rows at a time are Python's objects, which take several times what a table does: a long run has millions.
    Raises ``NotARun`` where a line is no event, or holds a row of none of the tables.
    """
    frames = {table: table_of(kind, []) for table, (kind, _) in TABLES.items()}
    decoders = {table: msgspec.json.Decoder(kind) for table, (kind, _) in TABLES.items()}
    events = (event for _, event in _lines(path, _RowEvent) if event.kind == "row")
    while some := list(islice(events, _AT_ONCE)):
        rows: dict[str, list[Row]] = {table: [] for table in TABLES}
        for event in some:
            try:
                rows[event.table].append(decoders[event.table].decode(event.row))
            except (KeyError, msgspec.DecodeError) as error:
                journal = path / "events.jsonl"
                raise NotARun(f"{journal} holds a row that is none of {event.table or 'a table'}: {error}") from error
        for table, frame in frames.items():
            frame.extend(table_of(TABLES[table][0], rows[table]))
    return {
        table: frame.group_by(TABLES[table][1], maintain_order=True).last().select(frame.columns)
        for table, frame in frames.items()
    }


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _table(path: Path, table: str) -> pl.DataFrame:
    file, kind = path / f"{table}.parquet", TABLES[table][0]
    try:
        frame = pl.read_parquet(file)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise NotARun(f"{file} cannot be read: {next(iter(str(error).splitlines()), '')}") from error
    missing = [c for c, dtype in schema(kind).items() if frame.schema.get(c) != dtype]
    if missing:
        raise NotARun(f"{file} was not written by this version: no fitting column {', '.join(missing)}")
    return frame


class _Event(msgspec.Struct):
    time: float
    kind: str


class _RowEvent(_Event):
    table: str = ""
    row: msgspec.Raw = msgspec.Raw()


_AnEvent = TypeVar("_AnEvent", bound=_Event)


def _events(path: Path) -> pl.DataFrame:
    times: list[float] = []
    kinds: list[str] = []
    data: list[str] = []
    for line, event in _lines(path, _Event):
        times.append(event.time)
        kinds.append(event.kind)
        data.append(line.decode(errors="replace"))
    columns = {"time": pl.Float64, "kind": pl.String, "data": pl.String}
    return pl.DataFrame({"time": times, "kind": kinds, "data": data}, schema=columns)


def _lines(path: Path, kind: type[_AnEvent]) -> Iterator[tuple[bytes, _AnEvent]]:
    """The lines of the journal in a run's folder, and what stands in them."""
    file = path / "events.jsonl"
    if not file.exists():
        return
    decoder = msgspec.json.Decoder(kind)
    with file.open("rb") as journal:
        for number, line in enumerate(journal, 1):
            if not line.endswith(b"\n"):  # a killed run may leave a torn last line
                return
            try:
                event = decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise NotARun(f"line {number} of {file} is no event: {error}") from error
            yield line[:-1], event


def table_of(kind: type[Row], rows: list[Row]) -> pl.DataFrame:
    """Rows as a table, empty ones with its columns."""
    columns = schema(kind)
    return pl.DataFrame([msgspec.structs.astuple(row) for row in rows], schema=columns, orient="row")
