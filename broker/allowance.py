"""How much one node may say: so many messages a second in the long run, more of them in a burst."""

from __future__ import annotations

from collections import OrderedDict

RATE = 200.0
"""Messages a second that a session hears of one device, in the long run.

A device reports ten times a second and says fewer than ten things for a request: it would have to finish 19 requests
a second to come near.
"""

BURST = 1000
"""Messages of one device at once: four times what a watched device has to say after an outage of 20 s."""

_REMEMBERED = 1024  # speakers; a testbed has fewer, and where passwords are asked for nobody can make names up


class Allowance:
    """A token bucket for each speaker, of whom the latest ``remembered`` are known.

    ``rate`` is in messages a second, ``burst`` what a full bucket holds.
    """

    def __init__(self, *, rate: float = RATE, burst: int = BURST, remembered: int = _REMEMBERED) -> None:
        self.rate = rate
        self.burst = burst
        self._remembered = remembered
        self._missing: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        """How many speakers are remembered."""
        return len(self._missing)

    def allows(self, speaker: str, now: float) -> bool:
        """Whether one more message of the speaker may pass at ``now`` (seconds of a clock that never goes back).

        What may not pass costs the speaker nothing.
        """
        missing, since = self._missing.pop(speaker, (0.0, now))
        missing = max(0.0, missing - (now - since) * self.rate)
        passes = missing + 1 <= self.burst
        self._missing[speaker] = (missing + passes, now)
        if len(self._missing) > self._remembered:
            self._missing.popitem(last=False)
        return passes
