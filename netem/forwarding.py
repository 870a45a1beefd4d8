"""From one end of a userspace link to the other: the compiled part of the packet scheduler.

`forward` reads packets from TUN devices, decides what the link does to each as the kernel's netem would
(``netem_enqueue`` in net/sched/sch_netem.c, with the random draws in the same order), keeps them, and writes
each to the other end when it is due. It runs without the interpreter until something happens that is not a packet.

All state is in the arrays of `Memory`, which the scheduler process (`netem.scheduler`) reads and writes between two
runs. Times are nanoseconds of CLOCK_MONOTONIC. A link's two directions have numbers of their own.

``python -m netem.scheduler`` compiles this once; the result stays beside this file, or in the user's cache.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import select
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeVar, cast

import numba
import numpy as np
from numba import types
from numpy.typing import NDArray

UNIFORM, NORMAL, PARETO = 0, 1, 2  # Direction.distribution; tables[distribution - 1]
NO_BURSTS, GILBERT_ELLIOTT, FOUR_STATE = 0, 1, 2  # Direction.bursts

DIRECTION: Final = np.dtype(
    [
        # The wanted state, in the units of `netem.link.LinkState`.
        ("rate", np.float64),  # 0: unlimited
        ("delay", np.float64),
        ("jitter", np.float64),
        ("delay_correlation", np.float64),
        ("loss", np.float64),
        ("loss_correlation", np.float64),
        ("duplicate", np.float64),
        ("reorder", np.float64),
        ("corrupt", np.float64),
        ("queue", np.int64),
        ("distribution", np.int64),
        # Losses in bursts: netem's a1 to a5. Gilbert-Elliott: to_bad, to_good, loss_bad, loss_good.
        ("bursts", np.int64),
        ("a1", np.float64),
        ("a2", np.float64),
        ("a3", np.float64),
        ("a4", np.float64),
        ("a5", np.float64),
        # Where it stands.
        ("random", np.uint64),
        ("last_loss", np.float64),
        ("last_delay", np.float64),
        ("chain", np.int64),  # the state of the Markov chain
        ("last_due", np.int64),
        ("waiting", np.int64),
        ("source", np.int64),  # file descriptors
        ("target", np.int64),
        # What has happened.
        ("packets_in", np.int64),
        ("bytes_in", np.int64),
        ("packets_out", np.int64),
        ("bytes_out", np.int64),
        ("lost", np.int64),
        ("dropped", np.int64),
        ("duplicated", np.int64),
        ("corrupted", np.int64),
        ("reordered", np.int64),
        ("refused", np.int64),
        ("latest", np.int64),
    ]
)
"""One direction of a link."""

WAITING: Final = np.dtype([("due", np.int64), ("order", np.int64), ("slot", np.int64)])
"""A packet on its way; those that are due at the same time leave in the order of their arrival."""

BUCKETS: Final = 128
PER_OCTAVE: Final = 4
"""Lateness is counted in buckets: the i-th up to 2 ** ((i + 1) / 4) - 1 microseconds."""

_SLOTS: Final = 2**18  # packets on their way on all links: 2 Gbit/s for 1.5 s
_TUN_DESCRIPTORS: Final = 2**14
_EVENTS: Final = 256
_BATCH: Final = 16  # packets read from one device before those that are due are sent
_EVENT_WORDS: Final = 3 if platform.machine() in {"x86_64", "i686"} else 4  # struct epoll_event, packed on x86
_HEADER: Final = 14  # bytes of an Ethernet header, which netem counts on virtual Ethernet

# Memory.counts
_FREE, _WAITING, _ORDER, _ARMED = 0, 1, 2, 3
# Memory.meaning of a file descriptor that is not the number of a direction
_TIMER, OTHER = -1, -2

_EPOLLIN, _EPOLLERR, _EPOLLHUP = 0x1, 0x8, 0x10
_MONOTONIC = 1
_TIMER_ABSTIME = 1

# Python's integers would turn unsigned arithmetic into floating point.
_GOLDEN, _MIX1, _MIX2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_30, _27, _31, _11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)

_size = types.intp  # of a pointer too
_read = types.ExternalFunction("read", _size(types.int32, _size, _size))
_write = types.ExternalFunction("write", _size(types.int32, _size, _size))
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, _size))
_timerfd_settime = types.ExternalFunction("timerfd_settime", types.int32(types.int32, types.int32, _size, _size))
_epoll_wait = types.ExternalFunction("epoll_wait", types.int32(types.int32, _size, types.int32, types.int32))

Function = TypeVar("Function", bound=Callable[..., Any])


class Memory(NamedTuple):
    """All that the forwarding knows, as arrays that outlive a run of it."""

    directions: NDArray[Any]
    """`DIRECTION` for each of (directions,)."""
    lateness: NDArray[np.int64]
    """(directions, BUCKETS): packets that left so late."""
    packets: NDArray[np.uint8]
    """(slots + 1, bytes): the contents; the last slot is for what there is no room for."""
    owners: NDArray[np.int64]
    """(slots + 1,): the packet's direction."""
    lengths: NDArray[np.int64]
    """(slots + 1,): bytes."""
    free: NDArray[np.int64]
    """(slots,): a stack of empty slots, the most recently used on top, of which counts[0] are valid."""
    heap: NDArray[Any]
    """`WAITING` for each of (slots,): a binary heap of the packets on their way, of which counts[1] are valid."""
    counts: NDArray[np.int64]
    """Free slots, packets on their way, packets so far, what the timer is set to."""
    meaning: NDArray[np.int64]
    """(file descriptors,): the direction that begins there, or one of the constants above."""
    tables: NDArray[np.float64]
    """(2, size): quantiles of the normal and the Pareto distribution, mean 0 and deviation 1."""
    events: NDArray[np.uint32]
    """Room for what epoll_wait returns."""
    clock: NDArray[np.int64]
    """Room for a struct itimerspec; its first half also for a struct timespec."""


