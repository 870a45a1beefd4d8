import asyncio
import os
import re
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import broker as package
from broker import local as module
from broker.local import BrokerFailed, LocalBroker
from broker.messages import MAX_PAYLOAD
from broker.session import Session

Local = Callable[[], LocalBroker]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def test_it_names_itself_and_leaves_with_the_context(local: Local) -> None:
    for _ in range(2):  # the port is free again
        async with local() as broker:
            assert re.fullmatch(r"(mosquitto|amqtt) \d+\.\d+\.\d+", broker.version)
            pid = broker._process.pid
            assert os.getsid(pid) == pid  # Ctrl-C in our terminal does not reach it
        assert not alive(pid)


async def test_it_listens_on_all_its_addresses_and_no_other(local: Local) -> None:
    broker = local()
    broker.hosts = ("127.0.0.1", "127.0.0.2")
    async with broker:
        for host in broker.hosts:
            async with Session(host, broker.port, testbed="t", name="d0"):
                pass
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.3", broker.port)


async def test_a_port_in_use_is_one_sentence(local: Local, port: int) -> None:
    sentence = f"^port {port} on 127.0.0.1 is in use: .* take another port$"
    with socket.create_server(("127.0.0.1", port)), pytest.raises(BrokerFailed, match=sentence):
        await local().__aenter__()


@pytest.mark.parametrize(
    ("host", "sentence"),
    [
        ("0.0.0.0", "asks for no password, so it may not listen on 0.0.0.0"),  # noqa: S104
        ("8.8.8.8", "asks for no password, so it may not listen on 8.8.8.8"),
        ("10.255.254.253", "is no address of this network namespace"),
        ("localhost", "listens on IPv4 addresses, and 'localhost' is none"),
    ],
)
async def test_addresses_it_cannot_or_may_not_have(mosquitto: Local, host: str, sentence: str) -> None:
    broker = mosquitto()
    broker.hosts = (host,)
    with pytest.raises(BrokerFailed, match=sentence):
        async with broker:
            pass


async def test_mosquitto_is_taken_where_it_is_and_amqtt_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, port: int, mosquitto: Local
) -> None:
    assert LocalBroker(hosts=["127.0.0.1"], port=port, directory=tmp_path).implementation == "mosquitto"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(module, "_PLACES", (str(tmp_path),))
    assert LocalBroker(hosts=["127.0.0.1"], port=port, directory=tmp_path).implementation == "amqtt"
    with pytest.raises(BrokerFailed, match=r"mosquitto is neither in PATH nor in .*: install it, or ask for amqtt"):
        async with LocalBroker(hosts=["127.0.0.1"], port=port, directory=tmp_path, implementation="mosquitto"):
            pass


async def test_one_that_dies_at_its_start_says_why(mosquitto: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalBroker, "_mosquitto_configuration", lambda _: "colour blue\n")
    with pytest.raises(BrokerFailed, match=r"mosquitto ended with exit code 3: .*mosquitto.conf:1.*\(.*broker.log\)"):
        async with mosquitto():
            pass


async def kill_and_wait(broker: LocalBroker) -> None:
    os.kill(broker._process.pid, signal.SIGKILL)
    with pytest.raises(BrokerFailed, match="ended with signal 9"):
        async with asyncio.timeout(5):
            await broker.wait()


async def test_one_that_dies_on_the_way_is_noticed(local: Local) -> None:
    broker = await local().__aenter__()
    await kill_and_wait(broker)
    with pytest.raises(BrokerFailed, match="ended with signal 9"):
        await broker.__aexit__(None, None, None)


async def test_one_that_dies_on_the_way_does_not_hide_the_error_that_followed(local: Local) -> None:
    with pytest.raises(ZeroDivisionError) as caught:  # noqa: PT012
        async with local() as broker:
            await kill_and_wait(broker)
            raise ZeroDivisionError
    assert "ended with signal 9" in caught.value.__notes__[0]


async def test_one_that_does_not_listen_to_sigterm_is_killed(mosquitto: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STOP", 0.1)
    async with mosquitto() as broker:
        os.kill(broker._process.pid, signal.SIGSTOP)
    assert not alive(broker._process.pid)


PARENT = """
import asyncio, sys
from pathlib import Path
from broker.local import LocalBroker

async def main():
    _, port, directory, implementation = sys.argv
    async with LocalBroker(
        hosts=["127.0.0.1"], port=int(port), directory=Path(directory), implementation=implementation
    ) as broker:
        print(broker._process.pid, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_it_dies_with_its_parent(local: Local, tmp_path: Path) -> None:
    asked = local()
    arguments = [str(asked.port), str(tmp_path), asked.implementation]
    path = {"PYTHONPATH": str(Path(package.__path__[0]).parent)}
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, *arguments, env={**os.environ, **path}, stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    await parent.wait()
    async with asyncio.timeout(5):
        while alive(pid):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def test_mosquitto_takes_what_the_messages_allow(mosquitto: Local) -> None:
    found = re.search(r"^max_packet_size (\d+)$", mosquitto()._mosquitto_configuration(), re.MULTILINE)
    assert found is not None
    assert int(found[1]) == MAX_PAYLOAD + 1024
