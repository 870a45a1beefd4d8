"""What is asked of the service that shapes containers' links and breaks containers, and what it answers.

Messages go over a Unix socket. A connection that begins with ``Use`` is a runner's, and lasts; any other one is for a
single question.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Literal

import msgspec

from netem.choice import Wanted
from netem.control import Count, Counters, Done, Read, Refused, Request, Shape, State
from netem.link import Link
from netem.probe import Traffic

BROKER = "broker"
"""What the broker's container goes by, of which a testbed has one."""

_LONGEST = 2**16  # bytes of a message
_PATIENCE = 180.0  # seconds until the service must be there: containers start in any order
_AGAIN = 0.2  # seconds between two tries
_LENGTH = 4  # bytes before each message that say how long it is
_ENDED = "the links service has ended, and the links with it"


class LinksRefused(RuntimeError):
    """The service cannot do what was asked, or is not there: one sentence says why."""


class Use(msgspec.Struct, frozen=True, tag=True):
    """Before all else: shape links in this way, with chances from this seed. Links that there are go."""

    wanted: Wanted
    seed: int


class Using(msgspec.Struct, frozen=True, tag=True):
    """So links will be shaped."""

    implementation: str


class Pass(Request, frozen=True):
    """What has passed a container's interface?"""


class Passed(msgspec.Struct, frozen=True, tag=True):
    """Bytes so far."""

    up: int
    down: int


class Ping(Request, frozen=True):
    """How long does an echo to a container and back take?"""

    patience: float


class Took(msgspec.Struct, frozen=True, tag=True):
    """Seconds; none where no answer came in time."""

    seconds: float | None


Change = Literal["kill", "pause", "stop", "start", "resume"]
"""What is done to a container: it is killed, stands still, or ends in order; and what mends that."""


class Break(Request, frozen=True):
    """Break a container, or mend it again.

    The name ``broker`` is the broker's. What is not mended when its runner leaves is then.
    """

    what: Change


class Look(Request, frozen=True):
    """Does a container run, and how much memory does it have for itself?"""


class Seen(msgspec.Struct, frozen=True, tag=True):
    """One that stands still runs; ``memory`` is in bytes, none where the kernel does not count it."""

    runs: bool
    memory: int | None = None


Question = Use | Shape | Read | Count | Pass | Ping | Break | Look
Answer = Using | Done | Refused | State | Counters | Passed | Took | Seen

_encoder = msgspec.msgpack.Encoder(enc_hook=float)


def _quantity(kind: type[Any], value: Any) -> Any:
    return kind(value)


_questions: msgspec.msgpack.Decoder[Question] = msgspec.msgpack.Decoder(Question, dec_hook=_quantity)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer, dec_hook=_quantity)


async def read_question(reader: asyncio.StreamReader) -> Question:
    """The next question; raises ``IncompleteReadError`` at the end, ``DecodeError`` for anything else."""
    return _questions.decode(await _read(reader))


def write(writer: asyncio.StreamWriter, message: Question | Answer) -> None:
    """Send one message."""
    data = _encoder.encode(message)
    writer.write(len(data).to_bytes(_LENGTH, "big") + data)


async def _read(reader: asyncio.StreamReader) -> bytes:
    length = int.from_bytes(await reader.readexactly(_LENGTH), "big")
    if length > _LONGEST:
        raise msgspec.DecodeError(f"a message of {length} bytes is too long")
    return await reader.readexactly(length)


