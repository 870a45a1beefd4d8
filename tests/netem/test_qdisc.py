"""netem's options as bytes: what is written is read again, and stands where the kernel's header files say."""

import struct

from hypothesis import given
from hypothesis import strategies as st

from netem import qdisc
from netem.link import Duration, FourState, GilbertElliott, Link, LinkState, Probability, Rate, mismatch

probabilities = st.floats(0, 1).map(Probability)
halves = st.floats(0, 0.5).map(Probability)
likely = st.floats(1e-6, 1).map(Probability)
durations = st.one_of(st.just(0.0), st.floats(1e-6, 3600)).map(Duration)
models = st.one_of(
    st.none(),
    st.builds(
        GilbertElliott, to_bad=probabilities, to_good=probabilities, loss_bad=probabilities, loss_good=probabilities
    ),
    st.builds(FourState, p13=halves, p31=halves, p32=halves, p23=probabilities, p14=halves),
)


@st.composite
def states(draw: st.DrawFn) -> LinkState:
    delay = draw(durations)
    jitter = Duration(delay * draw(st.one_of(st.just(0.0), st.floats(0.01, 1))))
    bursts = draw(models)
    loss = Probability() if bursts else draw(st.one_of(st.just(Probability()), likely))
    return LinkState(
        rate=draw(st.one_of(st.none(), st.floats(8, 1e12).map(Rate))),
        delay=delay,
        jitter=jitter,
        distribution=draw(st.sampled_from(["uniform", "normal", "pareto"])),
        delay_correlation=draw(probabilities) if jitter else Probability(),
        loss=loss,
        loss_correlation=draw(probabilities) if loss else Probability(),
        bursts=bursts,
        duplicate=draw(probabilities),
        reorder=draw(likely) if delay else Probability(),
        corrupt=draw(probabilities),
        limit=draw(st.one_of(st.none(), st.integers(1, 2**32 - 1))),
    )


@given(states())
def test_what_is_written_is_read_again(state: LinkState) -> None:
    found = qdisc.decode(qdisc.encode(state), state.distribution)
    assert mismatch(Link(up=state), Link(up=found)) is None


def attribute(options: bytes, wanted: int) -> bytes:
    place = 24
    while place < len(options):
        length, kind = struct.unpack_from("=HH", options, place)
        if kind & 0x7FFF == wanted:
            return options[place + 4 : place + length]
        place += (length + 3) // 4 * 4
    raise AssertionError(f"no attribute {wanted}")


def test_where_things_stand() -> None:
    """Against linux/pkt_sched.h: struct tc_netem_qopt, and TCA_NETEM_ RATE = 6, LATENCY64 = 10, LOSS = 5."""
    state = LinkState(rate=Rate("8mbit"), delay=Duration("20ms"), loss=Probability(0.5), limit=7)
    options = qdisc.encode(state)
    assert struct.unpack_from("=6I", options) == (0, 7, 2**31, 0, 0, 0)
    assert struct.unpack("=IiIi", attribute(options, 6)) == (1_000_000, 0, 0, 0)
    assert struct.unpack("=q", attribute(options, 10)) == (20_000_000,)
    bursts = GilbertElliott(to_bad=Probability(0.25), to_good=Probability(0.5))
    loss = attribute(qdisc.encode(LinkState(bursts=bursts)), 5)
    assert struct.unpack("=HH4I", loss) == (20, 2, 2**30, 2**31, 0, 0)


def test_jitter_always_has_a_table_since_netem_keeps_the_last_one() -> None:
    for distribution in ("uniform", "normal", "pareto"):
        state = LinkState(delay=Duration("9ms"), jitter=Duration("1ms"), distribution=distribution)
        table = attribute(qdisc.encode(state), 2)
        values = struct.unpack("=4096h", table)
        assert abs(sum(values)) < 4096
        assert (max(values) == 8190) == (distribution == "uniform")
