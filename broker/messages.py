"""The messages of the testbed: msgpack maps, typed here and validated at the door.

Times are seconds of the Unix epoch, durations seconds, energies joules, sizes bytes. Every message stands
on its own: correlation (``request``), deadline and the rest of the route travel inside it, so that MQTT
3.1.1 and 5 clients attach alike. Nothing is ever unpickled.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

PROTOCOL = 1
"""The version of these messages; a node that reads another one refuses it."""

MAX_PAYLOAD = 16 * 1024 * 1024
"""Bytes: nothing larger is encoded, accepted by the broker, or decoded."""

Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,31}(?!\n)$")]
HostName = Annotated[str, Meta(max_length=253)]
Identifier = Annotated[str, Meta(min_length=1, max_length=96)]
Prompt = Annotated[str, Meta(max_length=2000)]
Blend = Annotated[tuple[Prompt, ...], Meta(min_length=2, max_length=64)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Step = Annotated[int, Meta(ge=0, le=1000)]
Amount = Annotated[float, Meta(ge=0)]  # no NaN either
Count = Annotated[int, Meta(ge=0)]
Time = Amount


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag=str.lower, forbid_unknown_fields=True):
    """What all messages have in common."""


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """Denoising steps [start, stop) of one prompt with one model on one node.

    Several prompts mean the mean of their conditionings, summed in the order in which they stand.
    """

    node: Name
    model: Identifier
    prompt: Prompt | Blend
    start: Step
    stop: Step


class Latent(msgspec.Struct, frozen=True, kw_only=True):
    """An intermediate result: the tensor between two denoising steps.

    ``data`` holds the values in C order, little endian. ``padding`` are zero bytes that stand for the size
    of an emulated model's latent, so that the network carries what it would carry.
    """

    dtype: Literal["float16", "bfloat16", "float32"]
    shape: Annotated[tuple[Annotated[int, Meta(ge=1, le=4096)], ...], Meta(max_length=4)]
    data: memoryview
    padding: memoryview = memoryview(b"")

    def __post_init__(self) -> None:
        found = memoryview(self.data).nbytes
        wanted = math.prod(self.shape) * (4 if self.dtype == "float32" else 2)
        if found != wanted:
            raise ValueError(f"a {self.dtype} latent of shape {self.shape} has {wanted} bytes, not {found}")


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """One stretch of a request's time on one node, and what it cost.

    ``joules`` and ``flops`` are the request's own part where the work was shared; ``steps`` are denoising
    steps run for this request, shared ones counted as their part (1 / sharers). ``busy`` is the request's part of
    the node's computing time, in seconds of the emulated world. ``modelled`` says that
    duration and energy come from a compute profile, not from a clock and a meter. ``size`` is what a
    transfer from ``node`` put on the wire, and ``to`` who received it.
    """

    name: Literal["collect", "plan", "queue", "denoise", "transfer", "decode"]
    node: Name
    start: Time
    stop: Time
    joules: Amount = 0.0
    flops: Amount = 0.0
    steps: Amount = 0.0
    busy: Amount = 0.0
    overruns: Annotated[int, Meta(ge=0)] = 0
    size: Annotated[int, Meta(ge=0)] = 0
    to: Name | None = None
    modelled: bool = False


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """What one row's denoising step with one model takes."""

    step_seconds: Amount
    step_joules: Amount


class Compute(msgspec.Struct, frozen=True, kw_only=True):
    """How a node computes: a profile's name or ``native``, and what denoising and decoding take.

    A denoiser call takes ``call_*`` once and ``step_*`` for each of its rows, of which it takes up to ``rows``.
    The step is one with the first of the node's models; ``others`` are the paces of the rest, by model.
    A ``meter`` counts a native node's joules, where it has one; nodes with the same one on the same ``machine`` share
    it, and each counts all that it counts meanwhile.
    """

    profile: Identifier
    step_seconds: Amount
    step_joules: Amount
    decode_seconds: Amount = 0.0
    decode_joules: Amount = 0.0
    call_seconds: Amount = 0.0
    call_joules: Amount = 0.0
    rows: Annotated[int, Meta(ge=1)] = 8
    others: dict[Identifier, Pace] = {}
    meter: Identifier | None = None
    machine: Annotated[str, Meta(max_length=96)] = ""


