"""The kernel's netem qdisc: puts interfaces into a link state, and reads the state back.

In netlink's bytes, since pyroute2 knows no delay distributions, no Markov losses and no times in nanoseconds, and
takes milliseconds for a request where 50 links change ten times a second. The layouts are those of
``linux/pkt_sched.h``. A request carries every option: what a change leaves out, netem keeps.
"""

from __future__ import annotations

import os
import socket
import struct
from types import TracebackType
from typing import Final, Literal, Self

from netem.distributions import SCALE, table
from netem.link import BadLink, Duration, FourState, GilbertElliott, LinkState, Probability, Rate

ROOT: Final = 0xFFFFFFFF
"""The parent of an interface's only or outermost qdisc."""

_PUT, _GET = 36, 38  # RTM_NEWQDISC, RTM_GETQDISC
_REQUEST: Final = 0x1 | 0x4  # NLM_F_REQUEST | NLM_F_ACK
_ECHO: Final = 0x8  # NLM_F_ECHO, without which the kernel sends a qdisc that was asked for only to other listeners
_CREATE: Final = 0x100 | 0x400  # NLM_F_REPLACE | NLM_F_CREATE
_ERROR: Final = 2  # NLMSG_ERROR, also the answer to what went well
_MESSAGE: Final = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_TRAFFIC: Final = struct.Struct("=B3xi3I")  # struct tcmsg: family, interface, handle, parent, info
_KIND, _OPTIONS = 1, 2  # TCA_...

_HEADER: Final = struct.Struct("=6I")  # struct tc_netem_qopt: latency, limit, loss, gap, duplicate, jitter
_CORRELATION, _DISTRIBUTION, _REORDER, _CORRUPT, _LOSS, _RATE, _RATE_64, _LATENCY_64, _JITTER_64 = (
    1, 2, 3, 4, 5, 6, 8, 10, 11)  # TCA_NETEM_...  # fmt: skip
_PARAMETERS, _BURST = 1, 6  # TCA_TBF_...
_LINK_LAYER_ETHERNET: Final = 1
_FOUR_STATE, _GILBERT_ELLIOTT = 1, 2  # NETEM_LOSS_...
_NESTED: Final = 0x8000
_UINT32: Final = 2**32 - 1
_UNIFORM: Final = tuple(range(-SCALE + 2, SCALE, 4))  # the quantiles from -1 to 1, as many as in the other tables

Distribution = Literal["uniform", "normal", "pareto"]


