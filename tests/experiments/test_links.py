"""Links in the course of a run: what is applied and when, in a slower world too, and questions from outside."""

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from broker.messages import Result, Stage
from experiments import rows
from experiments.cli import app
from experiments.links import LinkControl, Replay, Set, Show, ask, courses, newest_running, parse_change, render
from experiments.places import PlaceFailed
from experiments.scenario import BadScenario, Radio, load_scenario
from experiments.served import Served
from netem.course import Change, Setting, StateChange
from netem.hosts import AttachError
from netem.link import BadLink, Duration, Link, LinkState, Probability, Rate
from netem.motion import Moment
from netem.probe import Traffic

SLOW = Link(up=LinkState(rate=Rate("5mbit"), delay=Duration("20ms")), down=LinkState(rate=Rate("10mbit")))


class Field:
    """A place whose links are a dictionary."""

    def __init__(self, *nodes: str) -> None:
        self.links = dict.fromkeys(nodes, Link())
        self.shaped: list[tuple[float, str, Link]] = []
        self.ended: dict[str, str] = {}

    async def shape(self, node: str, link: Link) -> None:
        if node not in self.links:
            raise AttachError(f"no device named {node!r} is attached")
        self.links[node] = link
        self.shaped.append((time.monotonic(), node, link))

    async def read(self, node: str) -> Link:
        return self.links[node]

    async def counters(self, node: str) -> None: ...

    async def traffic(self) -> Mapping[str, Traffic]:
        now = int(1000 * time.monotonic())
        return {node: Traffic(up=now, down=2 * now) for node in self.links}

    async def round_trip(self, node: str, patience: float) -> float | None:  # noqa: ARG002
        return 2 * self.links[node].up.delay


def control(place: Any, *, slowdown: float = 1.0, journal: list[dict[str, Any]] | None = None) -> LinkControl:
    def keep(kind: str, **fields: Any) -> None:
        assert kind == "link"
        if journal is not None:
            journal.append(fields)

    return LinkControl(place, slowdown=slowdown, journal=keep)


def slower_from(seconds: float) -> Change:
    return Change(at=Moment(seconds), down=StateChange(rate=Rate("1mbit")))


async def test_links_start_as_asked_and_follow_their_course() -> None:
    place, journal = Field("device-1", "device-2"), []
    setting = Setting(up=SLOW.up, down=SLOW.down, changes=(slower_from(0.2),))
    wanted = courses({"device-1": setting, "device-2": Setting()}, 0, Path())
    links = control(place, journal=journal)
    begin = time.monotonic()
    async with links.played(wanted):
        assert place.links == {"device-1": SLOW, "device-2": Link()}
        await asyncio.sleep(0.6)
    assert place.links["device-1"].down.rate == 1e6
    assert place.links["device-1"].up == SLOW.up
    assert place.shaped[-1][0] - begin >= 0.2
    assert (links.changes("device-1"), links.changes("device-2")) == (1, 0)
    assert links.start("device-1") == SLOW
    assert journal[-1] == {"node": "device-1", "up": str(SLOW.up), "down": "rate 1mbit"}
    now = time.time()
    assert links.during("device-1", now - 0.55) == SLOW
    late = links.during("device-1", now)
    assert late is not None
    assert late.down.rate == 1e6
    assert links.during("edge", now) is None


async def test_a_slower_world_has_slower_links_and_later_changes() -> None:
    place = Field("device-1")
    setting = Setting(up=SLOW.up, down=SLOW.down, changes=(slower_from(0.1),))
    links = control(place, slowdown=4)
    begin = time.monotonic()
    async with links.played(courses({"device-1": setting}, 0, Path())):
        assert place.links["device-1"].up.rate == 1.25e6
        assert place.links["device-1"].up.delay == pytest.approx(0.08)
        assert await links.applied() == {"device-1": SLOW}
        told = links.told(Radio())
        await asyncio.sleep(0.6)
    assert len(place.shaped) == 2
    assert place.shaped[-1][0] - begin >= 0.4
    assert told["device-1"].up.delay == 0.02
    assert told["device-1"].up.watts == 0.2
    assert told["device-1"].down.rate == pytest.approx(10e6 * (1400 - 52) / 1400)


async def test_a_hand_on_a_link_outlasts_the_scenario_and_lets_go() -> None:
    place = Field("device-1")
    setting = Setting(up=SLOW.up, changes=(slower_from(0.2),))
    links = control(place)
    async with links.played(courses({"device-1": setting}, 0, Path())):
        await links._answer(Set(node="device-1", up=StateChange(loss=Probability("1%"))))
        assert place.links["device-1"].up.loss == 0.01
        await asyncio.sleep(0.5)
        assert place.links["device-1"].up.loss == 0.01
        assert place.links["device-1"].down.rate == 1e6
        await links._answer(Set(node="device-1"))
    assert place.links["device-1"].up == SLOW.up