class Birth(Message, frozen=True, kw_only=True):
    """Retained: who is there. The will of the session is the same message with ``state="lost"``.

    ``cloud`` is the edge program behind a link to a distant data centre. The first of ``models`` is the
    testbed's main one. ``host`` is the name of the machine or container that the node runs on. ``started`` is when
    the program began: another time means that what it knew is lost.
    """

    name: Name
    role: Literal["edge", "cloud", "device"]
    state: Literal["ready", "gone", "lost"]
    models: tuple[Identifier, ...] = ()
    compute: Compute | None = None
    host: HostName = ""
    started: Time = 0.0
    protocol: int = PROTOCOL


class Enrol(Message, frozen=True, kw_only=True):
    """Node to runner, retained under a provisional name: give me a place of the scenario.

    ``wants`` is the place's name, where only that one will do. ``left`` is the run that the node was told to leave
    just before, which must not take it in again. The will is the same message with ``state="lost"``.
    """

    name: Name
    role: Literal["edge", "device"]
    state: Literal["ready", "gone", "lost"]
    wants: Name | None = None
    left: Identifier | None = None
    host: HostName = ""
    protocol: int = PROTOCOL


class Assign(Message, frozen=True, kw_only=True):
    """Runner to a node that enrolled: be this node of the run.

    ``settings`` is a map of what the node program would else read from its settings file, the name first. The node
    keeps to its own way to the broker, whatever the ``host`` and ``port`` in it.
    """

    run: Identifier
    settings: msgspec.Raw


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """One direction of a link: payload bits per second (none: no limit), one-way delay, and the sender's watts."""

    rate: Annotated[float, Meta(gt=0)] | None = None
    delay: Amount = 0.0
    watts: Amount = 0.0


class LinkNow(msgspec.Struct, frozen=True, kw_only=True):
    """A node's link as a base station would know it: ``up`` is what the node sends."""

    up: Way = Way()
    down: Way = Way()


class Round(Message, frozen=True, kw_only=True):
    """Runner to edge: plan the coming requests of this round with this framework.

    The edge waits for ``requests`` of them, at most ``window`` seconds after the first, and not for devices that
    are lost in the round. ``links`` are those of the nodes when the round begins; a node that is not named has none
    that limits it. The same order may come again, for an edge that came back.
    """

    round: Identifier
    framework: Identifier
    seed: Seed
    requests: Annotated[int, Meta(ge=1, le=10000)]
    window: Annotated[float, Meta(gt=0, le=3600)]
    links: dict[Name, LinkNow] = {}


class Ask(Message, frozen=True, kw_only=True):
    """Runner to device: this user now wants this picture.

    ``attempt`` counts how often the same has been asked before, where the device or the edge may have forgotten, and
    ``waited`` how many seconds the user has waited since the first time. ``patience`` is how many seconds the device
    waits for the edge before it does it alone; none: as long as the deadline allows.
    """

    round: Identifier
    request: Identifier
    attempt: Count = 0
    waited: Amount = 0.0
    patience: Amount | None = None
    prompt: Prompt
    seed: Seed
    steps: Annotated[int, Meta(ge=1, le=1000)]
    deadline: Time


class Request(Message, frozen=True, kw_only=True):
    """Device to edge: a personal prompt. ``reply`` is the node whose inbox takes what comes back.

    A higher ``attempt`` than before says that the device still has no answer and may have lost one.
    """

    round: Identifier
    request: Identifier
    attempt: Count = 0
    reply: Name
    prompt: Prompt
    seed: Seed
    steps: Annotated[int, Meta(ge=1, le=1000)]
    sent: Time
    deadline: Time


class Work(Message, frozen=True, kw_only=True):
    """Node to node: a latent and the rest of the route; the receiver runs its own segments and passes on.

    No latent means that the route starts here, at step 0, from the noise of ``seed``. An empty ``route``
    means that denoising is done: the receiver decodes, unless ``picture`` already holds the PNG. A
    ``failure`` says in one sentence why there will be no picture. ``sender`` is the node that passes it
    on; where a device forwards, the topic says who it is, and that counts.
    """

    round: Identifier
    request: Identifier
    reply: Name
    seed: Seed
    steps: Annotated[int, Meta(ge=1, le=1000)]
    route: Annotated[tuple[Segment, ...], Meta(max_length=64)]
    latent: Latent | None = None
    picture: bytes | None = None
    failure: str = ""
    stages: Annotated[tuple[Stage, ...], Meta(max_length=256)] = ()
    sender: Name | None = None
    sent: Time
    deadline: Time


class Result(Message, frozen=True, kw_only=True):
    """Device to runner: the one outcome of a request, with the stages of its way and their cost.

    ``degraded``: the edge did not answer in time, and the device did it alone from the prompt. ``reason`` says why
    an outcome is not ``answered``.
    """

    round: Identifier
    request: Identifier
    device: Name
    outcome: Literal["answered", "degraded", "failed"]
    reason: str = ""
    asked: Time
    finished: Time
    stages: tuple[Stage, ...] = ()


