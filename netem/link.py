"""What a link does to packets: its wanted state in each direction, in the units that ``tc`` users write.

The fields mean what the kernel's netem means by them, and every implementation of links behaves so: a packet
is lost or not, is put back by ``delay`` and jitter, and then waits for its turn at ``rate``.
"""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar, Literal, Self

import msgspec

MTU = 1400
"""Bytes. What is left of 1500 inside a cellular core's tunnels. Every kind of link uses it, since TCP's
goodput under loss depends on the segment size."""

_HEADERS = 52  # bytes of a segment: IP, TCP, and TCP's timestamps
_QUEUE_SECONDS = 0.1  # of waiting packets that a derived queue holds, beside those on their way
_LEAST_QUEUE = 64  # packets
_LARGEST_QUEUE = 2**32 - 1
_UNLIMITED = 1e10  # bit/s: what a link without a rate is taken for where its queue is derived


class BadLink(ValueError):
    """A link's state is written wrongly or impossible: one sentence says what and what would be right."""


class _Quantity(float):
    """A number with a unit: ``units`` gives the value of one of each."""

    kind: ClassVar[str]
    example: ClassVar[str]
    units: ClassVar[dict[str, float]]

    def __new__(cls, value: float | str = 0.0) -> Self:
        return super().__new__(cls, cls._parse(value) if isinstance(value, str) else cls._checked(value))

    @classmethod
    def _parse(cls, text: str) -> float:
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z%]+)\s*", text.lower())
        if match is None or match[2] not in cls.units:
            raise BadLink(f"{text!r} is no {cls.kind}: write it like {cls.example}, with one of {', '.join(cls.units)}")
        return cls._checked(float(match[1]) * cls.units[match[2]])

    @classmethod
    def _checked(cls, value: float) -> float:
        if not (math.isfinite(value) and value >= 0):
            raise BadLink(f"a {cls.kind} is a number from 0 on, not {value}")
        return value


class Rate(_Quantity):
    """Bits per second. As with tc, ``bit`` is for bits and ``bps`` for bytes per second."""

    kind = "rate"
    example = "20mbit"
    units: ClassVar = {
        f"{prefix}{unit}": factor * bits
        for unit, bits in (("bit", 1), ("bps", 8))
        for prefix, factor in (("", 1.0), ("k", 1e3), ("m", 1e6), ("g", 1e9), ("ki", 2.0**10), ("mi", 2.0**20))
    }  # fmt: skip

    def __str__(self) -> str:
        unit, size = next(((u, s) for u, s in (("gbit", 1e9), ("mbit", 1e6), ("kbit", 1e3)) if self >= s), ("bit", 1.0))
        return f"{self / size:.6g}{unit}"

    @classmethod
    def _checked(cls, value: float) -> float:
        if not 8 <= value < 8 * 2**63:
            raise BadLink(f"a rate is at least 8bit, not {value:g}; leave it out where nothing limits the rate")
        return value


class Duration(_Quantity):
    """Seconds."""

    kind = "time"
    example = "50ms"
    units: ClassVar = {"s": 1.0, "sec": 1.0, "secs": 1.0, "ms": 1e-3, "msec": 1e-3, "msecs": 1e-3,
             "us": 1e-6, "usec": 1e-6, "usecs": 1e-6}  # fmt: skip

    def __str__(self) -> str:
        unit, size = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if self >= s), ("us", 1e-6))
        return f"{self / size:.6g}{unit}" if self else "0ms"

    @classmethod
    def _checked(cls, value: float) -> float:
        if not 0 <= value <= 3600:
            raise BadLink(f"a time on a link is from 0s to 3600s, not {value:g}s")
        return value


class Probability(_Quantity):
    """A fraction of 1, written in percent."""

    kind = "probability"
    example = "1%"
    units: ClassVar = {"%": 0.01}

    def __str__(self) -> str:
        return f"{100 * self:.6g}%"

    @classmethod
    def _checked(cls, value: float) -> float:
        if not 0 <= value <= 1:
            raise BadLink(f"a probability is from 0% to 100%, not {100 * value:g}%")
        return value