class Qdiscs:
    """The qdiscs of the interfaces in the namespace in which it is entered."""

    def __enter__(self) -> Self:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def shape(self, interface: str, state: LinkState, *, handle: int, parent: int = ROOT) -> None:
        """Put an interface's netem into a state, keeping what waits in it; create it where there is none.

        Raises ``OSError``: ``ENOENT`` when the kernel has no netem.
        """
        self._put(interface, "netem", encode(state), handle=handle, parent=parent)

    def read(self, interface: str, distribution: Distribution, *, handle: int) -> LinkState:
        """The state of an interface's netem; its jitter's distribution, which the kernel does not tell, is given.

        Raises ``OSError``, or ``BadLink`` when it is no longer a netem.
        """
        answer = self._ask(_GET, _ECHO, _traffic(interface, handle, 0))
        found = _attributes(answer[_MESSAGE.size + _TRAFFIC.size :])
        kind = found[_KIND].rstrip(b"\0").decode()
        if kind != "netem":
            raise BadLink(f"{interface} has a qdisc {kind} where netem was: somebody else replaced it")
        return decode(found[_OPTIONS], distribution)

    def segment(self, interface: str, size: int, *, handle: int) -> None:
        """Cut bundles of packets at an interface's root into packets of at most ``size`` bytes for a child qdisc.

        A token bucket does that which is so wide that it limits nothing.
        """
        rate = struct.pack("=xBHhHI", _LINK_LAYER_ETHERNET, 0, 0, 0, _UINT32)
        parameters = rate + bytes(12) + struct.pack("=3I", 1 << 30, 0, 0)
        options = _attribute(_PARAMETERS, parameters) + _attribute(_BURST, struct.pack("=I", size))
        self._put(interface, "tbf", options, handle=handle, parent=ROOT)

    def _put(self, interface: str, kind: str, options: bytes, *, handle: int, parent: int) -> None:
        attributes = _attribute(_KIND, kind.encode() + b"\0") + _attribute(_OPTIONS, options)
        self._ask(_PUT, _CREATE, _traffic(interface, handle, parent) + attributes)

    def _ask(self, kind: int, flags: int, body: bytes) -> bytes:
        """Send a request and return the last message before its acknowledgement."""
        self._socket.send(_MESSAGE.pack(_MESSAGE.size + len(body), kind, _REQUEST | flags, 0, 0) + body)
        answer = b""
        while True:
            messages = self._socket.recv(1 << 16)
            while messages:
                length, kind, *_ = _MESSAGE.unpack_from(messages)
                if kind == _ERROR:
                    (code,) = struct.unpack_from("=i", messages, _MESSAGE.size)
                    if code:
                        raise OSError(-code, os.strerror(-code))
                    return answer
                answer, messages = messages[:length], messages[(length + 3) // 4 * 4 :]


def encode(state: LinkState) -> bytes:
    """The options that put netem into a state."""
    rate = round((state.rate or 0) / 8)
    options = [
        _HEADER.pack(0, state.queue, _part(state.loss), 1 if state.reorder else 0, _part(state.duplicate), 0),
        _attribute(_LATENCY_64, struct.pack("=q", round(state.delay * 1e9))),
        _attribute(_JITTER_64, struct.pack("=q", round(state.jitter * 1e9))),
        _attribute(_CORRELATION, struct.pack("=3I", _part(state.delay_correlation), _part(state.loss_correlation), 0)),
        _attribute(_REORDER, struct.pack("=2I", _part(state.reorder), 0)),
        _attribute(_CORRUPT, struct.pack("=2I", _part(state.corrupt), 0)),
        _attribute(_RATE, struct.pack("=IiIi", min(rate, _UINT32), 0, 0, 0)),
    ]
    if rate > _UINT32:
        options.append(_attribute(_RATE_64, struct.pack("=Q", rate)))
    if state.jitter:
        values = _UNIFORM if state.distribution == "uniform" else table(state.distribution)
        options.append(_attribute(_DISTRIBUTION, struct.pack(f"={len(values)}h", *values)))
    if state.bursts:
        options.append(_attribute(_LOSS | _NESTED, _bursts(state.bursts)))
    return b"".join(options)


def decode(options: bytes, distribution: Distribution) -> LinkState:
    """The state in the options that the kernel reports, except the shape of jitter, which it does not tell."""
    _, limit, loss, gap, duplicate, _ = _HEADER.unpack_from(options)
    found = _attributes(options[_HEADER.size :])
    (latency,) = struct.unpack("=q", found[_LATENCY_64])
    (jitter,) = struct.unpack("=q", found[_JITTER_64])
    delay_correlation, loss_correlation, _ = struct.unpack("=3I", found[_CORRELATION])
    (reorder, _), (corrupt, _) = struct.unpack("=2I", found[_REORDER]), struct.unpack("=2I", found[_CORRUPT])
    (rate,) = struct.unpack_from("=I", found[_RATE])
    if _RATE_64 in found:
        (rate,) = struct.unpack("=Q", found[_RATE_64])
    models = _attributes(found.get(_LOSS, b""))
    return LinkState(
        rate=Rate(rate * 8) if rate else None,
        delay=Duration(latency / 1e9),
        jitter=Duration(jitter / 1e9),
        distribution=distribution,
        delay_correlation=_probability(delay_correlation),
        loss=_probability(loss),
        loss_correlation=_probability(loss_correlation),
        bursts=_model(models),
        duplicate=_probability(duplicate),
        reorder=_probability(reorder if gap else 0),
        corrupt=_probability(corrupt),
        limit=limit,
    )


def _traffic(interface: str, handle: int, parent: int) -> bytes:
    return _TRAFFIC.pack(socket.AF_UNSPEC, socket.if_nametoindex(interface), handle, parent, 0)


def _bursts(model: GilbertElliott | FourState) -> bytes:
    if isinstance(model, GilbertElliott):
        parts = [model.to_bad, model.to_good, 1 - model.loss_bad, model.loss_good]  # netem's h is what passes
        return _attribute(_GILBERT_ELLIOTT, struct.pack("=4I", *map(_part, parts)))
    parts = [model.p13, model.p31, model.p32, model.p14, model.p23]
    return _attribute(_FOUR_STATE, struct.pack("=5I", *map(_part, parts)))


def _model(models: dict[int, bytes]) -> GilbertElliott | FourState | None:
    if _GILBERT_ELLIOTT in models:
        to_bad, to_good, passed, good = struct.unpack("=4I", models[_GILBERT_ELLIOTT])
        return GilbertElliott(
            to_bad=_probability(to_bad),
            to_good=_probability(to_good),
            loss_bad=_probability(_UINT32 - passed),
            loss_good=_probability(good),
        )
    if _FOUR_STATE in models:
        p13, p31, p32, p14, p23 = map(_probability, struct.unpack("=5I", models[_FOUR_STATE]))
        return FourState(p13=p13, p31=p31, p32=p32, p14=p14, p23=p23)
    return None


def _attribute(kind: int, value: bytes) -> bytes:
    """One of netlink's attributes: length, kind, value, padded to a multiple of 4 bytes."""
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _attributes(data: bytes) -> dict[int, bytes]:
    found = {}
    while data:
        length, kind = struct.unpack_from("=HH", data)
        found[kind & ~_NESTED] = data[4:length]
        data = data[(length + 3) // 4 * 4 :]
    return found


def _part(probability: float) -> int:
    return round(probability * _UINT32)


def _probability(part: int) -> Probability:
    return Probability(part / _UINT32)
