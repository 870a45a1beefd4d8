"""A warmed process from which device processes fork.

Importing torch and loading a model takes seconds and hundreds of megabytes. The fork server does both once;
a device forked from it shares that memory and starts in a fraction of a second.

The module that a fork server runs has two functions:

    def warm(arguments: dict[str, Any]) -> None: ...  # once, in the server: import and load
    def main(arguments: dict[str, Any]) -> int: ...   # in each child: returns its exit status

`warm` must leave no thread behind (call `torch.set_num_threads(1)`): only the forking thread lives on in a
child.

The server dies with the process that started it and the children die with the server, also after `kill -9`:
the kernel sends each of them SIGKILL when its parent ends. All stay in the starter's process group and
ignore SIGINT, so what Ctrl-C does is up to the starter.
"""

import asyncio
import ctypes
import faulthandler
import gc
import importlib
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Final, NoReturn, Self

import msgspec
import tqdm  # type: ignore[import-untyped]

from netem.hosts import NamespaceError, enter_host, wait_for_link

_PR_SET_PDEATHSIG: Final = 1

_ENVIRONMENT: Final = {
    # A process with several threads cannot safely fork; and the devices share the machine's cores anyway.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # An arena for every thread would keep what it once needed, in each of hundreds of children.
    "MALLOC_ARENA_MAX": "1",
    # Logs are complete when a child is killed.
    "PYTHONUNBUFFERED": "1",
}

_FORKED_WELL: Final = {"jemalloc_bg_thd"}  # pyarrow's; jemalloc makes its thread anew in a child


class ForkServerError(Exception):
    """The fork server could not warm up, could not fork a child, or ended by itself."""


class Exit(msgspec.Struct, frozen=True, tag="exit"):
    """A child has ended."""

    name: str
    pid: int
    code: int
    """Its exit status, or minus the number of the signal that killed it."""


class _Warm(msgspec.Struct, frozen=True, tag="warm"):
    arguments: dict[str, Any]
    own_network: bool


class _Fork(msgspec.Struct, frozen=True, tag="fork"):
    name: str
    arguments: dict[str, Any]
    log: str


class _Stop(msgspec.Struct, frozen=True, tag="stop"):
    grace_s: float


class _Warmed(msgspec.Struct, frozen=True, tag="warmed"):
    refusal: str = ""


class _Forked(msgspec.Struct, frozen=True, tag="forked"):
    name: str
    pid: int
    refusal: str = ""


_commands: Final = msgspec.json.Decoder(_Warm | _Fork | _Stop)
_events: Final = msgspec.json.Decoder(_Warmed | _Forked | Exit)


def _line(message: msgspec.Struct) -> bytes:
    return msgspec.json.encode(message) + b"\n"


