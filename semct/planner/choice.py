"""Choices that requests make one by one: each takes the option of greatest utility by its own reckoning."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from semct.cost import Floats, Ints, Network, Users, Weights
from semct.routes import Request


def best_options(
    requests: Sequence[Request],
    *,
    quality: Floats,
    seconds: ArrayLike,
    joules: ArrayLike,
    alone: float,
    network: Network,
    weights: Weights,
) -> Ints:
    """The index of each request's best option, (requests,); of equals, the first.

    ``quality`` (options,) is what every option gives, ``seconds`` and ``joules`` (options,) or (requests, options)
    what it takes from the arrival of the request to the finished latent on the device. What all options have in
    common may be left out. ``alone`` is the quality of the reference, device-only inference.
    """
    users = Users.of(network, [r.device for r in requests])
    reference = users.alone(np.array([r.steps for r in requests]), np.full(len(requests), alone))
    energy = reference.energy[:, None]
    spent = np.broadcast_to(joules, (len(requests), len(quality)))
    burden = np.divide(spent, energy, out=np.zeros_like(spent, dtype=np.float64), where=energy > 0)
    gain = weights.quality * quality / alone - weights.latency * np.asarray(seconds) / reference.latency[:, None]
    return np.asarray((gain - weights.energy * burden).argmax(axis=1), dtype=np.int64)
