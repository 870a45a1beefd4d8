"""Independent PPO for the first tier, on batches drawn from the cost model.

As in the paper's system model [13]: an agent per user that decides on its own inputs, hidden layers of 3 x 128, Adam
at 5e-4, 500 episodes of 128 batches, advantages normalised and rewards scaled; all agents have the same parameters.
A plan is made in one decision, so an episode is one step of many batches at once: there is no time to bootstrap over,
and PPO comes down to its clipped loss, which is why no reinforcement learning library stands here.

The reward is the weighted utility, but for an agent the part of it that is its own doing: the utility of all users
with its split less that with all its steps on its device instead, the others' splits as it sees them (a difference
reward). Whoever raises that raises the utility of all; without it agents crowd the edge, since each feels but a small
part of the delay that it causes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from semct.cost import Floats, Ints, NodeState, Users, Weights
from semct.planner.learned import (
    SHARED,
    Field,
    Header,
    Policy,
    cost,
    most_shared,
    observe,
    others,
    own,
    personal,
    tower,
)
from semct.planner.splits import Costs, corners, price
from semct.planner.two_tier import solve
from semct.quality import QualityModel

STEPS = 28


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How to learn; the defaults are the paper's where it says.

    An episode plays ``scenes`` kinds of batches (their number of users and clusters, weights and edge drawn anew),
    ``batches`` of each, in so many ``rounds`` of decisions.
    """

    episodes: int = 200
    learning_rate: float = 5e-4
    minibatch: int = 512
    hidden: tuple[int, ...] = (128, 128, 128)
    scenes: int = 8
    batches: int = 16
    rounds: int = 4
    epochs: int = 4
    clip: float = 0.2
    entropy: float = 0.02
    seed: int = 0


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """A point of the learning curve: mean utility per user lost to the exact planner, and mean reward."""

    episode: int
    reward: float
    entropy: float
    gap: float | None = None


def draw(rng: np.random.Generator, qualities: Sequence[QualityModel], batches: int) -> Field:
    """So many batches of the same numbers of users and clusters, on one kind of edge, with the same weights."""
    users, clusters = int(rng.integers(4, 65)), int(rng.integers(1, 9))
    clusters = min(users, clusters) if rng.random() < 0.75 else users
    count = batches * users
    cluster = rng.integers(0, clusters, (batches, users))
    cluster[:, :clusters] = np.arange(clusters)  # none is empty
    near = rng.uniform(0.15, 0.85, (batches, clusters))
    similarity = np.clip(np.take_along_axis(near, cluster, 1) + rng.normal(0, 0.08, (batches, users)), 0.0, 1.0)
    flat = cluster + np.arange(batches)[:, None] * clusters
    longest = SHARED - 1 if clusters < users else 0
    edge = NodeState(
        step_seconds=float(np.exp(rng.uniform(np.log(0.004), np.log(0.3)))),
        step_joules=float(rng.uniform(5, 60)),
    )
    prices = price(
        _users(rng, count),
        similarity.ravel() if longest else np.ones(count),
        STEPS,
        longest,
        edge=edge,
        weights=_weights(rng),
        quality=qualities[int(rng.integers(len(qualities)))],
    )
    return Field(
        prices=prices,
        cluster=flat.ravel(),
        batch=np.repeat(np.arange(batches), clusters),
        step=np.full(batches, edge.full_seconds),
        owed=np.zeros(batches),
    )


def _users(rng: np.random.Generator, count: int) -> Users:
    """Devices from graphics cards to boards, all alike in one batch in three, at links from poor to good."""
    alike = rng.random() < 1 / 3
    seconds = np.exp(rng.uniform(np.log(0.15), np.log(0.9), 1 if alike else count)) * np.ones(count)
    watts = np.exp(rng.uniform(np.log(50), np.log(450), 1 if alike else count)) * np.ones(count)
    rate = np.exp(rng.uniform(np.log(2e6), np.log(3e8), count))
    return Users(
        step_seconds=seconds,
        step_joules=seconds * watts,
        decode_seconds=0.9 * seconds,
        decode_joules=0.9 * seconds * watts,
        up_rate=rate / 2,
        up_delay=np.full(count, 0.01),
        up_watts=np.full(count, 0.2),
        down_rate=rate,
        down_delay=np.full(count, 0.01),
        down_watts=np.full(count, 1.0),
        latent_bytes=524_288,
    )


