"""The conformance table for the kernel's netem. Needs root and a kernel that has it: `make test-kernel`."""

from collections.abc import Callable
from typing import ClassVar

import pytest

from tests.netem.conformance import Conformance, check_fifty

pytestmark = pytest.mark.kernel


class TestNetem(Conformance):
    links: ClassVar = "netem.kernel:NetemLinks"
    delay_within: ClassVar = 0.0006
    fifty_at_mbit: ClassVar = 1  # 4,500 packets/s: User Mode Linux has one processor and a costly timer


def test_fifty_links_with_large_packets(record_property: Callable[[str, object], None]) -> None:
    """The same number of packets, so that it fits on one processor too."""
    check_fifty("tests.kernel.variants:LargePackets", 4, record_property)
