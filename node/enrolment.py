"""How a node comes to its place without a settings file: it enrols with the runner and is assigned one."""

from __future__ import annotations

import argparse
import asyncio
import logging
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from broker.address import Address, BadAddress
from broker.credentials import BadCredentials, load_credentials
from broker.messages import Assign, Close, Enrol
from broker.session import BrokerRefused, BrokerUnreachable, Session
from broker.topics import Topics
from node.metrics import parse_listener
from node.settings import Settings, read_settings, start_logging

TESTBED = "local"
"""The testbed that a node joins unless told otherwise."""

_logger = logging.getLogger(__name__)


class Door(msgspec.Struct, frozen=True, kw_only=True):
    """Where and as what a node enrols: the broker, the testbed, its part, and the only place that will do, if any.

    ``credentials`` is the file with what the broker asks for, if it does; ``metrics`` is where Prometheus may ask.
    """

    address: Address
    role: Literal["edge", "device"]
    testbed: str = TESTBED
    wants: str | None = None
    credentials: str = ""
    metrics: str = ""

    @property
    def name(self) -> str:
        """What the node is called until it has a place: as it wants to be, or after its machine."""
        return self.wants or provisional_name(socket.gethostname())


def make_door(
    broker: str, role: Literal["edge", "device"], testbed: str, wants: str | None, *, credentials: str, metrics: str
) -> Door:
    """The door at a broker's address; raises ``BadAddress``, also where credentials and TLS do not go together."""
    if metrics:
        parse_listener(metrics)
    address = Address.parse(broker)
    if address.tls != bool(credentials):
        raise BadAddress(
            f"{broker} is without TLS, and credentials only go over TLS: write mqtts://"
            if credentials
            else f"{broker} asks for TLS: name the file of credentials that `semct enroll` made for this node"
        )
    return Door(address=address, role=role, testbed=testbed, wants=wants, credentials=credentials, metrics=metrics)


def provisional_name(host: str) -> str:
    """A node's name made of a machine's: in a container, where that is its short id, the same."""
    return re.sub(r"[^a-z0-9-]", "-", host.lower().split(".")[0]).strip("-")[:32] or "node"


async def enrol(door: Door, *, left: str | None = None) -> Assign | None:
    """Wait for a place, in a run other than ``left``; none when the testbed ends.

    Raises ``BrokerUnreachable``, ``BrokerRefused`` and ``BadCredentials``.
    """
    topics = Topics(door.testbed)
    wish = Enrol(name=door.name, role=door.role, state="ready", wants=door.wants, left=left, host=socket.gethostname())
    async with Session(
        door.address.host,
        door.address.port,
        testbed=door.testbed,
        name=door.name,
        birth=wish,
        subscriptions=[topics.inbox(door.name, "control")],
        credentials=load_credentials(Path(door.credentials)) if door.credentials else None,
    ) as session:
        _logger.info("%s waits for a place at %s:%d", door.name, door.address.host, door.address.port)
        async for incoming in session:
            match incoming.message:
                case Assign() as assign if assign.run != left:  # else it came twice, and late
                    return assign
                case Close(round=None, ends=True):
                    return None
    raise AssertionError("a session does not end by itself")


async def _enrol_at_last(door: Door, left: str | None) -> Assign | None:
    """Enrol as soon as there is a broker: a node may be there before its testbed, and wait for the next."""
    while True:
        try:
            return await enrol(door, left=left)
        except BrokerUnreachable as error:
            _logger.warning("%s; trying again", error)


def serve_enrolled(kind: type[Settings], serve: Callable[[Settings], bool], door: Door) -> None:
    """Enrol, serve in the place that was assigned, and again for the next run, until the testbed ends.

    ``serve`` tells whether it does. Raises what ``serve`` raises, ``BrokerRefused`` and ``BadCredentials``.
    """
    left = None
    while (assign := asyncio.run(_enrol_at_last(door, left))) is not None:
        try:
            settings = msgspec.msgpack.decode(assign.settings, type=kind)
        except msgspec.DecodeError as error:
            _logger.error("the place that the runner assigned is not right: %s", error)
            left = assign.run
            continue
        here = msgspec.structs.replace(
            settings,
            host=door.address.host,
            port=door.address.port,
            credentials=door.credentials,
            metrics=door.metrics,
        )
        _logger.info("%s is %s from now on", door.name, here.name)
        if serve(here):
            return
        left = assign.run


def start(
    kind: type[Settings],
    serve: Callable[[Settings], bool],
    role: Literal["edge", "device"],
    *,
    prepare: Callable[[], None] = lambda: None,
    unfit: tuple[type[Exception], ...],
) -> int:
    """A node program's command line: a settings file, or a broker at which to enrol. Returns the exit status.

    ``prepare`` loads what serving needs in any place. ``unfit`` is what the two raise, in one sentence, where this
    machine lacks what the settings ask for.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {role}_node", description=f"One {role} of a testbed.")
    parser.add_argument("settings", nargs="?", help="a settings file (JSON); without one, the runner assigns a place")
    parser.add_argument("--broker", help="where to enrol: HOST, HOST:PORT or mqtt://HOST:PORT")
    parser.add_argument("--name", help="the only place of the scenario that will do; by default the next free one")
    parser.add_argument("--testbed", default=TESTBED, help=f"the testbed's name on the broker, by default {TESTBED}")
    parser.add_argument("--credentials", default="", help="what to show a broker with TLS: a file by semct enroll")
    parser.add_argument("--metrics", default="", help="where Prometheus may ask: PORT (on loopback) or HOST:PORT")
    arguments = parser.parse_args()
    if (arguments.settings is None) == (arguments.broker is None):
        parser.error("give either a settings file or --broker")
    start_logging()
    said: tuple[type[Exception], ...] = (BadAddress, BadCredentials, BrokerRefused, BrokerUnreachable, *unfit)
    try:
        if arguments.settings is not None:
            serve(read_settings(kind, arguments.settings))
            return 0
        door = make_door(
            arguments.broker,
            role,
            arguments.testbed,
            arguments.name or None,
            credentials=arguments.credentials,
            metrics=arguments.metrics,
        )
        prepare()
        serve_enrolled(kind, serve, door)
    except said as error:
        sys.exit(str(error))
    return 0