def _certain() -> Probability:
    return Probability(1.0)


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of a link's state; a key that it does not know is an error."""


class Bursts(Part, frozen=True, kw_only=True, tag_field="model"):
    """Losses that depend on a Markov chain's state."""

    def __str__(self) -> str:
        fields = " ".join(f"{name} {value}" for name, value in msgspec.structs.asdict(self).items())
        return f"{self.__struct_config__.tag} {fields}"


class GilbertElliott(Bursts, frozen=True, kw_only=True, tag="gilbert-elliott"):
    """Losses in bursts: a good state and a bad one, left for the other with ``to_bad`` and ``to_good`` a packet.

    Packets are lost with ``loss_good`` and ``loss_bad`` there (netem's 1-k and 1-h).
    """

    to_bad: Probability
    to_good: Probability
    loss_bad: Probability = msgspec.field(default_factory=_certain)
    loss_good: Probability = msgspec.field(default_factory=Probability)


class FourState(Bursts, frozen=True, kw_only=True, tag="four-state"):
    """netem's 4-state Markov loss: p13 into bursts, p31 out of them, p32 and p23 between the losses of a burst,
    p14 for a lone loss between bursts."""

    p13: Probability
    p31: Probability
    p32: Probability = msgspec.field(default_factory=Probability)
    p23: Probability = msgspec.field(default_factory=_certain)
    p14: Probability = msgspec.field(default_factory=Probability)

    def __post_init__(self) -> None:
        if max(self.p13 + self.p14, self.p31 + self.p32) > 1 + 1e-6:  # netem rounds them
            raise BadLink("a packet of the 4-state model goes one way only: p13 + p14 and p31 + p32 are at most 100%")


class LinkState(Part, frozen=True, kw_only=True):
    """The wanted state of one direction of a link; the default lets everything pass at once.

    ``jitter`` is the half-width of a ``uniform`` distribution around ``delay``, and the standard deviation of
    a ``normal`` or ``pareto`` (shape 3) one; ``delay_correlation`` ties each packet's delay to the one
    before. ``loss`` is independent or, with ``loss_correlation``, of a packet and the one before; ``bursts``
    are losses by a Markov model instead. ``reorder`` is the part of packets that skip the delay. ``limit`` are
    packets in the queue and on their way; without it see ``queue``.
    """

    rate: Rate | None = None
    delay: Duration = msgspec.field(default_factory=Duration)
    jitter: Duration = msgspec.field(default_factory=Duration)
    distribution: Literal["uniform", "normal", "pareto"] = "uniform"
    delay_correlation: Probability = msgspec.field(default_factory=Probability)
    loss: Probability = msgspec.field(default_factory=Probability)
    loss_correlation: Probability = msgspec.field(default_factory=Probability)
    bursts: GilbertElliott | FourState | None = None
    duplicate: Probability = msgspec.field(default_factory=Probability)
    reorder: Probability = msgspec.field(default_factory=Probability)
    corrupt: Probability = msgspec.field(default_factory=Probability)
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.jitter > self.delay:
            raise BadLink(
                f"a jitter of {self.jitter} around a delay of {self.delay} would have packets arrive before "
                "they are sent: it may be as large as the delay"
            )
        if self.reorder and not self.delay:
            raise BadLink("reordering lets packets skip the delay, so it needs one")
        if self.bursts and self.loss:
            raise BadLink("`loss` and `bursts` are two models of the same losses: give one of them")
        if self.loss_correlation and not self.loss:
            raise BadLink("`loss_correlation` needs a `loss`")
        if self.delay_correlation and not self.jitter:
            raise BadLink("`delay_correlation` needs a `jitter`")
        if self.limit is not None and not 1 <= self.limit <= _LARGEST_QUEUE:
            raise BadLink(f"a queue holds at least 1 packet, not {self.limit}")

    def slowed(self, factor: float) -> LinkState:
        """The state where time passes ``factor`` times slower; the queue keeps its length."""
        if factor == 1 or self == LinkState():
            return self
        return msgspec.structs.replace(
            self,
            rate=None if self.rate is None else Rate(self.rate / factor),
            delay=Duration(self.delay * factor),
            jitter=Duration(self.jitter * factor),
            limit=self.queue,
        )

    def __str__(self) -> str:
        """Its fields as they would stand in a file, without those that leave packets alone."""
        fields = msgspec.structs.asdict(self)
        default = msgspec.structs.asdict(LinkState())
        said = [f"{name} {value}" for name, value in fields.items() if value != default[name]]
        return ", ".join(said) or "everything passes"

    @property
    def goodput(self) -> float | None:
        """Bits per second of payload that one TCP connection gets of the rate without losses; none: no limit."""
        return None if self.rate is None else self.rate * (MTU - _HEADERS) / MTU

    @property
    def queue(self) -> int:
        """Packets that may wait or be on their way: ``limit``, or enough for the delay and 100 ms of queue.

        netem's own 1000 lose packets on every fast long link.
        """
        if self.limit is not None:
            return self.limit
        rate = self.rate or _UNLIMITED
        seconds = self.delay + 4 * self.jitter + _QUEUE_SECONDS
        return min(max(_LEAST_QUEUE, math.ceil(rate * seconds / (8 * MTU))), _LARGEST_QUEUE)


