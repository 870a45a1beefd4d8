"""The engine: shared steps run once, every request gets the latent of its own route, weights are kept."""

import itertools
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from semct.compute import Cost, Native
from semct.cost import Backlog
from semct.diffusion import Conditioning, Denoiser
from semct.engine import Done, Engine, Job, backlog
from semct.routes import Route, Segment, steps_by_node

STEPS = 8


class Counting(Native):
    """The native pace, with a unit of time and energy per row, and the rows of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def step(
        self,
        denoiser: Denoiser,
        latents: Sequence[Tensor],
        at: Sequence[int],
        of: Sequence[int],
        conditionings: Sequence[Conditioning],
    ) -> tuple[list[Tensor], Cost]:
        self.calls.append(len(latents))
        rows = denoiser.step(latents, at, of, conditionings)
        return rows, Cost(float(len(rows)), float(len(rows)), float(len(rows)), overrun=False, modelled=True)


def segment(denoiser: Denoiser, prompt: str, start: int, stop: int) -> Segment:
    return Segment(node="edge", model=denoiser.name, prompt=prompt, start=start, stop=stop)


def job(denoiser: Denoiser, request: str, *spans: tuple[str, int], seed: int = 1, **more: object) -> Job:
    stops = [0, *itertools.accumulate(length for _, length in spans)]
    segments = tuple(
        segment(denoiser, prompt, a, b) for (prompt, _), (a, b) in zip(spans, itertools.pairwise(stops), strict=True)
    )
    return Job(request=request, seed=seed, steps=STEPS, segments=segments, **more)  # type: ignore[arg-type]


def finish(engine: Engine) -> list[Done]:
    done: list[Done] = []
    for _ in range(10_000):
        if engine.idle:
            return done
        done += engine.call()
    raise AssertionError("the engine never came to rest")


@settings(max_examples=15, deadline=None)
@given(
    routes=st.lists(
        st.tuples(st.sampled_from(["p", "q"]), st.integers(0, 4), st.integers(1, 4)), min_size=1, max_size=6
    ),
    rows=st.integers(1, 4),
)
def test_the_backlog_is_what_is_run_from_then_on(tiny: Denoiser, routes: list[tuple[str, int, int]], rows: int) -> None:
    engine = Engine({tiny.name: tiny}, Counting(), rows=rows)
    jobs = [
        job(tiny, f"r{i}", (public, x), (f"personal {i}", y), group=public) for i, (public, x, y) in enumerate(routes)
    ]
    jobs = [Job(**{**{f: getattr(j, f) for f in j.__struct_fields__}, "segments": _solid(j)}) for j in jobs]
    seen = [(0, backlog(jobs, {}))]
    for each in jobs:
        engine.submit(each)
    under_way = {j.request: j for j in jobs}
    while not engine.idle:
        for done in engine.call():
            del under_way[done.job.request]
        seen.append((engine.totals.rows, backlog(under_way.values(), engine.reached())))
    for rows_so_far, left in seen:
        assert sum(b.steps[tiny.name] for b in left) == engine.totals.rows - rows_so_far
    assert sum(b.requests for b in seen[0][1]) == len(jobs)
    assert seen[-1][1] == ()


def test_the_backlog_is_told_by_group(tiny: Denoiser) -> None:
    jobs = [
        job(tiny, "r1", ("public", 3), ("a cat", 2), group=1, weight=0.7),
        job(tiny, "r2", ("public", 4), ("a dog", 1), group=1, weight=0.7),
        job(tiny, "r3", ("a tree", 5), group=2, weight=0.3),
    ]
    assert backlog(jobs, {"r1": 3, "r2": 3, "r3": 4}) == (
        Backlog(steps={tiny.name: 1 + 2 + 1}, requests=2, weight=0.7),
        Backlog(steps={tiny.name: 1}, requests=1, weight=0.3),
    )


def test_a_shared_segment_runs_once_and_each_takes_its_split(tiny: Denoiser) -> None:
    pace = Counting()
    engine = Engine({tiny.name: tiny}, pace)
    for i, x in enumerate((2, 5, 5)):
        engine.submit(job(tiny, f"r{i}", ("a cat", x)))
    done = {d.job.request: d for d in finish(engine)}
    assert pace.calls == [1] * 5
    whole = [tiny.noise(1)]
    for k in range(5):
        whole = tiny.run(whole, k, k + 1, STEPS, ["a cat"])
        if k + 1 == 2:
            assert torch.equal(done["r0"].latent, whole[0])
    assert torch.equal(done["r1"].latent, whole[0])
    assert torch.equal(done["r2"].latent, whole[0])
    # Two steps shared by three, three by two: the parts add up to what was run.
    assert done["r0"].steps == pytest.approx(2 / 3)
    assert sum(d.steps for d in done.values()) == pytest.approx(5)
    assert engine.totals.rows == 5


@settings(max_examples=15, deadline=None)
@given(
    routes=st.lists(
        st.tuples(st.sampled_from(["p", "q"]), st.integers(0, 4), st.integers(0, 4), st.integers(0, 1)),
        min_size=1,
        max_size=6,
    ),
    rows=st.integers(1, 4),
    late=st.integers(0, 4),
)
def test_the_engine_runs_each_different_step_once(
    tiny: Denoiser, routes: list[tuple[str, int, int, int]], rows: int, late: int
) -> None:
    pace = Counting()
    engine = Engine({tiny.name: tiny}, pace, rows=rows)
    jobs = [
        job(tiny, f"r{i}", (public, x), (f"personal {i % 2}", y), seed=seed, group=public)
        for i, (public, x, y, seed) in enumerate(routes)
        if x + y > 0
    ]
    jobs = [Job(**{**{f: getattr(j, f) for f in j.__struct_fields__}, "segments": _solid(j)}) for j in jobs]
    done: list[Done] = []
    for i, each in enumerate(jobs):
        engine.submit(each)
        if i == late:
            done += engine.call()
    done += finish(engine)
    assert sorted(d.job.request for d in done) == sorted(j.request for j in jobs)
    for d in done:
        latent = [tiny.noise(d.job.seed)]
        for s in d.job.segments:
            latent = tiny.run(latent, s.start, s.stop, STEPS, [s.prompt])
        torch.testing.assert_close(d.latent, latent[0], rtol=1e-3, atol=1e-3)
    rest = [
        Route(
            request=j.request,
            seed=j.seed,
            steps=j.segments[-1].stop,
            segments=j.segments,
        )
        for j in jobs
    ]
    same = [Route(request=r.request, seed=r.seed, steps=r.steps, segments=r.segments) for r in rest]
    if len({r.steps for r in same}) == 1 and late >= len(jobs):
        assert sum(pace.calls) == steps_by_node(same).get("edge", 0)
    assert sum(d.steps for d in done) == pytest.approx(sum(pace.calls))
    assert sum(d.joules for d in done) == pytest.approx(engine.totals.joules)
    assert max(pace.calls, default=0) <= rows


def _solid(j: Job) -> tuple[Segment, ...]:
    return tuple(s for s in j.segments if s.start < s.stop)


def test_rows_of_different_clusters_and_steps_ride_together(tiny: Denoiser) -> None:
    pace = Counting()
    engine = Engine({tiny.name: tiny}, pace, rows=8)
    engine.submit(job(tiny, "a", ("a cat", 4), group="cats", weight=0.5))
    engine.call()
    engine.submit(job(tiny, "b", ("a dog", 4), group="dogs", weight=0.5))
    finish(engine)
    assert 2 in pace.calls


def test_clusters_get_rows_by_their_weights(tiny: Denoiser) -> None:
    order: list[str] = []

    class Watching(Counting):
        def step(
            self,
            denoiser: Denoiser,
            latents: Sequence[Tensor],
            at: Sequence[int],
            of: Sequence[int],
            conditionings: Sequence[Conditioning],
        ) -> tuple[list[Tensor], Cost]:
            order.extend("heavy" if c is denoiser.encode("heavy") else "light" for c in conditionings)
            return super().step(denoiser, latents, at, of, conditionings)

    engine = Engine({tiny.name: tiny}, Watching(), rows=2)
    for i in range(6):
        engine.submit(job(tiny, f"h{i}", ("heavy", STEPS), seed=i, group="h", weight=0.75))
        engine.submit(job(tiny, f"l{i}", ("light", STEPS), seed=i, group="l", weight=0.25))
    while order.count("heavy") < 30:
        engine.call()
    counts = Counter(order)
    assert counts["heavy"] / counts["light"] == pytest.approx(3, rel=0.2)
    finish(engine)


def test_a_latecomer_takes_the_latent_of_a_step_that_has_passed(tiny: Denoiser) -> None:
    engine = Engine({tiny.name: tiny}, Counting())
    engine.submit(job(tiny, "first", ("a cat", 6)))
    for _ in range(4):
        engine.call()
    engine.submit(job(tiny, "late", ("a cat", 2)))
    done = {d.job.request: d for d in finish(engine)}
    assert torch.equal(done["late"].latent, tiny.run([tiny.noise(1)], 0, 2, STEPS, ["a cat"])[0])
    assert done["late"].steps == 0
    assert engine.totals.rows == 6


def test_a_job_can_go_on_from_a_latent(tiny: Denoiser) -> None:
    engine = Engine({tiny.name: tiny}, Counting())
    (half,) = tiny.run([tiny.noise(9)], 0, 3, STEPS, ["a cat"])
    segments = (segment(tiny, "a cat", 3, STEPS),)
    engine.submit(Job(request="r", seed=9, steps=STEPS, segments=segments, latent=half))
    (done,) = finish(engine)
    assert torch.equal(done.latent, tiny.run([tiny.noise(9)], 0, STEPS, STEPS, ["a cat"])[0])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"segments": ()}, "no segments"),
        ({"weight": 0.0}, "must be above 0"),
        (
            {"segments": (Segment(node="edge", model="other", prompt="", start=0, stop=1),)},
            "wants model 'other'",
        ),
    ],
)
def test_impossible_jobs_are_refused(tiny: Denoiser, change: dict[str, object], sentence: str) -> None:
    good = job(tiny, "r", ("a cat", 2))
    bad = Job(**{**{f: getattr(good, f) for f in good.__struct_fields__}, **change})  # type: ignore[arg-type]
    engine = Engine({tiny.name: tiny}, Counting())
    with pytest.raises(ValueError, match=sentence):
        engine.submit(bad)
    assert engine.idle


def test_a_start_without_a_latent_is_refused(tiny: Denoiser) -> None:
    engine = Engine({tiny.name: tiny}, Counting())
    with pytest.raises(ValueError, match="without a latent"):
        engine.submit(Job(request="r", seed=0, steps=STEPS, segments=(segment(tiny, "p", 2, 4),)))


class Cramped(Counting):
    """A GPU whose memory holds so many rows."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def step(
        self,
        denoiser: Denoiser,
        latents: Sequence[Tensor],
        at: Sequence[int],
        of: Sequence[int],
        conditionings: Sequence[Conditioning],
    ) -> tuple[list[Tensor], Cost]:
        if len(latents) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().step(denoiser, latents, at, of, conditionings)


