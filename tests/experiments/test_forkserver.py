"""The fork server with a small module in place of the device's, on the host and in a hub."""

# ruff: noqa: ASYNC240 - nothing else waits for these event loops

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from experiments.forkserver import Exit, ForkServer, ForkServerError

ROOT = Path(__file__).parents[2]

CHILD = """
import os, random, signal, socket, sys, threading, time

import numpy
import tqdm

CHILDREN = {
    "answer": lambda arguments: 42,
    "nothing": lambda arguments: None,
    "exit": lambda arguments: sys.exit("that was it"),
    "crash": lambda arguments: 1 / 0,
    "abort": lambda arguments: os.abort(),
    "sleep": lambda arguments: time.sleep(60),
    "stubborn": lambda arguments: stay(),
    "draw": lambda arguments: print(random.random(), numpy.random.random()),
    "report": lambda arguments: print(arguments["text"], os.getpgid(0), signal.getsignal(signal.SIGTERM)),
    "descriptors": lambda arguments: print(*sorted(os.listdir("/proc/self/fd"))),
    "call": lambda arguments: socket.create_connection(("10.83.0.1", arguments["port"])).recv(1),
}

def stay():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("ready")
    time.sleep(60)

def warm(arguments):
    print("warming", arguments)
    list(tqdm.tqdm([1, 2]))
    if arguments.get("fail"):
        raise LookupError("no such model")
    if arguments.get("thread"):
        threading.Thread(target=time.sleep, args=[60], daemon=True, name="sleeper").start()

def main(arguments):
    return CHILDREN[arguments["do"]](arguments)
"""

