"""Serving: tasks end with their node, and what the bus brings twice counts once."""

import asyncio

import pytest

from broker.messages import Segment, Work
from node.serving import Deliveries, tasks_until_end


async def test_tasks_are_cancelled_when_the_body_ends() -> None:
    ended = []

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")

    async with asyncio.timeout(5), tasks_until_end() as tasks:
        tasks.create_task(endless())
        await asyncio.sleep(0)
    assert ended == ["cancelled"]


async def test_a_failing_task_ends_the_body() -> None:
    async def failing() -> None:
        raise RuntimeError("broken")

    async def serving() -> None:
        async with asyncio.timeout(5), tasks_until_end() as tasks:
            tasks.create_task(failing())
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as raised:
        await serving()
    assert raised.group_contains(RuntimeError, match="broken")


async def test_the_bodys_own_error_comes_through() -> None:
    with pytest.raises(ExceptionGroup) as raised:
        async with tasks_until_end():
            raise KeyError("mine")
    assert raised.group_contains(KeyError)


def work(**change: object) -> Work:
    fields = {"round": "r", "request": "q", "reply": "d", "seed": 0, "steps": 8, "route": (), "sent": 0, "deadline": 0}
    return Work(**{**fields, **change})  # type: ignore[arg-type]


def test_work_comes_first_once_at_each_step_of_its_route() -> None:
    seen = Deliveries()
    leg = Segment(node="d", model="m", prompt="p", start=3, stop=8)
    assert seen.is_first_work(work(route=(leg,)))
    assert not seen.is_first_work(work(route=(leg,), sent=5))
    assert seen.is_first_work(work())  # the end of the route
    assert not seen.is_first_work(work())
    assert seen.is_first_work(work(round="another"))
    assert seen.is_first_work(work(request="another"))


def test_only_the_latest_are_remembered() -> None:
    seen = Deliveries(kept=3)
    assert all(seen.is_first(n) for n in range(4))
    assert not seen.is_first(3)
    assert seen.is_first(0)