def _weights(rng: np.random.Generator) -> Weights:
    quality, latency, energy = rng.dirichlet([4.0, 3.0, 3.0])
    return Weights(quality=float(quality), latency=float(latency), energy=float(energy))


def exact(field: Field) -> Floats:
    """What the exact planner's decisions cost each batch (batches,)."""
    own = field.prices.own()
    bends = corners(own)
    tables: list[list[Costs]] = [[] for _ in field.step]
    for number, batch in enumerate(field.batch.tolist()):
        members = np.flatnonzero(field.cluster == number)
        tables[batch].append(
            Costs(
                own=own[members],
                corners=bends[members],
                second=float(field.prices.second[members].sum()),
                step=float(field.step[batch]),
                joules=float(field.prices.edge[members].mean()),
            )
        )
    return np.array([solve(t, owed=owed).cost for t, owed in zip(tables, field.owed.tolist(), strict=True)])


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """Batches to judge a policy by, and what the exact planner's decisions cost each of them (batches,)."""

    field: Field
    least: Floats


def judge(rng: np.random.Generator, qualities: Sequence[QualityModel], scenes: int, batches: int) -> list[Judged]:
    """So many scenes of so many batches, drawn like those to learn on."""
    fields = [draw(rng, qualities, batches) for _ in range(scenes)]
    return [Judged(field=field, least=exact(field)) for field in fields]


def gap(policy: Policy, judged: Sequence[Judged]) -> float:
    """The share of the exact planner's mean utility that the policy's decisions miss, over all batches."""
    lost, best = 0.0, 0.0
    for each in judged:
        users = each.field.per_batch(each.field.per_cluster(np.ones(each.field.users)))
        found = cost(each.field, *policy.decide(each.field))
        lost += float(((found - each.least) / users).sum())
        best -= float((each.least / users).sum())
    return lost / best


def learn(
    qualities: Sequence[QualityModel],
    settings: Settings,
    *,
    judged: Sequence[Judged] = (),
    every: int = 25,
    told: Callable[[Progress], None] = lambda _: None,
) -> Policy:
    """Train a policy; every so many episodes its gap on the ``judged`` batches is ``told``."""
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    fields = [draw(rng, qualities, 4) for _ in range(64)]
    first = np.concatenate([observe(f, *_started(rng, f)) for f in fields])
    header = Header(observations=first.shape[1], hidden=settings.hidden, episodes=settings.episodes, seed=settings.seed)
    policy, critic = Policy(header), tower(first.shape[1], settings.hidden, 1)
    policy.mean.copy_(torch.from_numpy(first.mean(axis=0)))
    policy.std.copy_(torch.from_numpy(first.std(axis=0) + 1e-6))
    optimizer = torch.optim.Adam([*policy.parameters(), *critic.parameters()], lr=settings.learning_rate, eps=1e-5)
    for episode in range(1, settings.episodes + 1):
        left = 1 - (episode - 1) / settings.episodes
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * left
        fields = [draw(rng, qualities, settings.batches) for _ in range(settings.scenes)]
        played = _play(policy, fields, rng, settings.rounds)
        entropy = _update(policy, critic, optimizer, played, settings, entropy=settings.entropy * left)
        if episode % every == 0 or episode == settings.episodes:
            missed = gap(policy, judged) if judged else None
            told(Progress(episode=episode, reward=float(played.reward.mean()), entropy=entropy, gap=missed))
    return policy.eval()


class _Played(msgspec.Struct, frozen=True, kw_only=True):
    """What the agents of an episode saw, did and got; rewards are ``scaled`` to the spread of their scene's.

    Or else scenes with a crowded edge, where a step more costs everybody dearly, would drown all others.
    """

    observed: Tensor
    longest: Tensor
    shared: Tensor
    level: Tensor
    likelihood: Tensor
    reward: Tensor
    scaled: Tensor