# What a runner does: it enters the hub, forks devices, attaches them, and reports; then it waits.
RUNNER = """
import asyncio, json, os, sys
from pathlib import Path

from experiments.forkserver import ForkServer
from netem.hosts import HUB_ADDRESS, Hub, enter_hub
from netem.kernel import PlainLinks

async def run():
    called = asyncio.Queue()
    server = await asyncio.start_server(lambda reader, writer: called.put_nowait(writer), HUB_ADDRESS, 9000)
    log = Path(sys.argv[1])
    async with Hub(PlainLinks()) as hub, ForkServer("child_of_test", warm={}, log=log) as devices:
        pids = []
        for name in ("a", "b", "c"):
            pids.append(await devices.fork(name, {"do": "call", "port": 9000}, log=log))
            await hub.attach(name, pids[-1])
        writers = [await called.get() for _ in pids]
        processes = [os.getpid(), devices.pid, *pids]
        print(json.dumps([[pid, os.stat(f"/proc/{pid}/ns/net").st_ino] for pid in processes]), flush=True)
        try:
            await asyncio.Event().wait()
        finally:
            print("leaving", flush=True)

enter_hub()
try:
    asyncio.run(run())
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture(autouse=True)
def child_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "child_of_test.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path}")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def server_on_host(log: Path, *, warm: dict[str, Any] | None = None, grace_s: float = 5.0) -> ForkServer:
    return ForkServer("child_of_test", warm=warm or {}, log=log, own_network=False, grace_s=grace_s)


async def first_exit(server: ForkServer) -> Exit:
    async with asyncio.timeout(10):
        async for event in server.exits():
            return event
    raise AssertionError("no child has ended")


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended may wait for the init process to take notice."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def becomes_true(condition: Callable[[], bool], within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize(
    ("action", "code", "printed"),
    [
        ("answer", 42, ""),
        ("nothing", 0, ""),
        ("exit", 1, "that was it"),
        ("crash", 1, "ZeroDivisionError: division by zero"),
        ("abort", -signal.SIGABRT, "Fatal Python error: Aborted"),
    ],
)
async def test_the_end_of_a_child_is_reported_and_logged(
    tmp_path: Path, log: Path, action: str, code: int, printed: str
) -> None:
    async with server_on_host(log) as server:
        pid = await server.fork("phone", {"do": action}, log=tmp_path / "phone.log")
        assert await first_exit(server) == Exit(name="phone", pid=pid, code=code)
        assert not psutil.pid_exists(pid)
        assert await server.fork("phone", {"do": "sleep"}, log=log) != pid
    assert printed in (tmp_path / "phone.log").read_text()
    assert "Traceback" not in log.read_text()


async def test_arguments_signals_and_process_group_of_a_child(log: Path) -> None:
    async with server_on_host(log) as server:
        await server.fork("phone", {"do": "report", "text": "grüß dich"}, log=log)
        await first_exit(server)
    assert f"grüß dich {os.getpgid(0)} 0" in log.read_text()  # 0 is SIG_DFL


async def test_children_inherit_no_descriptors(log: Path, tmp_path: Path) -> None:
    async with server_on_host(log) as server:
        await server.fork("first", {"do": "sleep"}, log=log)
        await server.fork("second", {"do": "descriptors"}, log=tmp_path / "second")
        await first_exit(server)
    assert (tmp_path / "second").read_text().split() == ["0", "1", "2", "3"]  # 3 is the listing itself


async def test_children_draw_different_random_numbers(log: Path, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn"
    async with server_on_host(log) as server:
        for name in ("first", "second"):
            await server.fork(name, {"do": "draw"}, log=drawn)
            await first_exit(server)
    assert len(set(drawn.read_text().split())) == 4


async def test_stop_ends_children_kindly_then_by_force(log: Path, tmp_path: Path) -> None:
    stubborn_log = tmp_path / "stubborn"
    async with server_on_host(log, grace_s=0.3) as server:
        pids = {
            await server.fork("kind", {"do": "sleep"}, log=log),
            await server.fork("stubborn", {"do": "stubborn"}, log=stubborn_log),
        }
        while not stubborn_log.read_text():  # noqa: ASYNC110 - another process writes it
            await asyncio.sleep(0.01)
        pids.add(server.pid)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    codes = {event.name: event.code async for event in server.exits()}
    assert codes == {"kind": -signal.SIGTERM, "stubborn": -signal.SIGKILL}


async def test_children_are_forked_at_once_under_names_of_their_own(log: Path) -> None:
    async with server_on_host(log) as server:
        async with asyncio.TaskGroup() as tasks:
            forks = [tasks.create_task(server.fork(f"{i}", {"do": "sleep"}, log=log)) for i in range(20)]
        assert len({fork.result() for fork in forks}) == 20
        with pytest.raises(ForkServerError, match="a child named '7' is running already"):
            await server.fork("7", {"do": "sleep"}, log=log)
        assert all(psutil.Process(fork.result()).ppid() == server.pid for fork in forks)


async def test_a_child_that_cannot_be_set_up(log: Path, tmp_path: Path) -> None:
    async with server_on_host(log) as server:
        with pytest.raises(ForkServerError, match=r"phone could not be started: .*No such file or directory"):
            await server.fork("phone", {"do": "answer"}, log=tmp_path / "missing" / "log")
        assert await server.fork("phone", {"do": "answer"}, log=log)


@pytest.mark.parametrize(
    ("warm", "expected"),
    [
        ({"fail": True}, "child_of_test could not be warmed up: LookupError: no such model"),
        ({"thread": True}, "it leaves threads where a fork needs one alone: .*Python knows MainThread, sleeper"),
    ],
)
async def test_a_server_that_cannot_warm_up(log: Path, warm: dict[str, Any], expected: str) -> None:
    with pytest.raises(ForkServerError, match=expected):
        await server_on_host(log, warm=warm).__aenter__()
    assert "warming" in log.read_text()


async def test_a_module_that_does_not_exist(log: Path) -> None:
    with pytest.raises(ForkServerError, match="No module named 'nowhere'"):
        await ForkServer("nowhere", warm={}, log=log).__aenter__()


async def test_a_server_that_is_killed_takes_its_children_along_and_says_so(log: Path) -> None:
    async with server_on_host(log) as server:
        pid = await server.fork("phone", {"do": "sleep"}, log=log)
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(ForkServerError, match="the fork server of child_of_test has ended with status -9"):
            await first_exit(server)
        with pytest.raises(ForkServerError, match="has ended"):
            await server.fork("tablet", {"do": "sleep"}, log=log)
        assert becomes_true(lambda: not is_alive(pid))


async def test_cancelling_the_start_leaves_no_process(log: Path) -> None:
    server = server_on_host(log)
    start = asyncio.create_task(server.__aenter__())
    await asyncio.sleep(0.1)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert not psutil.Process().children()


# With a hub: real namespaces.


class Runner:
    """A runner in a process group of its own, as a terminal would start it."""

    def __init__(self, log: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", RUNNER, str(log)],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self.output = self._process.stdout
        report: list[tuple[int, int]] = json.loads(self.output.readline())
        self.pids = [pid for pid, _ in report]
        self.namespaces = {namespace for _, namespace in report}

    def interrupt(self) -> int:
        """Press Ctrl-C and return the exit status."""
        os.killpg(self._process.pid, signal.SIGINT)
        return self._process.wait(timeout=20)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self.output.close()


@pytest.fixture
def runner(log: Path) -> Iterator[Runner]:
    attempt = subprocess.run(
        [sys.executable, "-c", "from netem.hosts import enter_hub; enter_hub()"],
        capture_output=True,
        text=True,
        check=False,
    )
    if os.geteuid() != 0 and attempt.returncode != 0:
        pytest.skip(attempt.stderr.strip().splitlines()[-1])
    runner = Runner(log)
    yield runner
    runner.kill()


def host_interfaces() -> str:
    return subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout


def living_namespaces() -> set[int]:
    living = set()
    for path in Path("/proc").glob("[0-9]*/ns/net"):
        with contextlib.suppress(OSError):  # it has just ended, or is another user's
            living.add(path.stat().st_ino)
    return living


def assert_nothing_is_left(runner: Runner) -> None:
    assert becomes_true(lambda: not any(is_alive(pid) for pid in runner.pids))
    assert becomes_true(lambda: not living_namespaces() & runner.namespaces)
    mounts = Path("/proc/self/mountinfo").read_text()
    assert not any(f"net:[{namespace}]" in mounts for namespace in runner.namespaces)


def test_each_device_has_a_namespace_and_the_server_is_in_the_hub(runner: Runner) -> None:
    assert len(runner.pids) == 5
    assert len(runner.namespaces) == 4
    assert runner.namespaces <= living_namespaces()


def test_kill_9_of_the_runner_leaves_nothing(runner: Runner) -> None:
    interfaces = host_interfaces()
    runner.kill()
    assert_nothing_is_left(runner)
    assert host_interfaces() == interfaces


def test_kill_9_of_the_server_leaves_no_device(runner: Runner) -> None:
    os.kill(runner.pids[1], signal.SIGKILL)
    assert becomes_true(lambda: not any(is_alive(pid) for pid in runner.pids[1:]))


def test_ctrl_c_is_up_to_the_runner(runner: Runner) -> None:
    assert runner.interrupt() == 130
    assert runner.output.read() == "leaving\n"
    assert_nothing_is_left(runner)
