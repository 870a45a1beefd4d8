"""What this machine can do for a testbed, and how to get what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec
import psutil
from rich.table import Table
from rich.text import Text

from broker.local import LocalBroker
from experiments.record import gpus

Verdict = Literal["yes", "no", "optional"]

_CONGESTION = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")


class Finding(msgspec.Struct, frozen=True):
    """One thing looked at: ``optional`` is something missing that a testbed can do without."""

    what: str
    verdict: Verdict
    said: str


def examine() -> Iterator[Finding]:
    """Look at one thing after the other. Namespaces and links are tried in child processes, and leave nothing."""
    for look in (_python, _machine, _namespaces, _netem, _userspace, _congestion, _broker, _writer, _gpus, _docker):
        yield look()


def render(findings: list[Finding]) -> Table:
    """The findings for a terminal."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    marks = {"yes": Text("yes", "bold green"), "no": Text("no", "bold red"), "optional": Text("no", "dim")}
    for finding in findings:
        table.add_row(marks[finding.verdict], finding.what, finding.said)
    return table


def _python() -> Finding:
    return Finding("Python", "yes", f"{platform.python_version()}, torch {importlib.metadata.version('torch')}")


def _machine() -> Finding:
    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory()
    said = f"{cores} cores, {memory.total / 2**30:.0f} GiB of memory, {memory.available / 2**30:.0f} GiB of it free"
    if memory.available < 3 * 2**30:
        return Finding("machine", "no", f"{said}: edge and devices want 3 GiB")
    return Finding("machine", "yes", said)


def _namespaces() -> Finding:
    done = _tried("from netem.hosts import enter_hub; enter_hub()")
    if done.returncode:
        return Finding("network namespaces", "no", _last_line(done))
    who = "as root" if os.geteuid() == 0 else "in a user namespace"
    return Finding("network namespaces", "yes", f"permitted, {who}: each device has its own")


def _netem() -> Finding:
    return _links("netem", "NetemLinks", "netem.kernel", "links in the kernel")


def _userspace() -> Finding:
    return _links("userspace", "UserspaceLinks", "netem.userspace", "links in userspace")


def _links(name: str, kind: str, module: str, what: str) -> Finding:
    """Open this kind of links in a hub of its own and close it again."""
    done = _tried(
        "import sys\n"
        "from netem.hosts import LinksUnavailable, enter_hub\n"
        f"from {module} import {kind}\n"
        "enter_hub()\n"
        f"links = {kind}()\n"
        "try:\n"
        "    links.open()\n"
        "except LinksUnavailable as error:\n"
        "    sys.exit(str(error))\n"
        "links.close()\n"
    )
    if done.returncode:
        return Finding(what, "optional", _last_line(done))
    return Finding(what, "yes", f"`links.shaped_by: {name}` works here")


def _congestion() -> Finding:
    have = _CONGESTION.read_text().split() if _CONGESTION.exists() else []
    return Finding("congestion control", "yes" if "cubic" in have else "optional", f"this kernel has {', '.join(have)}")


def _broker() -> Finding:
    broker = LocalBroker(hosts=["127.0.0.1"], port=1883, directory=Path())
    if broker.implementation == "amqtt":
        return Finding("mosquitto", "optional", f"not installed: {broker.version} from pip is the broker, and slower")
    return Finding("mosquitto", "yes", broker.version)


def _writer() -> Finding:
    from semct.language_model import LanguageModelError, prepare  # noqa: PLC0415

    try:
        return Finding("language model", "yes", f"SmolLM2 is ready in {prepare()}")
    except LanguageModelError as error:
        return Finding("language model", "optional", f"{error}; `planning.writer: medoid` needs none")


def _gpus() -> Finding:
    found = list(gpus())
    if not found:
        return Finding("GPU", "optional", "none: the embedded model runs on the CPU, times are those of a profile")
    return Finding("GPU", "yes", ", ".join(found))


def _docker() -> Finding:
    if shutil.which("docker") is None:
        return Finding("Docker", "optional", "not installed: local testbeds need none")
    command = ["docker", "version", "--format", "{{.Server.Version}}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    if done.returncode:
        return Finding("Docker", "optional", _last_line(done))
    # What the engine looks for itself.
    lacks = any(gpus()) and shutil.which("nvidia-container-runtime-hook") is None
    more = ": without NVIDIA's container toolkit, containers get no GPU" if lacks else ""
    return Finding("Docker", "yes", f"engine {done.stdout.strip()}{more}")


def _tried(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"ended with status {done.returncode}"
