"""Nobody may say more than its allowance, nobody pays for another, and who is modest is always heard."""

from hypothesis import given
from hypothesis import strategies as st

from broker.allowance import Allowance

RATE, BURST = 8.0, 5  # times below are multiples of 1/16 s, so that all sums are exact

events = st.lists(st.tuples(st.integers(0, 20), st.sampled_from("abc")), max_size=200)
"""Sixteenths of a second since the message before, and who speaks."""


def heard(said: list[tuple[int, str]], *, remembered: int = 3) -> list[tuple[float, str, bool]]:
    """When each message came, whose it was, and whether it passed."""
    allowance = Allowance(rate=RATE, burst=BURST, remembered=remembered)
    now, all_of_them = 0.0, []
    for gap, speaker in said:
        now += gap / 16
        all_of_them.append((now, speaker, allowance.allows(speaker, now)))
        assert len(allowance) <= remembered
    return all_of_them


@given(events)
def test_in_no_span_of_time_pass_more_than_burst_and_rate_allow(said: list[tuple[int, str]]) -> None:
    for speaker in "abc":
        passed = [at for at, who, passes in heard(said) if who == speaker and passes]
        for first, began in enumerate(passed):
            for count, at in enumerate(passed[first:], start=1):
                assert count <= BURST + RATE * (at - began)


@given(events)
def test_what_is_refused_would_have_been_too_much(said: list[tuple[int, str]]) -> None:
    for speaker in "abc":
        passed: list[float] = []
        for at, who, passes in heard(said):
            if who == speaker and passes:
                passed.append(at)
            elif who == speaker:
                spans = [(len(passed) - n, at - began) for n, began in enumerate(passed)]
                assert any(count + 1 > BURST + RATE * span for count, span in spans)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=100), st.integers(1, 3))
def test_who_keeps_to_the_rate_is_always_heard(floods: list[int], remembered: int) -> None:
    said = [turn for flood in floods for turn in ((2, "a"), *((0, "bcd"[n % 3]) for n in range(flood)))]
    assert all(passes for _, speaker, passes in heard(said, remembered=remembered) if speaker == "a")
