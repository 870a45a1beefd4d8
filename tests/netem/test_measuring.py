"""The measuring kit itself, on links that nothing shapes, and its statistics on made-up figures."""

import os
import random
import statistics
from typing import Any

import pytest

from tests.netem import conformance

PLAIN = "netem.kernel:PlainLinks"
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs namespaces")


@root
@pytest.mark.parametrize("direction", ["up", "down"])
def test_what_plain_links_do_to_packets(direction: str) -> None:
    assert statistics.median(conformance.play(PLAIN, "delay", direction=direction, state={}, count=21)) < 0.005
    arrived = conformance.play(PLAIN, "datagrams", direction=direction, state={}, count=500)
    assert [number for number, *_ in arrived] == list(range(500))
    assert all(intact and sent < arrival for _, sent, arrival, intact in arrived)
    assert min(conformance.play(PLAIN, "goodput", direction=direction, link={}, devices=2, seconds=0.5)) > 100e6


@root
def test_what_plain_links_read_back() -> None:
    assert conformance.play(PLAIN, "read_back", states=[{}]) == [None]


def test_geometric_lengths_fit_and_others_do_not() -> None:
    dice = random.Random(1)

    def length(end: float) -> int:
        return 1 if dice.random() < end else 1 + length(end)

    assert conformance.fit_of_geometric([length(0.25) for _ in range(500)], 0.25) > 0.01
    assert conformance.fit_of_geometric([length(0.33) for _ in range(500)], 0.25) < 0.005
    assert conformance.fit_of_geometric([4] * 500, 0.25) < 1e-6


def test_when_a_change_was_seen() -> None:
    """Trains of three packets of 1000 bits: at 1 kbit/s, from the sixth on at 4."""
    arrived: list[Any] = []
    for train in range(10):
        spacing = 1.0 if train < 5 else 0.25
        arrived += [(3 * train + place, 0.0, 10.0 * train + place * spacing, True) for place in range(3)]
    report = {"train": 3, "packet_bits": 1000, "arrived": arrived, "changes": [(4000.0, 49.0)]}
    assert conformance.effects(report) == [1.5]
    assert conformance.effects({**report, "changes": [(2000.0, 49.0), (4000.0, 60.0)]}) == [float("inf"), 0.5]
