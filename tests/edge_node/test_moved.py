"""What a plan gives to devices that hold no model is done by the edge, step for step the same."""

from edge_node.planning import moved
from semct.routes import Plan, Route, Segment


def route(request: str, *parts: tuple[str, int, int]) -> Route:
    segments = tuple(Segment(node=n, model="m", prompt="a cat", start=a, stop=b) for n, a, b in parts)
    return Route(request=request, seed=1, steps=10, segments=segments)


def test_only_the_part_of_a_device_without_a_model_moves() -> None:
    routes = (route("r1", ("edge", 0, 4), ("phone", 4, 10)), route("r2", ("edge", 0, 4), ("d1", 4, 10)))
    plan = Plan(clusters=(), routes=routes)
    thin = moved(plan, {"phone"}, "edge")
    assert thin.routes == (route("r1", ("edge", 0, 4), ("edge", 4, 10)), plan.routes[1])
    assert moved(plan, {"other"}, "edge") is plan
