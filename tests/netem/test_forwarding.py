"""The packet scheduler without devices: what it does to packets that come through sockets, and its arithmetic."""

import math
import os
import random
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netem import forwarding
from netem.control import Add, Count, Counters, Done, Read, Remove, Shape, Started, State, decode_answer, encode
from netem.distributions import SCALE, table
from netem.link import (
    Duration,
    FourState,
    GilbertElliott,
    Link,
    LinkState,
    Probability,
    Rate,
)
from netem.scheduler import read_state, write_state
from tests.netem.conformance import ROOT

TABLES = np.array([table("normal"), table("pareto")], np.float64) / SCALE

probabilities = st.floats(0, 1).map(Probability)
halves = st.floats(0, 0.5).map(Probability)
certain_or_not = st.sampled_from([Probability(p) for p in (0.0, 0.1, 0.5, 1.0)])
bursts = st.one_of(
    st.none(),
    st.builds(
        GilbertElliott,
        to_bad=probabilities,
        to_good=probabilities,
        loss_bad=probabilities,
        loss_good=probabilities,
    ),
    st.builds(FourState, p13=halves, p31=halves, p32=halves, p23=probabilities, p14=halves),
)


@st.composite
def states(draw: st.DrawFn) -> LinkState:
    """States of one direction, with everything that a link can do."""
    delay = draw(st.floats(0, 10))
    jitter = draw(st.floats(0, 1)) * delay
    chain = draw(bursts)
    loss = Probability(0.0) if chain else draw(certain_or_not)
    return LinkState(
        rate=draw(st.none() | st.floats(8, 1e11).map(Rate)),
        delay=Duration(delay),
        jitter=Duration(jitter),
        distribution=draw(st.sampled_from(["uniform", "normal", "pareto"])),
        delay_correlation=draw(probabilities) if jitter else Probability(0.0),
        loss=loss,
        loss_correlation=draw(probabilities) if loss else Probability(0.0),
        bursts=chain,
        duplicate=draw(certain_or_not),
        reorder=draw(certain_or_not) if delay else Probability(0.0),
        corrupt=draw(certain_or_not),
        limit=draw(st.none() | st.integers(1, 20)),
    )


def direction(state: LinkState, seed: int = 1) -> Any:
    """A direction in a state, at its beginning."""
    record = np.zeros(1, forwarding.DIRECTION)[0]
    record["random"] = seed
    write_state(record, state)
    return record


def pattern(state: LinkState, count: int) -> list[bool]:
    record = direction(state)
    return [bool(forwarding.lost(record)) for _ in range(count)]


# Arithmetic -----------------------------------------------------------------------------------------------


@given(states())
def test_a_state_is_read_back_exactly(state: LinkState) -> None:
    record = direction(LinkState())
    write_state(record, state)
    found = read_state(record)
    assert found.queue == state.queue
    assert read_state(direction(found)) == found
    for field in set(LinkState.__struct_fields__) - {"limit"}:
        assert getattr(found, field) == getattr(state, field)


def test_chances_are_uniform_and_independent() -> None:
    record = direction(LinkState())
    values = np.array([forwarding.uniform(record) for _ in range(20_000)])
    assert 0 <= values.min() < values.max() < 1
    counts = np.histogram(values, 20, (0, 1))[0]
    assert np.abs(counts - 1000).max() < 4.5 * math.sqrt(950)
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 4 / math.sqrt(20_000)


@pytest.mark.parametrize("loss", [0.0, 0.01, 0.3, 1.0])
def test_independent_losses(loss: float) -> None:
    lost = sum(pattern(LinkState(loss=Probability(loss)), 20_000))
    assert abs(lost - 20_000 * loss) <= 4 * math.sqrt(20_000 * loss * (1 - loss))


def test_correlated_losses_come_together() -> None:
    lost = pattern(LinkState(loss=Probability(0.3), loss_correlation=Probability(0.5)), 20_000)
    after_loss = [now for before, now in pairwise(lost) if before]
    assert np.mean(after_loss) > np.mean(lost) + 0.1


def test_gilbert_elliott_against_its_theory() -> None:
    chain = GilbertElliott(
        to_bad=Probability(0.05), to_good=Probability(0.2), loss_bad=Probability(0.7), loss_good=Probability(0.02)
    )
    lost = pattern(LinkState(bursts=chain), 50_000)
    assert np.mean(lost) == pytest.approx(0.2 * 0.7 + 0.8 * 0.02, rel=0.08)  # the bad state holds a fifth of the time


