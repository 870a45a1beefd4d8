import asyncio
import contextlib
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiomqtt
import pytest

import broker as package
from broker.local import LocalBroker
from broker.messages import MAX_PAYLOAD, Ask, Birth, Close, Latent, Picture, Result, Work, encode
from broker.session import BrokerRefused, BrokerUnreachable, Incoming, Session, Undelivered
from broker.topics import Topic, Topics

Connect = Callable[..., Session]
Local = Callable[[], LocalBroker]

ask = Ask(round="r1", request="q1", prompt="a fox in the snow", seed=7, steps=28, deadline=2e9)


@pytest.fixture
def connect(port: int, testbed: str) -> Connect:
    def session(name: str, *subscriptions: str, **options: object) -> Session:
        return Session(
            "127.0.0.1",
            port,
            testbed=testbed,
            name=name,
            subscriptions=subscriptions,
            **options,  # type: ignore[arg-type]
        )

    return session


@pytest.fixture
def topics(testbed: str) -> Topics:
    return Topics(testbed)


@pytest.fixture(autouse=True)
async def no_task_stays_behind() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    assert {task for task in asyncio.all_tasks() - before if task is not asyncio.current_task()} == set()


def work(request: str, latent: Latent | None = None) -> Work:
    return Work(
        round="r1",
        request=request,
        reply="d0",
        seed=7,
        steps=28,
        route=(),
        latent=latent,
        sent=1.0,
        deadline=2e9,
    )


async def take(session: Session, count: int) -> list[Incoming]:
    async with asyncio.timeout(20):
        return [await anext(session) for _ in range(count)]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def states(session: Session, count: int) -> list[str]:
    return [incoming.message.state for incoming in await take(session, count) if isinstance(incoming.message, Birth)]


@pytest.mark.usefixtures("broker")
async def test_messages_arrive_typed_and_in_order(connect: Connect, topics: Topics, testbed: str) -> None:
    async with connect("d0", *topics.to_node("d0")) as device, connect("runner") as runner:
        for message in (ask, Close(round="r1"), Close()):
            await runner.publish(topics.inbox("d0", "control"), message)
        taken = await take(device, 3)
    assert [incoming.message for incoming in taken] == [ask, Close(round="r1"), Close()]
    assert {incoming.topic for incoming in taken} == {Topic(testbed, "d0", "control")}
    assert taken[0].size == len(encode(ask))
    assert device.dropped == {}


@pytest.mark.usefixtures("broker")
async def test_latents_arrive_byte_for_byte(connect: Connect, topics: Topics) -> None:
    values = [random.Random(n).randbytes(512 * 1024) for n in range(40)]
    sent = [
        work(f"q{n}", Latent(dtype="float16", shape=(16, 128, 128), data=memoryview(data)))
        for n, data in enumerate(values)
    ]
    async with connect("edge", *topics.to_node("edge")) as edge, connect("d0") as device:
        sending = asyncio.gather(*(device.publish(topics.forward("d0", "edge"), message) for message in sent))
        taken = await take(edge, len(sent))
        await sending
    assert sorted((incoming.message for incoming in taken), key=str) == sorted(sent, key=str)  # bytes compared


@pytest.mark.usefixtures("broker")
async def test_births_are_kept_and_orderly_and_other_ends_differ(connect: Connect, topics: Topics) -> None:
    birth = Birth(name="d0", role="device", state="ready", models=("embedded",))
    async with connect("runner", topics.every("birth")) as runner:
        async with connect("d0", birth=birth):
            assert [incoming.message for incoming in await take(runner, 1)] == [birth]
            async with connect("late", topics.every("birth")) as late:
                assert [incoming.message for incoming in await take(late, 1)] == [birth]
        assert await states(runner, 1) == ["gone"]
        with pytest.raises(ZeroDivisionError):
            async with connect("d0", birth=birth):
                raise ZeroDivisionError
        assert await states(runner, 2) == ["ready", "lost"]
    async with connect("late", topics.every("birth")) as late:
        assert await states(late, 1) == ["lost"]


def test_a_session_announces_itself_only(connect: Connect) -> None:
    with pytest.raises(ValueError, match="cannot announce the birth of 'd1'"):
        connect("d0", birth=Birth(name="d1", role="device", state="ready"))


