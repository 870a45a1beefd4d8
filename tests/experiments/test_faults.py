"""What a scenario may say of faults, and what is drawn from it."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.faults import BROKER, Fault, Faults, RandomFaults
from experiments.scenario import BadScenario, load_scenario
from netem.link import Duration

NODES = {"edge": False, "device-1": True, "device-2": True, "cloud": True}

durations = st.floats(0, 100).map(Duration)
randoms = st.builds(
    RandomFaults,
    count=st.integers(1, 30),
    within=durations,
    lasts=st.tuples(durations, durations).map(lambda pair: (min(pair), max(pair))),
    what=st.lists(st.sampled_from(["dies", "hangs", "outage", "loss", "broker-restarts"]), min_size=1).map(tuple),
    nodes=st.lists(st.sampled_from(list(NODES)), max_size=3).map(tuple),
)


def read(folder: Path, faults: str, *, more: str = "") -> Faults:
    path = folder / "s.yaml"
    path.write_text(f"name: s\ndevices: [{{count: 2}}]\nedges: [{{count: 1}}]\n{more}\nfaults: {faults}\n")
    return load_scenario(path).faults


@given(randoms, st.integers(0, 99))
def test_random_faults_are_drawn_as_asked_and_break_nothing_twice_at_once(asked: RandomFaults, seed: int) -> None:
    faults = Faults(random=asked)
    if faults.problem(NODES):
        return
    drawn = faults.drawn(NODES, seed, 0)
    assert drawn == faults.drawn(NODES, seed, 0)
    assert len(drawn) <= asked.count
    assert list(drawn) == sorted(drawn, key=lambda fault: fault.at)
    until: dict[str, float] = {}
    for fault in drawn:
        target = fault.node or BROKER
        assert fault.what in asked.what
        assert fault.at <= asked.within
        assert fault.lasts is not None
        assert asked.lasts[0] <= fault.lasts <= asked.lasts[1]
        assert target in (asked.nodes or (*NODES, BROKER)) or target == BROKER
        assert (target == BROKER) == (fault.what == "broker-restarts")
        assert NODES.get(target, True) or fault.what not in {"outage", "loss"}
        assert fault.at > until.get(target, -1.0)
        until[target] = fault.at + fault.lasts


def test_another_repetition_meets_other_faults_and_the_script_stays() -> None:
    scripted = Fault(at=Duration(3), what="dies", node="device-1")
    faults = Faults(
        script=(scripted,),
        random=RandomFaults(count=5, within=Duration(9), lasts=(Duration(1), Duration(2))),
    )
    first, second = (faults.drawn(NODES, 1, repetition) for repetition in (0, 1))
    assert first != second
    assert scripted in first
    assert scripted in second


def test_faults_are_written_as_people_write_times(tmp_path: Path) -> None:
    faults = read(tmp_path, "{script: [{at: 3s, what: loss, node: device-2, lasts: 500ms, loss: 5%}]}")
    (fault,) = faults.script
    assert (fault.at, fault.lasts, fault.loss) == (3.0, 0.5, 0.05)
    assert bool(faults)
    assert faults.on_links
    assert not Faults()


@pytest.mark.parametrize(
    ("faults", "more", "sentence"),
    [
        ("{script: [{at: 1s, what: burns, node: edge}]}", "", r"at `faults.script\[0\].what` 'burns'"),
        ("{script: [{at: 1s, what: dies}]}", "", "'dies' happens to a `node`: there is edge, edge-2, device-1"),
        ("{script: [{at: 1s, what: dies, node: moon}]}", "", "there is no node 'moon'"),
        ("{script: [{at: 1s, what: outage, node: edge}]}", "", "'edge' stands at the hub and has no link"),
        ("{script: [{at: 1s, what: broker-restarts, node: edge}]}", "", "happens to the broker, not to 'edge'"),
        ("{random: {count: 1, within: 1s, lasts: [2s, 1s]}}", "", "random faults last from 2s to 1s"),
        ("{random: {count: 1, within: 1s, lasts: [1s, 2s], nodes: [sun]}}", "", "random faults cannot hit 'sun'"),
        ("{random: {count: 1, within: 1s, lasts: [1s, 2s], nodes: [edge]}}", "", "'outage' hit nobody"),
        (
            "{script: [{at: 1s, what: loss, node: device-1}]}",
            "links: {shaped_by: none}",
            "faults on links need links that are shaped",
        ),
    ],
)
def test_faults_that_cannot_be_get_one_sentence(tmp_path: Path, faults: str, more: str, sentence: str) -> None:
    with pytest.raises(BadScenario, match=sentence) as raised:
        read(tmp_path, faults, more=more)
    assert "\n" not in str(raised.value)