def test_four_states_against_their_theory() -> None:
    chain = FourState(p13=Probability(0.02), p31=Probability(0.25), p14=Probability(0.01))
    lost = pattern(LinkState(bursts=chain), 50_000)
    runs = [len(list(run)) for gone, run in groupby(lost) if gone]
    # Bursts of 1 / p31 packets twice as often as lone losses, which may lie next to each other.
    assert np.mean(runs) == pytest.approx((2 * 4 + 1) / 3, rel=0.08)
    assert np.mean(lost) == pytest.approx(0.0808, rel=0.1)  # the chain's stationary distribution


@pytest.mark.parametrize(("distribution", "deviation"), [("uniform", 1 / math.sqrt(3)), ("normal", 1), ("pareto", 1)])
def test_delays_have_the_distribution(distribution: Any, deviation: float) -> None:
    state = LinkState(delay=Duration(0.1), jitter=Duration(0.02), distribution=distribution)
    record = direction(state)
    delays = np.array([forwarding.drawn_delay(record, TABLES) for _ in range(20_000)]) / 1e9
    assert delays.mean() == pytest.approx(0.1, rel=0.01)
    assert delays.std() == pytest.approx(0.02 * deviation, rel=0.05)


@given(
    st.floats(1e3, 1e10), st.floats(0, 1), st.lists(st.tuples(st.integers(20, 1400), st.floats(0, 0.2)), max_size=20)
)
def test_a_packet_waits_for_its_delay_and_then_for_the_one_before(
    rate: float, delay: float, packets: list[tuple[int, float]]
) -> None:
    record = direction(LinkState(rate=Rate(rate), delay=Duration(delay)))
    arrival, free = 0.0, 0.0
    for length, gap in packets:
        arrival += gap
        free = max(arrival + delay, free) + (length + 14) * 8 / rate
        due = forwarding.departure(record, TABLES, length, int(arrival * 1e9))
        assert due / 1e9 == pytest.approx(free, rel=1e-9, abs=1e-6)


@given(st.lists(st.integers(0, 20), max_size=60), st.integers(0, 3))
def test_packets_leave_when_they_are_due_and_then_in_order(dues: list[int], forgotten: int) -> None:
    memory = forwarding.memory(4, 64, TABLES, slots=64)
    kept = []
    for number, due in enumerate(dues):
        slot = forwarding.take(memory)
        memory.owners[slot] = number % 4
        forwarding.push(memory, due, slot)
        if number % 4 != forgotten:
            kept.append((due, number, slot))
    forwarding.forget(memory, forgotten)
    assert [forwarding.pop(memory) for _ in kept] == [slot for *_, slot in sorted(kept)]


@settings(max_examples=50)
@given(states(), st.integers(0, 40), st.integers(0, 2**64 - 1))
def test_no_packet_is_miscounted(state: LinkState, count: int, seed: int) -> None:
    memory = forwarding.memory(2, 64, TABLES, slots=8)  # fewer than some queues hold
    memory.directions[0]["random"] = seed
    write_state(memory.directions[0], state)
    for _ in range(count):
        slot = forwarding.take(memory)
        memory.lengths[slot] = 64
        forwarding.arrive(memory, 0, slot, 0)
    seen = memory.directions[0]
    assert seen["packets_in"] == count
    assert seen["packets_in"] + seen["duplicated"] == seen["lost"] + seen["dropped"] + seen["waiting"]
    assert seen["waiting"] == memory.counts[1] <= min(8, state.queue + (state.duplicate > 0))  # as with netem


# Packets through sockets ------------------------------------------------------------------------------------


class Process:
    """A scheduler as a process of its own."""

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(120)  # it may have to compile
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "netem.scheduler", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                cwd=ROOT,
            )
        assert isinstance(self._answer(), Started)

    def ask(self, request: Any, *descriptors: int) -> Any:
        socket.send_fds(self.control, [encode(request)], descriptors)
        return self._answer()

    def cpu_s(self) -> float:
        return sum(psutil.Process(self.process.pid).cpu_times()[:2])

    def memory_bytes(self) -> int:
        """What it alone has and has written to."""
        return sum(part.private_dirty for part in psutil.Process(self.process.pid).memory_maps())

    def _answer(self) -> Any:
        return decode_answer(self.control.recv(65536))


class Ends:
    """A link named ``d`` whose devices are sockets: ``hub`` and ``device`` are their outer ends."""

    def __init__(self, scheduler: Process) -> None:
        self.scheduler = scheduler
        self.hub, inner_hub = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.device, inner_device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.hub, self.device):
            end.settimeout(10)
        process = os.pidfd_open(os.getpid())
        with inner_hub, inner_device:
            self.added = self.ask(Add("d", up_seed=1, down_seed=2), inner_hub.fileno(), inner_device.fileno(), process)
        os.close(process)

    def ask(self, request: Any, *descriptors: int) -> Any:
        return self.scheduler.ask(request, *descriptors)


