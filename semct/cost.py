"""What a plan costs: service latency, energy and network utility of each request.

Notation as in the paper: of T denoising steps a request shares x on the edge, runs y personal ones there and
z = T - x - y on its device. Seconds, joules, bits per second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec


class NodeState(msgspec.Struct, frozen=True, kw_only=True):
    """What one row's denoising step and one decode take on a node, alone: seconds and joules."""

    step_seconds: float
    step_joules: float
    decode_seconds: float = 0.0
    decode_joules: float = 0.0


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """What a device's wireless link gives in one direction; an infinite rate means that nothing shapes it.

    ``watts`` is the sender's transmission power.
    """

    rate: float = math.inf
    delay: float = 0.0
    watts: float = 0.0

    def __post_init__(self) -> None:
        if not (self.rate > 0 and self.delay >= 0 and self.watts >= 0):
            raise ValueError(
                f"a link's rate must be above 0, its delay and watts at least 0; these are "
                f"{self.rate}, {self.delay} and {self.watts}"
            )

    def seconds(self, size: int) -> float:
        """Time until ``size`` bytes are over."""
        return self.delay + self.airtime(size)

    def airtime(self, size: int) -> float:
        """Time for which the sender transmits ``size`` bytes."""
        return 8 * size / self.rate

    def joules(self, size: int) -> float:
        """Energy that transmitting ``size`` bytes takes."""
        return self.watts * self.airtime(size)


class Network(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the network that a framework plans on: nodes by name, devices' links in both directions.

    ``latent_bytes`` and ``request_bytes`` are the sizes of an intermediate result and of a request on the wire.
    """

    edge: str
    nodes: Mapping[str, NodeState]
    uplinks: Mapping[str, Link]
    downlinks: Mapping[str, Link]
    latent_bytes: int
    request_bytes: int = 400


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """How much quality, latency and energy count in the utility; they sum to 1."""

    quality: float = 1 / 3
    latency: float = 1 / 3
    energy: float = 1 / 3

    def __post_init__(self) -> None:
        parts = (self.quality, self.latency, self.energy)
        if min(parts) < 0 or not math.isclose(sum(parts), 1.0, abs_tol=1e-6):
            raise ValueError(f"utility weights must be at least 0 and sum to 1, these are {parts}")


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a request got: content quality, service latency in seconds, energy in joules."""

    quality: float
    latency: float
    energy: float


def utility(outcome: Outcome, reference: Outcome, weights: Weights) -> float:
    """Network utility of one request against the same user's device-only inference.

    w_q Q / Q_ref + w_t (1 - T / T_ref) + w_e (1 - E / E_ref). Device-only itself scores w_q. An energy that
    the reference does not have (native nodes without a meter) counts as unchanged.
    """
    energy = 1 - outcome.energy / reference.energy if reference.energy > 0 else 0.0
    return (
        weights.quality * outcome.quality / reference.quality
        + weights.latency * (1 - outcome.latency / reference.latency)
        + weights.energy * energy
    )


def device_only(network: Network, device: str, steps: int, quality: float) -> Outcome:
    """The reference of a device: all steps on itself, nothing sent."""
    node = network.nodes[device]
    return Outcome(
        quality=quality,
        latency=steps * node.step_seconds + node.decode_seconds,
        energy=steps * node.step_joules + node.decode_joules,
    )
