"""The topics of a testbed: ``semct/<testbed>/<node>/<what>``.

A node publishes under its own name only. The one exception are inboxes: ``work`` (from edge and cloud nodes)
and ``control`` (from the runner) of a node are written by others. So a device needs its own topics only, and no
device can read what another one was sent: ``broker.rights`` has the rules.
"""

from __future__ import annotations

import re
from typing import Literal, get_args

import msgspec

from broker.messages import (
    Ask,
    Assign,
    Birth,
    Close,
    Enrol,
    Message,
    Name,
    Picture,
    Ping,
    Planned,
    Pong,
    Progress,
    Request,
    Result,
    Round,
    Spent,
    View,
    Watch,
    Work,
)

Outgoing = Literal[
    "birth", "enrol", "request", "forward", "result", "picture", "planned", "spent", "clock", "progress", "view"
]
"""What a node publishes under its own name."""

Inbox = Literal["work", "control"]
"""What others publish to a node."""

What = Outgoing | Inbox

Own = Literal["birth", "enrol", "request", "result", "picture", "planned", "spent", "clock", "progress"]
"""What has one topic for each node: not ``forward``, which names the receiver, and ``view``, which names a part."""

BY_DEVICES: tuple[Outgoing, ...] = (
    "birth",
    "enrol",
    "request",
    "forward",
    "result",
    "picture",
    "spent",
    "clock",
    "progress",
)
"""What devices publish, too: all but what only an edge or the runner has to say."""

CARRIES: dict[What, tuple[type[Message], ...]] = {
    "birth": (Birth,),  # retained
    "enrol": (Enrol,),  # node without a place -> runner; retained
    "request": (Request,),  # device -> edge
    "forward": (Work,),  # device -> the node named by the topic's last level
    "result": (Result,),  # device -> runner
    "picture": (Picture,),  # device -> runner
    "planned": (Planned,),  # edge -> runner
    "spent": (Spent,),  # node -> runner
    "clock": (Pong,),  # node -> runner
    "progress": (Progress,),  # node -> who watches
    "view": (View,),  # runner -> who watches, the part named by the topic's last level; retained
    "work": (Work,),  # edge or cloud -> node
    "control": (Assign, Ask, Round, Ping, Watch, Close),  # runner -> node
}
"""The message types that each kind of topic may carry."""

SPEAKER: dict[type[Message], str] = {
    Birth: "name",
    Enrol: "name",
    Request: "reply",
    Result: "device",
    Spent: "node",
    Pong: "node",
    Progress: "node",
}
"""Where such a message says whose it is: that must be the node of its topic, which the broker vouches for."""

_ROOT = "semct"
_DEEPER = ("forward", "view")  # these have one level more
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")  # the pattern of messages.Name


class Topic(msgspec.Struct, frozen=True):
    """One topic, taken apart.

    ``to`` is the receiving node of a ``forward``, ``part`` the part of a ``view``; both are None for all others.
    """

    testbed: Name
    node: Name
    what: What
    to: Name | None = None
    part: Name | None = None

    @classmethod
    def parse(cls, text: str) -> Topic:
        """The parts of a topic; raises ``ValueError`` for anything outside the tree."""
        match text.split("/"):
            case [root, testbed, node, what] if root == _ROOT and what in CARRIES and what not in _DEEPER:
                return cls(_name(testbed), _name(node), what)
            case [root, testbed, node, "forward", to] if root == _ROOT:
                return cls(_name(testbed), _name(node), "forward", to=_name(to))
            case [root, testbed, node, "view", part] if root == _ROOT:
                return cls(_name(testbed), _name(node), "view", part=_name(part))
        raise ValueError(f"{text[:80]!r} is no topic of a testbed")


class Topics(msgspec.Struct, frozen=True):
    """The topics and subscription filters of one testbed, as MQTT wants them; names are checked."""

    testbed: Name

    def __post_init__(self) -> None:
        _name(self.testbed)

    def own(self, node: str, what: Own) -> str:
        """Where ``node`` publishes ``what``."""
        return f"{_ROOT}/{self.testbed}/{_name(node)}/{what}"

    def forward(self, node: str, to: str) -> str:
        """Where the device ``node`` publishes work for the node ``to``, whose inbox it may not write."""
        return f"{_ROOT}/{self.testbed}/{_name(node)}/forward/{_name(to)}"

    def view(self, node: str, part: str) -> str:
        """Where ``node`` publishes a part of what it has to show."""
        return f"{_ROOT}/{self.testbed}/{_name(node)}/view/{_name(part)}"

    def inbox(self, node: str, what: Inbox) -> str:
        """Where edge and cloud nodes (``work``) and the runner (``control``) write to ``node``."""
        return f"{_ROOT}/{self.testbed}/{_name(node)}/{what}"

    def to_node(self, node: str) -> tuple[str, ...]:
        """Filters for all that is meant for ``node``: its inbox, and work forwarded to it."""
        inbox = tuple(self.inbox(node, what) for what in get_args(Inbox))
        return (*inbox, f"{_ROOT}/{self.testbed}/+/forward/{_name(node)}")

    def every(self, what: Own) -> str:
        """The filter for ``what`` of all nodes."""
        return f"{_ROOT}/{self.testbed}/+/{what}"


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError(f"{text[:80]!r} is no name of a testbed or node: use 1 to 32 of a-z, 0-9 and -, not - first")
    return text
