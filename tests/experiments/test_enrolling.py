"""``semct enroll``: an authority and credentials from the command line."""

from pathlib import Path

from typer.testing import CliRunner

from broker.credentials import load_credentials
from experiments.cli import app


def test_an_authority_and_a_device_in_two_commands(tmp_path: Path) -> None:
    said = []
    for arguments in (["--ca", "10.0.0.5", "--ca", "broker.local"], ["phone"], ["gate", "--role", "edge"]):
        done = CliRunner().invoke(app, ["enroll", *arguments, "--folder", str(tmp_path / "a")])
        assert done.exit_code == 0, done.output
        said.append(done.output)
    phone = load_credentials(tmp_path / "a" / "phone.json")
    assert phone.name == "phone"
    assert phone.password not in "".join(said)
    assert "user gate" in (tmp_path / "a" / "rights").read_text()


def test_what_is_missing_is_said_in_one_sentence(tmp_path: Path) -> None:
    for arguments, sentence in (
        ([], "name a device"),
        (["phone"], "holds no authority"),
        (["--ca", "a", "X"], "no name"),
    ):
        done = CliRunner().invoke(app, ["enroll", *arguments, "--folder", str(tmp_path / "a")])
        assert done.exit_code == 1
        assert sentence in done.output