def memory(directions: int, largest: int, tables: NDArray[np.float64], slots: int = _SLOTS) -> Memory:
    """Room for so many directions, and ``slots`` for packets of up to ``largest`` bytes.

    It takes up memory only where it has been used. The slot that was left last is used first, so that is what the
    packets took that ever waited at once: on links with queues of 200 packets of 1.4 KB, 0.3 MB for each direction.
    """
    room = 64 * math.ceil(largest / 64)
    return Memory(
        directions=np.zeros(directions, DIRECTION),
        lateness=np.zeros((directions, BUCKETS), np.int64),
        packets=np.empty((slots + 1, room), np.uint8),
        owners=np.empty(slots + 1, np.int64),
        lengths=np.empty(slots + 1, np.int64),
        free=np.arange(slots, dtype=np.int64)[::-1].copy(),
        heap=np.empty(slots, WAITING),
        counts=np.array([slots, 0, 0, 0], np.int64),
        meaning=np.full(_TUN_DESCRIPTORS, OTHER, np.int64),
        tables=tables,
        events=np.zeros(_EVENTS * _EVENT_WORDS, np.uint32),
        clock=np.zeros(4, np.int64),
    )


def forget(memory: Memory, direction: int) -> None:
    """Discard the packets that are on their way in a direction."""
    waiting = memory.heap[: memory.counts[_WAITING]]
    leaving = memory.owners[waiting["slot"]] == direction
    kept = np.sort(waiting[~leaving], order=("due", "order"))  # what is sorted is a heap
    freed = waiting["slot"][leaving]
    memory.free[memory.counts[_FREE] : memory.counts[_FREE] + len(freed)] = freed
    memory.counts[_FREE] += len(freed)
    memory.heap[: len(kept)] = kept
    memory.counts[_WAITING] = len(kept)
    memory.directions[direction]["waiting"] = 0


