"""The hub and its devices, in real namespaces. On a machine that refuses them to this user, they skip."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from netem import hosts

ROOT = Path(__file__).parents[2]
IN_HUB = Path(__file__).with_name("in_hub.py")


def python(*arguments: str, before: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*before, sys.executable, "-W", "error", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture(scope="module")
def permitted() -> None:
    """Root always may, or these tests fail; others may not everywhere."""
    if os.geteuid() != 0:
        attempt = python("-c", "from netem.hosts import enter_hub; enter_hub()")
        if attempt.returncode != 0:
            pytest.skip(attempt.stderr.strip().splitlines()[-1])


def host_interfaces() -> str:
    return subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout


def living_namespaces() -> set[int]:
    living = set()
    for path in Path("/proc").glob("[0-9]*/ns/net"):
        with contextlib.suppress(OSError):  # it has just ended, or is another user's
            living.add(path.stat().st_ino)
    return living


def play(scene: str, *arguments: str, before: Sequence[str] = ()) -> Any:
    """Run a scene, check that it leaves nothing behind, and return its result."""
    interfaces = host_interfaces()
    process = python(str(IN_HUB), scene, *arguments, before=before)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    report = json.loads(process.stdout)
    deadline = time.monotonic() + 5
    while living_namespaces() & set(report["namespaces"]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not living_namespaces() & set(report["namespaces"])
    assert host_interfaces() == interfaces
    return report["result"]


def host_address() -> str:
    """An address of this machine, or one that nobody has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "192.0.2.2"
        return str(probe.getsockname()[0])


def check_reach(result: dict[str, Any]) -> None:
    assert result["address"] == "10.83.1.2"
    assert result["answer"] == "10.83.1.2 reno hello"
    assert result["congestion"] == "reno"
    assert 0 < result["ping_ms"] < 100
    assert result["interfaces"] == ["lo", "uplink"]
    assert result["ipv6"] == 0
    for elsewhere in ("other device", "host", "internet"):
        assert result[elsewhere] != "reached"


@pytest.mark.usefixtures("permitted")
def test_a_device_reaches_the_hub_and_nothing_else() -> None:
    check_reach(play("reach", host_address()))


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests run without privileges already")
def test_the_same_without_privileges() -> None:
    # Root as in a container may no more than other users here, but can read an installation in root's home.
    unprivileged = ["setpriv", "--bounding-set=-sys_admin,-net_admin", "--inh-caps=-all"]
    attempt = python("-c", "from netem.hosts import enter_hub; enter_hub()", before=unprivileged)
    if attempt.returncode != 0:
        pytest.skip(attempt.stderr.strip().splitlines()[-1])
    check_reach(play("reach", host_address(), before=unprivileged))


@pytest.mark.usefixtures("permitted")
def test_fifty_devices() -> None:
    result = play("fifty")
    assert result["elapsed_s"] < 4  # 0.3 s on a quiet machine
    assert len(set(result["addresses"])) == 50
    assert len(set(result["hub_interfaces"])) == 50
    assert set(result["attached"]) == {"lo", *result["hub_interfaces"]}
    assert set(result["attached"]) - set(result["without_one"]) == {result["hub_interfaces"][7]}
    assert result["left"] == ["lo"]


@pytest.mark.usefixtures("permitted")
def test_a_device_that_dies_loses_its_link_and_its_name_is_free_again() -> None:
    assert play("device_dies") == "10.83.1.1"


@pytest.mark.usefixtures("permitted")
def test_an_exception_removes_the_links() -> None:
    assert play("failing_body") == ["lo"]


@pytest.mark.usefixtures("permitted")
def test_what_attach_says_when_it_cannot() -> None:
    result = play("wrong_attachments")
    for sentence, expected in zip(
        result["sentences"],
        (
            "a device named 'phone' is attached already",
            "cannot attach 'dead': process",
            "has not left the hub's namespace",
            "cannot attach 'again': File exists",
            "Numerical result out of range",
            "no device named 'nobody' is attached",
        ),
        strict=True,
    ):
        assert expected in sentence
    assert result["left"] == ["device1", "lo"]


@pytest.mark.usefixtures("permitted")
def test_an_unknown_congestion_control_is_named_beside_those_there_are() -> None:
    available = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
    result = play("unknown_congestion")
    assert result["sentence"] == (
        f"this kernel has no TCP congestion control 'vegetarian': choose one of {', '.join(available)},"
        " or load it with `modprobe tcp_vegetarian`"
    )
    assert result["left"] == ["lo"]


def test_a_process_with_threads_may_not_enter() -> None:
    assert "while the process has one thread, but it has 2" in play("threads")


def test_a_hub_needs_a_process_that_has_entered() -> None:
    assert play("on_the_host") == "a Hub needs a process that has called enter_hub(); this one is on the host"


@pytest.mark.usefixtures("permitted")
def test_a_real_refusal() -> None:
    # The limit belongs to the user namespace around it, so nobody else sees it.
    limit = 'echo 0 > /proc/sys/user/max_net_namespaces; exec "$@"'
    sentence = play("refused", before=["unshare", "--user", "--map-root-user", "sh", "-c", limit, "sh"])
    assert sentence == (
        "the hub cannot have a network namespace (No space left on device);"
        " user.max_net_namespaces = 0 forbids it: run as root or change the setting"
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "usually a container without CAP_SYS_ADMIN"),
        (
            {"kernel.unprivileged_userns_clone": "0"},
            "kernel.unprivileged_userns_clone = 0 forbids it: run as root",
        ),
        ({"kernel.unprivileged_userns_clone": "1"}, "usually a container"),
        ({"kernel.apparmor_restrict_unprivileged_userns": "1"}, "unprivileged_userns = 1 forbids it"),
    ],
)
def test_how_a_refusal_is_explained(monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], expected: str) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(hosts, "_call", refuse)
    monkeypatch.setattr(hosts, "_read_setting", settings.get)
    with pytest.raises(hosts.NamespaceError) as caught:
        hosts.enter_host()
    sentence = str(caught.value)
    assert sentence.startswith("a device cannot have a network namespace (Operation not permitted); ")
    assert expected in sentence


def test_a_thousand_devices_have_addresses() -> None:
    addresses = {hosts._device_address(number) for number in range(1, 1001)}
    assert len(addresses) == 1000
    assert hosts.HUB_ADDRESS not in addresses
    for address in addresses:
        socket.inet_aton(address)
