"""The wire protocol as documents, made from the message types: ``python -m broker.protocol docs`` writes them.

``asyncapi.yaml`` is the whole of it for machines; ``protocol.md`` keeps its text and gets its tables and examples anew.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import yaml

from broker.messages import (
    MAX_PAYLOAD,
    PROTOCOL,
    AnyMessage,
    Ask,
    Assign,
    Birth,
    Close,
    Compute,
    Enrol,
    Latent,
    LinkNow,
    Message,
    Picture,
    Ping,
    Planned,
    Pong,
    Progress,
    Request,
    Result,
    Round,
    Segment,
    Spent,
    Stage,
    View,
    Watch,
    Way,
    Work,
    encode,
)
from broker.topics import CARRIES, What

KINDS: tuple[type[Message], ...] = get_args(AnyMessage)

TEXTS: dict[What, str] = {
    "birth": "Retained. Who is there, and how it computes; the will of the session says that it is lost.",
    "enrol": "Retained. A node that has no place yet asks for one; by its provisional name.",
    "request": "A device asks the planning edge for its user's picture.",
    "forward": "A device passes work on to the node that the topic's last level names.",
    "result": "A device reports the one outcome of a request.",
    "picture": "A device shows the picture, after the clock has stopped.",
    "planned": "The planning edge tells what it planned.",
    "spent": "A node reports what a round took, when it is over.",
    "clock": "A node answers the runner's ping.",
    "progress": "QoS 0. A node tells whoever watches how far requests are.",
    "view": "Retained. The runner shows a part of a run to whoever watches.",
    "work": "Inbox. Edge and cloud nodes hand over a latent with the rest of its route, or a picture.",
    "control": "Inbox. The runner assigns a place, wishes for pictures, opens and closes rounds, asks for the time.",
}
"""What each kind of topic is for."""

_ADDRESS = {what: f"semct/{{testbed}}/{{node}}/{what}" for what in CARRIES}
_ADDRESS |= {"forward": f"{_ADDRESS['forward']}/{{to}}", "view": f"{_ADDRESS['view']}/{{part}}"}

_STAGE = Stage(name="transfer", node="phone", to="edge", start=1000.5, stop=1000.75, size=210)
_LEG = Segment(node="phone", model="embedded", prompt="a fox in the snow", start=12, stop=28)
_LATENT = Latent(dtype="float16", shape=(1, 2, 2), data=memoryview(bytes.fromhex("003c00c000380000")))
_IDS: dict[str, Any] = {"round": "semct-0", "request": "semct-0-phone"}
_WISH: dict[str, Any] = {"prompt": "a fox in the snow", "seed": 7, "steps": 28, "deadline": 1120.0}

EXAMPLES: tuple[AnyMessage, ...] = (
    Birth(
        name="phone",
        role="device",
        state="ready",
        models=("embedded",),
        compute=Compute(profile="native", step_seconds=0.25, step_joules=0.0),
        host="phone-7",
    ),
    Enrol(name="phone", role="device", state="ready", wants="phone", host="phone-7"),
    Assign(run="0b7c", settings=msgspec.Raw(msgspec.msgpack.encode({"name": "phone", "edge": "edge"}))),
    Round(
        round="semct-0",
        framework="semct",
        seed=7,
        requests=2,
        window=5.0,
        links={"phone": LinkNow(up=Way(rate=20e6, delay=0.02, watts=0.2))},
    ),
    Ask(**_IDS, **_WISH),
    Request(**_IDS, **_WISH, reply="phone", sent=1000.5),
    Work(
        **_IDS,
        reply="phone",
        seed=7,
        steps=28,
        route=(_LEG,),
        latent=_LATENT,
        stages=(_STAGE,),
        sender="edge",
        sent=1002.0,
        deadline=1120.0,
    ),
    Result(**_IDS, device="phone", outcome="answered", asked=1000.25, finished=1006.5, stages=(_STAGE,)),
    Picture(**_IDS, png=b"\x89PNG\r\n\x1a\n"),
    Planned(round="semct-0", framework="semct", plan=msgspec.Raw(b"\xc0"), seconds={"total": 0.5}),
    Spent(round="semct-0", node="phone", denoiser_calls=16, rows=16, flops=1.5e9, busy=4.0, joules=0.0, overruns=0),
    Ping(sent=1000.0),
    Pong(node="phone", sent=1000.0, received=1000.25, replied=1000.5),
    Watch(every=0.5),
    Progress(node="phone", requests={"semct-0-phone": 14}),
    View(run="0b7c", content=msgspec.Raw(b"\xc0")),
    Close(round="semct-0"),
)
"""One message of each type; their payloads are in the documents byte for byte."""


def asyncapi() -> dict[str, Any]:
    """The AsyncAPI 3 document. Binary fields are msgpack's ``bin``, which JSON schema can only show as base64."""
    _, schemas = msgspec.json.schema_components(KINDS, ref_template="#/components/schemas/{name}")
    payloads = {type(example).__name__: encode(example) for example in EXAMPLES}
    messages = {
        kind.__name__: {
            "name": kind.__name__.lower(),
            "summary": _sentence(kind),
            "contentType": "application/msgpack",
            "payload": {"$ref": f"#/components/schemas/{kind.__name__}"},
            "x-example-bytes": payloads[kind.__name__].hex(),
        }
        for kind in KINDS
    }
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "SemCT testbed",
            "version": f"{PROTOCOL}.0.0",
            "description": "MQTT 3.1.1 or 5, QoS 1 but where said; every payload is one msgpack map whose `type` says "
            f"which message it is, of {MAX_PAYLOAD} bytes at most. docs/protocol.md tells the life cycle.",
        },
        "defaultContentType": "application/msgpack",
        "servers": {
            "testbed": {"host": "localhost:1883", "protocol": "mqtt"},
            "guarded": {"host": "localhost:8883", "protocol": "secure-mqtt"},
        },
        "channels": {
            what: {
                "address": _ADDRESS[what],
                "description": TEXTS[what],
                "parameters": {name: {"description": text} for name, text in _parameters(what)},
                "messages": {
                    kind.__name__: {"$ref": f"#/components/messages/{kind.__name__}"} for kind in CARRIES[what]
                },
            }
            for what in CARRIES
        },
        "components": {"messages": messages, "schemas": schemas},
    }