def test_where_memory_does_not_suffice_calls_get_smaller_and_the_latents_stay_the_same(tiny: Denoiser) -> None:
    pace = Cramped(3)
    engine = Engine({tiny.name: tiny}, pace, rows=8)
    for i in range(8):
        engine.submit(job(tiny, f"r{i}", ("a cat", 4), seed=i, group=i % 2))
    done = {d.job.request: d for d in finish(engine)}
    assert max(pace.calls) == 2
    assert engine.totals.shortages == 2  # 8 rows, 4 rows
    assert engine.totals.rows == 32
    for i in range(8):
        (alone,) = tiny.run([tiny.noise(i)], 0, 4, STEPS, ["a cat"])
        assert torch.allclose(done[f"r{i}"].latent, alone, atol=1e-5)


def test_what_does_not_fit_alone_is_refused_and_the_rest_goes_on(tiny: Denoiser) -> None:
    pace = Cramped(0)
    engine = Engine({tiny.name: tiny}, pace, rows=4)
    engine.submit(job(tiny, "r0", ("a cat", 2), ("a red cat", 2)))
    engine.submit(job(tiny, "r1", ("a cat", 2), ("a dog", 2)))
    assert finish(engine) == []
    refused = engine.refused()
    assert {r.job.request for r in refused} == {"r0", "r1"}
    assert all("memory does not suffice for a single row" in r.reason for r in refused)
    assert engine.refused() == []
    pace.most = 1
    engine.submit(job(tiny, "r0", ("a cat", 2)))
    assert [d.job.request for d in finish(engine)] == ["r0"]


def test_it_remembers_its_calls_until_it_is_asked_for_them(tiny: Denoiser) -> None:
    ticks = itertools.count()
    engine = Engine({tiny.name: tiny}, Counting(), rows=8, clock=lambda: float(next(ticks)))
    engine.submit(job(tiny, "a", ("p", 4), ("a", 4)))
    engine.submit(job(tiny, "b", ("p", 4), ("b", 2)))
    finish(engine)
    calls = engine.calls()
    assert [c.steps for c in calls] == [(0,), (1,), (2,), (3,), (4, 4), (5, 5), (6,), (7,)]
    assert all(a.start < a.stop < b.start for a, b in itertools.pairwise(calls))
    assert len(calls) == engine.totals.calls
    assert engine.calls() == []
