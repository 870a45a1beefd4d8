"""Links for kernels without netem: pairs of TUN devices, and one process that carries packets between them.

Each end of a link is a TUN device in its own namespace. The packet scheduler (`netem.scheduler`) holds both open
and does to the packets what netem would. The devices exist only as long as they are open, so they vanish with
that process, which dies with this one, and a link vanishes with its device's process.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import logging
import os
import secrets
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final, NoReturn, TypeVar

from pyroute2 import IPRoute

from netem.control import (
    Add,
    Count,
    Counters,
    Done,
    Question,
    Read,
    Refused,
    Remove,
    Shape,
    Started,
    State,
    decode_answer,
    encode,
)
from netem.hosts import Host, LinksUnavailable, inside
from netem.link import MTU, Link

_TUN: Final = "/dev/net/tun"
_BURST: Final = 8192  # packets that a device keeps until the scheduler reads them
_PATIENCE: Final = 30.0  # seconds that an answer may take on a very busy machine
_START: Final = 10.0  # seconds until a start needs an explanation
_COMPILING: Final = 300.0  # seconds that the first start may take
_STOP: Final = 5.0  # seconds between asking the scheduler to end and killing it
_LARGEST_ANSWER: Final = 2**16

_TUNSETIFF: Final = 0x400454CA
_IFF_TUN: Final = 0x0001
_IFF_TAP: Final = 0x0002
_IFF_NO_PI: Final = 0x1000

Expected = TypeVar("Expected", Started, Done, State, Counters)

_log = logging.getLogger(__name__)


class SchedulerEnded(Exception):
    """The packet scheduler has ended while its links were needed; they are gone with it."""


class UserspaceLinks:
    """Links that a process of our own shapes. See `netem.hosts.Links`.

    The same ``seed`` gives each device's link the same chances in the same order; without one they differ each time.
    """

    implementation = "userspace"

    def __init__(self, *, seed: int | None = None) -> None:
        self.priority = ""
        """How the kernel's scheduler treats the open links' process: ``real time``, ``nice -10`` or ``normal``."""
        self._seed = secrets.randbits(64) if seed is None else seed
        self._control: socket.socket
        self._process: subprocess.Popen[bytes] | None = None
        self._one_at_a_time = threading.Lock()

    def open(self) -> None:
        """Start the packet scheduler; raises ``LinksUnavailable`` where TUN devices cannot be made."""
        try_a_device()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "netem.scheduler", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=_environment(),
            )
        try:
            started = self._started()
        except OSError as error:
            self.close()
            raise LinksUnavailable(f"userspace links do not start: {error.strerror}") from error
        except BaseException:
            self.close()
            raise
        self.priority = started.priority

    def close(self) -> None:
        """End the packet scheduler, and all links with it."""
        if self._process is None:
            return
        self._control.close()
        try:
            self._process.wait(_STOP)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    async def wait(self) -> NoReturn:
        """Until the packet scheduler ends by itself: raises `SchedulerEnded`."""
        assert self._process is not None, "the links are not open"  # noqa: S101
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        descriptor = os.pidfd_open(self._process.pid)
        try:
            loop.add_reader(descriptor, ended.set)
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
        raise SchedulerEnded(self._end())

    def connect(self, host: Host, namespace: int) -> None:
        """Make both ends of a link."""
        with ExitStack() as stack:
            hub = _device(host.hub_interface)
            stack.callback(os.close, hub)
            with inside(namespace):
                device = _device(host.device_interface)
            stack.callback(os.close, device)
            # An open device keeps its namespace alive, so the scheduler has to watch the process.
            process = os.pidfd_open(host.pid)
            stack.callback(os.close, process)
            self.join(host.name, hub, device, process)

    def join(self, name: str, hub: int, device: int, process: int) -> None:
        """Forward between two open devices until the process of a pidfd ends; the caller may close its own."""
        request = Add(name, up_seed=self._derived(name, "up"), down_seed=self._derived(name, "down"))
        self._ask(request, Done, [hub, device, process])

    def disconnect(self, host: Host) -> None:
        """Remove both ends; they may be gone already, and so may the scheduler."""
        with suppress(BrokenPipeError):
            self._ask(Remove(host.name), Done)

    def apply(self, host: Host, namespace: int, link: Link) -> None:  # noqa: ARG002
        """Have the scheduler shape the packets that come from now on; those on their way keep their times."""
        self._ask(Shape(host.name, link), Done)

    def read(self, host: Host, namespace: int) -> Link:  # noqa: ARG002
        """What the scheduler does to packets now."""
        return self._ask(Read(host.name), State).link

    def counters(self, host: Host) -> Counters:
        """What has happened on a link since it was made, also after its device has ended. Raises ``OSError``."""
        return self._ask(Count(host.name), Counters)

    def _started(self) -> Started:
        """Wait for the scheduler's first word."""
        self._control.settimeout(_START)
        try:
            started = self._receive(Started)
        except TimeoutError:
            _log.warning(
                "the packet scheduler is not up after %.0f s: its first start compiles it, which takes 7 s of CPU time",
                _START,
            )
            self._control.settimeout(_COMPILING)
            started = self._receive(Started)
        if not started.kept:
            _log.warning(
                "the packet scheduler was compiled in %.0f s, and will be at each start: neither %s nor this user's"
                " cache can be written; set NUMBA_CACHE_DIR to a directory that can",
                started.compile_s,
                Path(__file__).parent,
            )
        self._control.settimeout(_PATIENCE)
        return started

    def _ask(self, request: Question, expected: type[Expected], descriptors: Sequence[int] = ()) -> Expected:
        """Send a request and return the answer; raises ``OSError`` when it is refused or nobody answers."""
        with self._one_at_a_time:
            try:
                socket.send_fds(self._control, [encode(request)], descriptors)
                return self._receive(expected)
            except TimeoutError:
                self._end()  # a late answer would be taken for that to the next request
                raise
            except ConnectionError as error:
                raise BrokenPipeError(errno.EPIPE, self._end()) from error

    def _receive(self, expected: type[Expected]) -> Expected:
        try:
            data = self._control.recv(_LARGEST_ANSWER)
        except TimeoutError as error:
            raise TimeoutError(errno.ETIMEDOUT, "the packet scheduler does not answer") from error
        if not data:
            raise BrokenPipeError(errno.EPIPE, self._end())
        answer = decode_answer(data)
        if isinstance(answer, Refused):
            raise OSError(errno.ENODEV, answer.why)
        if not isinstance(answer, expected):
            raise OSError(errno.EPROTO, f"the packet scheduler answered {answer}")
        return answer

    def _end(self) -> str:
        """Make sure that the scheduler has ended, and say how."""
        if self._process is None:
            return "the packet scheduler is not running"
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP)
        self._process.kill()
        code = self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        return f"the packet scheduler {how}, and all links with it"

    def _derived(self, *words: str) -> int:
        """64 bits from the seed and some words."""
        text = "\0".join((str(self._seed), *words)).encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def try_a_device() -> None:
    """Make a TUN device and delete it, in the namespace that this thread is in; raises `LinksUnavailable`."""
    try:
        os.close(_device("trial"))
    except OSError as error:
        raise LinksUnavailable(_explain(error)) from error


