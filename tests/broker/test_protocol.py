"""The protocol's documents say what the code does; their examples decode to what they show."""

import re
from pathlib import Path
from typing import get_args

import msgpack
import pytest
import yaml

from broker.messages import AnyMessage, decode, encode
from broker.protocol import EXAMPLES, TEXTS, written
from broker.rights import device_rights
from broker.topics import CARRIES

DOCS = Path(__file__).parents[2] / "docs"
KINDS = get_args(AnyMessage)


@pytest.mark.parametrize("name", ["protocol.md", "asyncapi.yaml"])
def test_the_documents_are_up_to_date(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == written(DOCS)[DOCS / name], "run python -m broker.protocol docs"


def test_every_message_and_topic_is_there() -> None:
    assert [type(example) for example in EXAMPLES] == list(KINDS)
    assert set(TEXTS) == set(CARRIES)
    api = yaml.safe_load((DOCS / "asyncapi.yaml").read_text())
    assert set(api["channels"]) == set(CARRIES)
    assert set(api["components"]["messages"]) == {kind.__name__ for kind in KINDS}
    for channel in api["channels"].values():
        placeholders = set(re.findall(r"{(\w+)}", channel["address"]))
        assert placeholders == set(channel["parameters"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_in_the_text_decode_to_the_example(kind: type) -> None:
    text = (DOCS / "protocol.md").read_text(encoding="utf-8")
    section = text.split(f"### `{kind.__name__.lower()}`\n")[1].split("\n### ")[0]
    payload = bytes.fromhex(section.split("```")[1])
    example = next(e for e in EXAMPLES if type(e) is kind)
    assert decode(payload) == example
    assert encode(example) == payload
    plain = msgpack.unpackb(payload)  # by another library, as a stranger's client would
    assert plain["type"] == kind.__name__.lower()
    api = yaml.safe_load((DOCS / "asyncapi.yaml").read_text())
    assert bytes.fromhex(api["components"]["messages"][kind.__name__]["x-example-bytes"]) == payload


def test_the_text_names_what_a_device_may_do() -> None:
    text = (DOCS / "protocol.md").read_text(encoding="utf-8").split("## Who may do what")[1].split("\n## ")[0]
    for rule in device_rights().splitlines():
        what = rule.split("%u/")[-1] if "%u/" in rule else "+/forward/NAME"
        assert f"`{what}`" in text, rule


def test_every_reference_of_the_schema_is_there() -> None:
    api = yaml.safe_load((DOCS / "asyncapi.yaml").read_text())
    for reference in re.findall(r"#/([\w/-]+)", str(api)):
        found = api
        for step in reference.split("/"):
            found = found[step]
