"""What a run leaves: one folder that is readable at any moment, also of a run that failed half-way.

``runs/<utc>-<scenario>-<id>/`` holds ``run.json`` (how the run stands and what it ran on), ``scenario.yaml``,
``events.jsonl`` (a journal, one line as it happens), ``requests.parquet``, ``nodes.parquet``, ``links.parquet``,
``transfers.parquet``, ``stages.parquet``, ``calls.parquet``, ``planning.parquet`` and ``faults.parquet`` (the rows,
written when the folder closes), ``summary.csv``, ``images/`` and ``logs/``.
Rows stand in the journal until then and nowhere else: a run takes as much memory in its last round as in its first, and
one whose process was killed loses none of them.
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self
from urllib.parse import quote

import msgspec
import polars as pl

from experiments.summary import summarise, write_csv
from semct.runs import TABLES, Commit, Hardware, Row, RunInfo, Status, journalled

_LONGEST_LINE = 2**20  # bytes of the journal that a full disk may leave unwritten without a line torn in its midst


class Unwritable(Exception):
    """The record cannot be written: a full disk, missing rights, a folder that vanished."""


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


class RunFolder:
    """The folder of a run in progress. It is a context manager: entering makes the folder, leaving closes it.

    Leaving writes the tables and the final status, whatever happened: ``failed`` with the exception's
    sentence, ``interrupted`` on Ctrl-C or cancellation. Methods raise ``Unwritable``.
    """

    def __init__(self, path: Path, info: RunInfo) -> None:
        self.path = path
        self.info = info
        self._journal: BinaryIO | None = None
        self._readers: list[Callable[[str, Mapping[str, Any]], None]] = []

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
            self._journal = (self.path / "events.jsonl").open("ab", buffering=_LONGEST_LINE)
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

        def tabulate() -> None:
            for table, frame in journalled(self.path).items():
                attempt(self._write, f"{table}.parquet", _parquet(frame))
                if table == "requests":
                    attempt(self._summary, frame)

        status, reason = _ending(error) if error else (self.info.status, self.info.reason)
        ended = {"status": "finished" if status == "running" else status, "reason": reason}
        if status == "failed" and error:
            attempt(self.event, "failed", reason=reason, traceback="".join(traceback.format_exception(error)))
        # The status first: it is small, and a second Ctrl-C or a full disk may stop the rest.
        attempt(self.update, **ended, finished=datetime.now(UTC))
        if self._journal:
            attempt(self._journal.close)
        attempt(tabulate)
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

    def read_along(self, reader: Callable[[str, Mapping[str, Any]], None]) -> None:
        """From now on let ``reader`` have the kind and the fields of every event, too."""
        self._readers.append(reader)

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
        for reader in self._readers:
            reader(kind, fields)

    def add(self, row: Row) -> None:
        """Keep a row; a later row of the same request, node or link replaces it."""
        table = next(name for name, (kind, _) in TABLES.items() if isinstance(row, kind))
        self.event("row", table=table, row=row)

    def image(self, framework: str, request: str, png: bytes) -> str:
        """Keep a picture and return its path inside the folder, for ``RequestRow.image``."""
        name = f"images/{quote(framework, safe='')}-{quote(request, safe='')}.png"
        self._write(name, png)
        return name

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
    sentence = next(iter(str(leaf).splitlines()), "")
    builtin = type(leaf).__module__ == "builtins"  # these say little without their names
    return "failed", f"{type(leaf).__name__}: {sentence}" if builtin and sentence else sentence or repr(leaf)


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
        for line in Path("/proc/cpuinfo").read_text().splitlines():
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
