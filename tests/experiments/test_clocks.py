"""How far clocks are ahead: the estimate holds what it promises, and corrects times."""

from hypothesis import given
from hypothesis import strategies as st

from broker.messages import Call, Pong, Result, Spent, Stage
from experiments.clocks import Clocks

aheads = st.floats(-1e6, 1e6)
delays = st.floats(0, 5)


def exchange(clocks: Clocks, node: str, *, ahead: float, up: float, down: float, at: float = 2e9) -> None:
    """A ping that takes ``down`` seconds to a node whose clock is ahead, and an answer that takes ``up``."""
    there = at + down + ahead
    clocks.heard(Pong(node=node, sent=at, received=there, replied=there + 0.001), at + down + 0.001 + up)


@given(aheads, st.lists(st.tuples(delays, delays), min_size=1, max_size=8))
def test_the_truth_lies_within_the_uncertainty(ahead: float, ways: list[tuple[float, float]]) -> None:
    clocks = Clocks()
    for up, down in ways:
        exchange(clocks, "d", ahead=ahead, up=up, down=down)
    offset = clocks.offsets["d"]
    assert abs(offset.ahead - ahead) <= offset.uncertainty + 1e-5
    assert offset.uncertainty <= min(up + down for up, down in ways) / 2 + 1e-5
    assert clocks.answers("d") == len(ways)


@given(delays, delays)
def test_a_clock_that_may_be_right_is_left_alone(up: float, down: float) -> None:
    clocks = Clocks()
    exchange(clocks, "d", ahead=0.0, up=up, down=down + 1e-3)
    assert abs(clocks.ahead("d")) <= 1e-5
    assert clocks.ahead("nobody") == 0.0


def test_an_answer_that_is_too_good_is_ignored() -> None:
    clocks = Clocks()
    clocks.heard(Pong(node="d", sent=100.0, received=50.0, replied=90.0), 101.0)
    assert not clocks.offsets


def test_times_of_a_result_become_the_runners() -> None:
    clocks = Clocks()
    exchange(clocks, "phone", ahead=60.0, up=0.01, down=0.01)
    exchange(clocks, "edge", ahead=-30.0, up=0.001, down=0.001)
    stages = (
        Stage(name="transfer", node="phone", to="edge", start=1060.0, stop=970.5),
        Stage(name="denoise", node="edge", start=971.0, stop=973.0),
        Stage(name="transfer", node="edge", to="phone", start=973.0, stop=1063.25),
        Stage(name="decode", node="phone", start=1063.5, stop=1064.0),
    )
    result = Result(
        round="r", request="q", device="phone", outcome="answered", asked=1059.0, finished=1064.0, stages=stages
    )
    right = clocks.corrected(result)
    assert [round(s.start, 3) for s in right.stages] == [1000.0, 1001.0, 1003.0, 1003.5]
    assert [round(s.stop, 3) for s in right.stages] == [1000.5, 1003.0, 1003.25, 1004.0]
    assert (round(right.asked, 3), round(right.finished, 3)) == (999.0, 1004.0)
    call = Call(model="embedded", start=1063.0, stop=1063.5, steps=(1,))
    spent = Spent(
        round="r", node="phone", denoiser_calls=1, rows=1, flops=0.0, busy=0.5, joules=0.0, overruns=0, calls=(call,)
    )
    assert [round(c.start, 3) for c in clocks.on_runners_clock(spent).calls] == [1003.0]
    clocks.forget()
    assert clocks.corrected(result).stages[1] == stages[1]
