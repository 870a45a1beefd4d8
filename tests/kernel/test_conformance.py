"""The conformance table for the kernel's netem. Needs root and a kernel that has it: `make test-kernel`."""

from typing import ClassVar

import pytest

from tests.netem.conformance import Conformance

pytestmark = pytest.mark.kernel


class TestNetem(Conformance):
    links: ClassVar = "netem.kernel:NetemLinks"
    delay_within: ClassVar = 0.0006
