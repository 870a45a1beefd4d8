"""Usual kinds of access: all complete, each with its source."""

import pytest

from netem.access import ACCESS


@pytest.mark.parametrize("name", ACCESS)
def test_access_limits_both_directions_and_says_whence(name: str) -> None:
    access = ACCESS[name]
    for state in (access.link.up, access.link.down):
        assert state.rate is not None
        assert state.delay > 0
        assert state.loss <= 0.01
    assert (access.link.up.rate or 0) <= (access.link.down.rate or 0)
    assert "Rate" in access.source
    assert "rounded choice" in access.source or "rounding" in access.source


def test_the_kinds_of_access_are_these() -> None:
    assert list(ACCESS) == [
        "5g-mid-band", "lte", "wifi-6-good", "wifi-6-poor", "bluetooth-pan", "leo-satellite", "ethernet",
    ]  # fmt: skip
