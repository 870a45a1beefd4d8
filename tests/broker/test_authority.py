"""Credentials, TLS and rights against a real Mosquitto, with a hostile client that tries every topic."""

from __future__ import annotations

import asyncio
import itertools
import logging
import stat
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, get_args

import aiomqtt
import msgspec
import pytest
from paho.mqtt.client import CallbackAPIVersion, Client

from broker.allowance import BURST, RATE
from broker.authority import NoAuthority, enroll, make_authority
from broker.credentials import BadCredentials, Credentials, load_credentials
from broker.local import BrokerFailed, Listener, LocalBroker, _mosquitto
from broker.messages import Birth, Request, Work, encode
from broker.protocol import EXAMPLES
from broker.rights import Role
from broker.session import BrokerRefused, BrokerUnreachable, Session
from broker.topics import CARRIES, Own, Topics

TOPICS = Topics("t")
ROLES: dict[str, Role] = {
    "victim": "device", "other": "device", "hostile": "device", "edge": "edge", "cloud": "edge",
    "runner": "runner", "watcher": "runner",
}  # fmt: skip


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("authority")
    make_authority(folder, ["127.0.0.1"])
    for name, role in ROLES.items():
        enroll(folder, name, role=role)
    return folder


@pytest.fixture
async def guarded(authority: Path, port: int, unused_tcp_port: int, tmp_path: Path) -> AsyncIterator[tuple[int, int]]:
    """The open port and the guarded one of a broker."""
    if _mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    more = [Listener(port=unused_tcp_port, authority=authority)]
    async with LocalBroker(hosts=["127.0.0.1"], port=port, directory=tmp_path, more=more):
        yield port, unused_tcp_port


def client(port: int, credentials: Credentials, **change: Any) -> aiomqtt.Client:
    fields = {"username": credentials.name, "password": credentials.password, "tls_context": credentials.tls()}
    return aiomqtt.Client("127.0.0.1", port, timeout=5, **(fields | change))


def shown(authority: Path, name: str) -> Credentials:
    return load_credentials(authority / f"{name}.json")


def every_topic(node: str, to: str) -> list[str]:
    """All topics of a node, and those of work that it passes on."""
    own = [TOPICS.own(node, what) for what in get_args(Own)]
    inbox = [TOPICS.inbox(node, "work"), TOPICS.inbox(node, "control")]
    return [*own, *inbox, TOPICS.forward(node, to), TOPICS.view(node, to)]


