import itertools
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from broker.local import Implementation, LocalBroker, _mosquitto

_testbeds = (f"t{number}" for number in itertools.count())


def _local(implementation: Implementation, port: int, directory: Path) -> LocalBroker:
    if implementation == "mosquitto" and _mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    return LocalBroker(hosts=["127.0.0.1"], port=port, directory=directory, implementation=implementation)


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def testbed() -> str:
    return next(_testbeds)


@pytest.fixture(params=["mosquitto", "amqtt"])
def local(request: pytest.FixtureRequest, port: int, tmp_path: Path) -> Callable[[], LocalBroker]:
    """Makes the broker under test, each of both in turn; called again, on the same port again."""
    return lambda: _local(request.param, port, tmp_path)


@pytest.fixture
def mosquitto(port: int, tmp_path: Path) -> Callable[[], LocalBroker]:
    """Like ``local``, for what only Mosquitto does."""
    return lambda: _local("mosquitto", port, tmp_path)


@pytest.fixture
async def broker(local: Callable[[], LocalBroker]) -> AsyncIterator[LocalBroker]:
    async with local() as broker:
        yield broker
