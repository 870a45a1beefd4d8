"""What a node is called before it has a place, and its command line."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.topics import Topics
from node.enrolment import provisional_name


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
def test_a_wrong_command_line_ends_with_one_sentence(arguments: list[str], sentence: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "device_node", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert sentence in done.stderr.splitlines()[-1]
