"""Places and chance: distributions, ways that stay in their ring, landscapes, fading, and recorded ways."""

import math
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netem.link import BadLink
from netem.motion import (
    Field,
    Moment,
    Place,
    Placement,
    RandomWaypoint,
    Rayleigh,
    Recorded,
    Rician,
    block,
    draws,
    read_way,
)

rings = st.tuples(st.floats(0, 1000), st.floats(0.1, 1000)).map(
    lambda bounds: Placement(inner_m=bounds[0], outer_m=bounds[0] + bounds[1])
)
seeds = st.integers(0, 2**31)


def distance_from_uniform(values: list[float]) -> float:
    """Kolmogorov and Smirnov's statistic against the uniform distribution on [0, 1]."""
    count = len(values)
    return max(max((index + 1) / count - value, value - index / count) for index, value in enumerate(sorted(values)))


@pytest.mark.parametrize("uniform", ["area", "radius"])
def test_devices_are_uniform_over_the_ring(uniform: str) -> None:
    ring = Placement(uniform=uniform)  # type: ignore[arg-type]
    random = draws("placement")
    places = [ring.draw(random) for _ in range(4000)]
    if uniform == "area":
        ranks = [(place.distance**2 - 50**2) / (300**2 - 50**2) for place in places]
    else:
        ranks = [(place.distance - 50) / 250 for place in places]
    angles = [math.atan2(place.y, place.x) / (2 * math.pi) + 0.5 for place in places]
    limit = 1.95 / math.sqrt(4000)  # exceeded once in a thousand seeds; this one is fixed
    assert distance_from_uniform(ranks) < limit
    assert distance_from_uniform(angles) < limit


@given(rings, seeds)
def test_placement_stays_in_its_ring(ring: Placement, seed: int) -> None:
    assert ring.inner_m - 1e-6 <= ring.draw(draws(seed)).distance <= ring.outer_m + 1e-6


def test_a_ring_inside_out_is_an_error() -> None:
    with pytest.raises(BadLink, match="`inner_m` is at most its `outer_m`, not 300 of 50"):
        Placement(inner_m=300, outer_m=50)


@given(rings, seeds, st.floats(0.1, 50))
def test_a_walk_stays_in_the_ring_and_within_its_speed(ring: Placement, seed: int, speed: float) -> None:
    walk = RandomWaypoint(slowest=speed / 2, fastest=speed).start(ring, draws(seed))
    places = [walk.at(step * 0.5) for step in range(400)]
    for place in places:
        assert ring.inner_m * (1 - 1e-6) - 1e-6 <= place.distance <= ring.outer_m * (1 + 1e-6)
    for before, after in pairwise(places):
        assert math.dist(before, after) <= speed * 0.5 * (1 + 1e-6)


@given(seeds, st.lists(st.floats(0, 2000), max_size=8))
def test_a_walk_does_not_depend_on_when_it_is_asked(seed: int, times: list[float]) -> None:
    one, other = (RandomWaypoint().start(Placement(), draws(seed)) for _ in range(2))
    forwards = {time: one.at(time) for time in sorted(times)}
    for time in times:
        assert other.at(time) == forwards[time]


def test_a_walk_goes_around_the_middle() -> None:
    """From east to west of a circle of 50 m: the shortest way is two tangents and an arc."""
    ring = Placement(inner_m=50, outer_m=100)
    walk = RandomWaypoint(slowest=1, fastest=1, longest_rest=Moment(0)).start(ring, draws(3))
    nearest = min(walk.at(time).distance for time in range(20000))
    assert nearest == pytest.approx(50, abs=0.1)


def test_a_walk_needs_room() -> None:
    with pytest.raises(BadLink, match="ring with some width"):
        RandomWaypoint().start(Placement(inner_m=50, outer_m=50), draws(0))
    with pytest.raises(BadLink, match="`slowest` is at most its `fastest`"):
        RandomWaypoint(slowest=3, fastest=2)


def test_a_landscape_is_standard_normal_and_falls_off_exponentially() -> None:
    """Over many landscapes: mean 0, variance 1, and correlation exp(-d / 10 m), within four standard errors."""
    count = 1500
    pairs = []
    for seed in range(count):
        landscape = Field(10.0, draws(seed))
        pairs.append((landscape.at(Place(3.0, 4.0)), landscape.at(Place(3.0, 11.0)), landscape.at(Place(23.0, 4.0))))
    tolerance = 4 / math.sqrt(count)
    assert abs(sum(a for a, _, _ in pairs) / count) < tolerance
    assert sum(a * a for a, _, _ in pairs) / count == pytest.approx(1, abs=math.sqrt(2) * tolerance)
    assert sum(a * b for a, b, _ in pairs) / count == pytest.approx(math.exp(-0.7), abs=math.sqrt(2) * tolerance)
    assert sum(a * c for a, _, c in pairs) / count == pytest.approx(math.exp(-2), abs=math.sqrt(2) * tolerance)


def test_ranks_of_a_landscape_are_uniform() -> None:
    ranks = [Field(50.0, draws("rank", seed)).rank_at(Place(100.0, 0.0)) for seed in range(1000)]
    assert distance_from_uniform(ranks) < 1.95 / math.sqrt(1000)


def power(gain_db: float) -> float:
    return float(10 ** (gain_db / 10))