class LinksClient:
    """A connection to the service, whose links last as long as this does, as what it breaks stays broken no longer.

    Containers go by their names or ids.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._turn = asyncio.Lock()
        self._writer: asyncio.StreamWriter | None = None

    async def open(self, wanted: Wanted, seed: int) -> str:
        """Connect, as soon as the service is there; returns what will shape the links. Raises ``LinksRefused``."""
        trouble = ""
        try:
            async with asyncio.timeout(_PATIENCE):
                while self._writer is None:
                    try:
                        self._reader, self._writer = await asyncio.open_unix_connection(str(self._path))
                    except (FileNotFoundError, ConnectionRefusedError) as error:
                        trouble = str(error.strerror)
                        await asyncio.sleep(_AGAIN)
        except TimeoutError:
            said = f"the links service did not answer at {self._path} within {_PATIENCE:g} s: {trouble}"
            raise LinksRefused(said) from None
        except OSError as error:
            raise LinksRefused(f"the links service cannot be reached at {self._path}: {error.strerror}") from error
        using: Using = await self._ask(Use(wanted, seed), Using)
        return using.implementation

    async def close(self) -> None:
        """Leave; the service removes the links."""
        if self._writer is not None:
            self._writer.close()

    async def shape(self, container: str, link: Link) -> None:
        """Bring a container's link into a state; raises ``LinksRefused``."""
        await self._ask(Shape(container, link), Done)

    async def read(self, container: str) -> Link:
        """The state of a container's link; raises ``LinksRefused``."""
        state: State = await self._ask(Read(container), State)
        return state.link

    async def counters(self, container: str) -> Counters | None:
        """What has happened on a container's link, where that is counted; raises ``LinksRefused``."""
        answer = await self._ask(Count(container), Counters | Done)
        return answer if isinstance(answer, Counters) else None

    async def traffic(self, container: str) -> Traffic:
        """The bytes that have passed a container's interface; raises ``LinksRefused``."""
        answer = await self._ask(Pass(container), Passed)
        return Traffic(up=answer.up, down=answer.down)

    async def round_trip(self, container: str, patience: float) -> float | None:
        """Seconds of a ping to a container and back; raises ``LinksRefused``."""
        took: Took = await self._ask(Ping(container, patience), Took)
        return took.seconds

    async def kill(self, container: str) -> None:
        """End a container as a crash would, and return when it has ended; raises ``LinksRefused``."""
        await self._ask_apart(Break(container, "kill"), Done)

    async def pause(self, container: str) -> None:
        """Let a container stand still; raises ``LinksRefused``."""
        await self._ask_apart(Break(container, "pause"), Done)

    async def resume(self, container: str) -> None:
        """Let a container go on that stands still; raises ``LinksRefused``."""
        await self._ask_apart(Break(container, "resume"), Done)

    async def stop(self, container: str) -> None:
        """End a container in order; raises ``LinksRefused``."""
        await self._ask_apart(Break(container, "stop"), Done)

    async def start(self, container: str) -> None:
        """Start a container that has ended, with a link that lets everything pass; raises ``LinksRefused``."""
        await self._ask_apart(Break(container, "start"), Done)

    async def look(self, container: str) -> Seen:
        """Whether a container runs, which one that is not there does not; raises ``LinksRefused``."""
        seen: Seen = await self._ask_apart(Look(container), Seen)
        return seen

    async def _ask(self, question: Question, expected: Any) -> Any:
        assert self._writer is not None, "the client is not open"  # noqa: S101
        async with self._turn:
            return await _exchange(question, expected, self._reader, self._writer)

    async def _ask_apart(self, question: Question, expected: Any) -> Any:
        """Ask by a connection of its own, so that links need not wait for what takes long."""
        try:
            reader, writer = await asyncio.open_unix_connection(str(self._path))
        except OSError as error:
            raise LinksRefused(_ENDED) from error
        try:
            return await _exchange(question, expected, reader, writer)
        finally:
            writer.close()


async def _exchange(
    question: Question, expected: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> Any:
    try:
        write(writer, question)
        answer = _answers.decode(await _read(reader))
    except (OSError, EOFError, msgspec.DecodeError) as error:
        raise LinksRefused(_ENDED) from error
    if isinstance(answer, Refused):
        raise LinksRefused(answer.why)
    if not isinstance(answer, expected):
        raise LinksRefused(f"the links service answered {answer}")
    return answer
