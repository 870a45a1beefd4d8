"""The live page's door, its files, and the scene that it shows."""

import asyncio
import socket
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace

import aiomqtt
import msgspec
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from broker.local import LocalBroker
from broker.messages import Progress, View, Watch
from broker.session import Session
from broker.topics import Topics
from experiments.live.gate import PATH, Forbidden, Gate, NoGate, Reading, open_gate
from experiments.live.scene import Scene, TableNow, _loss, _stretches
from experiments.live.show import Show
from experiments.record import RunFolder
from experiments.scenario import Scenario, load_scenario
from experiments.summary import MEASURES, summarise
from netem.link import FourState, GilbertElliott, LinkState, Probability
from node.reporting import Reporter
from semct.routes import Route, Segment
from semct.runs import RequestRow, RunInfo, table_of

PAGE = Path(__file__).parents[2] / "experiments" / "live" / "page"
SCENARIOS = PAGE.parents[1] / "scenarios"
CONNECT = b"\x10\x14\x00\x04MQTT\x04\x02\x00\x1e\x00\x08viewer-1"


@pytest_asyncio.fixture(params=["mosquitto", "amqtt"])
async def door(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[Gate, LocalBroker]]:
    """A gate that leads to a broker of each kind."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    gate = Gate(open_gate("0"))
    async with (
        gate,
        LocalBroker(hosts=["127.0.0.1"], port=port, directory=tmp_path, implementation=request.param) as broker,
    ):
        gate.lead_to("127.0.0.1", port)
        yield gate, broker


def at(gate: Gate) -> str:
    return gate.url.replace("http", "ws").rstrip("/") + PATH


async def test_a_viewer_reads_and_is_cut_off_when_it_writes(door: tuple[Gate, LocalBroker]) -> None:
    gate, broker = door
    async with aiomqtt.Client("127.0.0.1", broker.port) as inside:
        await inside.subscribe("#", qos=1)
        options = {"transport": "websockets", "websocket_path": PATH, "identifier": "viewer-a"}
        host, port = gate.url.removeprefix("http://").rstrip("/").split(":")
        headers = {"Origin": gate.url.rstrip("/")}
        async with aiomqtt.Client(host, int(port), websocket_headers=headers, **options) as viewer:  # type: ignore[arg-type]
            await viewer.subscribe("news", qos=1)
            await inside.publish("news", b"x" * 300_000, qos=1)  # more than Debian's mosquitto passes to WebSockets
            async with asyncio.timeout(5):
                assert len((await anext(aiter(viewer.messages))).payload) == 300_000
            assert gate.viewers == 1
            with pytest.raises(aiomqtt.MqttError):
                await viewer.publish("forged", b"x", qos=1, timeout=2)
        async with asyncio.timeout(5):
            while gate.viewers:
                gate.changed.clear()
                await gate.changed.wait()
        await inside.publish("last", b"x", qos=1)
        heard = []
        async for message in inside.messages:
            heard.append(message.topic.value)
            if heard[-1] == "last":
                break
        assert "forged" not in heard


async def test_only_the_page_itself_comes_in() -> None:
    async with Gate(open_gate("0")) as gate:
        for origin in ("http://evil.example", None):
            with pytest.raises(InvalidStatus) as refused:
                await connect(at(gate), origin=origin, subprotocols=["mqtt"])  # type: ignore[arg-type]
            assert refused.value.response.status_code == HTTPStatus.FORBIDDEN
        with pytest.raises(ConnectionClosed) as early:  # the testbed is not there yet
            async with connect(at(gate), origin=gate.url.rstrip("/"), subprotocols=["mqtt"]) as viewer:  # type: ignore[arg-type]
                await viewer.recv()
        assert early.value.rcvd is not None
        assert early.value.rcvd.code == 1013


async def test_files_of_the_page_are_served_and_no_others() -> None:
    async with Gate(open_gate("0")) as gate:
        for path, status in (("/", 200), ("/live.css", 200), ("/vendor/msgpack.min.js", 200), ("/../gate.py", 404)):
            assert (await get(gate, path, "127.0.0.1")).startswith(f"HTTP/1.1 {status}".encode()), path
        assert b" 403 " in (await get(gate, "/", "evil.example")).splitlines()[0]


async def get(gate: Gate, path: str, host: str) -> bytes:
    port = int(gate.url.rstrip("/").rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    return answer


def test_a_place_that_is_taken_or_none_gets_one_sentence() -> None:
    with open_gate("0") as taken:
        for address in (str(taken.getsockname()[1]), "here", "70000"):
            with pytest.raises(NoGate, match="the live page"):
                open_gate(address)


def test_the_page_is_small_and_names_the_licences_of_what_it_brings() -> None:
    assert sum(file.stat().st_size for file in PAGE.rglob("*") if file.is_file()) < 300_000
    for library in (PAGE / "vendor").glob("*.js"):
        assert (PAGE / "vendor" / library.name.replace(".min.js", ".LICENSE.txt")).exists()


@given(st.lists(st.integers(1, 9), max_size=9))
def test_a_viewer_may_send_its_packets_in_any_pieces(sizes: list[int]) -> None:
    sent = CONNECT + b"\x82\x06\x00\x01\x00\x01a\x00" + b"\xc0\x00\xe0\x00"
    reading = Reading()
    passed, rest = b"", sent
    for size in [*sizes, len(sent)]:
        passed += reading.feed(rest[:size])
        rest = rest[size:]
    assert passed == sent


@pytest.mark.parametrize(
    "packet",
    [
        b"\x30\x03\x00\x01a",  # a message
        CONNECT[:9] + b"\x06" + CONNECT[10:],  # a will
        CONNECT[:9] + b"\x00" + CONNECT[10:],  # a session that lasts
        CONNECT.replace(b"viewer-1", b"device-1"),
        CONNECT.replace(b"\x04\x02", b"\x05\x02"),  # MQTT 5
        b"\x82\xff\x7f",  # larger than anything a viewer has to say
        b"\x82\xff\xff\xff\xff",
    ],
)
def test_what_no_viewer_sends_is_refused(packet: bytes) -> None:
    with pytest.raises(Forbidden):
        Reading().feed(packet)


def test_the_table_has_all_repetitions_with_their_latest_rows() -> None:
    plain = {"name": "x", "frameworks": ["semct", "device-only"], "devices": [{"count": 2}], "prompts": {"list": ["a"]}}
    scenario = msgspec.convert(plain, Scenario)
    info = RunInfo(started=datetime.now(UTC), scenario="x")
    scene = Scene(scenario, info=lambda: info, links=lambda _: None, walks=lambda _: {})
    scene.rated = lambda rows: [msgspec.structs.replace(row, utility=row.quality) for row in rows]
    latest: dict[str, RequestRow] = {}

    def add(row: RequestRow) -> None:
        latest[row.request] = row
        scene.event("row", {"table": "requests", "row": row})

    for repetition in range(3):
        for framework in scenario.frameworks:
            scene.event("round", {"framework": framework, "repetition": repetition})
            for device in ("device-1", "device-2"):
                row = RequestRow(
                    round=f"{framework}-{repetition}", framework=framework, repetition=repetition, device=device,
                    request=f"{framework}-{repetition}-{device}", prompt="a", seed=repetition, steps=12,
                    outcome="answered", latency_s=1.0, energy_j=2.0, tflop=3.0,
                )  # fmt: skip
                add(row)
        for number, row in enumerate(list(latest.values())[-4:]):
            add(msgspec.structs.replace(row, quality=repetition + number / 10))
        wanted = summarise(table_of(RequestRow, scene.rated(list(latest.values()))), frameworks=scenario.frameworks)
        table = scene.take("table")
        assert isinstance(table, TableNow)
        assert [row.asked for row in table.rows] == [2 * repetition + 2] * 2
        for row, columns in zip(table.rows, wanted.iter_rows(named=True), strict=True):
            assert [v.mean for v in row.values] == pytest.approx([columns[m.column] for m in MEASURES])


probabilities = st.floats(0.01, 1).map(Probability)


@given(probabilities, probabilities)
def test_the_loss_of_a_link_with_bursts_is_that_of_the_long_run(bad: float, good: float) -> None:
    alike = {"to_bad": Probability(bad), "to_good": Probability(good)}
    two = _loss(LinkState(bursts=GilbertElliott(**alike)))
    four = _loss(LinkState(bursts=FourState(p13=alike["to_bad"], p31=alike["to_good"])))
    assert two == pytest.approx(bad / (bad + good))
    assert four == pytest.approx(two)
    assert _loss(LinkState(loss=Probability(0.02))) == pytest.approx(0.02)


@given(st.integers(0, 28), st.integers(0, 28))
def test_a_route_is_cut_where_it_parts_from_the_others(shared: int, moved: int) -> None:
    spans = [("edge", 0, moved), ("device-1", moved, 28)]
    segments = tuple(
        Segment(node=n, model="m", prompt="p", start=start, stop=stop) for n, start, stop in spans if start < stop
    )
    found = list(_stretches(Route(request="r", seed=0, steps=28, segments=segments), shared))
    assert [s.start for s in found] == [0, *(s.stop for s in found[:-1])]
    assert found[-1].stop == 28
    assert sum(s.stop - s.start for s in found if s.shared) == shared
    assert all(s.node == ("edge" if s.start < moved else "device-1") for s in found)


async def test_a_node_says_how_far_requests_are_while_somebody_watches(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    async with (
        LocalBroker(hosts=["127.0.0.1"], port=port, directory=tmp_path),
        Session("127.0.0.1", port, testbed="t", name="runner", subscriptions=["semct/t/+/progress"]) as ear,
        Session("127.0.0.1", port, testbed="t", name="edge") as session,
    ):
        reporter = Reporter(session)
        assert not reporter.is_watched
        reporter.watch(Watch(every=0.2))
        assert reporter.is_watched
        reporter.report({"a": 1}, {})
        reporter.report({"a": 2}, {"b": 28})  # too soon: said with the next
        await asyncio.sleep(0.25)
        reporter.report({"a": 3}, {})
        async with asyncio.timeout(5):
            heard = [(await anext(ear)).message for _ in range(2)]
        assert heard == [Progress(node="edge", requests={"a": 1}), Progress(node="edge", requests={"a": 3, "b": 28})]
        reporter.watch(Watch(every=0.0))
        assert not reporter.is_watched


class Line:
    """A session that a message gets stuck in, once."""

    name = "runner"
    topics = Topics("t")

    def __init__(self, stuck: str) -> None:
        self.told: list[str] = []
        self._stuck = stuck
        self.stands = asyncio.Event()

    async def publish(self, topic: str, message: View, **_: bool) -> None:
        part = topic.rpartition("/")[2]
        if part == self._stuck:
            self._stuck = ""
            self.stands.set()
            await asyncio.Event().wait()
        self.told.append(msgspec.msgpack.decode(message.content)["status"] if part == "run" else part)


async def test_viewers_are_told_all_before_the_end_whatever_stood_in_between(tmp_path: Path) -> None:
    scenario = load_scenario(SCENARIOS / "quickstart.yaml")
    folder = RunFolder.create(tmp_path, "watched")
    links = SimpleNamespace(now=lambda _: None)
    async with Gate(open_gate("0")) as gate:
        line = Line(stuck="notes")
        async with Show(gate, scenario, folder, links, line, settings={}, beside=tmp_path):  # type: ignore[arg-type]
            async with asyncio.timeout(5):
                await line.stands.wait()
    assert line.told == ["cell", "notes", "round", "table", "finished"]
