"""What a run leaves: one folder that is readable at any moment, also of a run that failed half-way.

``runs/<utc>-<scenario>-<id>/`` holds ``run.json`` (how the run stands and what it ran on), ``scenario.yaml``,
``events.jsonl`` (a journal, one line as it happens), ``requests.parquet``, ``nodes.parquet``, ``links.parquet``
and ``transfers.parquet`` (the rows, written when the folder closes), ``summary.csv``, ``images/`` and ``logs/``.
Rows stand in the journal too, so that a run whose process was killed loses none of them.
"""

from __future__ import annotations

import asyncio
import io
import os
import platform
import re
import secrets
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import NoneType, TracebackType, UnionType
from typing import Any, BinaryIO, Literal, Self, get_args, get_type_hints
from urllib.parse import quote

import msgspec
import polars as pl

from experiments.summary import summarise, write_csv

Status = Literal["running", "finished", "failed", "interrupted"]


class Unwritable(Exception):
    """The record cannot be written: a full disk, missing rights, a folder that vanished."""


class NotARun(ValueError):
    """A folder is no run's, or lacks what makes it readable."""


class RequestRow(msgspec.Struct, frozen=True, kw_only=True):
    """One request of one framework in one repetition.

    Suffixes name the units: ``_s`` seconds of the emulated world (divided by the slowdown), ``_j`` joules,
    ``bytes_`` bytes on the wire; ``tflop`` is the request's part of denoising, a step shared by n requests
    counted 1/n. ``quality`` is the content quality in the scorer's unit, ``similarity`` the cosine of
    personal and public prompt. ``shared_steps``, ``edge_steps`` and ``device_steps`` are the paper's x, y and
    z: steps that others share, wherever they run, and own ones on edges and device; ``cloud_steps`` are own ones in
    the cloud. The stages ``upload_s`` ... ``decode_s`` say where the time went; ``relay_s`` and ``bytes_relayed``
    are transfers between edge and cloud nodes, which take no radio energy. ``modelled``: compute time and energy
    come from a compute profile, not from a clock and a meter. ``image`` is a path inside the run folder.
    """

    round: str
    framework: str
    repetition: int
    request: str
    device: str
    prompt: str
    seed: int
    steps: int
    outcome: Literal["answered", "failed", "unanswered"]
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
    energy_edge_j: float = 0.0
    energy_cloud_j: float = 0.0
    energy_device_j: float = 0.0
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
    world; ``memory_mib`` the process's private memory (USS) in MiB; ``alive`` whether it lived at the end.
    ``shortages`` are denoiser calls for which memory did not suffice, after which calls had half as many rows.
    ``cache_*`` are the edge's, where the framework caches latents: requests that started from what was there or coming
    and those that did not, denoising steps that this saved, latents dropped, and the MB that are held at the end.
    """

    round: str
    framework: str
    node: str
    role: str
    denoiser_calls: int
    rows: int
    tflop: float
    busy_s: float
    energy_j: float
    overruns: int
    shortages: int = 0
    cache_hits: int | None = None
    cache_misses: int | None = None
    cache_steps_saved: int | None = None
    cache_evictions: int | None = None
    cache_mb: float | None = None
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


Row = RequestRow | NodeRow | LinkRow | TransferRow

_TABLES: dict[str, tuple[type[Row], tuple[str, ...]]] = {
    "requests": (RequestRow, ("round", "framework", "request")),
    "nodes": (NodeRow, ("round", "framework", "node")),
    "links": (LinkRow, ("round", "framework", "node")),
    "transfers": (TransferRow, ("round", "framework", "request", "sent")),
}
"""Each table's row type, and the fields that tell its rows apart."""

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


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """What a result came from: versions of the libraries, kernel, machine, and the commit of the code."""

    versions: dict[str, str]
    kernel: str
    hardware: Hardware
    commit: Commit | None


def provenance() -> Provenance:
    """What is computing here and now."""
    return Provenance(
        versions=_versions(),
        kernel=f"{platform.system()} {platform.release()}",
        hardware=_hardware(),
        commit=_commit(Path(__file__).resolve().parent.parent),
    )


def new_folder(root: Path, name: str, now: datetime) -> Path:
    """A path below ``root``, named by time, name and six random digits."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:64]
    return root / f"{now:%Y%m%dT%H%M%SZ}-{safe}-{secrets.token_hex(3)}"


class RunInfo(msgspec.Struct, frozen=True, kw_only=True):
    """``run.json``: how a run stands, what was asked of it, and what it ran on.

    ``reason`` is one sentence where the status needs one. ``frameworks`` stand in the scenario's order.
    ``profiles`` maps nodes to their compute profiles. ``overruns`` counts calls that took longer than the
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