def topics_table() -> str:
    """Every topic, what it carries, and what for."""
    lines = ["| topic | messages | what for |", "|---|---|---|"]
    for what, kinds in CARRIES.items():
        names = ", ".join(f"`{kind.__name__.lower()}`" for kind in kinds)
        lines.append(f"| `{_ADDRESS[what]}` | {names} | {TEXTS[what]} |")
    return "\n".join(lines)


def messages_text() -> str:
    """Every message and every structure in one: fields, types, limits, and the bytes of an example."""
    _, schemas = msgspec.json.schema_components(KINDS, ref_template="#/components/schemas/{name}")
    payloads = {type(example).__name__: encode(example) for example in EXAMPLES}
    order = [*(kind.__name__ for kind in KINDS), *sorted(set(schemas) - {kind.__name__ for kind in KINDS})]
    return "\n\n".join(_section(name, schemas[name], payloads.get(name)) for name in order)


def _section(name: str, schema: dict[str, Any], payload: bytes | None) -> str:
    title = f"### `{name.lower()}`" if payload is not None else f"### structure {name}"
    lines = [title, "", " ".join(schema.get("description", "").replace("``", "`").split())]
    if "properties" in schema:
        lines += ["", "| field | type and limits | default |", "|---|---|---|"]
        required = set(schema.get("required", ()))
        for field, kind in schema["properties"].items():
            default = "required" if field in required else f"`{json.dumps(kind.get('default'))}`"
            lines.append(f"| `{field}` | {_kind(kind)} | {default} |")
    else:
        lines += ["", "An array: " + ", ".join(_kind(item) for item in schema.get("prefixItems", ())) + "."]
    if payload is not None:
        lines += ["", "```", *re.findall(r".{1,96}", payload.hex()), "```"]
    return "\n".join(lines)


def _kind(schema: dict[str, Any]) -> str:  # noqa: PLR0911
    """A field's schema in a few words."""
    if "$ref" in schema:
        return f"structure {schema['$ref'].rsplit('/', 1)[1]}"
    if "anyOf" in schema:
        return " or ".join(_kind(part) for part in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("contentEncoding") == "base64":
        return "bin"
    match schema.get("type"):
        case "array":
            bounds = _bounds(schema, "minItems", "maxItems")
            return f"array of {_kind(schema.get('items') or {})}{bounds}"
        case "object":
            return f"map to {_kind(schema.get('additionalProperties') or {})}"
        case "string":
            pattern = f", `{schema['pattern']}`".replace("|", "\\|") if "pattern" in schema else ""
            return f"string{_bounds(schema, 'minLength', 'maxLength')}{pattern}"
        case "integer" | "number" as plain:
            above = f" over {schema['exclusiveMinimum']}" if "exclusiveMinimum" in schema else ""
            return f"{plain}{above}{_bounds(schema, 'minimum', 'maximum')}"
        case None:
            return "any msgpack"
        case other:
            return str(other)


def _bounds(schema: dict[str, Any], low: str, high: str) -> str:
    least, most = schema.get(low), schema.get(high)
    match least, most:
        case None, None:
            return ""
        case None, _:
            return f" up to {most}"
        case _, None:
            return f" from {least}"
    return f" {least} to {most}"


def _sentence(kind: type[Message]) -> str:
    return " ".join((kind.__doc__ or "").strip().split("\n\n")[0].split())


def _parameters(what: What) -> Iterator[tuple[str, str]]:
    yield "testbed", "The testbed's name; several may share a broker."
    yield "node", "The node that publishes here, or whose inbox it is."
    if what == "forward":
        yield "to", "The node that the work is for."
    if what == "view":
        yield "part", "Which part of what there is to show."


def written(folder: Path) -> dict[Path, str]:
    """What the documents in a folder should say."""
    text = (folder / "protocol.md").read_text(encoding="utf-8")
    for name, made in (("topics", topics_table()), ("messages", messages_text())):
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        text = marks.sub(lambda found, made=made: found[1] + made + "\n" + found[2], text)  # type: ignore[misc]
    api = yaml.safe_dump(asyncapi(), sort_keys=False, allow_unicode=True, width=120)
    return {folder / "protocol.md": text, folder / "asyncapi.yaml": api}


if __name__ == "__main__":
    for path, content in written(Path(sys.argv[1])).items():
        path.write_text(content, encoding="utf-8")
