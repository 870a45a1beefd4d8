"""A node's session with the broker, on aiomqtt.

What it adds to an MQTT client: presence (a retained birth, a will), typed messages checked at the door, an allowance
for each device that speaks, a bounded incoming queue, and reconnection that its user does not notice. The session lasts
at the broker while the node is away (it is no clean one): what is sent to it meanwhile waits there.

The queue is bounded by MQTT itself. aiomqtt would acknowledge a message before anyone has looked at it, and
keep or drop what is too much; here a message is acknowledged when its reader asks for the next one, and the
broker sends no more than its window (``max_inflight_messages``) ahead of that. So a slow node holds a window
of messages at most, the rest waits in the broker, and acknowledgements of its own messages still come in.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NoReturn, Self, cast

import aiomqtt
import msgspec
from aiomqtt.exceptions import MqttConnectError
from paho.mqtt import client as paho
from paho.mqtt.reasoncodes import ReasonCode

from broker.allowance import Allowance
from broker.credentials import Credentials
from broker.messages import MAX_PAYLOAD, AnyMessage, Birth, Enrol, MalformedMessage, decode, encode
from broker.topics import BY_DEVICES, CARRIES, SPEAKER, Topic, Topics

_KEEPALIVE = 20  # seconds; an outage of 10 s must not end a session, and a dead peer is noticed in 30
_HANDSHAKE = 5.0  # seconds that the broker may take for one answer while a connection opens
_ANNOUNCE = 2.0  # seconds that the broker may take to confirm a birth or a farewell
_BACKOFF = (0.05, 2.0)  # seconds before the first and the later attempts to reconnect
_LOG_EVERY = 5.0  # seconds between two lines on the same kind of dropped message
_INFLIGHT = 8  # own messages on their way; with more, a burst of latents costs 1.5 times the processor time
_REFUSALS = frozenset({132, 133, 134, 135})  # protocol, identifier, password, rights: final

_logger = logging.getLogger(__name__)
_paho_logger = logging.getLogger(f"{__name__}.paho")
_paho_logger.setLevel(logging.CRITICAL)  # what it has to say about lost connections is said here


class BrokerUnreachable(ConnectionError):
    """No broker answered at the address within the session's patience."""


class BrokerRefused(ConnectionError):
    """The broker answered and turned the session or one of its subscriptions down; trying again is no use."""


class Undelivered(ConnectionError):
    """The broker did not confirm a message in time. It may or may not have arrived."""


class Incoming(msgspec.Struct, frozen=True):
    """A message that passed the door. ``received`` is the epoch time it arrived at, ``size`` its bytes."""

    topic: Topic
    message: AnyMessage
    received: float
    size: int


@dataclass(frozen=True)
class _Connection:
    client: aiomqtt.Client
    lost: asyncio.Future[None]


@dataclass(frozen=True)
class _Delivery:
    incoming: Incoming
    connection: _Connection
    packet: int
    qos: int
    retained: bool

    def acknowledge(self) -> None:
        """Let the broker send another one, unless the connection that brought this one is gone."""
        if not self.connection.lost.done():
            # aiomqtt has no manual acknowledgement; paho, below it, does.
            self.connection.client._client.ack(self.packet, self.qos)


class _Dropped(Exception):
    """A message does not get through; ``speaker`` is given where each of them has a line of its own in the log."""

    def __init__(self, reason: str, detail: str, speaker: str = "") -> None:
        super().__init__(detail)
        self.reason = reason
        self.speaker = speaker