@pytest.fixture(scope="module")
def scheduler() -> Iterator[Process]:
    running = Process()
    yield running
    running.control.close()
    assert running.process.wait(10) == 0


@pytest.fixture
def ends(scheduler: Process) -> Iterator[Ends]:
    ends = Ends(scheduler)
    assert ends.added == Done()
    yield ends
    ends.ask(Remove("d"))
    ends.hub.close()
    ends.device.close()


def test_packets_arrive_whole_in_order_and_in_time(ends: Ends) -> None:
    link = Link(up=LinkState(rate=Rate("2mbit"), delay=Duration("30ms")))
    assert ends.ask(Shape("d", link)) == Done()
    packets = [random.Random(n).randbytes(1 + 45 * n) for n in range(30)]
    began = time.monotonic()
    for packet in packets:
        ends.device.send(packet)
    assert [ends.hub.recv(2000) for _ in packets] == packets
    least = 0.030 + sum((len(packet) + 14) * 8 for packet in packets) / 2e6
    assert least <= time.monotonic() - began < least + 1
    ends.hub.send(b"back")
    assert ends.device.recv(2000) == b"back"
    assert ends.ask(Read("d")) == State(link)
    counted = ends.ask(Count("d"))
    assert counted.up.bytes_out == sum(map(len, packets))
    assert counted.down.packets_out == 1


def test_a_change_keeps_what_is_on_its_way(ends: Ends) -> None:
    ends.ask(Shape("d", Link(up=LinkState(delay=Duration("300ms")))))
    began = time.monotonic()
    ends.device.send(b"slow")
    ends.ask(Shape("d", Link()))
    ends.device.send(b"fast")
    assert ends.hub.recv(2000) == b"fast"
    assert ends.hub.recv(2000) == b"slow"
    assert time.monotonic() - began >= 0.3


def test_duplicates_and_corruption_in_their_bytes(ends: Ends) -> None:
    ends.ask(Shape("d", Link(down=LinkState(duplicate=Probability(1.0), corrupt=Probability(1.0)))))
    ends.hub.send(bytes(100))
    for _ in range(2):
        assert sum(byte.bit_count() for byte in ends.device.recv(2000)) == 1


def test_requests_that_cannot_be(ends: Ends) -> None:
    assert ends.ask(Read("nobody")).why == "nobody is unknown"
    assert Ends(ends.scheduler).added.why == "d has a link already"
    assert ends.ask(Remove("nobody")) == Done()


def test_an_idle_scheduler_uses_no_time(ends: Ends) -> None:
    ends.ask(Shape("d", Link(up=LinkState(delay=Duration("1000s")))))
    ends.device.send(b"on its way for long")
    before = ends.scheduler.cpu_s()
    time.sleep(0.5)
    assert ends.scheduler.cpu_s() - before < 0.25


def test_packets_take_the_memory_of_those_that_waited_at_once(ends: Ends) -> None:
    ends.ask(Shape("d", Link(up=LinkState(delay=Duration("50ms")))))

    def burst() -> None:
        for _ in range(50):
            ends.device.send(bytes(1400))
        for _ in range(50):
            ends.hub.recv(2000)

    burst()
    before = ends.scheduler.memory_bytes()
    for _ in range(30):
        burst()
    assert ends.scheduler.memory_bytes() - before < 500_000  # all of them: 2.1 MB


def test_forwarding_returns_for_a_device_that_was_deleted() -> None:
    memory = forwarding.memory(2, 64, TABLES, slots=4)
    timer = forwarding.timer(memory)
    source, far = os.pipe()
    os.close(far)  # end of file: EPOLLHUP, as a deleted TUN device shows EPOLLERR
    memory.meaning[source] = 0
    with select.epoll() as epoll:
        epoll.register(source, select.EPOLLIN)
        assert forwarding.forward(memory, epoll.fileno(), timer) == source
    os.close(source)
    os.close(timer)


def test_messages_keep_every_digit() -> None:
    link = Link(up=LinkState(rate=Rate(123456789.123), delay=Duration(1 / 3), loss=Probability(1.0)))
    found = decode_answer(encode(State(link)))
    assert isinstance(found, State)
    assert found.link == link
    assert isinstance(found.link.up.rate, Rate)
    assert not isinstance(found, Counters)
