"""From the distance of a device to its link: path loss, signal-to-noise ratio, rate, retransmission.

A path-loss model is one small class with a name of its own; so is a way from signal-to-noise ratio to rate.
Everything here is a function of the distance and of three numbers that `netem.motion` draws: whether there is a
line of sight, the shadowing and the fading.

Not modelled: beams and more than one spatial layer, interference beyond a constant rise of the noise, the
scheduler (a device has its share of the carrier at all times), and the core network behind the base station.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Annotated, Final, Literal, NamedTuple, Protocol

import msgspec
from msgspec import Meta

from netem.link import BadLink, Duration, Link, LinkState, Part, Probability, Rate

Positive = Annotated[float, Meta(gt=0)]
Fraction = Annotated[float, Meta(gt=0, le=1)]

_LIGHT: Final = 299_792_458.0  # m/s
_THERMAL_NOISE: Final = -173.98  # dBm/Hz: k x 290 K


class PathLoss(Protocol):
    """How a signal weakens on its way. Distances are in metres, frequencies in GHz, losses in dB."""

    def loss_db(self, metres: float, ghz: float, *, los: bool) -> float:
        """The median loss; ``los`` says whether there is a line of sight."""

    def los_probability(self, metres: float) -> float:
        """The chance of a line of sight."""

    def shadowing(self, *, los: bool) -> tuple[float, float]:
        """Standard deviation in dB and correlation distance in metres of the log-normal shadowing."""


class UrbanMicro(Part, frozen=True, kw_only=True, tag_field="model", tag="umi"):
    """A base station below the roofs of a street: 3GPP TR 38.901, UMi - Street Canyon, outdoor devices.

    Loss and shadowing of Table 7.4.1-1, line of sight of Table 7.4.2-1, correlation distances of Table 7.5-6.
    The distance is the horizontal one; the model holds for 10 m to 5 km and 0.5 to 100 GHz, and a device that is
    nearer than 10 m counts as at 10 m.
    """

    edge_height_m: Annotated[float, Meta(gt=1)] = 10.0
    device_height_m: Annotated[float, Meta(ge=1.5, le=22.5)] = 1.5

    def loss_db(self, metres: float, ghz: float, *, los: bool) -> float:
        """Table 7.4.1-1. The environment is 1 m high (note 1); NLOS is never better than LOS."""
        horizontal = max(metres, 10.0)
        height = self.edge_height_m - self.device_height_m
        distance = math.hypot(horizontal, height)
        breakpoint_m = 4 * (self.edge_height_m - 1) * (self.device_height_m - 1) * ghz * 1e9 / 3e8
        if horizontal <= breakpoint_m:
            free = 32.4 + 21 * math.log10(distance) + 20 * math.log10(ghz)
        else:
            bend = 9.5 * math.log10(breakpoint_m**2 + height**2)
            free = 32.4 + 40 * math.log10(distance) + 20 * math.log10(ghz) - bend
        if los:
            return free
        blocked = 35.3 * math.log10(distance) + 22.4 + 21.3 * math.log10(ghz) - 0.3 * (self.device_height_m - 1.5)
        return max(free, blocked)

    def los_probability(self, metres: float) -> float:
        """Table 7.4.2-1."""
        if metres <= 18:
            return 1.0
        return 18 / metres + math.exp(-metres / 36) * (1 - 18 / metres)

    def shadowing(self, *, los: bool) -> tuple[float, float]:
        """Tables 7.4.1-1 and 7.5-6."""
        return (4.0, 10.0) if los else (7.82, 13.0)


class LogDistance(Part, frozen=True, kw_only=True, tag_field="model", tag="log-distance"):
    """Free space for the first metre, then ``10 exponent log10(d)`` (Rappaport, Wireless Communications, 4.9.1).

    An exponent of 2.7 to 3.5 is his for urban cells; the defaults are rounded choices within it. There is no
    difference between sight and no sight: the exponent and the shadowing hold for both.
    """

    exponent: Annotated[float, Meta(ge=1, le=8)] = 3.0
    shadowing_db: Annotated[float, Meta(ge=0)] = 8.0
    correlation_m: Positive = 10.0

    def loss_db(self, metres: float, ghz: float, *, los: bool) -> float:  # noqa: ARG002
        """The same with and without ``los``; a device nearer than 1 m counts as at 1 m."""
        return _free_space(1.0, ghz) + 10 * self.exponent * math.log10(max(metres, 1.0))

    def los_probability(self, metres: float) -> float:  # noqa: ARG002
        """Always 1: the model does not tell the two apart."""
        return 1.0

    def shadowing(self, *, los: bool) -> tuple[float, float]:  # noqa: ARG002
        """As configured."""
        return self.shadowing_db, self.correlation_m


class FreeSpace(Part, frozen=True, kw_only=True, tag_field="model", tag="free-space"):
    """Nothing in between: Recommendation ITU-R P.525, equation 3. No shadowing."""

    def loss_db(self, metres: float, ghz: float, *, los: bool) -> float:  # noqa: ARG002
        """The same with and without ``los``; a device nearer than 1 m counts as at 1 m."""
        return _free_space(max(metres, 1.0), ghz)

    def los_probability(self, metres: float) -> float:  # noqa: ARG002
        """Always 1."""
        return 1.0

    def shadowing(self, *, los: bool) -> tuple[float, float]:  # noqa: ARG002
        """None."""
        return 0.0, 1.0


def _free_space(metres: float, ghz: float) -> float:
    return 20 * math.log10(4 * math.pi * metres * ghz * 1e9 / _LIGHT)


class Shannon(Part, frozen=True, kw_only=True, tag_field="model", tag="shannon"):
    """``efficiency x log2(1 + SNR)`` bit/s/Hz between ``floor_db`` and a cap.

    The defaults are the LTE baseline of 3GPP TR 36.942, annex A.
    """

    up_efficiency: Fraction = 0.4
    down_efficiency: Fraction = 0.6
    up_cap: Positive = 2.0
    down_cap: Positive = 4.4
    floor_db: float = -10.0

    def at(self, snr_db: float, bandwidth_mhz: float, *, up: bool) -> tuple[float, float]:
        """Bit/s of a first transmission over the whole carrier, and the dB to spare over what it needs."""
        efficiency, cap = (self.up_efficiency, self.up_cap) if up else (self.down_efficiency, self.down_cap)
        capped_db = _decibel(2 ** (cap / efficiency) - 1)
        used_db = min(max(snr_db, self.floor_db), capped_db)
        spectral = min(cap, efficiency * math.log2(1 + _linear(used_db)))
        return bandwidth_mhz * 1e6 * spectral, snr_db - used_db

    def check(self, bandwidth_mhz: float) -> None:
        """Any bandwidth will do."""


class CqiTable(Part, frozen=True, kw_only=True, tag_field="model", tag="cqi"):
    """The modulation and code of 5G NR that the signal allows, at 30 kHz between subcarriers.

    Efficiencies: 3GPP TS 38.214, Table 5.2.2.1-2 (``64qam``) or 5.2.2.1-3 (``256qam``). Needed SNR: where the
    link-level curves of Lagen et al., "New Radio Physical Layer Abstraction for System-Level Simulations of 5G
    Networks" (ICC 2020, arXiv 2001.10309; the tables of ns-3's 5G-LENA) cross a block error rate of 10 % for
    their largest code block of that efficiency, read to 0.1 dB. Two entries are weaker: for the lowest index
    there is no curve, it stands 2 dB below the next (10 log10 of the ratio of efficiencies); for the highest of
    ``64qam`` there are only blocks of 928 bits.
    Overheads: TS 38.306, 4.1.2 (frequency range 1). Resource blocks: TS 38.101-1, Table 5.3.2-1.
    """

    table: Literal["64qam", "256qam"] = "256qam"

    def at(self, snr_db: float, bandwidth_mhz: float, *, up: bool) -> tuple[float, float]:
        """Bit/s of a first transmission over the whole carrier, and the dB to spare over what it needs.

        Below the lowest index the lowest one is used, and there is less than nothing to spare.
        """
        rows = _CQI[self.table]
        spectral, needed_db = rows[max(bisect_right(rows, snr_db, key=lambda row: row[1]), 1) - 1]
        symbols = _RESOURCE_BLOCKS[bandwidth_mhz] * 12 * 14 * 2000  # subcarriers x symbols x slots per second
        return symbols * spectral * (1 - (0.08 if up else 0.14)), snr_db - needed_db

    def check(self, bandwidth_mhz: float) -> None:
        """Raises ``BadLink`` for a bandwidth that NR does not have."""
        if bandwidth_mhz not in _RESOURCE_BLOCKS:
            allowed = ", ".join(str(width) for width in _RESOURCE_BLOCKS)
            raise BadLink(
                f"a 5G carrier with a CQI table has no {bandwidth_mhz:g} MHz, it has {allowed}; "
                "`rate: {model: shannon}` takes any bandwidth"
            )


_LOW: Final = ((0.1523, -3.0),)
_CQI: Final = {
    "64qam": (
        *_LOW, (0.2344, -1.0), (0.3770, 0.2), (0.6016, 1.8), (0.8770, 3.4), (1.1758, 4.8), (1.4766, 6.8),
        (1.9141, 8.5), (2.4063, 10.3), (2.7305, 12.2), (3.3223, 14.0), (3.9023, 15.8), (4.5234, 17.7),
        (5.1152, 19.7), (5.5547, 22.6),
    ),
    "256qam": (
        *_LOW, (0.3770, 0.2), (0.8770, 3.4), (1.4766, 6.8), (1.9141, 8.5), (2.4063, 10.3), (2.7305, 12.2),
        (3.3223, 14.0), (3.9023, 15.8), (4.5234, 17.7), (5.1152, 19.7), (5.5547, 21.4), (6.2266, 23.3),
        (6.9141, 25.3), (7.4063, 27.1),
    ),
}  # fmt: skip
_RESOURCE_BLOCKS: Final[dict[float, int]] = {
    5: 11, 10: 24, 15: 38, 20: 51, 25: 65, 30: 78, 40: 106, 50: 133, 60: 162, 70: 189, 80: 217, 90: 245, 100: 273,
}  # fmt: skip


class Outcome(NamedTuple):
    """What retransmission makes of a block: seconds beyond the first transmission, given that it arrives."""

    loss: float
    """The part of blocks that never arrives."""
    transmissions: float
    """Mean number of times that a block is on the air."""
    delay: float
    jitter: float
    """Standard deviation."""


class Retransmission(Part, frozen=True, kw_only=True):
    """Hybrid ARQ with chase combining, and RLC's ARQ above it.

    The first of ``attempts`` fails with 10 % where the signal is just what its rate needs (TS 38.214, 5.2.2.1:
    that defines the CQI), and ten times less for each ``decade_db`` to spare. Link-level curves fall faster;
    1 dB is a rounded choice that allows for a channel that has changed since it was measured. The n-th attempt
    gains 10 log10(n) dB. A failure is taken for a success, and the block is lost, with ``feedback_error`` (TS
    38.104, 8.3: NACK to ACK at most 0.1 %). Then RLC in acknowledged mode sends it again, up to ``rounds``
    times; 0 is unacknowledged mode. ``round_trip`` is a rounded choice for 30 kHz and TDD (LTE: 8 ms),
    ``rounds_after`` is t-PollRetransmit of TS 38.331, 9.2.1, and ``rounds`` a rounded choice from its 1 to 32.
    """

    attempts: Annotated[int, Meta(ge=1, le=16)] = 4
    round_trip: Duration = msgspec.field(default_factory=lambda: Duration(0.005))
    decade_db: Positive = 1.0
    feedback_error: Probability = msgspec.field(default_factory=lambda: Probability(0.001))
    rounds: Annotated[int, Meta(ge=0, le=32)] = 4
    rounds_after: Duration = msgspec.field(default_factory=lambda: Duration(0.045))

    def block_error(self, margin_db: float) -> float:
        """The probability that one transmission fails with ``margin_db`` over what its rate needs."""
        exponent = -1 - margin_db / self.decade_db
        return float(min(1.0, 10.0**exponent)) if exponent < 0 else 1.0

    def outcome(self, margin_db: float) -> Outcome:
        """What becomes of a block whose first transmission has ``margin_db`` over what its rate needs."""
        alive, sent, arrivals = 1.0, 0.0, []
        for attempt in range(1, self.attempts + 1):
            error = self.block_error(margin_db + _decibel(attempt))
            sent += alive
            arrivals.append(alive * (1 - error))
            alive *= error * (1 - self.feedback_error)
        arrived = sum(arrivals)
        lost = 1 - arrived
        if arrived <= 0:
            return Outcome(1.0, sent * (self.rounds + 1), 0.0, 0.0)
        total = moment = square = 0.0
        for turn in range(self.rounds + 1):
            for attempt, arrival in enumerate(arrivals):
                part, late = lost**turn * arrival, turn * self.rounds_after + attempt * self.round_trip
                total, moment, square = total + part, moment + part * late, square + part * late**2
        mean = moment / total
        turns = sum(lost**turn for turn in range(self.rounds + 1))
        spread = math.sqrt(max(0.0, square / total - mean**2))
        return Outcome(lost ** (self.rounds + 1), sent * turns, mean, spread)


class Station(Part, frozen=True, kw_only=True):
    """One end of the radio link."""

    power_dbm: float
    noise_figure_db: Annotated[float, Meta(ge=0)]
    gain_dbi: float = 0.0


class Reception(NamedTuple):
    """How a device is received at one moment."""

    distance_m: float
    los: bool
    loss_db: float
    """Path loss and shadowing."""
    snr_up_db: float
    snr_down_db: float


class Channel(Part, frozen=True, kw_only=True):
    """A carrier between the edge and one device.

    ``share`` is the part of the carrier's bandwidth that the device has at all times (0.02 where 50 devices
    share evenly); the edge spreads its power over the carrier, the device puts all of its own into its share.
    ``up_time`` and ``down_time`` are the parts of time for each direction: by default the TDD pattern DDDSU
    with 10:2:2 symbols in S; 1 and 1 for FDD. ``interference_db`` is how much neighbours raise the noise.

    Powers: the device is of class 3 (TS 38.101-1, Table 6.2.1-1); the edge's 30 dBm is the 1 W that scenarios
    count for energy, a rounded choice for a small cell. Gain of one antenna element: TR 38.901, Table 7.3-1. Noise
    figures are rounded choices near 3GPP's (5 dB and 9 dB). Delays are one-way without retransmission and
    queues, rounded choices within what Rohde & Schwarz measured one-way in a public 5G NSA network (Kottkamp,
    "5G NR and LTE latency analysis in a public network", 2022: from under 7 ms down to around 18 ms up).
    """

    path_loss: UrbanMicro | LogDistance | FreeSpace = UrbanMicro()
    carrier_ghz: Annotated[float, Meta(ge=0.1, le=100)] = 3.5
    bandwidth_mhz: Positive = 100.0
    share: Fraction = 1.0
    up_time: Fraction = 0.23
    down_time: Fraction = 0.74
    interference_db: Annotated[float, Meta(ge=0)] = 0.0
    edge: Station = Station(power_dbm=30.0, noise_figure_db=5.0, gain_dbi=8.0)
    device: Station = Station(power_dbm=23.0, noise_figure_db=9.0)
    rate: CqiTable | Shannon = CqiTable()
    retransmission: Retransmission = msgspec.field(default_factory=Retransmission)
    up_delay: Duration = msgspec.field(default_factory=lambda: Duration(0.010))
    down_delay: Duration = msgspec.field(default_factory=lambda: Duration(0.005))

    def __post_init__(self) -> None:
        self.rate.check(self.bandwidth_mhz)

    def reception(self, metres: float, *, los: bool, shadowing_db: float = 0.0, fading_db: float = 0.0) -> Reception:
        """How a device at ``metres`` is received; shadowing weakens the signal, fading is a gain."""
        loss = self.path_loss.loss_db(metres, self.carrier_ghz, los=los) + shadowing_db
        arriving = self.edge.gain_dbi + self.device.gain_dbi - loss + fading_db - self.interference_db
        noise = _THERMAL_NOISE + _decibel(self.bandwidth_mhz * 1e6)  # dBm, over the carrier
        noise_up = noise + _decibel(self.share) + self.edge.noise_figure_db
        return Reception(
            distance_m=metres,
            los=los,
            loss_db=loss,
            snr_up_db=self.device.power_dbm + arriving - noise_up,
            snr_down_db=self.edge.power_dbm + arriving - noise - self.device.noise_figure_db,
        )

    def link(self, reception: Reception) -> Link:
        """The link of a device that is received so. Out of reach, its loss is 100 %."""
        return Link(
            up=self._state(reception.snr_up_db, self.up_time, self.up_delay, up=True),
            down=self._state(reception.snr_down_db, self.down_time, self.down_delay, up=False),
        )

    def _state(self, snr_db: float, time: float, delay: float, *, up: bool) -> LinkState:
        bits, margin = self.rate.at(snr_db, self.bandwidth_mhz, up=up)
        outcome = self.retransmission.outcome(margin)
        late = delay + outcome.delay
        # Rounded, so that a change that no packet could tell is none.
        return LinkState(
            rate=Rate(max(1e3, round(bits * self.share * time / outcome.transmissions, -3))),
            delay=Duration(round(late, 5)),
            jitter=Duration(round(min(outcome.jitter, late), 5)),
            distribution="normal",
            loss=Probability(round(outcome.loss, 6)),
        )


def _decibel(ratio: float) -> float:
    return 10 * math.log10(ratio)


def _linear(decibel: float) -> float:
    return float(10 ** (decibel / 10))
