"""From distance to link: against published numbers, and what holds for every distance and signal."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netem.channel import Channel, CqiTable, FreeSpace, LogDistance, PathLoss, Retransmission, Shannon, UrbanMicro
from netem.link import BadLink, Duration, Probability, decode_quantity

MODELS = (UrbanMicro(), UrbanMicro(device_height_m=10.0), LogDistance(), LogDistance(exponent=4.0), FreeSpace())
RATES = (CqiTable(), CqiTable(table="64qam"), Shannon(), Shannon(up_efficiency=1.0, down_efficiency=1.0))

distances = st.floats(10, 5000)
carriers = st.floats(0.5, 100)
signals = st.floats(-200, 200)


@pytest.mark.parametrize(
    ("metres", "los", "loss"),
    [
        (10, True, 69.8591),
        (100, True, 88.4122),
        (1000, True, 119.3114),
        (5000, True, 147.2696),
        (10, False, 76.7563),
        (100, False, 107.9432),
        (1000, False, 143.1886),
        (5000, False, 167.8617),
    ],
)
def test_street_canyon_against_the_reference_values_of_ns_3(metres: float, los: bool, loss: float) -> None:
    """At 5 GHz, heights 10 and 1.5 m: ns-3, three-gpp-propagation-loss-model-test-suite.cc."""
    assert UrbanMicro().loss_db(metres, 5.0, los=los) == pytest.approx(loss, abs=5e-5)


def test_free_space_against_a_textbook_example() -> None:
    """100.05 dB over 1 km at 2.4 GHz, the usual worked example."""
    assert FreeSpace().loss_db(1000, 2.4, los=True) == pytest.approx(100.05, abs=0.005)


def test_peak_rate_against_the_published_peak_of_a_5g_carrier() -> None:
    """Four layers at 100 MHz and 256QAM are known as 2.34 Gbit/s (TS 38.306, 4.1.2)."""
    bits, _ = CqiTable().at(60.0, 100.0, up=False)
    assert 4 * bits == pytest.approx(2.337e9, rel=1e-3)


def test_noise_of_20_mhz_against_the_usual_link_budget() -> None:
    """Thermal noise of 20 MHz is -101 dBm; free space at 1 m and 3.5 GHz takes 43.3 dB."""
    channel = Channel(path_loss=FreeSpace(), bandwidth_mhz=20.0)
    reception = channel.reception(1.0, los=True)
    assert reception.loss_db == pytest.approx(43.33, abs=0.01)
    assert reception.snr_down_db == pytest.approx(30 + 8 - 43.33 + 101 - 9, abs=0.1)
    assert reception.snr_up_db == pytest.approx(23 + 8 - 43.33 + 101 - 5, abs=0.1)


@given(st.sampled_from(MODELS), distances, distances, carriers, st.booleans())
def test_what_is_farther_away_is_weaker(model: PathLoss, one: float, other: float, ghz: float, los: bool) -> None:
    near, far = sorted((one, other))
    assert model.loss_db(near, ghz, los=los) <= model.loss_db(far, ghz, los=los) + 1e-9


@given(st.sampled_from(MODELS), distances, carriers)
def test_a_line_of_sight_never_hurts(model: PathLoss, metres: float, ghz: float) -> None:
    assert model.loss_db(metres, ghz, los=True) <= model.loss_db(metres, ghz, los=False)


@given(st.sampled_from(MODELS), st.floats(0, 1e5), st.floats(0, 1e5))
def test_the_chance_of_sight_falls_with_distance(model: PathLoss, one: float, other: float) -> None:
    near, far = sorted((one, other))
    assert 0 <= model.los_probability(far) <= model.los_probability(near) <= 1


def test_street_canyon_always_sees_up_to_18_m() -> None:
    model = UrbanMicro()
    assert model.los_probability(0) == model.los_probability(18) == 1
    assert model.los_probability(50) == pytest.approx(0.36 + 0.64 * math.exp(-50 / 36))


@given(st.sampled_from(RATES), signals, signals, st.booleans())
def test_a_better_signal_is_never_slower(rates: CqiTable | Shannon, one: float, other: float, up: bool) -> None:
    worse, better = sorted((one, other))
    assert rates.at(worse, 100.0, up=up)[0] <= rates.at(better, 100.0, up=up)[0]


@given(signals, st.booleans(), st.sampled_from([5.0, 20.0, 100.0]))
def test_shannon_stays_within_its_cap(snr_db: float, up: bool, mhz: float) -> None:
    model = Shannon()
    bits, _ = model.at(snr_db, mhz, up=up)
    assert 0 < bits <= mhz * 1e6 * (model.up_cap if up else model.down_cap)


@given(signals, st.sampled_from(["64qam", "256qam"]))
def test_a_cqi_stays_below_shannon_where_the_signal_suffices(snr_db: float, table: str) -> None:
    bits, margin = msgspec.convert({"table": table}, CqiTable).at(snr_db, 100.0, up=False)
    if margin >= 0:
        assert bits < 100e6 * math.log2(1 + 10 ** (snr_db / 10))


def test_cqi_thresholds_are_near_those_in_use_for_lte() -> None:
    """SINR for CQI 5 to 14 as tabulated widely for LTE, which has the same efficiencies: within 1.5 dB."""
    for spectral, lte_db in (
        (0.8770, 2.4), (1.1758, 4.3), (1.4766, 5.9), (1.9141, 8.1), (2.4063, 10.3), (2.7305, 11.7), (3.3223, 14.1),
        (3.9023, 16.3), (4.5234, 18.7), (5.1152, 21.0),
    ):  # fmt: skip
        peak, _ = CqiTable(table="64qam").at(60.0, 100.0, up=True)
        got, _ = CqiTable(table="64qam").at(lte_db + 1.5, 100.0, up=True)
        assert got / peak * 5.5547 >= spectral - 1e-9
        below, _ = CqiTable(table="64qam").at(lte_db - 1.5, 100.0, up=True)
        assert below / peak * 5.5547 < spectral


def test_a_bandwidth_that_5g_does_not_have_is_an_error() -> None:
    with pytest.raises(BadLink, match="no 7 MHz, it has 5, 10, 15"):
        Channel(bandwidth_mhz=7.0)
    assert Channel(bandwidth_mhz=7.0, rate=Shannon()).bandwidth_mhz == 7.0


def test_retransmission_by_hand() -> None:
    """Two attempts without combining worth mentioning: half of the blocks need the second, a quarter is lost."""
    twice = Retransmission(attempts=2, rounds=0, feedback_error=Probability(0), decade_db=1e9)
    error = twice.block_error(0)
    assert error == pytest.approx(0.1)
    outcome = twice.outcome(0)
    assert outcome.loss == pytest.approx(error**2)
    assert outcome.transmissions == pytest.approx(1 + error)
    late = error * (1 - error) / (1 - error**2)  # of those that arrive
    assert outcome.delay == pytest.approx(0.005 * late)
    assert outcome.jitter == pytest.approx(0.005 * math.sqrt(late * (1 - late)))


def test_misread_feedback_loses_blocks_that_rlc_repairs() -> None:
    unacknowledged = Retransmission(rounds=0).outcome(0)
    assert unacknowledged.loss == pytest.approx(0.1 * 0.001, rel=0.01)
    acknowledged = Retransmission(rounds=1).outcome(0)
    assert acknowledged.loss == pytest.approx(unacknowledged.loss**2)
    assert acknowledged.delay > unacknowledged.delay


@given(st.floats(-300, 300), st.integers(1, 8), st.integers(0, 8))
def test_retransmission_is_a_distribution(margin: float, attempts: int, rounds: int) -> None:
    outcome = Retransmission(attempts=attempts, rounds=rounds).outcome(margin)
    assert 0 <= outcome.loss <= 1
    assert 1 <= outcome.transmissions <= attempts * (rounds + 1) + 1e-9
    assert 0 <= outcome.delay <= (attempts - 1) * 0.005 + rounds * 0.045
    assert 0 <= outcome.jitter < 1


@given(st.floats(-60, 60), st.floats(-60, 60))
def test_more_to_spare_loses_less(one: float, other: float) -> None:
    less, more = sorted((one, other))
    assert Retransmission().outcome(more).loss <= Retransmission().outcome(less).loss + 1e-12


@given(st.floats(1, 1e5), st.booleans(), st.sampled_from(RATES), st.floats(0.001, 1), st.floats(-40, 40))
def test_every_distance_has_a_link(
    metres: float, los: bool, rates: CqiTable | Shannon, share: float, shadowing_db: float
) -> None:
    channel = Channel(rate=rates, share=share)
    link = channel.link(channel.reception(metres, los=los, shadowing_db=shadowing_db))
    best = channel.link(channel.reception(1.0, los=True, shadowing_db=-200.0))
    for state, most in ((link.up, best.up), (link.down, best.down)):
        assert state.rate is not None
        assert most.rate is not None
        assert 1000 <= state.rate <= most.rate
        assert state.jitter <= state.delay
    assert link.up.delay >= channel.up_delay
    assert link.down.delay >= channel.down_delay


def test_far_out_of_reach_nothing_passes() -> None:
    channel = Channel()
    link = channel.link(channel.reception(5000, los=False, shadowing_db=40))
    assert link.up.loss == link.down.loss == 1


def test_a_smaller_share_is_slower_but_reaches_farther_up() -> None:
    """The device puts all of its power into its share; the edge spreads its own over the carrier."""
    whole, part = Channel(), Channel(share=0.02)
    near = [channel.link(channel.reception(50, los=True)) for channel in (whole, part)]
    assert near[0].down.rate == pytest.approx(50 * (near[1].down.rate or 0), rel=1e-3)
    far = [channel.reception(300, los=False) for channel in (whole, part)]
    assert far[1].snr_up_db - far[0].snr_up_db == pytest.approx(10 * math.log10(50))
    assert far[1].snr_down_db == far[0].snr_down_db


def test_up_and_down_differ_by_power_time_and_delay() -> None:
    channel = Channel(up_time=0.5, down_time=0.5)
    reception = channel.reception(300, los=False)
    assert reception.snr_down_db - reception.snr_up_db == pytest.approx(30 - 23 - 9 + 5)
    link = channel.link(channel.reception(20, los=True))
    assert (link.up.rate or 0) / (link.down.rate or 1) == pytest.approx(0.92 / 0.86, rel=1e-3)  # overheads
    assert (link.up.delay, link.down.delay) == (Duration("10ms"), Duration("5ms"))


def test_models_are_chosen_by_name_in_a_file() -> None:
    wanted = {"path_loss": {"model": "log-distance", "exponent": 2.7}, "rate": {"model": "shannon"}, "up_delay": "3ms"}
    channel = msgspec.convert(wanted, Channel, dec_hook=decode_quantity)
    assert channel.path_loss == LogDistance(exponent=2.7)
    assert channel.rate == Shannon()
    assert channel.up_delay == 0.003
    with pytest.raises(msgspec.ValidationError, match="Invalid value 'okumura'"):
        msgspec.convert({"path_loss": {"model": "okumura"}}, Channel)
