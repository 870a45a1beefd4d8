"""Settings: one JSON document, and one sentence where it is not right."""

from pathlib import Path

import msgspec
import pytest

from device_node.node import DeviceSettings
from edge_node.node import EdgeSettings
from node.settings import NodeSettings, read_settings

GOOD = {"testbed": "t", "name": "n", "host": "127.0.0.1", "port": 1883}


def test_settings_come_back_as_they_were_written(tmp_path: Path) -> None:
    for kind in (EdgeSettings, DeviceSettings):
        path = tmp_path / "settings.json"
        wanted = kind(**GOOD, profile="a100", slowdown=2.0)  # type: ignore[arg-type]
        path.write_bytes(msgspec.json.encode(wanted))
        assert read_settings(kind, str(path)) == wanted


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        (b"{", "are not right"),
        (msgspec.json.encode({**GOOD, "nme": "x"}), "unknown field `nme`"),
        (msgspec.json.encode({**GOOD, "name": "Not A Name"}), "matching regex"),
        (msgspec.json.encode({**GOOD, "rows": 0}), r">= 1.*\$.rows"),
        (msgspec.json.encode({**GOOD, "threads": 0}), r">= 1.*\$.threads"),
        (None, "cannot be read"),
    ],
)
def test_wrong_settings_end_with_one_sentence(tmp_path: Path, document: bytes | None, sentence: str) -> None:
    path = tmp_path / "settings.json"
    if document is not None:
        path.write_bytes(document)
    with pytest.raises(SystemExit, match=sentence) as raised:
        read_settings(NodeSettings, str(path))
    assert "\n" not in str(raised.value)
