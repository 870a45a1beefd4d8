"""Both implementations of links on the same kernel: the same TCP over them has to reach the same."""

import statistics
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.netem.conformance import ROOT, play, settled

pytestmark = pytest.mark.kernel

LINKS = {"kernel": "netem.kernel:NetemLinks", "userspace": "netem.userspace:UserspaceLinks"}
DEVICES, SECONDS = 4, 30
"""At 1 % loss a link loses some 2 packets a second, so about 250 in all: enough for 6 % of goodput."""


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """The first start of the userspace links would compile while the measurement waits."""
    subprocess.run([sys.executable, "-m", "netem.scheduler"], cwd=ROOT, check=True)


def test_same_tcp(record_property: Callable[[str, object], None]) -> None:
    """Cubic at 20 Mbit/s with 50 ms there and none back, and 1 % loss of what is sent."""
    link = {"down": {"rate": "20mbit", "delay": "50ms", "loss": "1%"}, "up": {"rate": "20mbit"}}

    def ratio() -> float:
        goodputs = {
            name: statistics.fmean(
                play(links, "goodput", direction="down", link=link, devices=DEVICES, settle=5, seconds=SECONDS)
            )
            for name, links in LINKS.items()
        }
        record_property("mbit", {name: round(goodput / 1e6, 2) for name, goodput in goodputs.items()})
        return goodputs["userspace"] / goodputs["kernel"]

    measured = settled(3, ratio, lambda ratio: 0.8 <= ratio <= 1.25)
    record_property("userspace_to_kernel", round(measured, 3))
    assert 0.8 <= measured <= 1.25