class ForkServer:
    """The runner's side: a warmed server while the `async with` block lasts.

    With `own_network`, each child is in a network namespace of its own and starts its `main` when
    `netem.hosts.Hub.attach` has given it a link. `log` takes what the server itself prints; `files` are
    open files of this process that the children have, too.

    The server is bound to the thread that enters the block and dies with it.
    """

    def __init__(
        self,
        module: str,
        *,
        warm: Mapping[str, Any],
        log: Path,
        own_network: bool = True,
        grace_s: float = 5.0,
        files: Sequence[int] = (),
    ) -> None:
        self._module = module
        self._warm = _Warm(arguments=dict(warm), own_network=own_network)
        self._log = log
        self._grace_s = grace_s
        self._files = tuple(files)
        self._living: set[str] = set()
        self._forking: dict[str, asyncio.Future[int]] = {}
        self._exits: asyncio.Queue[Exit | None] = asyncio.Queue()
        self._stopping = False

    async def __aenter__(self) -> Self:
        """Start the server and wait until it is warm. Raises `ForkServerError` when it fails."""
        ours, theirs = socket.socketpair()
        reader, self._writer = await asyncio.open_connection(sock=ours)
        try:
            with theirs, self._log.open("ab") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "experiments.forkserver", self._module),
                    stdin=theirs.fileno(),
                    stdout=log,
                    stderr=log,
                    env={**os.environ, **_ENVIRONMENT},
                    pass_fds=self._files,
                )
        except BaseException:
            self._writer.close()
            raise
        self._warmed = asyncio.get_running_loop().create_future()
        self._listener = asyncio.create_task(self._listen(reader))
        try:
            self._writer.write(_line(self._warm))
            await self._warmed
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid

    async def fork(self, name: str, arguments: Mapping[str, Any], *, log: Path) -> int:
        """Fork a child that runs the module's `main(arguments)`, and return its process id.

        `arguments` are what JSON can express. What the child prints is appended to `log`. Raises
        `ForkServerError` when a living child has this name, when the child cannot be set up, or when the
        server has ended.
        """
        if name in self._living:
            raise ForkServerError(f"a child named {name!r} is running already")
        if self._listener.done():
            raise ForkServerError(self._obituary())
        command = _line(_Fork(name=name, arguments=dict(arguments), log=str(log)))
        self._living.add(name)
        self._forking[name] = asyncio.get_running_loop().create_future()
        self._writer.write(command)
        return await self._forking[name]

    async def exits(self) -> AsyncIterator[Exit]:
        """Yield each child's end as it happens, until the server has been stopped. For one reader.

        Raises `ForkServerError` when the server ends by itself, which no child survives.
        """
        while (event := await self._exits.get()) is not None:
            yield event
        if not self._stopping:
            raise ForkServerError(self._obituary())

    async def stop(self) -> None:
        """End all children, by SIGTERM and after the grace period by SIGKILL, and the server."""
        self._stopping = True
        self._writer.write(_line(_Stop(grace_s=self._grace_s)))
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._grace_s + 5):
                    await self._process.wait()
        finally:
            await self._end()

    async def _end(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()  # its children go with it
        await self._listener
        self._writer.close()

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        with suppress(ConnectionError):
            while line := await reader.readline():
                self._take(_events.decode(line))
        await self._process.wait()
        for future in (self._warmed, *self._forking.values()):
            _fail(future, self._obituary())
        self._exits.put_nowait(None)

    def _take(self, event: _Warmed | _Forked | Exit) -> None:
        match event:
            case _Warmed(refusal=""):
                if not self._warmed.done():
                    self._warmed.set_result(None)
            case _Warmed(refusal=refusal):
                _fail(self._warmed, f"{self._module} could not be warmed up: {refusal} (see {self._log})")
            case _Forked(name=name, pid=pid, refusal=""):
                future = self._forking.pop(name)
                if not future.done():
                    future.set_result(pid)
            case _Forked(name=name, refusal=refusal):
                self._living.discard(name)
                _fail(self._forking.pop(name), f"{name} could not be started: {refusal}")
            case Exit(name=name):
                self._living.discard(name)
                self._exits.put_nowait(event)

    def _obituary(self) -> str:
        status = self._process.returncode
        return f"the fork server of {self._module} has ended with status {status} (see {self._log})"


def _fail(future: asyncio.Future[Any], sentence: str) -> None:
    if not future.done():
        future.set_exception(ForkServerError(sentence))


class _Server:
    """The server's side: one thread that forks, reaps, and reports to the runner."""

    def __init__(self, module_name: str, channel: socket.socket, signals: socket.socket, wakeup: socket.socket) -> None:
        self._module_name = module_name
        self._module = ModuleType("nothing")  # until told to warm up
        self._own_network = False
        self._channel = channel
        self._signals = signals
        self._wakeup = wakeup
        self._children: dict[int, str] = {}
        self._grace_s: float | None = None  # set when it is time to stop

    def run(self) -> None:
        """Serve until the runner says stop or is gone, or SIGTERM comes; then end all children."""
        self._wakeup.setblocking(False)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, lambda *_: None)  # what matters is the byte in the wake-up socket
        received = b""
        while self._grace_s is None:
            readable, _, _ = select.select([self._channel, self._signals], [], [])
            if self._signals in readable:
                self._reap()
            if self._channel in readable:
                data = self._receive()
                *lines, received = (received + data).split(b"\n")
                for line in lines:
                    self._obey(_commands.decode(line))
        self._stop(self._grace_s)

    def _receive(self) -> bytes:
        with suppress(ConnectionError):
            if data := self._channel.recv(65536):
                return data
        self._grace_s = 0.0  # nobody is left to serve
        return b""

    def _obey(self, command: _Warm | _Fork | _Stop) -> None:
        match command:
            case _Warm():
                self._send(_Warmed(refusal=self._warm(command)))
            case _Fork():
                self._send(self._fork(command))
            case _Stop(grace_s=grace_s):
                self._grace_s = grace_s

    def _warm(self, command: _Warm) -> str:
        """Import and warm the module; return what went wrong, if anything."""
        tqdm.tqdm.monitor_interval = 0  # else the first progress bar of a model library leaves a thread
        try:
            self._module = importlib.import_module(self._module_name)
            self._module.warm(command.arguments)
        except Exception as error:
            traceback.print_exc()
            return f"{type(error).__name__}: {error}"
        threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
        if others := sorted(name for name in threads[1:] if name not in _FORKED_WELL):
            known = ", ".join(thread.name for thread in threading.enumerate())
            return f"it leaves threads where a fork needs one alone: {', '.join(others)} (Python knows {known})"
        self._own_network = command.own_network
        gc.collect()
        gc.freeze()  # a collection in a child would touch, and so copy, every page of objects
        return ""

    def _fork(self, command: _Fork) -> _Forked:
        report, refusal = os.pipe()
        server = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            os.close(report)
            os.close(refusal)
            return _Forked(name=command.name, pid=0, refusal=f"fork: {error.strerror}")
        if pid == 0:
            os.close(report)
            self._be_child(command, server, refusal)
        os.close(refusal)
        with os.fdopen(report) as pipe:
            text = pipe.read()  # empty when the child is set up
        if text:
            os.waitpid(pid, 0)
        else:
            self._children[pid] = command.name
        return _Forked(name=command.name, pid=pid, refusal=text)

    def _be_child(self, command: _Fork, server: int, refusal: int) -> NoReturn:
        code = 1
        try:
            try:
                self._set_up_child(command, server)
            except (OSError, NamespaceError) as error:
                os.write(refusal, str(error).encode())
                os._exit(code)
            os.close(refusal)
            if self._own_network:
                wait_for_link()
            code = int(self._module.main(command.arguments) or 0)
        except SystemExit as leaving:
            if isinstance(leaving.code, str):
                print(leaving.code, file=sys.stderr)
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def _set_up_child(self, command: _Fork, server: int) -> None:
        _die_with_parent(server)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        for inherited in (self._channel, self._signals, self._wakeup):
            inherited.close()
        log = os.open(command.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        if self._own_network:
            enter_host()
        # The generators that all children would inherit in one state; `random` sees to its own.
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed()
        if torch := sys.modules.get("torch"):
            torch.seed()

    def _reap(self) -> None:
        if signal.SIGTERM in self._signals.recv(4096):
            self._grace_s = 0.0
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._bury(pid, status)

    def _bury(self, pid: int, status: int) -> None:
        if name := self._children.pop(pid, None):
            self._send(Exit(name=name, pid=pid, code=os.waitstatus_to_exitcode(status)))

    def _stop(self, grace_s: float) -> None:
        for pid in self._children:
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while self._children and (left := deadline - time.monotonic()) > 0:
            if select.select([self._signals], [], [], left)[0]:
                self._reap()
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)
        while self._children:
            self._bury(*os.waitpid(-1, 0))

    def _send(self, event: _Warmed | _Forked | Exit) -> None:
        with suppress(ConnectionError):  # the runner is gone, as the next read will tell
            self._channel.sendall(_line(event))


def _die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "the kernel refuses PR_SET_PDEATHSIG")
    if os.getppid() != parent:  # it ended before we asked
        os._exit(1)


def main() -> None:
    """Run a server for the module named by the first argument; its standard input is the runner's socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with_parent(os.getppid())  # a runner gone before this shows as a closed socket
    faulthandler.enable()
    channel = socket.socket(fileno=os.dup(0))
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
    signals, wakeup = socket.socketpair()
    with channel, signals, wakeup:
        _Server(sys.argv[1], channel, signals, wakeup).run()


if __name__ == "__main__":
    main()
