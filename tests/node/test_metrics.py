"""What Prometheus is shown: every quantity under its name, and nothing that a stranger's question could break."""

import asyncio
import json
import re
import socket
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from broker.address import BadAddress
from node.metrics import exposition, metrics_of, parse_listener, shown
from semct.engine import Totals

ROOT = Path(__file__).parents[2]


def seen() -> str:
    worker: Any = SimpleNamespace(totals=Totals(calls=7, rows=21, seconds=1.5, joules=3e9), under_way=2)
    session: Any = SimpleNamespace(dropped=Counter(malformed=4, misplaced=1, flood=9), connections=1)
    return exposition(metrics_of(worker, session), node="device-3", role="device")


def test_every_quantity_is_shown_with_its_type() -> None:
    text = seen()
    for line in (
        "# TYPE semct_denoiser_calls_total counter",
        'semct_denoiser_calls_total{node="device-3",role="device"} 7',
        'semct_energy_joules_total{node="device-3",role="device"} 3000000000',
        'semct_dropped_messages_total{node="device-3",role="device",reason="malformed"} 4',
        'semct_dropped_messages_total{node="device-3",role="device",reason="flood"} 9',
        "# TYPE semct_requests_under_way gauge",
        'semct_requests_under_way{node="device-3",role="device"} 2',
    ):
        assert line in text.splitlines()
    assert re.search(r"^semct_resident_bytes\{.*\} [1-9]\d+$", text, re.MULTILINE)
    assert text.endswith("\n")


def test_the_dashboard_asks_for_nothing_else() -> None:
    known = set(re.findall(r"^# TYPE (\S+)", seen(), re.MULTILINE))
    dashboard = json.loads((ROOT / "docker" / "metrics" / "dashboard.json").read_text())
    asked = {name for p in dashboard["panels"] for t in p["targets"] for name in re.findall(r"semct_\w+", t["expr"])}
    assert len(asked) >= 8
    assert asked <= known


async def get(port: int, question: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(question)
    answer = await reader.read()
    writer.close()
    return answer


async def test_it_answers_one_question_and_outlives_bad_ones(unused_tcp_port: int) -> None:
    text = seen()  # once: the memory in it changes
    async with asyncio.timeout(20), shown(str(unused_tcp_port), lambda: text):
        for _ in range(2):
            head, _, body = (await get(unused_tcp_port, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")).partition(
                b"\r\n\r\n"
            )
            assert head.startswith(b"HTTP/1.1 200 OK")
            assert b"version=0.0.4" in head
            assert body.decode() == text
            assert (await get(unused_tcp_port, b"GET / HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 404")
            assert await get(unused_tcp_port, b"GET" * 10_000 + b"\r\n\r\n") == b""
            assert (await get(unused_tcp_port, b"\r\n\r\n")).startswith(b"HTTP/1.1 404")


async def test_a_port_that_is_taken_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with shown(str(port), seen):
            pass
    assert f"metrics cannot be shown at {port}" in caplog.text


@pytest.mark.parametrize("text", ["", "x", "host:", "host:0", "99999", "1.2.3.4:-1"])
def test_what_is_no_place_to_listen(text: str) -> None:
    with pytest.raises(BadAddress, match="is no place to show metrics at"):
        parse_listener(text)


def test_a_port_alone_is_on_loopback() -> None:
    assert parse_listener("9100") == ("127.0.0.1", 9100)
    assert parse_listener("10.0.0.7:9100") == ("10.0.0.7", 9100)
