"""The packet scheduler: one process that carries the packets of all userspace links of a hub.

`netem.userspace.UserspaceLinks` starts it as ``python -m netem.scheduler DESCRIPTOR PARENT`` with its end of a
SOCK_SEQPACKET socket pair, hands it the ends of the links, and talks to it by `netem.control`. It ends with its
parent, or when the other end of the socket is closed, and the kernel removes the links with it. Without arguments it
compiles its inner loop for later starts, and ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import resource
import select
import signal
import socket
import sys
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from netem import forwarding
from netem.control import (
    Add,
    Answer,
    Count,
    Counters,
    DirectionCounters,
    Done,
    Lateness,
    Read,
    Refused,
    Remove,
    Shape,
    Started,
    State,
    decode_request,
    encode,
)
from netem.distributions import SCALE, table
from netem.link import MTU, Duration, FourState, GilbertElliott, Link, LinkState, Probability, Rate

_LINKS: Final = 1024
_FRAME: Final = 18  # bytes of an Ethernet header with a VLAN's tag, which TAP devices have
_LARGEST_REQUEST: Final = 2**16
_NICENESS: Final = -10
_PR_SET_PDEATHSIG: Final = 1

_DISTRIBUTIONS: Final = ("uniform", "normal", "pareto")
_QUANTITIES: Final[dict[str, type[Duration] | type[Probability]]] = {
    "delay": Duration,
    "jitter": Duration,
    "delay_correlation": Probability,
    "loss": Probability,
    "loss_correlation": Probability,
    "duplicate": Probability,
    "reorder": Probability,
    "corrupt": Probability,
}
"""The fields that `LinkState` and `forwarding.DIRECTION` have in common, with the same meaning."""


class _Link(NamedTuple):
    up: int
    """The number of the direction from the device to the hub; the other is the next."""
    ends: list[int]
    """The hub's and the device's TUN and the pidfd of the device; empty when the device has ended."""


class Scheduler:
    """The links that this process carries. ``control`` is the socket to the hub."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        tables = np.array([table("normal"), table("pareto")], np.float64) / SCALE
        self._memory = forwarding.memory(2 * _LINKS, MTU + _FRAME, tables)
        self._links: dict[str, _Link] = {}
        self._free = list(range(2 * _LINKS - 2, -2, -2))

    def serve(self, started: Started) -> None:
        """Say that it has started, then forward packets and answer the hub until that closes its end."""
        timer = forwarding.timer(self._memory)
        with select.epoll() as self._epoll:
            for descriptor in (timer, self._control.fileno()):
                self._epoll.register(descriptor, select.EPOLLIN)
            self._control.send(encode(started))
            while True:
                ready = forwarding.forward(self._memory, self._epoll.fileno(), timer)
                if ready != self._control.fileno():
                    self._lose(ready)
                elif not self._serve_one():
                    return

    def _serve_one(self) -> bool:
        data, descriptors, _, _ = socket.recv_fds(self._control, _LARGEST_REQUEST, 3)
        if not data:
            return False
        self._control.send(encode(self._answer(data, descriptors)))
        return True

    def _answer(self, data: bytes, descriptors: list[int]) -> Answer:
        request = decode_request(data)
        if isinstance(request, Add):
            return self._add(request, descriptors)
        link = self._links.get(request.name)
        if isinstance(request, Remove):
            return self._remove(request.name)
        if link is None or (isinstance(request, Shape) and not link.ends):
            return Refused(
                f"{request.name} has no link: its process has ended" if link else f"{request.name} is unknown"
            )
        up, down = (self._memory.directions[number] for number in (link.up, link.up + 1))
        match request:
            case Shape():
                write_state(up, request.link.up)
                write_state(down, request.link.down)
                return Done()
            case Read():
                return State(Link(up=read_state(up), down=read_state(down)))
            case Count():
                return Counters(up=self._counters(link.up), down=self._counters(link.up + 1))

    def _add(self, request: Add, ends: list[int]) -> Answer:
        why = ""
        if request.name in self._links:
            why = f"{request.name} has a link already"
        elif not self._free:
            why = f"there are {_LINKS} links already"
        elif max(ends) >= len(self._memory.meaning):
            why = f"there are {max(ends)} open files already"
        if why:
            _close(ends)
            return Refused(why)
        hub, device, _ = ends
        up = self._free.pop()
        self._links[request.name] = _Link(up, ends)
        self._begin(up, source=device, target=hub, seed=request.up_seed)
        self._begin(up + 1, source=hub, target=device, seed=request.down_seed)
        for descriptor in ends:
            os.set_blocking(descriptor, False)
            self._epoll.register(descriptor, select.EPOLLIN)
        return Done()

    def _begin(self, number: int, *, source: int, target: int, seed: int) -> None:
        self._memory.directions[number] = np.zeros((), forwarding.DIRECTION)
        direction = self._memory.directions[number]
        direction["source"], direction["target"], direction["random"] = source, target, seed
        chance = random.Random(seed)  # noqa: S311 - what comes before the first packet
        direction["last_loss"], direction["last_delay"] = chance.random(), chance.random()
        write_state(direction, LinkState())
        self._memory.lateness[number] = 0
        self._memory.meaning[source] = number

    def _remove(self, name: str) -> Done:
        link = self._links.pop(name, None)
        if link is not None:
            self._cut(link)
            self._free.append(link.up)
        return Done()

    def _lose(self, descriptor: int) -> None:
        """A device's process has ended, or somebody deleted an interface: the link is gone, the counters stay."""
        self._cut(next(link for link in self._links.values() if descriptor in link.ends))

    def _cut(self, link: _Link) -> None:
        for number in (link.up, link.up + 1):
            forwarding.forget(self._memory, number)
        for descriptor in link.ends:
            self._memory.meaning[descriptor] = forwarding.OTHER
        _close(link.ends)
        link.ends.clear()

    def _counters(self, number: int) -> DirectionCounters:
        direction = self._memory.directions[number]
        names = (field.name for field in msgspec.structs.fields(DirectionCounters) if field.name != "late")
        counts = {name: int(direction[name]) for name in names}
        return DirectionCounters(late=_lateness(self._memory.lateness[number], int(direction["latest"])), **counts)