async def until(settled: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not settled():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def collect(client: aiomqtt.Client, into: set[str]) -> None:
    async for message in client.messages:
        into.add(message.topic.value)


def test_all_topics_are_tried() -> None:
    tried = {topic.split("/")[3] for topic in every_topic("victim", "edge")}
    assert tried == set(CARRIES)


async def test_a_hostile_device_reads_and_writes_nothing_of_others(authority: Path, guarded: tuple[int, int]) -> None:
    others = [name for name in ROLES if name != "hostile"]
    topics = [t for node in others for to in others if to != node for t in every_topic(node, to)]
    read: set[str] = set()
    arrived: set[str] = set()
    async with (
        aiomqtt.Client("127.0.0.1", guarded[0]) as inside,
        client(guarded[1], shown(authority, "hostile")) as hostile,
    ):
        await hostile.subscribe([("#", 1), ("$SYS/#", 1), ("semct/+/+/forward/+", 1), ("semct/t/+/forward/victim", 1)])
        for topic in topics:
            await hostile.subscribe(topic, qos=1)
        await inside.subscribe("#", qos=1)
        reading = asyncio.create_task(collect(hostile, read))
        watching = asyncio.create_task(collect(inside, arrived))
        for retain, topic in itertools.product((False, True), topics):
            await inside.publish(topic, b"secret", qos=1, retain=retain)
        await inside.publish(TOPICS.inbox("hostile", "work"), b"for it", qos=1)
        await inside.publish(TOPICS.forward("victim", "hostile"), b"for it", qos=1)
        await until(lambda: len(read) >= 2 and len(arrived) >= len(set(topics)) + 2)
        assert read == {TOPICS.inbox("hostile", "work"), TOPICS.forward("victim", "hostile")}
        arrived.clear()
        for topic in topics:
            await hostile.publish(topic, b"forged", qos=1)
            await hostile.publish(topic, b"", qos=1, retain=True)  # would delete what is retained there
        own = [TOPICS.own("hostile", "birth"), TOPICS.forward("hostile", "edge")]
        for topic in own:
            await hostile.publish(topic, b"its own", qos=1)
        await until(lambda: arrived.issuperset(own))
        assert arrived == set(own)
        reading.cancel()
        watching.cancel()
        await asyncio.wait({reading, watching})


async def test_a_hostile_device_cannot_end_anothers_session(authority: Path, guarded: tuple[int, int]) -> None:
    def session(name: str) -> Session:
        birth = Birth(name=name, role="device", state="ready")
        return Session("127.0.0.1", guarded[1], testbed="t", name=name, birth=birth, credentials=shown(authority, name))

    async with session("victim") as victim:
        async with client(guarded[1], shown(authority, "hostile"), identifier="t.victim"):
            await victim.publish(TOPICS.own("victim", "birth"), Birth(name="victim", role="device", state="ready"))
        async with client(guarded[1], shown(authority, "hostile"), identifier="victim"):
            await victim.publish(TOPICS.own("victim", "birth"), Birth(name="victim", role="device", state="ready"))
        assert victim.connections == 1


async def test_an_edge_and_the_runner_have_what_they_need_and_no_more(
    authority: Path, guarded: tuple[int, int]
) -> None:
    heard: dict[str, set[str]] = {"edge": set(), "runner": set(), "victim": set()}
    async with (
        client(guarded[1], shown(authority, "edge")) as edge,
        client(guarded[1], shown(authority, "runner")) as runner,
        client(guarded[1], shown(authority, "victim")) as victim,
        aiomqtt.Client("127.0.0.1", guarded[0]) as inside,
    ):
        tasks = []
        for name, one in (("edge", edge), ("runner", runner), ("victim", victim)):
            await one.subscribe("semct/#", qos=1)
            tasks.append(asyncio.create_task(collect(one, heard[name])))
        for topic in every_topic("other", "edge"):
            await inside.publish(topic, b"x", qos=1)
        await edge.publish(TOPICS.inbox("victim", "work"), b"x", qos=1)
        await edge.publish(TOPICS.inbox("victim", "control"), b"x", qos=1)
        await runner.publish(TOPICS.inbox("victim", "control"), b"x", qos=1)
        await runner.publish(TOPICS.inbox("other", "work"), b"x", qos=1)
        for name in heard:
            await inside.publish(TOPICS.inbox(name, "control"), b"last", qos=1)
        await until(lambda: all(TOPICS.inbox(name, "control") in heard[name] for name in ("edge", "runner", "victim")))
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    own = {"birth", "request"}
    assert heard["edge"] == {TOPICS.own("other", w) for w in own} | {  # type: ignore[arg-type]
        TOPICS.forward("other", "edge"),
        TOPICS.inbox("edge", "control"),
    }
    told = {"birth", "enrol", "result", "picture", "planned", "spent", "clock", "progress"}
    assert heard["runner"] == {TOPICS.own("other", w) for w in told} | {  # type: ignore[arg-type]
        TOPICS.inbox("runner", "control")
    }
    assert heard["victim"] == {TOPICS.inbox("victim", "work"), TOPICS.inbox("victim", "control")}


async def test_who_has_no_password_stays_outside(
    authority: Path, guarded: tuple[int, int], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    good = shown(authority, "victim")
    for wrong in (
        Credentials(name="victim", password="guess", ca=good.ca),  # noqa: S106
        Credentials(name="nobody", password=good.password, ca=good.ca),
    ):
        with pytest.raises(BrokerRefused, match="refused"):
            await Session("127.0.0.1", guarded[1], testbed="t", name="victim", credentials=wrong).__aenter__()
    with pytest.raises(BrokerUnreachable):  # no TLS
        await Session("127.0.0.1", guarded[1], testbed="t", name="victim", patience=1).__aenter__()
    elsewhere = tmp_path / "elsewhere"
    make_authority(elsewhere, ["127.0.0.1"])
    stranger = load_credentials(enroll(elsewhere, "victim"))
    session = Session("127.0.0.1", guarded[1], testbed="t", name="v", credentials=stranger, patience=1)
    with pytest.raises(BrokerUnreachable, match="CERTIFICATE_VERIFY_FAILED"):
        await session.__aenter__()
    async with Session("127.0.0.1", guarded[1], testbed="t", name="victim", credentials=good):
        pass
    assert good.password not in caplog.text + repr(good) + (tmp_path / "broker.log").read_text()


async def test_a_flooding_device_is_held_off_while_another_is_answered(
    authority: Path, guarded: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    flood = 4 * BURST
    heard: Counter[str] = Counter()
    options: dict[str, Any] = {"testbed": "t", "name": "edge", "subscriptions": [TOPICS.every("request")]}
    victims: dict[str, Any] = {"testbed": "t", "name": "victim", "subscriptions": TOPICS.to_node("victim")}

    async def answer(edge: Session) -> None:
        async for incoming in edge:
            heard[incoming.topic.node] += 1
            if incoming.topic.node == "victim":
                work = next(m for m in EXAMPLES if isinstance(m, Work))
                await edge.publish(TOPICS.inbox("victim", "work"), work)

    async with (
        Session("127.0.0.1", guarded[1], credentials=shown(authority, "edge"), **options) as edge,
        Session("127.0.0.1", guarded[1], credentials=shown(authority, "victim"), **victims) as victim,
        client(guarded[1], shown(authority, "hostile")) as hostile,
    ):
        began = time.monotonic()
        answering = asyncio.create_task(answer(edge))
        example = next(m for m in EXAMPLES if isinstance(m, Request))
        payload = encode(msgspec.structs.replace(example, reply="hostile"))
        for _ in range(flood - 1):
            await hostile.publish(TOPICS.own("hostile", "request"), payload, qos=0)
        await hostile.publish(TOPICS.own("hostile", "request"), payload, qos=1)
        async with asyncio.timeout(20):
            await victim.publish(TOPICS.own("victim", "request"), msgspec.structs.replace(example, reply="victim"))
            assert isinstance((await anext(victim)).message, Work)
        await until(lambda: heard["hostile"] + edge.dropped.total() == flood)
        assert heard["victim"] == 1
        assert heard["hostile"] <= BURST + RATE * (time.monotonic() - began)
        assert edge.dropped["flood"] >= flood - BURST - RATE * (time.monotonic() - began)
        assert edge.connections == 1
        answering.cancel()
        await asyncio.wait({answering})
    lines = [record.getMessage() for record in caplog.records if "(flood" in record.getMessage()]
    assert "hostile says more than 200 messages a second, 1000 at once" in lines[0]
    assert len(lines) <= 1 + (time.monotonic() - began) / 5


async def test_a_packet_over_the_limit_ends_the_connection(authority: Path, guarded: tuple[int, int]) -> None:
    lost = asyncio.Event()
    loop = asyncio.get_running_loop()
    huge = Client(CallbackAPIVersion.VERSION2, client_id="huge")
    credentials = shown(authority, "hostile")
    huge.username_pw_set(credentials.name, credentials.password)
    huge.tls_set_context(credentials.tls())
    huge.on_disconnect = lambda *_: loop.call_soon_threadsafe(lost.set)
    await asyncio.to_thread(huge.connect, "127.0.0.1", guarded[1])
    huge.loop_start()
    huge.publish(TOPICS.own("hostile", "picture"), bytes(16_800_000), qos=1)
    async with asyncio.timeout(20):
        await lost.wait()
    huge.disconnect()
    huge.loop_stop()


def test_files_are_for_their_owner_only(authority: Path) -> None:
    for name in ("ca.key", "broker.key", "passwords", "rights", "victim.json"):
        assert stat.S_IMODE((authority / name).stat().st_mode) == 0o600, name
    assert not list(authority.glob(".*"))


def test_a_new_password_replaces_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    make_authority(tmp_path, ["broker.example.org"])
    first = load_credentials(enroll(tmp_path, "edge", role="edge"))
    rights = (tmp_path / "rights").read_text()
    enroll(tmp_path, "phone")
    second = load_credentials(enroll(tmp_path, "edge", role="edge"))
    assert first.password != second.password
    names = [line.split(":")[0] for line in (tmp_path / "passwords").read_text().splitlines()]
    assert names == ["phone", "edge"]
    assert (tmp_path / "rights").read_text() == rights
    make_authority(tmp_path, ["10.0.0.9"])  # the broker moves, the authority stays
    assert load_credentials(enroll(tmp_path, "edge")).ca == first.ca
    assert "user edge" not in (tmp_path / "rights").read_text()


@pytest.mark.parametrize("name", ["a/b", "+", "#", "", "a:b", "a\nuser root"])
def test_a_name_that_would_leave_its_place_is_refused(authority: Path, name: str) -> None:
    with pytest.raises(NoAuthority, match="is no name"):
        enroll(authority, name)


def test_wrong_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(NoAuthority, match="holds no authority"):
        enroll(tmp_path, "phone")
    with pytest.raises(BadCredentials, match="cannot be read"):
        load_credentials(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(BadCredentials, match="holds no credentials"):
        load_credentials(tmp_path / "bad.json")
    with pytest.raises(BadCredentials, match="name no authority"):
        Credentials(name="a", password="b", ca="c").tls()  # noqa: S106


async def test_amqtt_serves_no_one_from_outside(port: int, tmp_path: Path) -> None:
    broker = LocalBroker(
        hosts=["127.0.0.1"], port=port, directory=tmp_path, implementation="amqtt", more=[Listener(port=1)]
    )
    with pytest.raises(BrokerFailed, match="serves the testbed's own nodes only: install mosquitto"):
        await broker.__aenter__()