class Picture(Message, frozen=True, kw_only=True):
    """Device to runner, after the clock has stopped: the picture as PNG."""

    round: Identifier
    request: Identifier
    png: bytes


class Planned(Message, frozen=True, kw_only=True):
    """Edge to runner: what was planned for a batch of a round's requests, as the planner's own structure.

    ``plan`` is msgpack of the method's Plan; ``seconds`` the wall time that each part of planning took, which
    ``began`` then: that tells batches apart. Where several met, each is told again when the round is over.
    """

    round: Identifier
    framework: Identifier
    plan: msgspec.Raw
    seconds: dict[str, float]
    began: Time = 0.0
    error: str = ""


class CacheCounts(msgspec.Struct, frozen=True, kw_only=True):
    """What the edge's cache of latents did in a round: requests that started from what was there or coming and those
    that did not, steps that this saved, latents dropped; and the bytes that it holds at the end."""

    hits: Count = 0
    misses: Count = 0
    steps_saved: Count = 0
    evictions: Count = 0
    bytes: Count = 0


class Call(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One denoiser call: its model, when it began and ended, and the step of each of its rows."""

    model: Identifier
    start: Time
    stop: Time
    steps: Annotated[tuple[Step, ...], Meta(max_length=1024)]


class Spent(Message, frozen=True, kw_only=True):
    """Node to runner, when a round is over on it: totals that no single request shows.

    ``shortages`` are denoiser calls for which memory did not suffice. ``calls`` are the latest of the round's
    denoiser calls, as many as the message may hold.
    """

    round: Identifier
    node: Name
    denoiser_calls: int
    rows: int
    flops: Amount
    busy: Amount
    joules: Amount
    overruns: int
    shortages: Count = 0
    cache: CacheCounts | None = None
    calls: Annotated[tuple[Call, ...], Meta(max_length=10_000)] = ()


class Ping(Message, frozen=True, kw_only=True):
    """Runner to node: what time is it there? ``sent`` is by the runner's clock."""

    sent: Time


class Pong(Message, frozen=True, kw_only=True):
    """Node to runner: the answer to the ``Ping`` that was ``sent`` then, ``received`` and ``replied`` by its clock."""

    node: Name
    sent: Time
    received: Time
    replied: Time


class Watch(Message, frozen=True, kw_only=True):
    """Runner to node: say every so many seconds how far requests have come, since somebody watches; 0: nobody does."""

    every: Annotated[float, Meta(ge=0, le=3600)]


class Progress(Message, frozen=True, kw_only=True):
    """Node to who watches, by the way (QoS 0): how many steps each request has behind it that the node works on."""

    node: Name
    requests: Annotated[dict[Identifier, Step], Meta(max_length=10_000)]


class View(Message, frozen=True, kw_only=True):
    """Runner to who watches, retained: one part of the state of a run; the topic says which.

    ``content`` is msgpack of a structure of the runner's own (``experiments.live.scene``).
    """

    run: Identifier
    content: msgspec.Raw


class Close(Message, frozen=True, kw_only=True):
    """Runner to nodes: this round is over; report what it took. Without a round: leave.

    A node that enrolled and is told to leave enrols again, for the next run, unless the testbed ``ends``.
    """

    round: Identifier | None = None
    ends: bool = False


AnyMessage = (
    Birth
    | Enrol
    | Assign
    | Round
    | Ask
    | Request
    | Work
    | Result
    | Picture
    | Planned
    | Spent
    | Ping
    | Pong
    | Watch
    | Progress
    | View
    | Close
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


class MalformedMessage(ValueError):
    """A payload is no valid message: too large, no msgpack, unknown type or field, value out of range."""


def encode(message: AnyMessage) -> bytes:
    """The payload of a message; raises ``MalformedMessage`` above ``MAX_PAYLOAD`` bytes."""
    payload = _encoder.encode(message)
    if len(payload) > MAX_PAYLOAD:
        kind = type(message).__name__.lower()
        raise MalformedMessage(f"a {kind} message of {len(payload)} bytes is over the limit of {MAX_PAYLOAD}")
    return payload


def decode(payload: bytes) -> AnyMessage:
    """The message of a payload, checked against its type; raises ``MalformedMessage``."""
    if len(payload) > MAX_PAYLOAD:
        raise MalformedMessage(f"a payload of {len(payload)} bytes is over the limit of {MAX_PAYLOAD}")
    try:
        return _decoder.decode(payload)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise MalformedMessage(str(error)) from error