def tap(name: str) -> int:
    """A TAP device, which takes and gives Ethernet frames; see `_device`. Raises ``OSError``."""
    return _device(name, _IFF_TAP)


def _device(name: str, kind: int = _IFF_TUN) -> int:
    """A device in the namespace that this thread is in: it exists while the file descriptor is open."""
    descriptor = os.open(_TUN, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), kind | _IFF_NO_PI))
        with IPRoute() as kernel:
            kernel.link("set", index=socket.if_nametoindex(name), mtu=MTU, txqlen=_BURST)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _environment() -> dict[str, str]:
    """The scheduler finds this package first; numpy starts no threads, and asks for no pages of 2 MiB.

    With these a few waiting packets would take as much memory as many, once the kernel comes round to making them.
    """
    path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    numpy = {"OPENBLAS_NUM_THREADS": "1", "NUMPY_MADVISE_HUGEPAGE": "0"}
    return {**os.environ, **numpy, "PYTHONPATH": os.pathsep.join(path)}


def _explain(error: OSError) -> str:
    if error.errno in {errno.ENOENT, errno.ENODEV, errno.ENXIO}:
        cure = "load it with `modprobe tun`; a container needs `--device /dev/net/tun`"
    else:
        cure = f"let this user read and write {_TUN}; a container needs `--device /dev/net/tun`"
    return f"userspace links need {_TUN} ({error.strerror}): {cure}"
