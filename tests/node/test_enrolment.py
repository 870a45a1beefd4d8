"""What a node is called before it has a place, and its command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.topics import Topics
from node import enrolment
from node.enrolment import provisional_name, start
from node.settings import NodeSettings


@given(st.text())
def test_any_machine_gives_a_name(host: str) -> None:
    assert Topics("t").own(provisional_name(host), "birth")


def test_a_container_is_called_by_its_short_id() -> None:
    assert provisional_name("4c01db0b339c") == "4c01db0b339c"
    assert provisional_name("Orin_3.lab.example.org") == "orin-3"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give either a settings file or --broker"),
        (["a.json", "--broker", "b"], "give either a settings file or --broker"),
        (["a.json", "b.json"], "unrecognized arguments"),
        (["--broker", "http://b"], "is no address of a broker"),
    ],
)
def test_a_wrong_command_line_ends_with_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["device_node", *arguments])
    monkeypatch.setattr(enrolment, "start_logging", lambda: None)  # it would go on for all tests after this one
    with pytest.raises(SystemExit) as refused:
        start(NodeSettings, lambda _: True, "device", unfit=())
    said = f"{capsys.readouterr().err}{refused.value.code}"  # what exits with words prints them then
    assert sentence in said
    assert refused.value.code not in {None, 0}


@pytest.mark.parametrize("package", ["device_node", "edge_node"])
def test_a_node_without_the_model_that_it_is_told_to_hold_says_so_in_one_sentence(tmp_path: Path, package: str) -> None:
    settings = {"host": "127.0.0.1", "port": 1, "testbed": "t", "name": "n", "models": ["nobody/nothing"]}
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", package, str(path)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("diffusion model 'nobody/nothing' cannot be loaded")
    assert "Traceback" not in done.stderr