async def test_questions_come_through_the_run_folder(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("time,rate\n0,3mbit\n")
    links = control(Field("device-1"))
    folder = tmp_path / ("a" * 100) / ("b" * 100)  # longer than a socket's address may be
    folder.mkdir(parents=True)
    async with links.served(folder), links.played(courses({"device-1": Setting(up=SLOW.up)}, 0, Path())):
        answer = await asyncio.to_thread(ask, folder, Show())
        (shown,) = answer.links
        assert shown.requested == shown.applied == Link(up=SLOW.up)
        assert shown.up_bps == pytest.approx(8000, rel=0.2)
        assert shown.down_bps == pytest.approx(16000, rel=0.2)
        assert shown.round_trip_s == pytest.approx(0.04)
        answer = await asyncio.to_thread(ask, folder, Replay(node="device-1", trace=str(trace)))
        assert answer.links[0].requested.up.rate == 3e6
        answer = await asyncio.to_thread(ask, folder, Set(node="nobody"))
        assert answer.error == "'nobody' has no link here; there is device-1"
        answer = await asyncio.to_thread(ask, folder, Replay(node="device-1", trace="/nowhere.csv"))
        assert "/nowhere.csv" in answer.error
        assert newest_running(folder.parent) == folder
        assert render(answer.links).row_count == 0
    with pytest.raises(PlaceFailed, match="no testbed runs into"):
        ask(folder, Show())
    with pytest.raises(PlaceFailed, match="no testbed is running"):
        newest_running(folder.parent)


async def test_a_link_of_a_device_that_has_ended_is_left_alone() -> None:
    place = Field("device-1")
    place.ended["device-2"] = "device-2 was killed"
    links = control(place)
    async with links.played(courses({"device-1": Setting(), "device-2": Setting()}, 0, Path())):
        assert links.nodes == ("device-1",)
    del place.ended["device-2"]
    with pytest.raises(AttachError, match="device-2"):
        async with links.played(courses({"device-1": Setting(), "device-2": Setting()}, 0, Path())):
            pass


def test_changes_are_written_as_tc_users_write_them() -> None:
    assert parse_change("rate 2mbit delay 50ms") == StateChange(rate=Rate(2e6), delay=Duration(0.05))
    assert parse_change("rate=2mbit, limit=30") == StateChange(rate=Rate(2e6), limit=30)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rate", "'rate' is no state: write names and values in turn"),
        ("", "'' is no state"),
        ("speed 2mbit", "unknown field `speed`"),
        ("rate 2", "'2' is no rate|a rate is at least 8bit, not 2"),
    ],
)
def test_what_is_no_change_says_so(text: str, sentence: str) -> None:
    with pytest.raises(BadLink, match=sentence):
        parse_change(text)


def test_transfers_stand_beside_the_limits_of_their_way() -> None:
    stages = (
        Stage(name="transfer", node="device-1", to="edge", start=10.0, stop=10.1, size=200),
        Stage(name="transfer", node="edge", to="device-1", start=20.0, stop=22.0, size=1_000_000),
    )
    result = Result(
        round="r", request="q", device="device-1", outcome="answered", asked=9.0, finished=30.0, stages=stages
    )
    served = Served(
        round="r", framework="semct", repetition=0, seed=0, prompts={"q": "a cat"}, devices={"q": "device-1"}
    )
    served.results["q"] = result

    def during(node: str, at: float) -> Link | None:
        return SLOW if node == "device-1" else None

    up, down = rows.transfer_rows(served, during, slowdown=2)
    assert (up.sender, up.receiver, up.limit_bps, up.delay_s) == ("device-1", "edge", 5e6, 0.02)
    assert (down.seconds, down.goodput_bps, down.limit_bps, down.delay_s) == (1.0, 8e6, 10e6, 0.0)


def test_a_scenario_says_what_its_links_are(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("name: s\ndevices: [{count: 2, links: {access: lte}}]\n")
    assert load_scenario(path).shaping == "auto"
    path.write_text("name: s\ndevices: [{count: 2}]\nlinks: {down: {rate: 20mbits}}\n")
    with pytest.raises(BadScenario, match=r"line 3, at `links\.down\.rate`: '20mbits' is no rate: write it like"):
        load_scenario(path)
    path.write_text("name: s\ndevices: [{count: 2}]\nlinks: {down: {rate: 20mbps}}\n")
    assert load_scenario(path).links.down == LinkState(rate=Rate(160e6))
    path.write_text("name: s\ndevices: [{count: 2}]\n")
    assert load_scenario(path).shaping == "none"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["show"], "no testbed is running into a folder of"),
        (
            ["set", "device-1", "--up", "speed 3mbit"],
            "'speed 3mbit' is no state: Object contains unknown field `speed`",
        ),
        (["set", "device-1", "--down", "rate 3furlongs"], "'3furlongs' is no rate: write it like 20mbit"),
    ],
)
def test_the_command_says_in_one_sentence_what_it_cannot_do(
    tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    done = CliRunner().invoke(app, ["link", *arguments, "--runs", str(tmp_path)])
    assert done.exit_code == 1
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
