"""Shaping both directions of a link at one end, as for a container; the packets are measured as in the table."""

import json
import subprocess
import sys
from typing import Any

import pytest

from netem.link import MTU
from tests.netem.conformance import DIRECTIONS, ROOT, Direction, check_delay, interval, losses, play, settled

pytestmark = pytest.mark.kernel

LINKS = "tests.kernel.variants:OneEndLinks"


@DIRECTIONS
def test_delay(direction: Direction) -> None:
    check_delay(LINKS, direction, 20, within=0.0006)


@DIRECTIONS
def test_rate(direction: Direction) -> None:
    state = {"rate": "20mbit", "delay": "10ms"}

    def part() -> float:
        (measured,) = play(LINKS, "goodput", direction=direction, link={"up": state, "down": state})
        return float(measured) / 20e6

    assert 0.92 <= settled(3, part, lambda part: 0.92 <= part <= 1) <= 1


@DIRECTIONS
def test_loss(direction: Direction) -> None:
    count = 10_000
    low, high = interval(0.05, count)

    def lost() -> int:
        return sum(losses(play(LINKS, "datagrams", direction=direction, state={"loss": "5%"}, count=count), count))

    assert low <= settled(2, lost, lambda lost: low <= lost <= high) <= high


def test_bundles_of_packets_are_cut_up_before_they_are_shaped() -> None:
    """Without a limit to bundles at the other end, netem would lose all the packets of one at once."""
    state = {"rate": "50mbit", "delay": "2ms"}
    assert play(LINKS, "packet_sizes", link={"up": state, "down": state})["down"] <= MTU + 14
    assert scene("bundles")["way round"] <= MTU + 14


def test_what_was_asked_is_read_back() -> None:
    links = [
        {"up": {"rate": "5mbit", "delay": "20ms", "loss": "1%"}, "down": {"rate": "20mbit"}},
        {"down": {"delay": "40ms", "jitter": "10ms", "distribution": "normal"}},
        {},
    ]
    assert play(LINKS, "read_back", states=links) == [None] * len(links)


def test_nothing_is_left_also_of_what_was_killed() -> None:
    seen = scene("leftovers")
    assert seen["before"] == seen["after"] == seen["again"]
    assert {"tbf", "netem", "ingress"} <= set(seen["during"])
    assert {"tbf", "netem", "ingress"} <= set(seen["killed"])
    assert seen["left"] == ["container", "container-peer", "lo"]
    assert any(name.startswith("semct-") for name in seen["orphaned"])
    assert seen["at last"] == ["container", "container-peer", "lo"]


def test_an_interface_that_is_not_there() -> None:
    assert scene("nothing_there") == {"sentence": "there is no interface nothing here"}


def scene(name: str) -> Any:
    command = [sys.executable, "-W", "error", "-m", "tests.kernel.one_end_scenes", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
