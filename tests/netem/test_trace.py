"""Recorded links: both formats as written, their rates, their repetition, and errors with file and line."""

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netem.link import OUTAGE, BadLink, Duration, Link, LinkState, Probability, Rate
from netem.motion import Moment
from netem.trace import Deliveries, MahimahiTrace, read_csv, read_deliveries, read_mahimahi

COMMUTE = """\
time, direction, rate,   delay, jitter, loss
0,    down,      20mbit, 15ms,  2ms,    0.1%
0,    up,        5mbit,  25ms,  2ms,    0.1%
10,   down,      2mbit
12.5, both,      ,       ,      ,       2%
60,   up,        1e6,    0.03
"""


def write(folder: Path, text: str, name: str = "link.csv") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def state(rate: str, delay: str, jitter: str, loss: str) -> LinkState:
    return LinkState(rate=Rate(rate), delay=Duration(delay), jitter=Duration(jitter), loss=Probability(loss))


def test_a_csv_trace_holds_each_row_until_the_next_of_its_direction(tmp_path: Path) -> None:
    trace = read_csv(write(tmp_path, COMMUTE))
    assert trace.at(0) == Link(up=state("5mbit", "25ms", "2ms", "0.1%"), down=state("20mbit", "15ms", "2ms", "0.1%"))
    assert trace.at(10).down == state("2mbit", "15ms", "2ms", "0.1%")
    assert trace.at(12.5) == Link(up=state("5mbit", "25ms", "2ms", "2%"), down=state("2mbit", "15ms", "2ms", "2%"))
    assert trace.at(1e6).up == state("1mbit", "30ms", "2ms", "2%")
    assert [trace.after(time) for time in (0, 9.9, 10, 12.5, 60)] == [10, 10, 12.5, 60, float("inf")]


def test_a_csv_trace_starts_again_after_its_period(tmp_path: Path) -> None:
    trace = read_csv(write(tmp_path, COMMUTE), period=100.0)
    for time in (0, 9.9, 10, 12.5, 61, 99):
        assert trace.at(time + 300) == trace.at(time)
    assert [trace.after(time) for time in (60, 100, 113, 260)] == [100, 110, 160, 300]


def test_a_csv_trace_needs_no_more_than_a_time(tmp_path: Path) -> None:
    trace = read_csv(write(tmp_path, "time,rate\n5,1mbit\n7,2mbit\n"))
    assert trace.at(0) == Link(up=LinkState(rate=Rate("1mbit")), down=LinkState(rate=Rate("1mbit")))
    assert trace.at(7).up.rate == trace.at(7).down.rate == 2e6


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "link.csv, line 1: a link trace has `time` and some of the columns direction, rate, delay, jitter, loss"),
        ("rate,delay\n", "link.csv, line 1: a link trace has `time`"),
        ("time,speed\n", "link.csv, line 1: .*not 'time,speed'"),
        ("time,rate,rate\n", "link.csv, line 1: .*each once"),
        ("time,rate\n", "link.csv has no rows below its header"),
        ("time,rate\n0,fast\n", "link.csv, line 2: 'fast' is no rate: write it like 20mbit"),
        ("time,rate\nsoon,1mbit\n", "link.csv, line 2: 'soon' is no time: write it like 12s"),
        ("time,rate\n\n0,0\n", "link.csv, line 3: a rate is at least 8bit"),
        ("time,loss\n0,5\n", "link.csv, line 2: a probability of 5 may be meant as 5%"),
        ("time,rate\n0,1mbit,3\n", "link.csv, line 2: the header has 2 columns, this row has 3"),
        ("time,rate\n2,1mbit\n1,1mbit\n", "link.csv, line 3: times do not decrease, but 1 s comes after 2 s"),
        ("time,rate,direction\n0,1mbit,left\n", "link.csv, line 2: a direction is up, down or both, not 'left'"),
        ("time,delay,jitter\n0,1ms,2ms\n", "link.csv, line 2: a jitter of 2ms around a delay of 1ms"),
    ],
)
def test_a_wrong_csv_trace_is_one_sentence_with_the_line(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(BadLink, match=error):
        read_csv(write(tmp_path, text))


def test_a_csv_trace_ends_within_its_period_and_exists(tmp_path: Path) -> None:
    with pytest.raises(BadLink, match="goes on until 60 s, so its `period` is longer than that, not 60 s"):
        read_csv(write(tmp_path, COMMUTE), period=60.0)
    with pytest.raises(BadLink, match=r"nowhere\.csv cannot be read as a link trace: .*No such file"):
        read_csv(tmp_path / "nowhere.csv")


@given(st.lists(st.tuples(st.integers(1, 1000), st.integers(8, 10**10)), min_size=1, max_size=30))
def test_a_csv_trace_is_read_as_written(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int]]) -> None:
    time, lines, wanted = 0, ["time,rate"], []
    for step, rate in rows:
        lines.append(f"{time},{rate}bit")
        wanted.append((time, rate))
        time += step
    trace = read_csv(write(tmp_path_factory.mktemp("traces"), "\n".join(lines)), period=float(time))
    for start, rate in wanted:
        assert trace.at(start).up.rate == trace.at(start + 3 * time).down.rate == rate