def write_state(direction: Any, state: LinkState) -> None:
    """Make a `forwarding.DIRECTION` behave so from the next packet on; where it stands stays as it is."""
    direction["rate"] = state.rate or 0
    direction["queue"] = state.queue
    direction["distribution"] = _DISTRIBUTIONS.index(state.distribution)
    for name in _QUANTITIES:
        direction[name] = getattr(state, name)
    kind, *chances = _chain(state.bursts)
    if direction["bursts"] != kind:
        direction["bursts"], direction["chain"] = kind, 0
    for number, chance in enumerate(chances, 1):
        direction[f"a{number}"] = chance


def read_state(direction: Any) -> LinkState:
    """The state that a `forwarding.DIRECTION` is in; a queue of the derived length counts as not given."""
    quantities: dict[str, Any] = {name: kind(float(direction[name])) for name, kind in _QUANTITIES.items()}
    state = LinkState(
        rate=Rate(float(direction["rate"])) if direction["rate"] else None,
        distribution=_DISTRIBUTIONS[direction["distribution"]],
        bursts=_bursts(direction),
        **quantities,
    )
    queue = int(direction["queue"])
    return state if state.queue == queue else msgspec.structs.replace(state, limit=queue)


def _chain(bursts: GilbertElliott | FourState | None) -> tuple[float, ...]:
    """The kind of Markov chain and netem's a1, a2, ..."""
    match bursts:
        case GilbertElliott():
            return (
                forwarding.GILBERT_ELLIOTT,
                bursts.to_bad,
                bursts.to_good,
                bursts.loss_bad,
                bursts.loss_good,
            )
        case FourState():
            return forwarding.FOUR_STATE, bursts.p13, bursts.p31, bursts.p32, bursts.p14, bursts.p23
    return (forwarding.NO_BURSTS,)


def _bursts(direction: Any) -> GilbertElliott | FourState | None:
    a1, a2, a3, a4, a5 = (Probability(float(direction[f"a{number}"])) for number in range(1, 6))
    if direction["bursts"] == forwarding.GILBERT_ELLIOTT:
        return GilbertElliott(to_bad=a1, to_good=a2, loss_bad=a3, loss_good=a4)
    if direction["bursts"] == forwarding.FOUR_STATE:
        return FourState(p13=a1, p31=a2, p32=a3, p14=a4, p23=a5)
    return None


def _lateness(buckets: Any, latest: int) -> Lateness:
    """From the packets in each bucket and the largest lateness in nanoseconds."""
    upto = np.cumsum(buckets)

    def quantile(share: float) -> float:
        bucket = int(np.searchsorted(upto, share * upto[-1]))
        return float(min(latest / 1e9, (2 ** ((bucket + 1) / forwarding.PER_OCTAVE) - 1) / 1e6))

    return Lateness(p50=quantile(0.5), p99=quantile(0.99), max=latest / 1e9)


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _prefer_this_process() -> str:
    """Packets do not wait for the nodes' computations, where this user may say so. Returns how far that went."""
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        return "real time"
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, _NICENESS)
        return f"nice {_NICENESS}"
    return "normal"


def main() -> None:
    """Run the scheduler of the parent process, or only compile it."""
    if not sys.argv[1:]:
        forwarding.compile_once()
        return
    descriptor, parent = map(int, sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the hub ends this one when it is done
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    compile_s = forwarding.compile_once()
    with socket.socket(fileno=descriptor) as control:
        started = Started(compile_s=compile_s, kept=forwarding.kept(), priority=_prefer_this_process())
        Scheduler(control).serve(started)


if __name__ == "__main__":
    main()
