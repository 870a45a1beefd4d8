"""Courses: what a scenario says becomes a link for every time, the same for the same seed, in steps to follow."""

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from netem.access import ACCESS
from netem.course import (
    Cell,
    CellCourse,
    Change,
    Constant,
    Interruption,
    Setting,
    StateChange,
    changes,
    resolve,
)
from netem.link import (
    BadLink,
    Duration,
    GilbertElliott,
    Link,
    LinkState,
    Probability,
    Rate,
    decode_quantity,
    encode_quantity,
    quantity_schema,
)
from netem.motion import Moment, Placement, RandomWaypoint, Rayleigh

BUSY = Setting(
    cell=Cell(
        share=0.1, mobility=RandomWaypoint(fastest=30), update=Moment(0.3), fading=Rayleigh(coherence=Moment(0.25))
    ),
    changes=(Change(at=Moment(5), down=StateChange(rate=Rate("1mbit"))),),
    interruptions=(
        Interruption(every=Moment(8), lasting=Moment(0.5)),
        Interruption(every=Moment(4), lasting=Moment("110ms"), kind="handover"),
        Interruption(at=Moment(2), lasting=Moment(1)),
    ),
)
"""Everything at once."""


def read(setting: dict[str, Any]) -> Setting:
    return msgspec.convert(setting, Setting, dec_hook=decode_quantity)


def test_nothing_said_is_no_limit() -> None:
    assert list(changes(resolve(Setting(), 1, 0), math.inf)) == [(0.0, Link())]


@pytest.mark.parametrize("name", ACCESS)
def test_access_by_name_stays_as_it_is(name: str) -> None:
    course = resolve(read({"access": name}), 1, 0)
    assert list(changes(course, 1e9)) == [(0.0, ACCESS[name].link)]


def test_up_and_down_in_so_many_words() -> None:
    course = resolve(read({"up": {"rate": "5mbit"}, "down": {"delay": "50ms", "loss": "1%"}}), 1, 0)
    assert course.at(3) == Link(
        up=LinkState(rate=Rate("5mbit")), down=LinkState(delay=Duration("50ms"), loss=Probability("1%"))
    )


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ({"access": "dial-up"}, "there is no access 'dial-up'; there is 5g-mid-band, lte, wifi-6-good"),
        ({"access": "lte", "cell": {}}, "`access` and `cell` both say what the links are"),
        ({"up": {}, "trace": {"format": "csv", "file": "x"}}, "`up` and `trace` both say"),
        ({"down": {}, "access": "lte"}, "`access` and `down` both say"),
        ({"cell": {"update": "50ms"}}, r"an `update` of 50ms is too short - at `\$.cell`"),
        ({"cell": {"bandwidth_mhz": 21}}, "no 21 MHz"),
        ({"changes": [{"at": "3s"}]}, r"the change at 3s says nothing of `up` or `down` - at `\$.changes\[0\]`"),
        ({"changes": [{"at": "3s", "device": 0, "up": {}}]}, "Expected `int` >= 1"),
        ({"interruptions": [{"lasting": "1s"}]}, "either once `at` a time or `every` so often"),
        ({"interruptions": [{"lasting": "1s", "at": 1, "every": 1}]}, "either once `at` a time or `every` so often"),
        ({"interruptions": [{"lasting": "50ms", "at": 1}]}, "this outage of 50ms is too short"),
        ({"interruptions": [{"lasting": "1s", "every": 0}]}, "longer than 0s"),
        ({"interruptions": [{"lasting": "2000s", "at": 1, "kind": "handover"}]}, "up to 60s"),
        ({"trace": {"format": "pcap"}}, "Invalid value 'pcap'"),
    ],
)
def test_a_wrong_setting_is_one_sentence(setting: dict[str, Any], error: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=error):
        read(setting)


def test_a_setting_is_written_as_it_is_read() -> None:
    text = msgspec.json.encode(BUSY, enc_hook=encode_quantity)
    assert msgspec.json.decode(text, type=Setting, dec_hook=decode_quantity) == BUSY


def test_the_examples_in_the_documentation_are_settings() -> None:
    page = (Path(__file__).parents[2] / "docs" / "channels.md").read_text(encoding="utf-8")
    examples = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert len(examples) == 5
    for example in examples:
        assert read(yaml.safe_load(example)) != Setting()


