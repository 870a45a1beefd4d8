from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.topics import CARRIES, Own, Topic, Topics

names = st.from_regex(r"[a-z0-9][a-z0-9-]{0,31}", fullmatch=True)


@given(names, names, names)
def test_every_topic_parses_back(testbed: str, node: str, other: str) -> None:
    topics = Topics(testbed)
    for what in get_args(Own):
        assert Topic.parse(topics.own(node, what)) == Topic(testbed, node, what)
    for what in ("work", "control"):
        assert Topic.parse(topics.inbox(node, what)) == Topic(testbed, node, what)
    assert Topic.parse(topics.forward(node, other)) == Topic(testbed, node, "forward", to=other)
    assert Topic.parse(topics.view(node, other)) == Topic(testbed, node, "view", part=other)


@given(st.text() | st.from_regex(r"semct/[a-z+#]*/[a-zA-Z-]*/(birth|work|forward|view)(/[a-z]*)?"))
def test_what_is_outside_the_tree_is_refused(text: str) -> None:
    try:
        topic = Topic.parse(text)
    except ValueError:
        return
    rebuilt = f"semct/{topic.testbed}/{topic.node}/{topic.what}"
    assert text == "/".join([rebuilt, *filter(None, [topic.to, topic.part])])


@pytest.mark.parametrize("name", ["", "A", "a/b", "+", "#", "-a", "a" * 33, "a\n", "ä"])
def test_names_that_would_leave_the_tree_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is no name of a testbed or node"):
        Topics(name)
    with pytest.raises(ValueError, match="is no name of a testbed or node"):
        Topics("demo").own(name, "birth")


def test_a_node_subscribes_to_its_inbox_and_to_what_is_forwarded_to_it() -> None:
    assert Topics("demo").to_node("edge") == (
        "semct/demo/edge/work",
        "semct/demo/edge/control",
        "semct/demo/+/forward/edge",
    )
    assert Topics("demo").every("request") == "semct/demo/+/request"


def test_every_kind_of_topic_says_what_it_carries() -> None:
    assert set(CARRIES) == {*get_args(Own), "forward", "view", "work", "control"}