def test_rayleigh_power_is_exponential_with_mean_1() -> None:
    count = 8000
    powers = [power(Rayleigh().gain_db(number, "seed")) for number in range(count)]
    assert sum(powers) / count == pytest.approx(1, abs=3.3 / math.sqrt(count))  # 99.9 % confidence
    assert distance_from_uniform([1 - math.exp(-value) for value in powers]) < 1.95 / math.sqrt(count)


@pytest.mark.parametrize("k_db", [0.0, 9.0, 20.0])
def test_rician_power_has_mean_1_and_the_spread_of_its_k(k_db: float) -> None:
    """The variance of the power is (2 K + 1) / (K + 1)^2."""
    count, k = 8000, 10 ** (k_db / 10)
    powers = [power(Rician(k_db=k_db).gain_db(number, "seed")) for number in range(count)]
    variance = (2 * k + 1) / (k + 1) ** 2
    mean = sum(powers) / count
    assert mean == pytest.approx(1, abs=3.3 * math.sqrt(variance / count))
    assert sum((value - mean) ** 2 for value in powers) / count == pytest.approx(variance, rel=0.1)


def test_diversity_averages_fading() -> None:
    powers = [power(Rayleigh(diversity=16).gain_db(number, "seed")) for number in range(3000)]
    mean = sum(powers) / 3000
    assert mean == pytest.approx(1, abs=3.3 / math.sqrt(16 * 3000))
    assert sum((value - mean) ** 2 for value in powers) / 3000 == pytest.approx(1 / 16, rel=0.15)


def test_fading_is_a_function_of_seed_device_and_block() -> None:
    fading = Rayleigh()
    assert fading.gain_db(5, 7, 1) == fading.gain_db(5, 7, 1)
    assert len({fading.gain_db(*block) for block in ((5, 7, 1), (6, 7, 1), (5, 8, 1), (5, 7, 2))}) == 4


@pytest.mark.parametrize("kind", [Rayleigh, Rician])
def test_fading_faster_than_a_link_can_follow_is_an_error(kind: type[Rayleigh | Rician]) -> None:
    with pytest.raises(BadLink, match="a coherence time of 50ms is too short"):
        kind(coherence=Moment("50ms"))


@given(st.integers(0, 10**6), st.sampled_from([0.1, 0.25, 0.3, 0.5, 1.7]))
def test_a_block_begins_where_it_should(number: int, length: float) -> None:
    assert block(number * length, length) == number
    assert block((number + 0.5) * length, length) == number


def test_a_moment_may_be_late() -> None:
    assert Moment("12s") == 12
    assert Moment(1e6) == 1e6
    with pytest.raises(BadLink, match="from 0 on, not nan"):
        Moment(math.nan)


@given(st.lists(st.tuples(st.floats(0.01, 100), st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=1))
def test_a_recorded_way_is_read_as_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[float, float, float]]
) -> None:
    times = list(accumulate(step for step, _, _ in rows))
    file = tmp_path_factory.mktemp("ways") / "way.csv"
    lines = (f"{time!r},{x!r},{y!r}" for time, (_, x, y) in zip(times, rows, strict=True))
    file.write_text("\n".join(["time,x,y", *lines]))
    assert read_way(file) == (times, [Place(x, y) for _, x, y in rows])


def test_a_recorded_way_is_followed_in_straight_lines(tmp_path: Path) -> None:
    file = tmp_path / "way.csv"
    file.write_text("time, distance\n0, 100\n10, 200\n\n20, 200\n")
    way = Recorded(file="way.csv").read(file)
    assert [way.at(time).distance for time in (0, 5, 10, 15, 20, 1000)] == [100, 150, 200, 200, 200, 200]
    again = Recorded(file="way.csv", period=Moment(30)).read(file)
    assert [again.at(time).distance for time in (25, 30, 35, 65)] == [200, 100, 150, 150]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", r"way.csv, line 1: the columns are time,x,y or time,distance, not ''"),
        ("time,z\n0,1\n", r"way.csv, line 1: .*not 'time,z'"),
        ("time,x,y\n", r"way.csv has no rows"),
        ("time,x,y\n0,1,2\n1,2\n", r"way.csv, line 3: here stand 3 numbers, not '1,2'"),
        ("time,distance\n0,near\n", r"way.csv, line 2: here stand 2 numbers, not '0,near'"),
        ("time,distance\n0,inf\n", r"way.csv, line 2: here stand 2 numbers"),
        ("time,distance\n0,1\n0,2\n", r"way.csv, line 3: times start at 0 or later and increase, not 0"),
        ("time,distance\n-1,1\n", r"way.csv, line 2: times start at 0 or later"),
    ],
)
def test_a_wrong_way_is_one_sentence_with_the_line(tmp_path: Path, text: str, error: str) -> None:
    file = tmp_path / "way.csv"
    file.write_text(text)
    with pytest.raises(BadLink, match=error):
        Recorded(file="way.csv").read(file)


def test_a_period_shorter_than_the_way_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "way.csv"
    file.write_text("time,distance\n0,1\n40,2\n")
    with pytest.raises(BadLink, match="goes on until 40 s, longer than its `period` of 30s"):
        Recorded(file="way.csv", period=Moment(30)).read(file)
    with pytest.raises(BadLink, match="cannot be read as a recorded way"):
        Recorded(file="nowhere.csv").read(tmp_path / "nowhere.csv")