def test_a_setting_has_a_schema() -> None:
    schema = msgspec.json.schema(Setting, schema_hook=quantity_schema)
    assert {"Setting", "Cell", "StateChange", "UrbanMicro", "MahimahiTrace"} <= set(schema["$defs"])


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, 1000))
def test_same_seed_same_course_whenever_asked(seed: int, device: int) -> None:
    one, other = (resolve(BUSY, device, seed) for _ in range(2))
    times = [step * 0.37 for step in range(60)]
    forwards = [one.at(time) for time in times]
    assert [other.at(time) for time in reversed(times)] == forwards[::-1]


def test_another_seed_or_device_is_another_course() -> None:
    courses = [resolve(BUSY, device, seed) for device, seed in ((1, 1), (2, 1), (1, 2))]
    assert (
        len({msgspec.json.encode([course.at(t) for t in range(20)], enc_hook=encode_quantity) for course in courses})
        == 3
    )


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.floats(0.5, 40), st.floats(0, 20))
def test_steps_are_a_tenth_of_a_second_apart_and_say_what_holds(seed: int, length: float, start: float) -> None:
    course = resolve(BUSY, 1, seed)
    steps = list(changes(course, start + length, start))
    assert steps[0] == (start, course.at(start))
    for (before, old), (after, new) in pairwise(steps):
        assert after - before >= 0.1 - 1e-9
        assert new != old
        assert new == course.at(after)
    assert all(start <= time < start + length for time, _ in steps)


def test_steps_miss_no_change_that_can_be_followed() -> None:
    """Whatever holds for longer than the least distance of two steps is among them."""
    course = resolve(BUSY, 1, 11)
    steps = list(changes(course, 60))
    times = [time for time, _ in steps]
    for number in range(1500):
        time = number / 25
        link = course.at(time)
        applied = next(
            old
            for (begin, old), end in zip(reversed(steps), reversed([*times[1:], 60.0]), strict=True)
            if begin <= time
        )
        if link != applied:  # then it began less than 0.1 s after a step, and is put off
            last = max(begin for begin in times if begin <= time)
            assert time - last < 0.1 + 1e-9


def test_a_device_in_a_cell_is_where_the_seed_puts_it() -> None:
    setting = read({"cell": {"placement": {"inner_m": 50, "outer_m": 300}, "shadowing": False, "los": True}})
    course = resolve(setting, 1, 7)
    assert isinstance(course, CellCourse)
    reception = course.reception(0)
    assert 50 <= reception.distance_m <= 300
    assert reception.los
    channel = Cell()
    assert reception.loss_db == channel.path_loss.loss_db(reception.distance_m, 3.5, los=True)
    assert course.at(0) == channel.link(channel.reception(reception.distance_m, los=True))
    assert course.after(0) == math.inf


def test_sight_is_as_frequent_as_the_model_says() -> None:
    """Devices at 60 m of many cells: TR 38.901 sees half of them (18/60 + exp(-60/36) (1 - 18/60) = 0.432)."""
    cell = Cell(placement=Placement(inner_m=60, outer_m=60))
    seen = 0
    for seed in range(600):
        course = resolve(Setting(cell=cell), 1, seed)
        assert isinstance(course, CellCourse)
        seen += course.reception(0).los
    assert seen / 600 == pytest.approx(0.432, abs=3.3 * math.sqrt(0.432 * 0.568 / 600))


def test_devices_at_one_place_meet_the_same_shadow(tmp_path: Path) -> None:
    (tmp_path / "way.csv").write_text("time,x,y\n0,100,20\n100,200,20\n")
    setting = read({"cell": {"mobility": {"model": "recorded", "file": "way.csv"}, "update": 1}})
    one, other, elsewhere = (resolve(setting, d, s, tmp_path) for d, s in ((1, 5), (2, 5), (1, 6)))
    assert [one.at(t) for t in range(100)] == [other.at(t) for t in range(100)]
    assert [one.at(t) for t in range(100)] != [elsewhere.at(t) for t in range(100)]
    assert one.after(0) == 1


