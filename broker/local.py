"""The broker that a local run starts and stops itself: Mosquitto where it is installed, else amqtt from pip.

Its main port asks for no password, so it listens on loopback and on the testbed's private addresses only.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import importlib.metadata
import importlib.util
import ipaddress
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import Literal, NoReturn, Self

import msgspec

Implementation = Literal["mosquitto", "amqtt"]

CERTIFICATE, KEY, PASSWORDS, RIGHTS = "broker.crt", "broker.key", "passwords", "rights"
"""The files of an authority (``broker.authority``) that a broker needs."""

_PLACES = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin")  # where PATH often does not lead
_START = 15.0  # seconds until it must accept connections; amqtt imports for a second on a busy machine
_STOP = 3.0  # seconds between SIGTERM and SIGKILL
_POLL = 0.02  # seconds
_PR_SET_PDEATHSIG = 1
_MOST_OUTSIDE = 64  # connections to a port for devices from outside

_libc = ctypes.CDLL(None, use_errno=True)


class BrokerFailed(RuntimeError):
    """The local broker could not be started, or ended while it was needed."""


class Listener(msgspec.Struct, frozen=True, kw_only=True):
    """One more port of Mosquitto's, for WebSockets perhaps.

    With the folder of an ``authority`` it is for devices from outside: it talks TLS, asks for a password, and lets
    everyone read and write their own topics only. Without, it is as open as the broker's main port.
    """

    port: int
    websockets: bool = False
    authority: Path | None = None

    def configuration(self, host: str) -> list[str]:
        """The lines that Mosquitto reads."""
        lines = [f"listener {self.port} {host}", f"protocol {'websockets' if self.websockets else 'mqtt'}"]
        if self.authority is None:
            return [*lines, "allow_anonymous true"]
        return [
            *lines,
            "allow_anonymous false",
            f"password_file {self.authority / PASSWORDS}",
            f"acl_file {self.authority / RIGHTS}",
            f"certfile {self.authority / CERTIFICATE}",
            f"keyfile {self.authority / KEY}",
            "use_username_as_clientid true",  # or one could end another's session by its name
            f"max_connections {_MOST_OUTSIDE}",
        ]


class LocalBroker:
    """A broker as a child process, for as long as ``async with`` lasts.

    It listens on ``port`` of each of ``hosts`` (IPv4 addresses of the network namespace that the caller is
    in) and writes ``broker.log`` to ``directory``. ``implementation`` says which broker it must be; by
    default it is Mosquitto where that is found. ``more`` are ports that only Mosquitto has. The broker dies with this
    process, whatever ends it.

    Entry raises ``BrokerFailed`` if it does not come up. If it ends later on its own, ``wait`` raises
    ``BrokerFailed`` at once, and leaving the context does. ``stop`` and ``start`` are a restart: Mosquitto comes back
    with the sessions and messages that it had, amqtt with none.
    """

    def __init__(
        self,
        *,
        hosts: Sequence[str],
        port: int,
        directory: Path,
        implementation: Implementation | None = None,
        more: Sequence[Listener] = (),
    ) -> None:
        self.hosts = tuple(hosts)
        self.port = port
        self.log = directory / "broker.log"
        self._asked = implementation
        self._more = tuple(more)
        self._process: asyncio.subprocess.Process
        self._back: asyncio.Event | None = None  # set when it is back; none while it is not away on purpose

    @property
    def implementation(self) -> Implementation:
        """Which broker this is, or will be."""
        return self._asked or ("mosquitto" if _mosquitto() else "amqtt")

    @property
    def version(self) -> str:
        """The name and version for the record, such as ``mosquitto 2.0.11``."""
        if self.implementation == "amqtt":
            return f"amqtt {importlib.metadata.version('amqtt')}"
        said = subprocess.run([_mosquitto() or "mosquitto", "-h"], capture_output=True, text=True, check=False)
        found = re.search(r"version (\S+)", said.stdout)
        return f"mosquitto {found[1] if found else 'of unknown version'}"

    async def __aenter__(self) -> Self:
        await self._launch()
        return self

    async def stop(self) -> None:
        """End it for a while, in order: it keeps what it can keep. ``start`` brings it back."""
        self._back = self._back or asyncio.Event()
        await self._end()

    async def start(self) -> None:
        """Bring it back after ``stop``; raises ``BrokerFailed``."""
        if self._back is not None:
            await self._launch()
            back, self._back = self._back, None
            back.set()

    async def _launch(self) -> None:
        self._check_addresses()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command, environment = self._command()
        parent = os.getpid()

        def die_with_parent() -> None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,
                start_new_session=True,  # Ctrl-C must not end it before the nodes have said good-bye
            )
        try:
            async with asyncio.timeout(_START):
                for host in self.hosts:
                    for port in (self.port, *(listener.port for listener in self._more)):
                        await self._accepting(host, port)
        except TimeoutError:
            await self._end()
            raise BrokerFailed(
                f"{self.implementation} did not accept connections on port {self.port} within {_START:g} s: "
                f"{self._last_line()}"
            ) from None
        except BaseException:
            await self._end()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        alive = self._process.returncode is None
        await self._end()
        self._database.unlink(missing_ok=True)  # the testbed is over
        if alive or self._back is not None:
            return
        if error is None:
            raise self._ended()
        error.add_note(str(self._ended()))

    async def wait(self) -> NoReturn:
        """Raise ``BrokerFailed`` when the broker ends; run it as a task beside what needs the broker."""
        while True:
            await self._process.wait()
            if self._back is None:
                raise self._ended()
            await self._back.wait()

    @property
    def _database(self) -> Path:
        return self.log.with_name("mosquitto.db")

    def _check_addresses(self) -> None:
        for host in self.hosts:
            try:
                address = ipaddress.IPv4Address(host)
            except ValueError:
                raise BrokerFailed(f"the local broker listens on IPv4 addresses, and {host!r} is none") from None
            if address.is_unspecified or not address.is_private:
                raise BrokerFailed(
                    f"the local broker asks for no password, so it may not listen on {host}: use a loopback "
                    "address or one of the testbed's own network"
                )
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((host, self.port))
                except OSError as error:
                    raise BrokerFailed(self._why_not_bound(host, error)) from error

    def _why_not_bound(self, host: str, error: OSError) -> str:
        match error.errno:
            case errno.EADDRINUSE:
                return f"port {self.port} on {host} is in use: end what listens there, or take another port"
            case errno.EADDRNOTAVAIL:
                return f"the broker cannot listen on {host}: it is no address of this network namespace"
            case _:
                return f"the broker cannot listen on port {self.port} of {host}: {error.strerror}"

    def _command(self) -> tuple[list[str], dict[str, str]]:
        if self.implementation == "mosquitto":
            binary = _mosquitto()
            if binary is None:
                raise BrokerFailed(
                    f"mosquitto is neither in PATH nor in {', '.join(_PLACES)}: install it, or ask for amqtt"
                )
            configuration = self.log.with_name("mosquitto.conf")
            configuration.write_text(self._mosquitto_configuration(), encoding="utf-8")
            return [binary, "-c", str(configuration)], dict(os.environ)
        if self._more:
            raise BrokerFailed(
                "amqtt knows no WebSockets, passwords and access rules, so it serves the testbed's own nodes only: "
                "install mosquitto"
            )
        if importlib.util.find_spec("amqtt") is None:
            raise BrokerFailed("neither mosquitto nor the Python package amqtt is installed: install one of them")
        hosts = [part for host in self.hosts for part in ("--host", host)]
        # The child must find this package wherever it was started from.
        path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
        return [sys.executable, "-m", "broker.fallback", *hosts, "--port", str(self.port)], environment

    def _mosquitto_configuration(self) -> str:
        common = resources.files("broker").joinpath("mosquitto", "common.conf").read_text(encoding="utf-8")
        listeners = [Listener(port=self.port), *self._more]
        lines = ["per_listener_settings true", common]
        # Written when it is stopped, read when it comes back; saving while it runs would hold up the latents.
        lines += ["persistence true", f"persistence_location {self._database.parent.resolve()}/", "autosave_interval 0"]
        lines += [line for host in self.hosts for listener in listeners for line in listener.configuration(host)]
        if os.geteuid() == 0:
            lines.append("user root")  # it would become the user mosquitto, which may not write our log
        return "\n".join(lines) + "\n"

    async def _accepting(self, host: str, port: int) -> None:
        while True:
            if self._process.returncode is not None:
                raise self._ended()
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(host, port)
                writer.close()
                return
            await asyncio.sleep(_POLL)

    async def _end(self) -> None:
        if self._process.returncode is not None:
            return
        self._process.terminate()
        try:
            async with asyncio.timeout(_STOP):
                await self._process.wait()
        except TimeoutError:
            pass
        finally:
            if self._process.returncode is None:
                self._process.kill()
                await self._process.wait()

    def _ended(self) -> BrokerFailed:
        code = self._process.returncode
        how = f"exit code {code}" if code is not None and code >= 0 else f"signal {-(code or 0)}"
        return BrokerFailed(f"{self.implementation} ended with {how}: {self._last_line()}")

    def _last_line(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return f"{lines[-1].strip()} ({self.log})" if lines else f"{self.log} is empty"


def _mosquitto() -> str | None:
    return shutil.which("mosquitto") or shutil.which("mosquitto", path=os.pathsep.join(_PLACES))