class Session:
    """One node's connection to the broker, held by ``async with`` and read by ``async for``, by one task.

    ``birth`` is published retained on entry (and after each reconnection), with ``state="gone"`` on orderly
    exit, ``"lost"`` when the body raised, and as the will; for a node without a place, it is its ``Enrol``.
    ``credentials`` are shown to the broker, over TLS. ``queue`` is the number of incoming messages held for the
    reader, more than twice the broker's window; what comes beyond it is dropped and counted, and of messages without an
    acknowledgement (QoS 0) what comes beyond half of it, so that they cannot cost those with one their place.
    ``patience`` is how many seconds entry waits for a broker, and how long ``publish`` keeps trying.

    ``dropped`` counts incoming messages that did not get through, by reason: ``malformed``, ``oversized``,
    ``misplaced`` (a topic that the tree does not know, or a message that does not belong there), ``flood`` (a
    device says more than its allowance), ``overflow``.
    ``connections`` counts the connections made, so that one less is the number of reconnections.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        testbed: str,
        name: str,
        birth: Birth | Enrol | None = None,
        subscriptions: Sequence[str] = (),
        credentials: Credentials | None = None,
        queue: int = 256,
        patience: float = 30.0,
    ) -> None:
        if birth is not None and birth.name != name:
            raise ValueError(f"the session of {name!r} cannot announce the birth of {birth.name!r}")
        self.topics = Topics(testbed)
        self.name = name
        self.dropped: Counter[str] = Counter()
        self.connections = 0
        self._host, self._port = host, port
        self._broker = f"the broker at {host}:{port}"
        self._credentials = credentials
        self._tls = credentials.tls() if credentials is not None else None
        self._birth = birth
        self._presence = self.topics.own(name, "enrol" if isinstance(birth, Enrol) else "birth")
        self._subscriptions = tuple(subscriptions)
        self._capacity = queue
        self._patience = patience
        self._trouble = "no answer"
        self._allowance = Allowance()
        self._logged: dict[tuple[str, str], float] = {}
        self._unacknowledged: _Delivery | None = None
        self._sending = asyncio.Semaphore(_INFLIGHT)
        self._farewell: Literal["gone", "lost"] = "gone"
        self._failure: Exception

    async def __aenter__(self) -> Self:
        """Connect, subscribe, announce; raises ``BrokerUnreachable`` or ``BrokerRefused``."""
        # Unbounded, since None marks the end in it; _accept keeps it within the capacity.
        self._inbox: asyncio.Queue[_Delivery | None] = asyncio.Queue()
        self._connection: asyncio.Future[_Connection] = asyncio.get_running_loop().create_future()
        self._keeper = asyncio.create_task(self._keep(), name=f"session of {self.name}")
        try:
            async with asyncio.timeout(self._patience):
                await asyncio.shield(self._connection)
        except TimeoutError:
            await self._stop()
            raise BrokerUnreachable(
                f"no MQTT broker answered at {self._host}:{self._port} within {self._patience:g} s "
                f"({self._trouble}); start it or correct the address"
            ) from None
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self._unacknowledged is not None:
            self._unacknowledged.acknowledge()
        if error is not None and not isinstance(error, asyncio.CancelledError):
            self._farewell = "lost"
        await self._stop()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Incoming:
        """The next message; asking for it acknowledges the one before. Raises ``BrokerRefused``.

        While the broker is away this waits.
        """
        if self._unacknowledged is not None:
            self._unacknowledged.acknowledge()
            self._unacknowledged = None
        delivery = await self._inbox.get()
        if delivery is None:
            self._inbox.put_nowait(None)  # for whoever asks again
            raise self._failure
        if delivery.retained:
            delivery.acknowledge()  # the broker keeps it anyway, and amqtt lets our messages wait for this
        else:
            self._unacknowledged = delivery
        return delivery.incoming

    async def publish(self, topic: str, message: AnyMessage, *, retain: bool = False) -> None:
        """Publish with QoS 1 and return when the broker has it.

        While the broker is away this waits, and sends again what was under way: a receiver may see a message
        twice. Raises ``Undelivered`` after the session's patience, ``BrokerRefused``, and
        ``MalformedMessage`` for a message over the size limit.
        """
        try:
            async with asyncio.timeout(self._patience), self._sending:
                payload = encode(message)
                while not await self._attempt(topic, payload, retain=retain):
                    pass
        except TimeoutError:
            state = "connected but silent" if self._connection.done() else f"away ({self._trouble})"
            raise Undelivered(f"{self._broker} is {state}: {topic} was not confirmed in {self._patience:g} s") from None

    def mention(self, topic: str, message: AnyMessage) -> None:
        """Publish with QoS 0, if the broker is there: for what is soon out of date and may be lost."""
        if self._connection.done() and not self._connection.cancelled() and self._connection.exception() is None:
            connection = self._connection.result()
            if not connection.lost.done():
                # aiomqtt would wait for room; paho, below it, takes it at once.
                connection.client._client.publish(topic, encode(message))

    async def _attempt(self, topic: str, payload: bytes, *, retain: bool) -> bool:
        """Whether the broker confirmed the payload before its connection was lost."""
        connection = await asyncio.shield(self._connection)
        sending = asyncio.ensure_future(
            connection.client.publish(topic, payload, qos=1, retain=retain, timeout=math.inf)
        )
        try:
            await asyncio.wait({sending, connection.lost}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                return False
            sending.result()
        except aiomqtt.MqttError:
            await connection.lost  # paho noticed before we did
            return False
        finally:
            sending.cancel()
        return True

    async def _announce(self, client: aiomqtt.Client, state: str) -> None:
        if self._birth is not None:
            birth = msgspec.structs.replace(self._birth, state=state)
            await client.publish(self._presence, encode(birth), qos=1, retain=True, timeout=_ANNOUNCE)

    async def _stop(self) -> None:
        self._keeper.cancel()
        await asyncio.wait({self._keeper})
        if not self._connection.done():
            self._connection.cancel()  # whoever still publishes

    async def _keep(self) -> None:
        """Keep connected until cancelled; what ends it otherwise is raised to reader and publishers."""
        try:
            await self._keep_connected()
        except Exception as error:
            self._failure = error
            self._connection.set_exception(error)
            self._connection.exception()  # marks it as seen: it is raised where someone waits, and only there
            self._inbox.put_nowait(None)

    async def _keep_connected(self) -> NoReturn:
        loop = asyncio.get_running_loop()
        shortest, longest = _BACKOFF
        wait = shortest
        while True:
            began = loop.time()
            try:
                async with self._connected() as connection:
                    await self._serve(connection)
            except MqttConnectError as error:
                if isinstance(error.rc, ReasonCode) and error.rc.value in _REFUSALS:
                    raise BrokerRefused(f"{self._broker} refused {self.name}: {error}") from error
                self._trouble = str(error)
            except aiomqtt.MqttError as error:
                self._trouble = str(error)
            # A connection that lasted starts the waiting over; one that is cut off at once does not. Jitter,
            # since all sessions lose a broker in the same instant.
            wait = shortest if loop.time() - began > longest else min(2 * wait, longest)
            await asyncio.sleep(wait * random.uniform(0.5, 1.0))  # noqa: S311

    async def _serve(self, connection: _Connection) -> None:
        """Take messages until the connection is lost."""
        self._connection.set_result(connection)
        self.connections += 1
        if self.connections > 1:
            _logger.info("%s is back at %s", self.name, self._broker)
        try:
            async for packet in connection.client.messages:
                self._accept(connection, packet)
        except aiomqtt.MqttError:
            self._trouble = "it closed the connection"
            _logger.warning("%s lost %s and reconnects", self.name, self._broker)
        finally:
            self._connection = asyncio.get_running_loop().create_future()
            connection.lost.set_result(None)

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[_Connection]:
        """A connection that has subscribed and announced the birth."""
        will = None
        if self._birth is not None:
            lost = encode(msgspec.structs.replace(self._birth, state="lost"))
            will = aiomqtt.Will(self._presence, lost, qos=1, retain=True)
        client = aiomqtt.Client(
            self._host,
            self._port,
            identifier=f"{self.topics.testbed}.{self.name}",
            username=None if self._credentials is None else self._credentials.name,
            password=None if self._credentials is None else self._credentials.password,
            tls_context=self._tls,
            will=will,
            clean_session=False,
            keepalive=_KEEPALIVE,
            timeout=min(_HANDSHAKE, self._patience),
            logger=_paho_logger,
            socket_options=((socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),),
        )
        client._client.manual_ack_set(True)
        client._client.on_socket_register_write = _writing(client)
        await self._open(client)
        try:
            if self._subscriptions:
                granted = await client.subscribe([(topic, 1) for topic in self._subscriptions])
                for topic, code in zip(self._subscriptions, cast("list[ReasonCode]", granted), strict=True):
                    if code.is_failure:
                        raise BrokerRefused(f"{self._broker} refused {self.name} the subscription to {topic}")
            await self._announce(client, "ready")
            if self._keeper.cancelling():
                # Before Python 3.12, wait_for loses a cancellation that comes together with the answer.
                raise asyncio.CancelledError
            yield _Connection(client, asyncio.get_running_loop().create_future())
        finally:
            with contextlib.suppress(aiomqtt.MqttError):  # raised at once if the connection is lost
                await self._announce(client, self._farewell)
                if self._farewell == "gone" and self._subscriptions:  # else the broker would keep what nobody fetches
                    await client.unsubscribe(list(self._subscriptions), timeout=_ANNOUNCE)
            with contextlib.suppress(aiomqtt.MqttError):
                await client.__aexit__(None, None, None)

    async def _open(self, client: aiomqtt.Client) -> None:
        opening = asyncio.ensure_future(client.__aenter__())
        try:
            await asyncio.shield(opening)
        except asyncio.CancelledError:
            # paho connects in a thread, which cannot be cancelled: wait, or a ghost stays behind.
            await asyncio.wait({opening})
            if opening.exception() is None:
                await client.__aexit__(None, None, None)
            else:
                client._client.disconnect()
            raise
        except aiomqtt.MqttError:
            client._client.disconnect()  # aiomqtt leaves the socket of a failed handshake open
            raise

    def _accept(self, connection: _Connection, packet: aiomqtt.Message) -> None:
        """Queue a message for the reader, or count it as dropped and acknowledge it."""
        try:
            incoming = self._check(packet)
            room = self._capacity if packet.qos else self._capacity // 2  # the rest is for what must not get lost
            if self._inbox.qsize() >= room:
                raise _Dropped("overflow", f"{room} messages wait for the reader already")
        except _Dropped as dropped:
            self._count(packet.topic.value, dropped)
            connection.client._client.ack(packet.mid, packet.qos)
        else:
            self._inbox.put_nowait(_Delivery(incoming, connection, packet.mid, packet.qos, packet.retain))

    def _check(self, packet: aiomqtt.Message) -> Incoming:
        """A message that may be read; raises ``_Dropped``. What is said too fast is not even decoded."""
        received = time.time()
        try:
            topic = Topic.parse(packet.topic.value)
        except ValueError as error:
            raise _Dropped("misplaced", str(error)) from error
        own = topic.node
        if topic.what in BY_DEVICES and not self._allowance.allows(own, time.monotonic()):
            limits = f"{self._allowance.rate:g} messages a second, {self._allowance.burst} at once"
            raise _Dropped("flood", f"{own} says more than {limits}", own)
        size = len(packet.payload)
        if size > MAX_PAYLOAD:
            raise _Dropped("oversized", f"{size} bytes are over the limit of {MAX_PAYLOAD}")
        try:
            message = decode(packet.payload)
        except MalformedMessage as error:
            raise _Dropped("malformed", str(error)) from error
        kind = type(message)
        if not isinstance(message, CARRIES[topic.what]) or getattr(message, SPEAKER.get(kind, ""), own) != own:
            raise _Dropped(
                "misplaced", f"a message of type {kind.__name__} does not belong there, or names another node"
            )
        return Incoming(topic, message, received, size)

    def _count(self, topic: str, dropped: _Dropped) -> None:
        reason = dropped.reason
        self.dropped[reason] += 1
        now, kind = time.monotonic(), (reason, dropped.speaker)
        if now - self._logged.get(kind, -math.inf) >= _LOG_EVERY:
            self._logged = {k: logged for k, logged in self._logged.items() if now - logged < _LOG_EVERY} | {kind: now}
            _logger.warning(
                "%s dropped a message on %s (%s, %d so far): %s",
                self.name,
                topic[:120],
                reason,
                self.dropped[reason],
                str(dropped)[:200],
            )


def _writing(client: aiomqtt.Client) -> Callable[[paho.Client, Any, Any], None]:
    """What aiomqtt does when paho has something to write, but not for a socket that was closed in the meantime.

    It would raise in the event loop, or write to whoever got the same file descriptor.
    """
    loop = asyncio.get_running_loop()

    def write() -> None:
        try:
            client._client.loop_write()
        except Exception as error:
            if not client._disconnected.done():
                client._disconnected.set_exception(error)

    def register(_: paho.Client, __: Any, sock: Any) -> None:
        def add() -> None:
            if sock.fileno() >= 0:
                loop.add_writer(sock.fileno(), write)

        loop.call_soon_threadsafe(add)  # paho may be in another thread while it connects

    return register