class RunFolder:
    """The folder of a run in progress. It is a context manager: entering makes the folder, leaving closes it.

    Leaving writes the tables and the final status, whatever happened: ``failed`` with the exception's
    sentence, ``interrupted`` on Ctrl-C or cancellation. Methods raise ``Unwritable``.
    """

    def __init__(self, path: Path, info: RunInfo) -> None:
        self.path = path
        self.info = info
        self._rows: dict[str, dict[tuple[Any, ...], Row]] = {table: {} for table in _TABLES}
        self._journal: BinaryIO | None = None

    @classmethod
    def create(cls, root: Path, scenario_name: str) -> RunFolder:
        """A new run below ``root``, named by time, scenario and six random digits."""
        now = datetime.now(UTC)
        info = RunInfo(started=now, scenario=scenario_name, **msgspec.structs.asdict(provenance()))
        return cls(new_folder(root, scenario_name, now), info)

    @property
    def logs(self) -> Path:
        """Where processes write their logs."""
        return self.path / "logs"

    def __enter__(self) -> Self:
        try:
            self.path.mkdir(parents=True)
            (self.path / "images").mkdir()
            self.logs.mkdir()
            self._journal = (self.path / "events.jsonl").open("ab")
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self.update()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        problems: list[Exception] = []

        def attempt(action: Callable[..., object], *args: Any, **kwargs: Any) -> None:
            try:
                action(*args, **kwargs)
            except Exception as problem:  # whatever it is, it must not hide what ended the run
                problems.append(problem)

        status, reason = _ending(error) if error else (self.info.status, self.info.reason)
        ended = {"status": "finished" if status == "running" else status, "reason": reason}
        if status == "failed" and error:
            attempt(self.event, "failed", reason=reason, traceback="".join(traceback.format_exception(error)))
        # The status first: it is small, and a second Ctrl-C or a full disk may stop the rest.
        attempt(self.update, **ended, finished=datetime.now(UTC))
        for table, frame in self._tables():
            attempt(self._write, f"{table}.parquet", _parquet(frame))
            if table == "requests":
                attempt(self._summary, frame)
        if self._journal:
            attempt(self._journal.close)
        if problems and error is None:
            attempt(self.update, status="failed", reason=str(problems[0]))
            raise problems[0]
        if problems and error:
            error.add_note(f"Besides, {problems[0]}")

    def update(self, **changes: Any) -> None:
        """Change fields of ``info`` and rewrite ``run.json``; ``TypeError`` for what is no such field."""
        changed = msgspec.structs.replace(self.info, **changes)
        self.info = msgspec.convert(msgspec.to_builtins(changed), RunInfo)
        self._write("run.json", msgspec.json.format(msgspec.json.encode(self.info)) + b"\n")

    def scenario(self, text: str | bytes) -> None:
        """Keep the resolved scenario."""
        self._write("scenario.yaml", text.encode() if isinstance(text, str) else text)

    def event(self, kind: str, /, **fields: Any) -> None:
        """Append a line to the journal, at once: seconds of the Unix epoch, what happened, its fields."""
        if self._journal is None:
            raise ValueError("events belong to a run folder that is open")
        try:
            line = msgspec.json.encode({"time": time.time(), "kind": kind, **fields})
            self._journal.write(line + b"\n")
            self._journal.flush()
        except OSError as error:
            raise _unwritable(self.path / "events.jsonl", error) from error

    def add(self, row: Row) -> None:
        """Keep a row; a later row of the same request, node or link replaces it."""
        table = next(name for name, (kind, _) in _TABLES.items() if isinstance(row, kind))
        self._rows[table][_key(table, row)] = row
        self.event("row", table=table, row=row)

    def image(self, framework: str, request: str, png: bytes) -> str:
        """Keep a picture and return its path inside the folder, for ``RequestRow.image``."""
        name = f"images/{quote(framework, safe='')}-{quote(request, safe='')}.png"
        self._write(name, png)
        return name

    def _tables(self) -> Iterator[tuple[str, pl.DataFrame]]:
        for table, rows in self._rows.items():
            yield table, _frame(_TABLES[table][0], list(rows.values()))

    def _summary(self, requests: pl.DataFrame) -> None:
        self._write("summary.csv", write_csv(summarise(requests, frameworks=self.info.frameworks)).encode())

    def _write(self, name: str, content: bytes) -> None:
        """Whole or not at all: a reader never sees half a file, a full disk keeps no torn one."""
        target = self.path / name
        scratch = target.with_name(f".{target.name}.part")
        try:
            scratch.write_bytes(content)
            scratch.replace(target)
        except OSError as error:
            with suppress(OSError):
                scratch.unlink(missing_ok=True)
            raise _unwritable(target, error) from error


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A run that was read back: ``events`` has the columns time, kind and data (the line as JSON)."""

    path: Path
    info: RunInfo
    scenario: str
    requests: pl.DataFrame
    nodes: pl.DataFrame
    links: pl.DataFrame
    transfers: pl.DataFrame
    events: pl.DataFrame


def load_run(path: Path) -> Run:
    """Read a run, finished or not; tables that a killed run left unwritten are made from its journal.

    Raises ``NotARun`` with one sentence where the folder is none or a file of it cannot be read.
    """
    if not (path / "run.json").is_file():
        raise NotARun(f"{path} is no run: it has no run.json")
    try:
        info = msgspec.json.decode((path / "run.json").read_bytes(), type=RunInfo)
        scenario = _text(path / "scenario.yaml")
    except (OSError, ValueError) as error:
        raise NotARun(f"{path} is no readable run: {error}") from error
    events = _events(path / "events.jsonl")
    tables = {table: _table(path, table, events) for table in _TABLES}
    return Run(path=path, info=info, scenario=scenario, events=events, **tables)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _table(path: Path, table: str, events: pl.DataFrame) -> pl.DataFrame:
    file, kind = path / f"{table}.parquet", _TABLES[table][0]
    if not file.exists():
        return _frame(kind, _journalled(path, table, events))
    try:
        frame = pl.read_parquet(file)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise NotARun(f"{file} cannot be read: {_first_line(error)}") from error
    missing = [c for c, dtype in schema(kind).items() if frame.schema.get(c) != dtype]
    if missing:
        raise NotARun(f"{file} was not written by this version: no fitting column {', '.join(missing)}")
    return frame


def _journalled(path: Path, table: str, events: pl.DataFrame) -> list[Row]:
    kind = _TABLES[table][0]
    rows: dict[tuple[Any, ...], Row] = {}
    try:
        for line in events.filter(pl.col("kind") == "row")["data"]:
            event = msgspec.json.decode(line)
            if event["table"] == table:
                row = msgspec.convert(event["row"], kind)
                rows[_key(table, row)] = row
    except (KeyError, msgspec.ValidationError) as error:
        raise NotARun(f"{path / 'events.jsonl'} holds a row that is none of {table}: {error}") from error
    return list(rows.values())


class _Event(msgspec.Struct):
    time: float
    kind: str


def _events(path: Path) -> pl.DataFrame:
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    decoder = msgspec.json.Decoder(_Event)
    times: list[float] = []
    kinds: list[str] = []
    for number, line in enumerate(lines[:-1], 1):  # a killed run may leave a torn last line
        try:
            event = decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise NotARun(f"line {number} of {path} is no event: {error}") from error
        times.append(event.time)
        kinds.append(event.kind)
    data = [line.decode(errors="replace") for line in lines[:-1]]
    columns = {"time": pl.Float64, "kind": pl.String, "data": pl.String}
    return pl.DataFrame({"time": times, "kind": kinds, "data": data}, schema=columns)


def _key(table: str, row: Row) -> tuple[Any, ...]:
    return tuple(getattr(row, field) for field in _TABLES[table][1])


def _frame(kind: type[Row], rows: list[Row]) -> pl.DataFrame:
    columns = schema(kind)
    return pl.DataFrame([msgspec.structs.astuple(row) for row in rows], schema=columns, orient="row")


def _parquet(frame: pl.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    return buffer.getvalue()


def _unwritable(path: Path, error: OSError) -> Unwritable:
    return Unwritable(f"the run cannot be recorded, {path} cannot be written: {error.strerror or error}")


def _ending(error: BaseException) -> tuple[Status, str]:
    """How a run stands that this exception ended, and the sentence that says why."""
    leaf = error
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    if isinstance(leaf, KeyboardInterrupt):
        return "interrupted", "stopped by Ctrl-C"
    if isinstance(leaf, asyncio.CancelledError):
        return "interrupted", "stopped before its end"  # asyncio.run makes this of Ctrl-C
    sentence = _first_line(leaf)
    builtin = type(leaf).__module__ == "builtins"  # these say little without their names
    return "failed", f"{type(leaf).__name__}: {sentence}" if builtin and sentence else sentence or repr(leaf)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    wanted = ("semct", "torch", "diffusers", "transformers", "numpy", "polars", "msgspec", "aiomqtt", "amqtt")
    for name in wanted:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _hardware() -> Hardware:
    return Hardware(
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=tuple(gpus()),
    )


def _cpu() -> str:
    with suppress(OSError):
        for line in _text(Path("/proc/cpuinfo")).splitlines():
            key, _, value = line.partition(":")
            if key.strip() in {"model name", "Model"}:  # x86 and some ARM boards
                return value.strip()
    return platform.processor() or platform.machine()


def gpus() -> Iterator[str]:
    """NVIDIA's driver names its GPUs here, without a CUDA context or a child process."""
    with suppress(OSError):
        for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
            model = re.search(r"^Model:\s*(.+)$", path.read_text(), re.MULTILINE)
            yield model[1].strip() if model else "NVIDIA GPU"


def _commit(root: Path) -> Commit | None:
    """The commit of the checkout the package lies in, none where it was installed or git is absent."""

    surroundings = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}  # a hook's point elsewhere

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        done = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:  # some other project's checkout around a venv
            return None
        return Commit(id=git("rev-parse", "HEAD"), dirty=bool(git("status", "--porcelain")))
    except (OSError, subprocess.SubprocessError):
        return None
