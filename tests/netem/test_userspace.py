"""Userspace links against the table, and what happens when one of those that hold them ends."""

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from netem import userspace
from netem.hosts import LinksUnavailable
from netem.userspace import UserspaceLinks
from tests.netem.conformance import ROOT, Conformance

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs namespaces")


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """The first start would say that it compiles."""
    subprocess.run([sys.executable, "-m", "netem.scheduler"], cwd=ROOT, check=True)


@root
class TestConformance(Conformance):
    links: ClassVar = "netem.userspace:UserspaceLinks"
    delay_within: ClassVar = 0.0015


def start(scene: str, before: Sequence[str] = ()) -> subprocess.Popen[str]:
    command = [*before, sys.executable, "-W", "error", "-m", "tests.netem.userspace_scenes", scene]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def play(scene: str, before: Sequence[str] = ()) -> Any:
    with start(scene, before) as process:
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert errors == ""
    return json.loads(output)


def check_shaped(result: Any) -> None:
    assert 0.030 < statistics.median(result["trips"]) < 0.060
    assert result["same"]
    assert not result["huge"]  # two packets would take 2 MiB
    up, down = result["counters"]["up"], result["counters"]["down"]
    assert up["packets_in"] == up["packets_out"] == down["packets_in"] == down["packets_out"] == 10
    assert up["bytes_in"] == up["bytes_out"] == 10 * 28
    assert not any(up[name] for name in ("lost", "dropped", "duplicated", "corrupted", "reordered", "refused"))
    assert 0 < up["late"]["p50"] <= up["late"]["p99"] <= up["late"]["max"] < 1


@root
def test_a_link_is_shaped_read_and_counted() -> None:
    check_shaped(play("shaped"))


@root
def test_the_same_without_privileges() -> None:
    """In a user namespace: the scheduler gets no priority there, the links are the same."""
    lacking = "--bounding-set=-sys_admin,-net_admin,-sys_nice"
    check_shaped(play("shaped", before=["setpriv", lacking, "--inh-caps=-all"]))


@root
def test_a_link_goes_with_its_device_and_the_others_stay() -> None:
    result = play("device_dies")
    assert "the link of 'device-0'" in result["refusal"]
    assert result["seen"] == 3
    assert len(result["trips"]) == 3
    assert result["left"] == ["device2", "lo"]


@root
def test_everybody_learns_of_the_schedulers_death() -> None:
    result = play("scheduler_dies")
    sentence = "the packet scheduler was killed by signal 9, and all links with it"
    assert result["learnt"] == sentence
    assert result["refusal"] == f"the link of 'device-0' cannot be shaped: {sentence}"
    assert result["left"] == []


@root
def test_nothing_outlives_a_killed_hub() -> None:
    with start("hub_is_killed") as process:
        assert process.stdout is not None
        pids = json.loads(process.stdout.readline())
        process.kill()
        for pid in pids.values():
            wait_until_gone(pid)


def wait_until_gone(pid: int) -> None:
    """Ended: not there any more, or waiting to be reaped by a parent that does not care."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except OSError:
            return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} lives on")


@root
def test_an_interrupt_does_not_end_the_scheduler() -> None:
    assert len(play("interrupted")) == 3


@root
def test_a_seed_repeats_the_losses() -> None:
    first, again, other = play("same_seed")
    assert first == again
    assert first != other
    assert 300 <= len(first) <= 400  # 350 of 500 expected, standard deviation 10


@pytest.mark.parametrize(
    ("device", "cure"),
    [
        ("/dev/net/none", "(No such file or directory): load it with `modprobe tun`"),
        ("/proc/self/mem/tun", "(Not a directory): let this user read and write"),
    ],
)
def test_what_is_said_where_there_are_no_tun_devices(monkeypatch: pytest.MonkeyPatch, device: str, cure: str) -> None:
    monkeypatch.setattr(userspace, "_TUN", device)
    with pytest.raises(LinksUnavailable) as raised:
        UserspaceLinks().open()
    assert str(raised.value).startswith(f"userspace links need {device} ")
    assert cure in str(raised.value)
    assert "a container needs `--device /dev/net/tun`" in str(raised.value)


@root
def test_a_scheduler_that_does_not_start_makes_the_links_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    links = UserspaceLinks()
    with pytest.raises(LinksUnavailable, match="do not start: the packet scheduler ended with status 1"):
        links.open()
    links.close()


@root
async def test_waiting_ends_with_a_signal_from_elsewhere() -> None:
    links = UserspaceLinks()
    await asyncio.to_thread(links.open)
    try:
        waiting = asyncio.create_task(links.wait())
        await asyncio.sleep(0)
        (pid,) = scheduler_children()
        os.kill(pid, signal.SIGTERM)
        with pytest.raises(userspace.SchedulerEnded, match="killed by signal 15"):
            await asyncio.wait_for(waiting, 10)
    finally:
        links.close()


def scheduler_children() -> list[int]:
    children = [int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
    return [pid for pid in children if "netem.scheduler" in Path(f"/proc/{pid}/cmdline").read_text()]