def timer(memory: Memory) -> int:
    """A file descriptor for `forward`, which the caller adds to the epoll set."""
    descriptor = ctypes.CDLL(None).timerfd_create(_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
    if descriptor < 0:
        raise OSError("the kernel has no timerfd")
    memory.meaning[descriptor] = _TIMER
    return int(descriptor)


def _compiled(function: Function) -> Function:
    """Compile with numba, once for all processes where there is a place to keep the result."""
    try:
        return cast("Function", numba.njit(function, cache=True))
    except RuntimeError:  # neither this directory nor the user's cache can be written
        return cast("Function", numba.njit(function))


@_compiled
def now(memory: Memory) -> int:
    """CLOCK_MONOTONIC in nanoseconds."""
    _clock_gettime(_MONOTONIC, memory.clock.ctypes.data)
    return memory.clock[0] * 1_000_000_000 + memory.clock[1]


@_compiled
def uniform(direction: Any) -> float:
    """A number from 0 up to 1 (SplitMix64: Steele, Lea and Flood, OOPSLA 2014, section 4)."""
    direction.random += _GOLDEN
    bits = direction.random
    bits = (bits ^ (bits >> _30)) * _MIX1
    bits = (bits ^ (bits >> _27)) * _MIX2
    bits ^= bits >> _31
    return (bits >> _11) * 2.0**-53


@_compiled
def _by_chance(direction: Any, probability: float) -> bool:
    return probability > 0 and uniform(direction) < probability


@_compiled
def lost(direction: Any) -> bool:
    """Whether the next packet is lost (netem's ``loss_event``)."""
    if direction.bursts == GILBERT_ELLIOTT:
        return _lost_of_two_states(direction)
    if direction.bursts == FOUR_STATE:
        return _lost_of_four_states(direction)
    if direction.loss == 0:
        return False
    value = uniform(direction)
    if direction.loss_correlation > 0:
        value += direction.loss_correlation * (direction.last_loss - value)
        direction.last_loss = value
    return value < direction.loss


@_compiled
def _lost_of_two_states(direction: Any) -> bool:
    """``loss_gilb_ell``: the state changes first, the loss is still that of the state before."""
    change, loss = uniform(direction), uniform(direction)
    if direction.chain == 0:
        if change < direction.a1:
            direction.chain = 1
        return loss < direction.a4
    if change < direction.a2:
        direction.chain = 0
    return loss < direction.a3


@_compiled
def _lost_of_four_states(direction: Any) -> bool:
    """``loss_4state``: 0 received in a gap, 1 received in a burst, 2 lost in a burst, 3 lost in a gap."""
    value = uniform(direction)
    state = direction.chain
    if state == 0:
        if value < direction.a4:
            direction.chain = 3
        elif value < direction.a1 + direction.a4:
            direction.chain = 2
    elif state == 1:
        if value < direction.a5:
            direction.chain = 2
    elif state == 2:
        if value < direction.a3:
            direction.chain = 1
        elif value < direction.a2 + direction.a3:
            direction.chain = 0
    else:
        direction.chain = 0
    return direction.chain >= 2


@_compiled
def drawn_delay(direction: Any, tables: NDArray[np.float64]) -> int:
    """A packet's delay in nanoseconds (``tabledist``); a normal one may be negative, which is none."""
    if direction.jitter == 0:
        return int(direction.delay * 1e9)
    value = uniform(direction)
    if direction.delay_correlation > 0:
        value += direction.delay_correlation * (direction.last_delay - value)
        direction.last_delay = value
    if direction.distribution == UNIFORM:
        offset = 2 * value - 1
    else:
        table = tables[direction.distribution - 1]
        offset = table[min(int(value * len(table)), len(table) - 1)]
    return int((direction.delay + offset * direction.jitter) * 1e9)


@_compiled
def departure(direction: Any, tables: NDArray[np.float64], length: int, arrival: int) -> int:
    """When a packet leaves: its delay after its arrival, at once, or after the one before at the link's rate."""
    if _by_chance(direction, direction.reorder):
        direction.reordered += 1
        return arrival
    due = arrival + drawn_delay(direction, tables)
    if direction.rate > 0:
        due = max(due, direction.last_due) + int((length + _HEADER) * 8e9 / direction.rate)
    direction.last_due = max(direction.last_due, due)
    return due


@_compiled
def _before(left: Any, right: Any) -> bool:
    return left.due < right.due or (left.due == right.due and left.order < right.order)


@_compiled
def push(memory: Memory, due: int, slot: int) -> None:
    """Have a packet leave at a time."""
    heap = memory.heap
    place = memory.counts[_WAITING]
    order = memory.counts[_ORDER]
    memory.counts[_WAITING] += 1
    memory.counts[_ORDER] += 1
    while place > 0:
        parent = (place - 1) >> 1
        if heap[parent].due <= due:  # on equality the parent came earlier
            break
        heap[place] = heap[parent]
        place = parent
    heap[place].due = due
    heap[place].order = order
    heap[place].slot = slot


@_compiled
def pop(memory: Memory) -> int:
    """Take the slot of the packet that leaves first."""
    heap = memory.heap
    first = heap[0].slot
    memory.counts[_WAITING] -= 1
    size = memory.counts[_WAITING]
    place = 0
    child = 1
    while child < size:
        if child + 1 < size and _before(heap[child + 1], heap[child]):
            child += 1
        if not _before(heap[child], heap[size]):
            break
        heap[place] = heap[child]
        place = child
        child = 2 * place + 1
    heap[place] = heap[size]
    return first


@_compiled
def take(memory: Memory) -> int:
    """An empty slot, or the last one when all are full."""
    if memory.counts[_FREE] == 0:
        return len(memory.free)
    memory.counts[_FREE] -= 1
    return memory.free[memory.counts[_FREE]]


@_compiled
def _give(memory: Memory, slot: int) -> None:
    if slot < len(memory.free):
        memory.free[memory.counts[_FREE]] = slot
        memory.counts[_FREE] += 1


@_compiled
def _keep(memory: Memory, number: int, slot: int, arrival: int) -> None:
    """Hold a packet until it leaves."""
    direction = memory.directions[number]
    memory.owners[slot] = number
    direction.waiting += 1
    push(memory, departure(direction, memory.tables, memory.lengths[slot], arrival), slot)


@_compiled
def _corrupt(memory: Memory, direction: Any, slot: int) -> None:
    """Flip one bit."""
    bit = int(uniform(direction) * 8 * memory.lengths[slot])
    memory.packets[slot, bit >> 3] ^= np.uint8(1 << (bit & 7))
    direction.corrupted += 1


@_compiled
def _has_room(memory: Memory, direction: Any, slot: int) -> bool:
    return direction.waiting < direction.queue and slot < len(memory.free)


@_compiled
def _duplicate(memory: Memory, number: int, slot: int, arrival: int) -> None:
    """A copy begins again: it may be lost, corrupted or find the queue full by itself, but is not copied again."""
    direction = memory.directions[number]
    if lost(direction):
        direction.lost += 1
        return
    twin = take(memory)
    length = memory.lengths[slot]
    memory.lengths[twin] = length
    memory.packets[twin, :length] = memory.packets[slot, :length]
    if _by_chance(direction, direction.corrupt):
        _corrupt(memory, direction, twin)
    if _has_room(memory, direction, twin):
        _keep(memory, number, twin, arrival)
    else:
        direction.dropped += 1
        _give(memory, twin)


@_compiled
def arrive(memory: Memory, number: int, slot: int, arrival: int) -> None:
    """What a direction does to a packet that lies in a slot (``netem_enqueue``)."""
    direction = memory.directions[number]
    direction.packets_in += 1
    direction.bytes_in += memory.lengths[slot]
    copies = 1
    if _by_chance(direction, direction.duplicate):
        direction.duplicated += 1
        copies += 1
    if lost(direction):
        direction.lost += 1
        copies -= 1
    if copies == 0:
        _give(memory, slot)
        return
    if not _has_room(memory, direction, slot):
        direction.dropped += copies
        _give(memory, slot)
        return
    if copies == 2:
        _duplicate(memory, number, slot, arrival)
    if _by_chance(direction, direction.corrupt):
        _corrupt(memory, direction, slot)
    _keep(memory, number, slot, arrival)


@_compiled
def _send_what_is_due(memory: Memory, current: int) -> int:
    """Write the packets that are due to their targets; returns the time then."""
    while memory.counts[_WAITING] > 0 and memory.heap[0].due <= current:
        late = max(0, current - memory.heap[0].due)
        slot = pop(memory)
        number = memory.owners[slot]
        direction = memory.directions[number]
        length = memory.lengths[slot]
        if _write(direction.target, memory.packets[slot].ctypes.data, length) == length:
            direction.packets_out += 1
            direction.bytes_out += length
        else:
            direction.refused += 1
        direction.waiting -= 1
        direction.latest = max(direction.latest, late)
        bucket = int(PER_OCTAVE * math.log2(1 + late / 1000))
        memory.lateness[number, min(bucket, BUCKETS - 1)] += 1
        _give(memory, slot)
        current = now(memory)
    return current


@_compiled
def _receive(memory: Memory, number: int) -> None:
    """Read some packets of a direction."""
    source = memory.directions[number].source
    for _ in range(_BATCH):
        slot = take(memory)
        length = _read(source, memory.packets[slot].ctypes.data, memory.packets.shape[1])
        if length <= 0:
            _give(memory, slot)
            return
        memory.lengths[slot] = length
        arrive(memory, number, slot, now(memory))


@_compiled
def _set_timer(memory: Memory, timer: int) -> None:
    """Have it go off when the next packet is due, or never."""
    due = memory.heap[0].due if memory.counts[_WAITING] > 0 else 0
    if due != memory.counts[_ARMED]:
        memory.clock[0] = memory.clock[1] = 0
        memory.clock[2] = due // 1_000_000_000
        memory.clock[3] = due % 1_000_000_000
        _timerfd_settime(timer, _TIMER_ABSTIME, memory.clock.ctypes.data, 0)
        memory.counts[_ARMED] = due


@_compiled
def forward(memory: Memory, epoll: int, timer: int) -> int:
    """Forward packets until a file descriptor of the epoll set is ready that is not a working device's end.

    Returns that file descriptor: one without a `Memory.meaning`, or a device that has been deleted.
    """
    while True:
        _send_what_is_due(memory, now(memory))
        _set_timer(memory, timer)
        ready = _epoll_wait(epoll, memory.events.ctypes.data, _EVENTS, -1)
        other = -1
        for place in range(ready):
            event = memory.events[place * _EVENT_WORDS]
            # The descriptor stands in the first half of the last 8 bytes.
            descriptor = int(memory.events[(place + 1) * _EVENT_WORDS - 2])
            number = memory.meaning[descriptor]
            if number == _TIMER:
                memory.counts[_ARMED] = -1
            elif number == OTHER or event & (_EPOLLERR | _EPOLLHUP):
                other = descriptor
            else:
                _receive(memory, number)
            _send_what_is_due(memory, now(memory))
        if other >= 0:
            return other


def compile_once() -> float:
    """Compile, or load what was compiled before; returns the seconds that it took."""
    began = time.perf_counter()
    small = memory(2, 64, np.zeros((2, 1)), slots=4)
    going_off = timer(small)
    ready, waker = os.pipe()
    os.write(waker, b"\0")
    with select.epoll() as epoll:
        epoll.register(ready, select.EPOLLIN)
        assert forward(small, epoll.fileno(), going_off) == ready  # noqa: S101 - it is all that is there
    for descriptor in (going_off, ready, waker):
        os.close(descriptor)
    return time.perf_counter() - began


def kept() -> bool:
    """Whether there is a place that keeps what was compiled."""
    return bool(cast("Any", forward).stats.cache_path)