@torch.no_grad()
def _play(policy: Policy, fields: Sequence[Field], rng: np.random.Generator, rounds: int) -> _Played:
    """In each round a random part of the agents acts on what the last rounds left."""
    parts: list[tuple[Tensor, ...]] = []
    for field in fields:
        longest = most_shared(field)
        x, y = _started(rng, field)
        turns: list[tuple[Tensor, ...]] = []
        for _ in range(rounds):
            acting = np.flatnonzero(rng.random(field.users) < 1 / rounds)
            if len(acting) == 0:
                continue
            seen = torch.from_numpy(observe(field, x, y)[acting])
            most = torch.from_numpy(longest[acting])
            shared, level = (torch.log_softmax(logits, dim=1) for logits in policy(seen, most))
            taken, k = (torch.multinomial(chances.exp(), 1)[:, 0] for chances in (shared, level))
            around = others(field, x, y)
            x, y = x.copy(), y.copy()
            x[acting] = taken.numpy()
            y[acting] = personal(k.numpy(), x[acting], field.prices.steps)
            nothing = np.zeros(field.users, dtype=np.int64)
            gain = own(field, nothing, nothing) - own(field, x, y) - around.waiting(x, y)
            likelihood = _of(shared, taken) + _of(level, k)
            turns.append((seen, most, taken, k, likelihood, torch.from_numpy(gain[acting]).float()))
        if turns:
            columns = [torch.cat(column) for column in zip(*turns, strict=True)]
            gained = columns[-1]
            parts.append((*columns, gained / (gained.std(correction=0) + 1e-6)))
    observed, most, shared, level, likelihood, reward, scaled = (torch.cat(c) for c in zip(*parts, strict=True))
    return _Played(
        observed=observed,
        longest=most,
        shared=shared,
        level=level,
        likelihood=likelihood,
        reward=reward,
        scaled=scaled,
    )


def _started(rng: np.random.Generator, field: Field) -> tuple[Ints, Ints]:
    """Decisions to start from: nobody on the edge, everybody sharing the most, or anything, each in a third."""
    nothing, longest = np.zeros(field.users, dtype=np.int64), most_shared(field)
    kind = rng.integers(3)
    if kind == 0:
        return nothing, nothing
    if kind == 1:
        return longest, nothing
    used = rng.random(field.users) < rng.random()
    x = np.where(used, rng.integers(0, longest + 1), 0)
    return x, np.where(used & (rng.random(field.users) < 0.5), field.prices.steps - x, 0)


def _update(
    policy: Policy,
    critic: nn.Module,
    optimizer: torch.optim.Optimizer,
    played: _Played,
    settings: Settings,
    *,
    entropy: float,
) -> float:
    """A few epochs of the clipped loss over the episode; returns the mean entropy of the actions."""
    reward = played.scaled
    with torch.no_grad():
        advantage = reward - critic((played.observed - policy.mean) / policy.std)[:, 0]
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    seen = []
    for rows in _minibatches(len(reward), settings):
        logits = policy(played.observed[rows], played.longest[rows])
        shared, level = (torch.log_softmax(part, dim=1) for part in logits)
        likelihood = _of(shared, played.shared[rows]) + _of(level, played.level[rows])
        ratio = torch.exp(likelihood - played.likelihood[rows])
        gain = advantage[rows]
        clipped = torch.clamp(ratio, 1 - settings.clip, 1 + settings.clip)
        spread = -(shared.exp() * shared).sum(dim=1).mean() - (level.exp() * level).sum(dim=1).mean()
        value = critic((played.observed[rows] - policy.mean) / policy.std)[:, 0]
        loss = -torch.min(ratio * gain, clipped * gain).mean() - entropy * spread
        loss = loss + 0.5 * (value - reward[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
        nn.utils.clip_grad_norm_(critic.parameters(), 0.5)
        optimizer.step()
        seen.append(float(spread.detach()))
    return float(np.mean(seen))


def _of(likelihoods: Tensor, actions: Tensor) -> Tensor:
    """The entry of each row that its action names."""
    return likelihoods.gather(1, actions[:, None])[:, 0]


def _minibatches(count: int, settings: Settings) -> Iterator[Tensor]:
    for _ in range(settings.epochs):
        yield from torch.split(torch.randperm(count), settings.minibatch)