class Link(Part, frozen=True, kw_only=True):
    """A device's link: ``up`` is what the device sends, ``down`` what it receives."""

    up: LinkState = msgspec.field(default_factory=LinkState)
    down: LinkState = msgspec.field(default_factory=LinkState)

    def slowed(self, factor: float) -> Link:
        """The link where time passes ``factor`` times slower: rates divided, delays and jitter multiplied."""
        return Link(up=self.up.slowed(factor), down=self.down.slowed(factor))


OUTAGE = LinkState(loss=Probability(1.0))
"""Nothing passes."""


def mismatch(wanted: Link, found: Link) -> str | None:
    """In what a link that was read back is not the wanted one, such as "the rate up is 1mbit, not 2mbit".

    What a kernel rounds is none: rates to bytes a second, times to microseconds, probabilities to 32 bits. Queues
    count as equal when they hold the same, derived or given.
    """
    for direction in ("up", "down"):
        asked, seen = getattr(wanted, direction), getattr(found, direction)
        for field in (*LinkState.__struct_fields__, "queue"):
            if field != "limit" and not _alike(getattr(asked, field), getattr(seen, field)):
                return f"the {field} {direction} is {getattr(seen, field)}, not {getattr(asked, field)}"
    return None


def _alike(asked: Any, seen: Any) -> bool:
    if isinstance(asked, Part) and type(asked) is type(seen):
        return all(_alike(getattr(asked, field), getattr(seen, field)) for field in asked.__struct_fields__)
    if isinstance(asked, float) and isinstance(seen, float):
        rounding = 8 if isinstance(asked, Rate) else 1e-6
        return math.isclose(asked, seen, rel_tol=1e-6, abs_tol=rounding)
    return bool(asked == seen)


def decode_quantity(kind: type[Any], value: Any) -> Any:
    """For ``msgspec.convert(..., dec_hook=decode_quantity)``: a rate, time or probability as it stands in a file.

    Strings carry their unit; a bare number is in bit/s, seconds, or a fraction below 1.
    """
    if not issubclass(kind, _Quantity):
        raise NotImplementedError(kind)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadLink(f"{value!r} is no {kind.kind}: write it like {kind.example}")
    if kind is Probability and not isinstance(value, str) and value >= 1:
        raise BadLink(f"a probability of {value:g} may be meant as {value:g}% or as {100 * value:g}%: write the %")
    return kind(value)


def encode_quantity(value: Any) -> Any:
    """For ``msgspec``'s ``enc_hook``: a rate, time or probability as a string with its unit."""
    if isinstance(value, _Quantity):
        return str(value)
    raise NotImplementedError(type(value))


def quantity_schema(kind: type[Any]) -> dict[str, Any]:
    """For ``msgspec.json.schema(..., schema_hook=quantity_schema)``."""
    if not issubclass(kind, _Quantity):
        raise NotImplementedError(kind)
    return {"type": ["string", "number"], "description": f"a {kind.kind}, such as {kind.example}"}
