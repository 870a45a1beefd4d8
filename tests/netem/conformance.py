"""The conformance table: every implementation of links is held to the same figures.

A subclass of `Conformance` names the implementation; `docs/fidelity.md` has the table as measured. A busy machine
can only delay and starve, so delays and goodputs have three attempts. Statistical checks are at the 1 % level
and have two, so that a true link fails one of them in 10,000.
"""

import contextlib
import json
import math
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import pytest
from scipy import stats

from netem.link import MTU

ROOT = Path(__file__).parents[2]
Direction = Literal["up", "down"]
Result = TypeVar("Result")
State = Mapping[str, Any]

DIRECTIONS = pytest.mark.parametrize("direction", ["up", "down"])


def start(links: str, scene: str, **arguments: Any) -> subprocess.Popen[str]:
    """Run a scene of tests/netem/scenes.py in a process of its own."""
    command = [sys.executable, "-W", "error", "-m", "tests.netem.scenes", links, scene, json.dumps(arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def play(links: str, scene: str, **arguments: Any) -> Any:
    """The result of a scene."""
    with start(links, scene, **arguments) as process:
        try:
            output, errors = process.communicate(timeout=240)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    return json.loads(output)


def living_namespaces() -> set[int]:
    """The network namespaces in which there are processes."""
    living = set()
    for path in Path("/proc").glob("[0-9]*/ns/net"):
        with contextlib.suppress(OSError):  # it has just ended
            living.add(path.stat().st_ino)
    return living


def interfaces() -> list[str]:
    return sorted(name for _, name in socket.if_nameindex())


def settled(attempts: int, measure: Callable[[], Result], holds: Callable[[Result], bool]) -> Result:
    """The first measurement for which something holds, or the last one."""
    for _ in range(attempts - 1):
        if holds(result := measure()):
            return result
    return measure()


def lateness_of_timers(seconds: float) -> float:
    """Seconds by which the middle one of 21 sleeps is too long here: a busy or slow machine's clock runs late."""

    def late() -> float:
        began = time.monotonic()
        time.sleep(seconds)
        return time.monotonic() - began - seconds

    return statistics.median(late() for _ in range(21))


def check_delay(links: str, direction: Direction, delay: int, *, within: float) -> float:
    """Check a delay of so many milliseconds in one direction; returns how many of them it is late."""

    def late() -> float:
        trips = play(links, "delay", direction=direction, state={"delay": f"{delay}ms"}, count=21)
        return float(statistics.median(trips)) - delay / 1000

    within += lateness_of_timers(delay / 1000)
    found = settled(3, late, lambda late: abs(late) < within)
    assert abs(found) < within, f"{1000 * found:.3f} ms late, of {1000 * within:.3f} allowed"
    return round(found * 1000, 3)


def losses(arrived: list[Any], sent: int) -> Iterator[bool]:
    """For each datagram sent whether it was lost."""
    numbers = {number for number, *_ in arrived}
    return (number not in numbers for number in range(sent))


def interval(part: float, count: int) -> tuple[int, int]:
    """Where 99 % of counts lie of events with a probability of `part`."""
    low, high = stats.binom.interval(0.99, count, part)
    return int(low), int(high)


def fit_of_geometric(lengths: list[int], end: float) -> float:
    """The p-value of a chi-square test that lengths from 1 on end with a probability of `end` at each step."""
    counts = Counter(lengths)
    longest = next(n for n in range(1, 1000) if len(lengths) * (1 - end) ** n < 5)  # bins of at least 5
    seen = [counts[n] for n in range(1, longest)] + [sum(c for n, c in counts.items() if n >= longest)]
    wanted = [end * (1 - end) ** (n - 1) for n in range(1, longest)] + [(1 - end) ** (longest - 1)]
    return float(stats.chisquare(seen, [len(lengths) * part for part in wanted]).pvalue)


class Conformance:
    """The table as tests, for one implementation."""

    links: ClassVar[str]
    """MODULE:CLASS"""
    delay_within: ClassVar[float]
    """Seconds between the median round trip and the delay asked for in one direction, where timers are on time."""
    fifty_at_mbit: ClassVar[int] = 8  # 400 Mbit/s in all: two slow cores, which also play all fifty ends, move 520

    @DIRECTIONS
    @pytest.mark.parametrize("delay", [5, 20, 100])
    def test_delay(self, direction: Direction, delay: int, record_property: Callable[[str, object], None]) -> None:
        record_property("late_ms", check_delay(self.links, direction, delay, within=self.delay_within))

    @pytest.mark.parametrize(
        ("direction", "distribution", "deviation"),
        [("up", "uniform", 1 / math.sqrt(3)), ("down", "normal", 1), ("up", "pareto", 1)],
    )
    def test_jitter(
        self,
        direction: Direction,
        distribution: str,
        deviation: float,
        record_property: Callable[[str, object], None],
    ) -> None:
        state = {"delay": "60ms", "jitter": "10ms", "distribution": distribution}

        def spread() -> float:
            arrived = play(
                self.links, "datagrams", direction=direction, state=state, count=4000, every=0.001, together=1
            )
            assert len(arrived) == 4000
            return statistics.stdev(arrival - sent for _, sent, arrival, _ in arrived) / (0.01 * deviation)

        measured = settled(3, spread, lambda part: abs(part - 1) < 0.15)
        record_property("deviation_of_wanted", round(measured, 3))
        assert abs(measured - 1) < 0.15

    @DIRECTIONS
    @pytest.mark.parametrize("mbit", [1, 5, 20, 100])
    def test_rate(self, direction: Direction, mbit: int, record_property: Callable[[str, object], None]) -> None:
        link = {"up": {"rate": f"{mbit}mbit", "delay": "10ms"}, "down": {"rate": f"{mbit}mbit", "delay": "10ms"}}

        def part() -> float:
            seconds = 6 if mbit == 1 else 3
            (measured,) = play(self.links, "goodput", direction=direction, link=link, seconds=seconds)
            return float(measured) / (mbit * 1e6)

        measured = settled(3, part, lambda part: 0.92 <= part <= 1)
        record_property("part_of_rate", round(measured, 4))
        assert 0.92 <= measured <= 1

    @pytest.mark.parametrize(("direction", "percent"), [("up", 1), ("down", 5), ("up", 20)])
    def test_loss(self, direction: Direction, percent: int, record_property: Callable[[str, object], None]) -> None:
        count = 20_000
        low, high = interval(percent / 100, count)

        def lost() -> int:
            arrived = play(self.links, "datagrams", direction=direction, state={"loss": f"{percent}%"}, count=count)
            return sum(losses(arrived, count))

        measured = settled(2, lost, lambda lost: low <= lost <= high)
        record_property("lost_percent", measured / count * 100)
        assert low <= measured <= high

    def test_loss_in_bursts(self, record_property: Callable[[str, object], None]) -> None:
        """A Gilbert-Elliott model that loses all in its bad state: bursts have geometric lengths."""
        state = {"bursts": {"model": "gilbert-elliott", "to_bad": "2%", "to_good": "25%"}}
        count = 30_000

        def fit() -> tuple[float, float, float]:
            arrived = play(self.links, "datagrams", direction="down", state=state, count=count)
            runs = [(lost, len(list(run))) for lost, run in groupby(losses(arrived, count))][1:-1]  # whole ones
            bad = [length for lost, length in runs if lost]
            good = [length for lost, length in runs if not lost]
            return fit_of_geometric(bad, 0.25), fit_of_geometric(good, 0.02), statistics.fmean(bad)

        bad, good, mean = settled(2, fit, lambda fit: min(fit[:2]) > 0.005)  # two tests: 1 % together
        record_property("p_bursts", round(bad, 4))
        record_property("p_between", round(good, 4))
        record_property("mean_burst", round(mean, 2))
        assert min(bad, good) > 0.005

    @pytest.mark.parametrize("part", ["duplicate", "corrupt", "reorder"])
    def test_duplicates_corruption_and_order(self, part: str, record_property: Callable[[str, object], None]) -> None:
        count = 10_000
        low, high = interval(0.05, count)
        delay = {"delay": "5ms"} if part == "reorder" else {}

        def affected() -> int:
            arrived = play(
                self.links,
                "datagrams",
                direction="up",
                state={part: "5%", **delay},
                count=count,
                every=0.0005,
                together=1,
                size=1372,
            )
            if part == "duplicate":
                assert len({number for number, *_ in arrived}) == count
                return len(arrived) - count
            if part == "corrupt":  # one bit of the packet: in its headers it costs the datagram
                return count - sum(intact for *_, intact in arrived)
            assert len(arrived) == count
            return sum(arrival - sent < 0.0025 for _, sent, arrival, _ in arrived)

        measured = settled(2, affected, lambda affected: low <= affected <= high)
        record_property("percent", measured / count * 100)
        assert low <= measured <= high

    @DIRECTIONS
    def test_a_change_takes_effect_at_once_and_loses_nothing(
        self, direction: Direction, record_property: Callable[[str, object], None]
    ) -> None:
        """Ten changes, with time between them and then ten in a second."""

        for every in (0.5, 0.1):
            best, lossy = [math.inf] * 10, 0
            for _ in range(3):
                report = play(
                    self.links, "changes", direction=direction, rates=["6mbit", "30mbit"] * 5, every=every, wait="10ms"
                )
                if {number for number, *_ in report["arrived"]} != set(range(report["sent"])):
                    lossy += 1
                    assert lossy < 2  # a machine that stalls loses packets once, a change that does would again
                    continue
                best = [min(times) for times in zip(best, effects(report), strict=True)]
                if max(best) < 0.1:
                    break
            record_property(f"slowest_ms_every_{every}", round(max(best) * 1000, 1))
            assert max(best) < 0.1

    def test_fifty_links_at_once(self, record_property: Callable[[str, object], None]) -> None:
        check_fifty(self.links, self.fifty_at_mbit, record_property)

    def test_no_packet_is_larger_than_the_link_carries(self) -> None:
        """TCP may hand bundles of packets to an interface, which a link would lose or delay as one."""
        state = {"rate": "50mbit", "delay": "2ms"}
        sizes = play(self.links, "packet_sizes", link={"up": state, "down": state})
        assert 1000 < sizes["down"] <= MTU + 14
        assert 1000 < sizes["up"] <= MTU + 14

    def test_kill_9_leaves_nothing(self) -> None:
        state = {"rate": "5mbit", "delay": "50ms"}
        before = interfaces()
        with start(self.links, "hold", link={"up": state, "down": state}) as process:
            assert process.stdout is not None
            namespaces = set(json.loads(process.stdout.readline()))
            assert len(namespaces & living_namespaces()) == 3
            process.kill()
        deadline = time.monotonic() + 20
        while namespaces & living_namespaces() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not namespaces & living_namespaces()
        assert interfaces() == before

    def test_what_was_asked_is_read_back(self) -> None:
        links = [
            {},
            {"up": {"rate": "1.5mbit", "delay": "20ms"}, "down": {"rate": "20mbit", "delay": "300us"}},
            {"up": {"delay": "40ms", "jitter": "10ms", "distribution": "pareto", "delay_correlation": "25%"}},
            {"down": {"loss": "1%", "loss_correlation": "10%", "duplicate": "0.1%", "corrupt": "0.01%"}},
            {"down": {"bursts": {"model": "gilbert-elliott", "to_bad": "1%", "to_good": "20%", "loss_good": "0.1%"}}},
            {"up": {"bursts": {"model": "four-state", "p13": "1%", "p31": "20%", "p32": "5%", "p14": "0.5%"}}},
            {"up": {"delay": "5s", "reorder": "3%"}, "down": {"limit": 50}},
            {},
        ]
        assert play(self.links, "read_back", states=links) == [None] * len(links)


def check_fifty(links: str, mbit: int, record_property: Callable[[str, object], None]) -> None:
    """Fill fifty links at the same time: none may stay under 85 % of its rate."""
    state = {"rate": f"{mbit}mbit", "delay": "10ms"}

    def parts() -> list[float]:
        link = {"up": state, "down": state}
        measured = play(links, "goodput", direction="down", link=link, devices=50, settle=4, seconds=5)
        return [bits / (mbit * 1e6) for bits in measured]

    measured = settled(3, parts, lambda parts: min(parts) >= 0.85)
    record_property("least_part", round(min(measured), 4))
    assert min(measured) >= 0.85
    assert max(measured) <= 1


def effects(report: dict[str, Any]) -> list[float]:
    """For each change the seconds from asking for a rate to the arrival of a train at that rate."""
    arrivals: dict[int, list[float]] = {}
    for number, _, arrival, _ in report["arrived"]:
        arrivals.setdefault(number // report["train"], []).append(arrival)
    trains = [
        (max(times), (len(times) - 1) * report["packet_bits"] / (max(times) - min(times)))
        for times in arrivals.values()
        if len(times) == report["train"]
    ]
    moments = [asked for _, asked in report["changes"]] + [math.inf]
    return [
        min(
            (end - asked for end, seen in trains if asked < end < after and abs(seen / rate - 1) < 0.25),
            default=math.inf,
        )
        for (rate, asked), after in zip(report["changes"], moments[1:], strict=True)
    ]
