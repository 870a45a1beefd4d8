"""amqtt, the broker from pip, as a program: ``python -m broker.fallback --host 127.0.0.1 --port 1883``.

For machines without Mosquitto. It speaks MQTT 3.1.1, keeps no messages for absent clients, and knows no
access rules, so it stays on loopback or in the testbed's own namespaces. While a client has not acknowledged
a retained message, its own messages wait, for 5 s at most. It logs to standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import sys

from amqtt.adapters import StreamReaderAdapter, StreamWriterAdapter
from amqtt.broker import Broker
from amqtt.errors import BrokerError

from broker.messages import MAX_PAYLOAD

_MAX_PACKET = MAX_PAYLOAD + 1024  # room for the topic, as in Mosquitto's configuration


class _BoundedReader(StreamReaderAdapter):  # type: ignore[misc]
    """Refuses the body of a packet over the limit; amqtt itself would read up to 256 MiB of it."""

    async def read(self, n: int = -1) -> bytes:
        if n > _MAX_PACKET:
            raise ValueError(f"a packet of {n} bytes is over the limit of {_MAX_PACKET}: connection closed")
        return bytes(await super().read(n))


class _BoundedBroker(Broker):  # type: ignore[misc]
    async def stream_connected(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, listener_name: str
    ) -> None:
        # asyncio has set TCP_NODELAY on the socket.
        await self._client_connected(listener_name, _BoundedReader(reader), StreamWriterAdapter(writer))


async def _serve(hosts: list[str], port: int) -> None:
    names = ["default", *hosts[1:]]  # amqtt wants one listener of that name
    listeners = {name: {"type": "tcp", "bind": f"{host}:{port}"} for name, host in zip(names, hosts, strict=True)}
    plugins = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}
    broker = _BoundedBroker({"listeners": listeners, "plugins": plugins})
    await broker.start()
    await asyncio.Event().wait()  # until a signal: there is nothing to save


def main() -> None:
    """Serve until a signal; exit code 1 and one line on standard error if that fails."""
    parser = argparse.ArgumentParser(prog="python -m broker.fallback", description=__doc__)
    parser.add_argument("--host", action="append", required=True, help="an address to listen on; repeatable")
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with contextlib.suppress(KeyboardInterrupt):
        try:
            asyncio.run(_serve(arguments.host, arguments.port))
        except BrokerError as error:
            sys.exit(f"amqtt could not serve: {error}")


if __name__ == "__main__":
    main()
