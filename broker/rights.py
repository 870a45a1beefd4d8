"""Who may read and write which topics, as Mosquitto's access rules."""

from __future__ import annotations

from typing import Literal

from broker.topics import BY_DEVICES, Topics

Role = Literal["device", "edge", "runner"]

_DEVICE_WRITES = tuple("forward/+" if what == "forward" else what for what in BY_DEVICES)
_DEVICE_READS = ("work", "control")
_RUNNER_READS = ("birth", "enrol", "result", "picture", "planned", "spent", "clock", "progress")


def device_rights() -> str:
    """The rules for every user, by which a device reads and writes its own topics and no other's."""
    writes = [f"pattern write semct/+/%u/{what}" for what in _DEVICE_WRITES]
    reads = [f"pattern read semct/+/%u/{what}" for what in _DEVICE_READS]
    return "\n".join([*writes, *reads, "pattern read semct/+/+/forward/%u"]) + "\n"


def more_rights(name: str, role: Role) -> str:
    """What a user may do beyond a device's rights: an edge takes requests and passes work, the runner leads a run.

    Raises ``ValueError`` for a name that is none.
    """
    Topics(name)
    match role:
        case "device":
            return ""
        case "edge":
            rules = ["topic read semct/+/+/birth", "topic read semct/+/+/request", "topic write semct/+/+/work"]
            rules.append(f"topic write semct/+/{name}/planned")
        case "runner":
            rules = [*(f"topic read semct/+/+/{what}" for what in _RUNNER_READS), "topic write semct/+/+/control"]
            rules.append(f"topic write semct/+/{name}/view/+")
            rules.append(f"topic write semct/+/{name}/view/+")
    return "\n".join(["", f"user {name}", *rules]) + "\n"