def test_shadowing_of_nearby_places_is_alike() -> None:
    """At 10 cm of a correlation distance of 10 m, a shadow of 4 dB differs by sqrt(2 (1 - 0.99)) 4 = 0.6 dB."""
    cell = Cell(los=True, mobility=RandomWaypoint(slowest=0.2, fastest=0.2, longest_rest=Moment(0)))
    course = resolve(Setting(cell=cell), 1, 3)
    assert isinstance(course, CellCourse)
    shadows = []
    for step in range(400):
        reception = course.reception(step * 0.5)
        shadows.append(reception.loss_db - cell.path_loss.loss_db(reception.distance_m, 3.5, los=True))
    steps = [after - before for before, after in pairwise(shadows)]
    assert math.sqrt(sum(step**2 for step in steps) / len(steps)) < 1.2
    assert max(shadows) - min(shadows) > 1.0


def test_fading_changes_with_its_blocks_only() -> None:
    course = resolve(Setting(cell=Cell(fading=Rayleigh(coherence=Moment(0.2)))), 1, 4)
    assert course.at(0.0) == course.at(0.19) != course.at(0.21)
    assert course.after(0.0) == 0.2


def test_every_device_has_files_of_its_own(tmp_path: Path) -> None:
    for device, rate in ((1, "1mbit"), (2, "2mbit")):
        (tmp_path / f"link-{device}.csv").write_text(f"time,rate\n0,{rate}\n")
        (tmp_path / f"{device}.trace").write_text("1\n" * device)
    csv = read({"trace": {"format": "csv", "file": "link-{device}.csv"}})
    assert [resolve(csv, device, 0, tmp_path).at(0).up.rate for device in (1, 2)] == [1e6, 2e6]
    mahimahi = read({"trace": {"format": "mahimahi", "down": "{device}.trace", "delay": "5ms"}})
    assert [resolve(mahimahi, device, 0, tmp_path).at(0).down.rate for device in (1, 2)] == [12e6, 24e6]
    with pytest.raises(BadLink, match=r"link-3.csv cannot be read"):
        resolve(csv, 3, 0, tmp_path)


def test_scheduled_changes_hold_until_the_next_of_the_same_field() -> None:
    setting = read(
        {
            "access": "ethernet",
            "changes": [
                {"at": "30s", "down": {"rate": None}},
                {"at": "12s", "device": 3, "down": {"rate": "2mbit"}},
                {"at": "20s", "device": 3, "down": {"delay": "80ms"}, "up": {"loss": "3%"}},
                {"at": "13s", "device": 4, "down": {"rate": "9mbit"}},
            ],
        }
    )
    plain = ACCESS["ethernet"].link
    course = resolve(setting, 3, 0)
    assert course.at(11.9) == plain
    assert course.at(12).down == msgspec.structs.replace(plain.down, rate=Rate("2mbit"))
    assert course.at(25).down == msgspec.structs.replace(plain.down, rate=Rate("2mbit"), delay=Duration("80ms"))
    assert course.at(25).up == msgspec.structs.replace(plain.up, loss=Probability("3%"))
    assert course.at(30).down == msgspec.structs.replace(plain.down, rate=None, delay=Duration("80ms"))
    assert [time for time, _ in changes(course, 100)] == [0, 12, 20, 30]
    assert [time for time, _ in changes(resolve(setting, 4, 0), 100)] == [0, 13, 30]


def test_a_change_knows_every_field_of_a_state() -> None:
    assert StateChange.__struct_fields__ == LinkState.__struct_fields__


bursts = st.builds(GilbertElliott, to_bad=st.just(Probability("1%")), to_good=st.just(Probability("20%")))
probabilities = st.sampled_from([0.0, 0.01, 1.0]).map(Probability)
durations = st.sampled_from([0.0, 0.005, 0.02]).map(Duration)