def deliveries(folder: Path, times: list[int], name: str = "down.trace") -> Path:
    return write(folder, "".join(f"{time}\n" for time in times), name)


def test_mahimahi_documents_a_file_of_one_1_as_12_mbit(tmp_path: Path) -> None:
    """The README of its traces: one packet of 1500 bytes each millisecond."""
    trace = MahimahiTrace(down="down.trace", delay=Duration("20ms"), loss=Probability("1%"))
    link = read_mahimahi(trace, up=None, down=deliveries(tmp_path, [1]))
    for time in (0, 0.5, 17.3, 10_000):
        assert link.at(time).down == LinkState(rate=Rate("12mbit"), delay=Duration("20ms"), loss=Probability("1%"))
        assert link.at(time).up == LinkState(delay=Duration("20ms"), loss=Probability("1%"))
    assert link.after(0) == 0.5


def test_mahimahi_intervals_count_their_deliveries_and_repeat(tmp_path: Path) -> None:
    """100 packets in the first half second, none in the next, 50 in the last; 1.5 s, then again."""
    times = [5 * step for step in range(1, 101)] + [1000 + 10 * step for step in range(1, 51)]
    trace = MahimahiTrace(up="up.trace", interval=Moment(0.5))
    link = read_mahimahi(trace, up=deliveries(tmp_path, times, "up.trace"), down=None)
    for turn in (0, 1.5, 150):
        assert link.at(turn).up.rate == pytest.approx(100 * 12000 / 0.5)
        assert link.at(turn + 0.7).up == OUTAGE
        assert link.at(turn + 1.2).up.rate == pytest.approx(50 * 12000 / 0.5)
    assert link.at(0).down == LinkState()


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=40).filter(any),
    st.integers(1, 2000),
    st.integers(1, 400),
)
def test_mahimahi_counts_as_if_written_out(gaps: list[int], start: int, length: int) -> None:
    times, now = [], 0
    for gap in gaps:
        now += gap
        times.append(now)
    counted = Deliveries(tuple(times))
    turns = (start + length) // now + 1
    written_out = [turn * now + time for turn in range(turns) for time in times]
    within = sum(start < time <= start + length for time in written_out)
    assert counted.until(start + length) - counted.until(start) == within
    assert Fraction(counted.rate(start, start + length)).limit_denominator(10**6) == Fraction(
        within * 12_000_000, length
    )


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "down.trace is no Mahimahi trace: it has no delivery after 0 ms"),
        ("0\n0\n", "down.trace is no Mahimahi trace: it has no delivery after 0 ms"),
        ("1\n2.5\n", "down.trace, line 2: here stands a time in whole milliseconds, not '2.5'"),
        ("1\n\n3\n", "down.trace, line 2: here stands a time in whole milliseconds, not ''"),
        ("1\n-3\n", "down.trace, line 2: here stands a time in whole milliseconds, not '-3'"),
        ("5\n9\n7\n", "down.trace, line 3: delivery times do not decrease, but 7 comes after 9"),
    ],
)
def test_a_wrong_mahimahi_trace_is_one_sentence_with_the_line(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(BadLink, match=error):
        read_deliveries(write(tmp_path, text, "down.trace"))


def test_a_mahimahi_trace_needs_a_file_and_a_followable_interval(tmp_path: Path) -> None:
    with pytest.raises(BadLink, match="a file for `up` or `down`"):
        MahimahiTrace()
    with pytest.raises(BadLink, match="an `interval` of 20ms is too short"):
        MahimahiTrace(down="x", interval=Moment("20ms"))
    with pytest.raises(BadLink, match="cannot be read as a Mahimahi trace"):
        read_deliveries(tmp_path / "nowhere")
