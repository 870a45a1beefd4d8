"""What a hub asks of its packet scheduler, and what that answers: one msgpack message each way over a socket pair."""

from __future__ import annotations

from typing import Any

import msgspec

from netem.link import Link


class Request(msgspec.Struct, frozen=True, tag=True):
    """About one link, by its device's name."""

    name: str


class Add(Request, frozen=True):
    """Forward between two TUN devices as long as a process lives.

    With it go three file descriptors: the hub's end, the device's end, and a pidfd of the process.
    """

    up_seed: int
    down_seed: int


class Remove(Request, frozen=True):
    """Delete a link's devices, if they are still there."""


class Shape(Request, frozen=True):
    """Bring a link into a state."""

    link: Link


class Read(Request, frozen=True):
    """What is the link's state?"""


class Count(Request, frozen=True):
    """What has happened on it?"""


class Started(msgspec.Struct, frozen=True, tag=True):
    """The scheduler's first word."""

    compile_s: float
    kept: bool
    """Whether the next start will find what was compiled."""
    priority: str
    """How the kernel's scheduler treats the process: ``real time``, ``nice -10`` or ``normal``."""


class Done(msgspec.Struct, frozen=True, tag=True):
    """It is so."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """It cannot be: one sentence says why."""

    why: str


class State(msgspec.Struct, frozen=True, tag=True):
    """A link's state, as it is used."""

    link: Link


class Lateness(msgspec.Struct, frozen=True):
    """How long after their due time packets left, in seconds; the quantiles are good to a fifth."""

    p50: float
    p99: float
    max: float


class DirectionCounters(msgspec.Struct, frozen=True):
    """What has happened to the packets of one direction of a link since it was made.

    ``packets_in + duplicated`` is the sum of ``packets_out``, ``lost``, ``dropped``, ``refused`` and ``waiting``.
    """

    packets_in: int
    bytes_in: int
    packets_out: int
    bytes_out: int
    lost: int
    """By the link's loss."""
    dropped: int
    """Found the queue full."""
    duplicated: int
    corrupted: int
    reordered: int
    refused: int
    """Not taken by the other end: it was down, or the packet's first bits were corrupted."""
    waiting: int
    """On their way now."""
    late: Lateness
    """Large when the machine was too slow for its links."""


class Counters(msgspec.Struct, frozen=True, tag=True):
    """What has happened on a link; ``up`` is what the device sent."""

    up: DirectionCounters
    down: DirectionCounters


Question = Add | Remove | Shape | Read | Count
Answer = Started | Done | Refused | State | Counters

_encoder = msgspec.msgpack.Encoder(enc_hook=float)  # a rate, time or probability, exactly


def _quantity(kind: type[Any], value: Any) -> Any:
    return kind(value)


_requests: msgspec.msgpack.Decoder[Question] = msgspec.msgpack.Decoder(Question, dec_hook=_quantity)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer, dec_hook=_quantity)


def encode(message: Question | Answer) -> bytes:
    """As one message of a SOCK_SEQPACKET socket."""
    return _encoder.encode(message)


def decode_request(data: bytes) -> Question:
    """What `encode` made of a request."""
    return _requests.decode(data)


def decode_answer(data: bytes) -> Answer:
    """What `encode` made of an answer."""
    return _answers.decode(data)