def or_unset(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.just(msgspec.UNSET) | strategy


@st.composite
def state_changes(draw: st.DrawFn) -> StateChange:
    """Any change that does not contradict itself."""
    delay, jitter = draw(or_unset(durations)), draw(or_unset(durations))
    if msgspec.UNSET not in (delay, jitter):
        delay, jitter = max(delay, jitter), min(delay, jitter)
    loss = draw(or_unset(probabilities))
    return StateChange(
        rate=draw(or_unset(st.none() | st.just(Rate("1mbit")))),
        delay=delay,
        jitter=jitter,
        delay_correlation=draw(or_unset(probabilities)),
        loss=loss,
        loss_correlation=draw(or_unset(probabilities)),
        bursts=msgspec.UNSET if loss else draw(or_unset(st.none() | bursts)),
        reorder=draw(or_unset(probabilities)),
        limit=draw(or_unset(st.none() | st.just(10))),
    )


@given(st.lists(state_changes(), max_size=4), state_changes())
def test_a_change_fits_every_state_and_what_it_gives_holds(before: list[StateChange], change: StateChange) -> None:
    state = LinkState()
    for earlier in before:
        state = earlier.apply(state)
    changed = change.apply(state)
    idle = {"delay_correlation": "jitter", "loss_correlation": "loss", "reorder": "delay"}
    for name in change.__struct_fields__:
        if (wanted := getattr(change, name)) is not msgspec.UNSET and getattr(changed, idle.get(name, name)):
            assert getattr(changed, name) == wanted
    assert change.apply(changed) == changed


def test_what_a_change_gives_makes_the_rest_give_way() -> None:
    bursty = LinkState(bursts=GilbertElliott(to_bad=Probability("1%"), to_good=Probability("20%")))
    jittery = LinkState(delay=Duration("20ms"), jitter=Duration("10ms"), loss=Probability("1%"))
    assert StateChange(delay=Duration("5ms")).apply(jittery).jitter == 0.005
    assert StateChange(jitter=Duration("50ms")).apply(jittery).delay == 0.05
    assert StateChange(bursts=bursty.bursts).apply(jittery).loss == 0
    assert StateChange(loss=Probability("2%")).apply(bursty).bursts is None
    assert StateChange().apply(jittery) == jittery


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"delay": "5ms", "jitter": "9ms"}, "a change to a delay of 5ms has no room for its jitter of 9ms"),
        ({"loss": "1%", "bursts": {"model": "gilbert-elliott", "to_bad": "1%", "to_good": "9%"}}, "change one of them"),
        ({"limit": 0}, "Expected `int` >= 1"),
        ({"rate": "fast"}, "'fast' is no rate"),
        ({"speed": 1}, "unknown field `speed`"),
    ],
)
def test_a_change_that_contradicts_itself_is_refused(change: dict[str, Any], error: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=error):
        read({"changes": [{"at": "3s", "up": change}]})


def test_an_outage_loses_everything_and_a_handover_nothing() -> None:
    setting = read(
        {
            "access": "lte",
            "interruptions": [
                {"at": "10s", "lasting": "2s"},
                {"at": "11s", "lasting": "3s", "kind": "handover"},
            ],
        }
    )
    lte = ACCESS["lte"].link
    course = resolve(setting, 1, 0)
    assert [time for time, _ in changes(course, 100)] == [0, 10, 11, 12, 14]
    assert course.at(9.99) == course.at(14) == lte
    for time in (10, 11, 11.9):
        assert course.at(time).up.loss == course.at(time).down.loss == 1
        assert course.at(time).down.rate == lte.down.rate
    late = course.at(13)
    assert (late.up.loss, late.up.delay) == (lte.up.loss, lte.up.delay + 3)


def test_interruptions_by_chance_come_as_often_as_they_should() -> None:
    """Every 20 s in the mean (and 0.1 s) for 0.5 s: 1000 in 20,600 s, give or take 3.3 standard deviations."""
    course = resolve(Setting(interruptions=(Interruption(every=Moment(20), lasting=Moment(0.5)),)), 1, 3)
    steps = list(changes(course, 20_600))
    down = [time for time, link in steps if link.up.loss == 1]
    assert len(down) == pytest.approx(1000, abs=3.3 * math.sqrt(1000))
    for begin, end in zip(down, [time for time, link in steps[1:] if link.up.loss == 0], strict=False):
        assert end - begin == pytest.approx(0.5)


@given(st.sampled_from(["outage", "handover"]), st.integers(0, 2**31))
def test_an_interruption_fits_every_link(kind: Any, seed: int) -> None:
    interruption = Interruption(at=Moment(0), lasting=Moment(1), kind=kind)
    for access in ACCESS.values():
        assert interruption.apply(access.link) != access.link
    bursts = GilbertElliott(to_bad=Probability("1%"), to_good=Probability("20%"))
    link = interruption.apply(Link(up=LinkState(bursts=bursts), down=resolve(BUSY, 1, seed).at(1).down))
    assert link.up.loss == (1 if kind == "outage" else 0)


def test_a_constant_course_never_changes() -> None:
    course = Constant(Link())
    assert course.at(0) == course.at(1e9) == Link()
    assert course.after(0) == math.inf
