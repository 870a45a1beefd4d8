"""Link states: units as tc users write them, what is impossible, and the derived queue."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netem.link import (
    MTU,
    BadLink,
    Duration,
    GilbertElliott,
    Link,
    LinkState,
    Probability,
    Rate,
    decode_quantity,
    encode_quantity,
    mismatch,
    quantity_schema,
)


def read(state: dict[str, Any]) -> LinkState:
    return msgspec.convert({"up": state}, Link, dec_hook=decode_quantity).up


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("20mbit", 20e6),
        ("1.5Mbit", 1.5e6),
        ("100 kbit", 1e5),
        ("1kibit", 1024),
        ("1gbit", 1e9),
        ("9600bit", 9600),
        ("10kbps", 80e3),
    ],
)
def test_rates_as_tc_writes_them(text: str, bits: float) -> None:
    assert Rate(text) == bits


@pytest.mark.parametrize(("text", "seconds"), [("50ms", 0.05), ("1.5s", 1.5), ("300us", 3e-4), ("2msecs", 0.002)])
def test_times_as_tc_writes_them(text: str, seconds: float) -> None:
    assert Duration(text) == pytest.approx(seconds)


@given(st.floats(8, 1e12))
def test_a_rate_is_read_back_as_it_is_written(bits: float) -> None:
    assert Rate(str(Rate(bits))) == pytest.approx(bits, rel=1e-5)


@given(st.floats(0, 3600))
def test_a_time_is_read_back_as_it_is_written(seconds: float) -> None:
    assert Duration(str(Duration(seconds))) == pytest.approx(seconds, rel=1e-5, abs=1e-12)


@given(st.floats(0, 1))
def test_a_probability_is_read_back_as_it_is_written(part: float) -> None:
    assert Probability(str(Probability(part))) == pytest.approx(part, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({"rate": "20"}, "'20' is no rate: write it like 20mbit, with one of bit, kbit"),
        ({"rate": "20ms"}, "'20ms' is no rate"),
        ({"rate": "0mbit"}, "a rate is at least 8bit, not 0"),
        ({"rate": True}, "True is no rate: write it like 20mbit"),
        ({"delay": "-5ms"}, "'-5ms' is no time: write it like 50ms"),
        ({"delay": 4000}, "a time on a link is from 0s to 3600s, not 4000s"),
        ({"delay": float("nan")}, "a time on a link is from 0s to 3600s"),
        ({"loss": 1}, "a probability of 1 may be meant as 1% or as 100%: write the %"),
        ({"loss": "120%"}, "a probability is from 0% to 100%, not 120%"),
        ({"loss": [1]}, "[1] is no probability: write it like 1%"),
        ({"jitter": "1ms"}, "a jitter of 1ms around a delay of 0ms would have packets arrive before they are sent"),
        ({"reorder": "1%"}, "reordering lets packets skip the delay, so it needs one"),
        (
            {"loss": "1%", "bursts": {"model": "gilbert-elliott", "to_bad": "1%", "to_good": "10%"}},
            "two models of the same losses",
        ),
        ({"loss_correlation": "1%"}, "`loss_correlation` needs a `loss`"),
        ({"delay_correlation": "1%"}, "`delay_correlation` needs a `jitter`"),
        ({"limit": 0}, "a queue holds at least 1 packet, not 0"),
        ({"bursts": {"model": "four-state", "p13": "60%", "p31": "10%", "p14": "60%"}}, "goes one way only"),
        ({"bursts": {"model": "five-state"}}, "Invalid value 'five-state'"),
        ({"speed": "1mbit"}, "Object contains unknown field `speed`"),
    ],
)
def test_what_is_wrong_or_impossible_gets_one_sentence(state: dict[str, Any], sentence: str) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        read(state)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_link_survives_its_file() -> None:
    link = msgspec.convert(
        {
            "up": {"rate": "5mbit", "delay": "20ms", "jitter": "2ms", "distribution": "pareto", "loss": "0.5%"},
            "down": {"bursts": {"model": "four-state", "p13": "1%", "p31": "20%"}, "limit": 50},
        },
        Link,
        dec_hook=decode_quantity,
    )
    written = msgspec.to_builtins(link, enc_hook=encode_quantity)
    assert msgspec.convert(written, Link, dec_hook=decode_quantity) == link
    assert written["up"]["rate"] == "5mbit"


def test_the_schema_says_what_a_quantity_looks_like() -> None:
    state = msgspec.json.schema(Link, schema_hook=quantity_schema)["$defs"]["LinkState"]["properties"]
    assert state["delay"] == {"type": ["string", "number"], "description": "a time, such as 50ms"}


@given(st.floats(1e4, 1e10), st.floats(0, 2))
def test_the_queue_holds_what_is_on_its_way(rate: float, delay: float) -> None:
    state = LinkState(rate=Rate(rate), delay=Duration(delay))
    assert state.queue * MTU * 8 >= rate * delay
    assert state.queue >= 64


def test_a_given_limit_is_the_queue() -> None:
    assert LinkState(limit=7).queue == 7


def test_a_wrong_quantity_in_code_raises() -> None:
    with pytest.raises(BadLink, match="'fast' is no rate"):
        Rate("fast")


@pytest.mark.parametrize(
    ("asked", "found", "said"),
    [
        ({"rate": "1mbit"}, {"rate": "2mbit"}, "the rate up is 2mbit, not 1mbit"),
        ({"rate": "1mbit"}, {}, "the rate up is None, not 1mbit"),
        ({"rate": 1_000_001.0}, {"rate": 1_000_000.0}, None),
        ({"delay": "1ms"}, {"delay": "1.0001ms"}, None),
        ({"delay": "1ms"}, {"delay": "1.1ms"}, "the delay up is 1.1ms, not 1ms"),
        ({"limit": 64, "rate": "1mbit"}, {"rate": "1mbit"}, None),
        ({"limit": 9}, {"limit": 8}, "the queue up is 8, not 9"),
        (
            {"bursts": {"model": "gilbert-elliott", "to_bad": "1%", "to_good": "10%"}},
            {"bursts": {"model": "gilbert-elliott", "to_bad": "1.00001%", "to_good": "10%"}},
            None,
        ),
    ],
)
def test_what_was_read_back_is_compared_up_to_rounding(
    asked: dict[str, Any], found: dict[str, Any], said: str | None
) -> None:
    assert mismatch(Link(up=read(asked)), Link(up=read(found))) == said


def test_a_slower_world_keeps_what_fits_into_the_link() -> None:
    state = LinkState(rate=Rate("20mbit"), delay=Duration("50ms"), jitter=Duration("5ms"), loss=Probability("1%"))
    slowed = Link(up=state).slowed(4).up
    assert (slowed.rate, slowed.delay, slowed.jitter, slowed.loss) == (5e6, 0.2, 0.02, 0.01)
    assert slowed.queue == state.queue
    assert state.slowed(1) is state


def test_a_state_says_what_it_does() -> None:
    state = LinkState(rate=Rate(2e6), delay=Duration(0.05), loss=Probability(0.01))
    assert str(state) == "rate 2mbit, delay 50ms, loss 1%"
    assert str(LinkState()) == "everything passes"
    assert str(LinkState(bursts=GilbertElliott(to_bad=Probability(0.01), to_good=Probability(0.2)))) == (
        "bursts gilbert-elliott to_bad 1% to_good 20% loss_bad 100% loss_good 0%"
    )


def test_a_link_that_lets_everything_pass_is_the_same_in_a_slower_world() -> None:
    assert Link().slowed(5) == Link()
