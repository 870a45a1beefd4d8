"""What a node shows Prometheus, where it is told to: totals of its engine and its session, in the text format 0.0.4."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from broker.address import listener
from broker.session import Session
from node.worker import Worker

_PATIENCE = 5.0  # seconds for a question to be put
_LONGEST = 8192  # bytes of a question
_STATM = Path("/proc/self/statm")

_logger = logging.getLogger(__name__)


class Metric(NamedTuple):
    """One quantity: its name without the prefix, what it is, its value by label, and whether it only grows.

    A value without a label has an empty one.
    """

    name: str
    says: str
    values: Mapping[str, float]
    grows: bool = True


def metrics_of(worker: Worker, session: Session) -> tuple[Metric, ...]:
    """What there is to know of a node now."""
    done = worker.totals
    dropped = {f'reason="{reason}"': float(count) for reason, count in session.dropped.items()}
    return (
        Metric("denoiser_calls_total", "Denoiser calls.", {"": done.calls}),
        Metric("denoiser_rows_total", "Rows of denoiser calls: steps, each once.", {"": done.rows}),
        Metric("busy_seconds_total", "Time in denoiser calls, in the emulated world.", {"": done.seconds}),
        Metric("energy_joules_total", "Energy of denoiser calls.", {"": done.joules}),
        Metric("flops_total", "Floating-point operations of denoiser calls.", {"": done.flops}),
        Metric("overruns_total", "Calls that took longer than on the emulated hardware.", {"": done.overruns}),
        Metric("shortages_total", "Calls for which memory did not suffice.", {"": done.shortages}),
        Metric("dropped_messages_total", "Messages that did not get through.", dropped),
        Metric("connections_total", "Connections to the broker made.", {"": session.connections}),
        Metric("requests_under_way", "Requests that the engine works on.", {"": worker.under_way}, grows=False),
        Metric("resident_bytes", "Memory that the process has in use.", {"": _resident()}, grows=False),
    )


def exposition(metrics: tuple[Metric, ...], *, node: str, role: str) -> str:
    """The metrics as Prometheus reads them."""
    lines = []
    for metric in metrics:
        name = f"semct_{metric.name}"
        lines += [f"# HELP {name} {metric.says}", f"# TYPE {name} {'counter' if metric.grows else 'gauge'}"]
        for label, value in metric.values.items():
            labels = ",".join(filter(None, (f'node="{node}"', f'role="{role}"', label)))
            lines.append(f"{name}{{{labels}}} {value:.17g}")
    return "\n".join((*lines, ""))


def parse_listener(text: str) -> tuple[str, int]:
    """Where to listen, from ``PORT`` (on loopback) or ``HOST:PORT``; raises ``BadAddress``."""
    return listener(text, "to show metrics at", least=1)


@asynccontextmanager
async def shown(place: str, text: Callable[[], str]) -> AsyncIterator[None]:
    """Answer ``GET /metrics`` at a place while the block lasts; without one, or where it is taken, do nothing."""
    if not place:
        yield
        return

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            async with asyncio.timeout(_PATIENCE):
                question = (await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)
                found = question[:2] == [b"GET", b"/metrics"]
                body = (text() if found else "metrics are at /metrics\n").encode()
                writer.write(
                    f"HTTP/1.1 {'200 OK' if found else '404 Not Found'}\r\n"
                    "Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
                    f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
                    + body
                )
                await writer.drain()
        writer.close()

    host, port = parse_listener(place)
    try:
        server = await asyncio.start_server(answer, host, port, limit=_LONGEST)
    except OSError as error:
        _logger.error("metrics cannot be shown at %s: %s", place, error.strerror or error)
        yield
        return
    async with server:
        yield


def _resident() -> int:
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") if _STATM.exists() else 0
