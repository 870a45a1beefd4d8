"""Requests that come one by one, in virtual time: windows do not bury the edge under what they plan for it."""

import random
from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest

from benchmarks.sharing import Cell, cell_batch, prompt_groups
from semct.cost import Weights, device_only, utility
from semct.planner.learned import load_policy
from semct.prompts import load_sentence_encoder
from semct.public_prompt import MedoidWriter

USERS = 80
EVERY = [prompt for prompts in prompt_groups().values() for prompt in prompts]


def mean_utility(framework: str, *, rate: float, window: float, learned: bool = False) -> float:
    """Of users of the emulated cell who ask at random."""
    encoder, chance = load_sentence_encoder(), random.Random(1)
    batch = cell_batch(encoder, MedoidWriter(encoder), [chance.choice(EVERY) for _ in range(USERS)], 0.4)
    batch = replace(
        batch,
        weights=Weights(quality=0.4, latency=0.3, energy=0.3),
        policy=load_policy("learned" if learned else "exact"),
    )
    times = list(accumulate(chance.expovariate(rate) for _ in range(USERS)))
    _, outcomes = Cell(batch, framework, window).play(times)
    references = [device_only(batch.network, r.device, r.steps, batch.alone) for r in batch.requests]
    return float(np.mean([utility(o, r, batch.weights) for o, r in zip(outcomes, references, strict=True)]))


@pytest.mark.parametrize(
    ("framework", "learned"),
    [("semct", False), ("semct", True), ("hybrid", False), ("edge-device", False), ("semct-tree", False)],
)
def test_in_short_windows_sharing_does_not_fall_behind_no_sharing(framework: str, learned: bool) -> None:
    alone = mean_utility("device-only", rate=2, window=0.0)
    assert mean_utility(framework, rate=2, window=1.0, learned=learned) > alone