NODE = """
import asyncio, sys
from broker.messages import Birth
from broker.session import Session

async def main():
    birth = Birth(name="d0", role="device", state="ready")
    async with Session("127.0.0.1", int(sys.argv[1]), testbed=sys.argv[2], name="d0", birth=birth):
        await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.usefixtures("broker")
async def test_a_killed_node_is_announced_as_lost(connect: Connect, topics: Topics, port: int, testbed: str) -> None:
    path = {"PYTHONPATH": str(Path(package.__path__[0]).parent)}
    command = [sys.executable, "-c", NODE, str(port), testbed]
    async with connect("runner", topics.every("birth")) as runner:
        node = await asyncio.create_subprocess_exec(*command, env={**os.environ, **path})
        try:
            assert await states(runner, 1) == ["ready"]
        finally:
            node.kill()
            await node.wait()
        assert await states(runner, 1) == ["lost"]
        async with connect("late", topics.every("birth")) as late:
            assert await states(late, 1) == ["lost"]


@pytest.mark.usefixtures("broker")
async def test_what_is_no_message_is_counted_and_the_node_goes_on(
    connect: Connect, topics: Topics, port: int, testbed: str, caplog: pytest.LogCaptureFixture
) -> None:
    control = topics.inbox("d0", "control")
    picture = encode(Picture(round="r", request="q", png=b""))
    unwelcome = {
        "malformed": [(control, payload) for payload in (b"", b"{}", b"\xc1", encode(ask)[:-1], b"\x91" * 10_000)],
        "misplaced": [(control, picture), (f"semct/{testbed}/d0/secret", encode(ask)), ("semct/a/b", b"")],
        "oversized": [(control, bytes(MAX_PAYLOAD + 1))],
    }
    async with connect("d0", f"semct/{testbed}/d0/#", "semct/a/#") as device:
        async with aiomqtt.Client("127.0.0.1", port) as anyone:
            for topic, payload in (pair for pairs in unwelcome.values() for pair in pairs):
                await anyone.publish(topic, payload, qos=1, timeout=20)
        async with connect("runner") as runner:
            await runner.publish(control, ask)
            assert [incoming.message for incoming in await take(device, 1)] == [ask]
        assert device.dropped == {reason: len(pairs) for reason, pairs in unwelcome.items()}
        assert device.connections == 1
    lines = [record.getMessage() for record in caplog.records if record.name == "broker.session"]
    assert len(lines) == len(unwelcome)  # one for each reason, not one for each message
    assert f"d0 dropped a message on {control} (malformed, 1 so far)" in lines[0]


@pytest.mark.usefixtures("broker")
async def test_a_packet_over_the_brokers_limit_costs_its_sender_the_connection_only(
    connect: Connect, topics: Topics, port: int
) -> None:
    control = topics.inbox("d0", "control")
    async with connect("d0", control) as device, connect("runner") as runner:
        with pytest.raises(aiomqtt.MqttError):
            async with aiomqtt.Client("127.0.0.1", port, timeout=2) as anyone:
                await anyone.publish(control, bytes(MAX_PAYLOAD + 4096), qos=1)
        await runner.publish(control, ask)
        assert [incoming.message for incoming in await take(device, 1)] == [ask]
        assert device.dropped == {}


@pytest.mark.usefixtures("broker")
async def test_the_queue_is_bounded(connect: Connect, topics: Topics) -> None:
    inbox = topics.inbox("d0", "work")
    async with connect("d0", inbox, queue=8) as device, connect("edge") as edge:
        for n in range(20):
            await edge.publish(inbox, work(f"q{n}"))
        await until(lambda: device.dropped["overflow"] == 12)
        taken = await take(device, 8)
        assert [incoming.message for incoming in taken] == [work(f"q{n}") for n in range(8)]
        await edge.publish(inbox, work("after"))
        assert [incoming.message for incoming in await take(device, 1)] == [work("after")]
        assert device.dropped == {"overflow": 12}


async def test_the_brokers_window_keeps_a_slow_reader_from_losing_messages(
    connect: Connect, topics: Topics, mosquitto: Local
) -> None:
    inbox = topics.inbox("d0", "work")
    async with (
        mosquitto(),
        connect("d0", inbox, queue=32) as device,
        connect("edge") as edge,
    ):
        for n in range(200):
            await edge.publish(inbox, work(f"q{n}"))
        taken = await take(device, 200)
        assert [incoming.message for incoming in taken] == [work(f"q{n}") for n in range(200)]
        assert device.dropped == {}


async def test_what_may_get_lost_leaves_room_for_what_must_not(
    connect: Connect, topics: Topics, mosquitto: Local
) -> None:
    inbox = topics.inbox("d0", "work")
    async with (
        mosquitto(),
        connect("d0", inbox, queue=80) as device,
        connect("edge") as edge,
    ):
        for n in range(200):
            edge.mention(inbox, work(f"lost-{n}"))
        for n in range(60):
            await edge.publish(inbox, work(f"kept-{n}"))
        await until(lambda: device.dropped["overflow"] == 160)
        taken = await take(device, 100)
        assert [incoming.message for incoming in taken[40:]] == [work(f"kept-{n}") for n in range(60)]
        assert device.dropped == {"overflow": 160}


@pytest.mark.usefixtures("broker")
async def test_a_reader_may_publish_while_its_queue_is_full(connect: Connect, topics: Topics) -> None:
    async with (
        connect("d0", *topics.to_node("d0")) as device,
        connect("runner", topics.every("result")) as runner,
    ):

        async def answer() -> None:
            async for incoming in device:
                assert isinstance(incoming.message, Work)
                result = Result(
                    round="r1",
                    request=incoming.message.request,
                    device="d0",
                    outcome="answered",
                    asked=1.0,
                    finished=2.0,
                )
                await device.publish(topics.own("d0", "result"), result)

        for n in range(100):
            await runner.publish(topics.inbox("d0", "work"), work(f"q{n}"))
        answering = asyncio.create_task(answer())
        assert len(await take(runner, 100)) == 100
        answering.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await answering


async def test_a_session_outlives_its_broker(connect: Connect, topics: Topics, local: Local) -> None:
    birth = Birth(name="d0", role="device", state="ready")
    control = topics.inbox("d0", "control")
    async with contextlib.AsyncExitStack() as sessions:
        async with local():
            device = await sessions.enter_async_context(connect("d0", control, birth=birth))
            runner = await sessions.enter_async_context(connect("runner", topics.every("birth")))
            assert await states(runner, 1) == ["ready"]
        meanwhile = asyncio.create_task(runner.publish(control, ask))
        await asyncio.sleep(0.3)
        assert not meanwhile.done()
        async with local():
            async with asyncio.timeout(5):
                await meanwhile
            await until(lambda: device.connections == 2)
            again = await states(runner, 1)
            if again == ["lost"]:  # Mosquitto sends out the wills when it is stopped
                again = await states(runner, 1)
            assert again == ["ready"]
            await runner.publish(control, Close())
            received = (await take(device, 1))[0].message
            if received == ask:  # else the runner was back before the device
                received = (await take(device, 1))[0].message
            assert received == Close()
            assert (device.connections, runner.connections) == (2, 2)
            await sessions.aclose()


async def test_after_a_restart_of_the_broker_all_are_back_soon_and_no_message_is_lost(
    connect: Connect, topics: Topics, mosquitto: Local
) -> None:
    names = [f"d{n}" for n in range(20)]
    per_node = 40
    async with mosquitto() as broker, contextlib.AsyncExitStack() as stack:
        nodes = {n: await stack.enter_async_context(connect(n, topics.inbox(n, "work"))) for n in names}
        edge = await stack.enter_async_context(connect("edge"))
        heard: dict[str, set[str]] = {n: set() for n in names}

        async def listen(name: str) -> None:
            async for incoming in nodes[name]:
                assert isinstance(incoming.message, Work)
                heard[name].add(incoming.message.request)
                await asyncio.sleep(0.01)  # so that much is on its way, not yet acknowledged, when the broker goes

        async def send(name: str) -> None:
            for n in range(per_node):
                await edge.publish(topics.inbox(name, "work"), work(f"q{n}"))

        listening = [asyncio.create_task(listen(n)) for n in names]
        sending = [asyncio.create_task(send(n)) for n in names]
        await until(lambda: sum(map(len, heard.values())) > 100)
        assert not all(task.done() for task in sending)
        await broker.stop()
        await asyncio.sleep(0.2)
        await broker.start()
        began = asyncio.get_running_loop().time()
        await until(lambda: all(s.connections == 2 for s in (*nodes.values(), edge)))
        assert asyncio.get_running_loop().time() - began < 5
        await asyncio.gather(*sending)
        await until(lambda: all(len(requests) == per_node for requests in heard.values()))
        for task in listening:
            task.cancel()
        await asyncio.wait(listening)


async def test_what_is_sent_to_a_node_that_is_away_waits_for_it(
    connect: Connect, topics: Topics, mosquitto: Local
) -> None:
    control = topics.inbox("d0", "control")
    async with mosquitto(), connect("runner") as runner:
        with pytest.raises(ZeroDivisionError):
            async with connect("d0", control):
                raise ZeroDivisionError  # as a crash would, this ends no session
        await runner.publish(control, ask)
        async with connect("d0", control) as device:
            assert [incoming.message for incoming in await take(device, 1)] == [ask]
        await runner.publish(control, ask)  # it has left in order: nobody waits for this
        async with connect("d0", control) as device:
            await runner.publish(control, Close())
            assert [incoming.message for incoming in await take(device, 1)] == [Close()]


async def test_publishing_to_a_dead_broker_ends_in_a_clear_error(
    connect: Connect, topics: Topics, local: Local
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        async with local():
            runner = await stack.enter_async_context(connect("runner", patience=0.5))
        with pytest.raises(Undelivered, match=r"is away \(.*\): semct/.*/d0/control was not confirmed in 0.5 s"):
            await runner.publish(topics.inbox("d0", "control"), ask)


async def test_a_broker_that_hangs_is_named_too(connect: Connect, topics: Topics, mosquitto: Local) -> None:
    async with mosquitto() as broker, connect("runner", patience=0.5) as runner:
        os.kill(broker._process.pid, signal.SIGSTOP)
        with pytest.raises(Undelivered, match="is connected but silent"):
            await runner.publish(topics.inbox("d0", "control"), ask)
        with pytest.raises(BrokerUnreachable, match=r"no MQTT broker answered at .* within 0.3 s"):
            async with connect("late", patience=0.3):
                pass
        os.kill(broker._process.pid, signal.SIGCONT)
        await runner.publish(topics.inbox("d0", "control"), ask)


async def test_no_broker_at_all(connect: Connect, port: int) -> None:
    with pytest.raises(BrokerUnreachable, match=rf"at 127.0.0.1:{port} within 0.2 s \(.*refused\)"):
        async with connect("d0", patience=0.2):
            pass


@pytest.fixture
def strict(
    mosquitto: Local, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], LocalBroker]:
    """A Mosquitto with other rules than those of a local run."""

    def make(rules: str) -> LocalBroker:
        lines = ["user root", f"listener {port} 127.0.0.1", rules, ""]
        monkeypatch.setattr(LocalBroker, "_mosquitto_configuration", lambda _: "\n".join(lines))
        return mosquitto()

    return make


async def test_a_refusal_is_final(connect: Connect, strict: Callable[[str], LocalBroker]) -> None:
    async with strict("allow_anonymous false"):
        with pytest.raises(BrokerRefused, match=r"the broker at .* refused d0: .*Not authorized"):
            async with connect("d0"):
                pass


async def test_a_refused_subscription_is_final(connect: Connect, topics: Topics, port: int) -> None:
    async def broker(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1000)
        writer.write(b"\x20\x02\x00\x00")  # CONNACK
        subscribe = await reader.read(1000)
        writer.write(b"\x90\x03" + subscribe[2:4] + b"\x80")  # SUBACK: failure
        await reader.read()
        writer.close()

    async with await asyncio.start_server(broker, "127.0.0.1", port):
        with pytest.raises(BrokerRefused, match=r"refused d0 the subscription to semct/t\d+/d0/work"):
            async with connect("d0", topics.inbox("d0", "work")):
                pass


async def test_a_filter_that_is_none_is_not_retried(connect: Connect, mosquitto: Local) -> None:
    async with mosquitto():
        with pytest.raises(ValueError, match="Invalid subscription filter"):
            async with connect("d0", "semct/#/work"):
                pass


async def test_a_refusal_after_a_restart_reaches_reader_and_publisher(
    connect: Connect, topics: Topics, mosquitto: Local, strict: Callable[[str], LocalBroker]
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        async with mosquitto():
            device = await stack.enter_async_context(connect("d0", topics.inbox("d0", "work")))
        async with strict("allow_anonymous false"):
            for _ in range(2):
                with pytest.raises(BrokerRefused, match="Not authorized"):
                    await anext(device)
            with pytest.raises(BrokerRefused, match="Not authorized"):
                await device.publish(topics.own("d0", "result"), ask)


async def test_leaving_while_connecting_leaves_no_ghost(connect: Connect, topics: Topics, local: Local) -> None:
    births = {name: Birth(name=name, role="device", state="ready") for name in ("d0", "end")}

    async def brief() -> None:
        async with connect("d0", birth=births["d0"]):
            await asyncio.sleep(60)

    async with local(), connect("runner", topics.every("birth")) as runner:
        for delay in (0.0, *(0.0005 * n for n in range(12))):
            task = asyncio.create_task(brief())
            await asyncio.sleep(delay)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await runner.publish(topics.own("end", "birth"), births["end"])
        seen = ["gone"]
        while (message := (await take(runner, 1))[0].message) != births["end"]:
            assert isinstance(message, Birth)
            seen.append(message.state)
        assert seen[-1] != "ready"
