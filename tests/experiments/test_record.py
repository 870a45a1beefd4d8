"""The record of a run: what stands in the folder, whatever ended it."""

import asyncio
import errno
import subprocess
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import msgspec
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import record
from experiments.record import RunFolder, Unwritable
from semct import runs
from semct.runs import LinkRow, NodeRow, NotARun, RequestRow, TransferRow, load_run, schema, table_of

ROW = RequestRow(
    round="r0", framework="semct", repetition=0, request="u1", device="device-1", prompt="a cat", seed=7, steps=28,
    outcome="answered", quality=0.3, latency_s=4.0, energy_j=900.0, tflop=200.0, utility=0.5,
)  # fmt: skip
NODE = NodeRow(
    round="r0", framework="semct", node="edge", role="edge", denoiser_calls=28, rows=56, tflop=672.0, busy_s=4.3,
    energy_j=1720.0, overruns=0, memory_mib=11.5,
)  # fmt: skip
LINK = LinkRow(round="semct-0", framework="semct", node="device-1", implementation="unshaped")
TEXT = st.text(st.characters(codec="utf-8"), max_size=50)


def test_a_run_reads_back_as_it_was_recorded(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "quick start") as folder:
        folder.scenario("name: quick start\n")
        folder.update(seed=7, broker="mosquitto 2.0", device_memory_mib=[12.0])
        folder.event("round", framework="semct", repetition=0)
        for row in (ROW, NODE, LINK):
            folder.add(row)
        image = folder.image("semct", "u1", b"png")
    run = load_run(folder.path)
    assert (run.info.status, run.info.reason, run.info.seed) == ("finished", "", 7)
    assert run.info.device_memory_mib == (12.0,)
    assert run.info.finished is not None
    assert run.info.finished >= run.info.started
    assert run.scenario == "name: quick start\n"
    assert [run.requests.row(0), run.nodes.row(0), run.links.row(0)] == [
        msgspec.structs.astuple(row) for row in (ROW, NODE, LINK)
    ]
    assert run.events["kind"].to_list() == ["round", "row", "row", "row"]
    assert (folder.path / image).read_bytes() == b"png"
    assert (folder.path / "summary.csv").read_text().startswith("framework,asked,answered,degraded,quality,")
    assert folder.logs.is_dir()
    assert "quick-start" in folder.path.name
    assert not list(folder.path.rglob(".*.part"))


def test_an_empty_run_has_its_columns(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "empty") as folder:
        pass
    for table, kind in (("requests", RequestRow), ("nodes", NodeRow), ("links", LinkRow), ("transfers", TransferRow)):
        frame = pl.read_parquet(folder.path / f"{table}.parquet")
        assert frame.is_empty()
        assert frame.schema == schema(kind)


def test_the_schema_follows_from_the_struct() -> None:
    columns = schema(RequestRow)
    assert columns.names() == list(RequestRow.__struct_fields__)
    assert columns["outcome"] == pl.String
    assert columns["cluster"] == pl.Int64
    assert columns["quality"] == pl.Float64
    assert columns["modelled"] == pl.Boolean


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_a_later_row_of_a_request_replaces_the_earlier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(runs, "_AT_ONCE", at_once)
    with RunFolder.create(tmp_path, "utility") as folder:
        folder.add(msgspec.structs.replace(ROW, utility=None, reason="not judged"))
        folder.add(NODE)
        folder.add(msgspec.structs.replace(ROW, request="u2", utility=0.4))
        folder.add(ROW)
    found = load_run(folder.path).requests
    assert found.select("request", "utility", "reason").rows() == [("u1", 0.5, ""), ("u2", 0.4, "")]


def test_a_long_run_takes_no_more_memory_than_a_short_one(tmp_path: Path) -> None:
    def play(rounds: range) -> None:
        for number in rounds:
            folder.event("round", framework="semct", repetition=number)
            folder.add(msgspec.structs.replace(ROW, round=f"semct-{number}", latency_s=number / 7))

    with RunFolder.create(tmp_path, "long") as folder:
        play(range(10))
        tracemalloc.start()
        play(range(10, 1000))
        grown, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert grown < 50_000  # a row alone takes 500 bytes
    assert load_run(folder.path).requests.height == 1000


class DeviceVanished(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (DeviceVanished("device-3 vanished\nat step 12"), "failed", "device-3 vanished"),
        (KeyError("edge"), "failed", "KeyError: 'edge'"),
        (DeviceVanished(), "failed", "DeviceVanished()"),
        (KeyboardInterrupt(), "interrupted", "stopped by Ctrl-C"),
        (asyncio.CancelledError(), "interrupted", "stopped before its end"),
        (BaseExceptionGroup("tasks", [DeviceVanished("gone")]), "failed", "gone"),
    ],
)
def test_whatever_ends_a_run_stands_in_its_record(
    tmp_path: Path, error: BaseException, status: str, reason: str
) -> None:
    path = tmp_path

    def run() -> None:
        nonlocal path
        with RunFolder.create(tmp_path, "broken") as folder:
            path = folder.path
            folder.add(ROW)
            raise error

    with pytest.raises(type(error)):
        run()
    kept = load_run(path)
    assert (kept.info.status, kept.info.reason) == (status, reason)
    assert kept.info.finished is not None
    assert pl.read_parquet(path / "requests.parquet").height == 1
    assert ("failed" in kept.events["kind"]) == (status == "failed")


def test_a_killed_run_loses_no_row(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "killed")
    with folder:
        folder.add(msgspec.structs.replace(ROW, utility=None))
        folder.add(ROW)
        folder.add(NODE)
        left = {p.name: p.read_bytes() for p in folder.path.iterdir() if p.is_file()}
    killed = tmp_path / "left"
    killed.mkdir()
    for name, content in left.items():
        (killed / name).write_bytes(content + (b'{"time":1,"ki' if name == "events.jsonl" else b""))
    run = load_run(killed)
    assert run.info.status == "running"
    assert run.requests.row(0) == msgspec.structs.astuple(ROW)
    assert (run.requests.height, run.nodes.height, run.links.height) == (1, 1, 0)
    assert run.events.height == 3


def test_unknown_fields_and_wrong_values_are_refused(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "strict") as folder:
        with pytest.raises(TypeError):
            folder.update(sead=7)
        with pytest.raises(msgspec.ValidationError):
            folder.update(seed="seven")
        folder.update(seed=7)
    assert load_run(folder.path).info.seed == 7


def test_events_belong_to_an_open_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="open"):
        RunFolder.create(tmp_path, "closed").event("early")


def test_pictures_stay_inside_the_folder(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "../../escape") as folder:
        image = folder.image("../semct", "../../u/1", b"png")
    assert folder.path.parent == tmp_path
    assert (folder.path / image).parent == folder.path / "images"


def test_a_runs_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(Unwritable, match=r"^the run cannot be recorded, .* cannot be written: Not a directory$"):
        RunFolder.create(tmp_path / "runs", "x").__enter__()


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, data: bytes) -> int:
        if self.name.endswith(".parquet.part"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(self, data)

    write_bytes = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", refuse)


@pytest.mark.usefixtures("full_disk")
def test_a_disk_that_is_full_at_the_end_fails_the_run(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "full")

    def run() -> None:
        with folder:
            folder.add(ROW)

    with pytest.raises(Unwritable, match="No space left on device"):
        run()
    kept = load_run(folder.path)
    assert kept.info.status == "failed"
    assert "No space left on device" in kept.info.reason
    assert kept.requests.height == 1  # from the journal


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_does_not_mask_what_ended_the_run(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "full")

    def run() -> None:
        with folder:
            raise DeviceVanished("device-3 vanished")

    with pytest.raises(DeviceVanished, match="device-3 vanished") as caught:
        run()
    assert "No space left on device" in caught.value.__notes__[0]
    assert load_run(folder.path).info.reason == "device-3 vanished"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system takes root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_fills_up_on_the_way(small_disk: Path) -> None:
    folder = RunFolder.create(small_disk, "full")

    def run() -> None:
        with folder:
            folder.add(ROW)
            folder.image("semct", "u1", bytes(1 << 20))

    with pytest.raises(Unwritable, match=r"u1\.png cannot be written: No space left on device"):
        run()
    kept = load_run(folder.path)
    assert kept.info.status == "failed"
    assert kept.requests.height == 1
    assert not list((folder.path / "images").iterdir())


def test_a_journal_on_a_full_disk_is_one_sentence(small_disk: Path) -> None:
    folder = RunFolder.create(small_disk, "full")

    def run() -> None:
        with folder:
            for _ in range(100):
                folder.event("noise", text="x" * 10_000)

    with pytest.raises(Unwritable, match=r"events\.jsonl cannot be written: No space left on device"):
        run()


def test_what_a_full_disk_refused_is_kept_when_it_has_room_again(small_disk: Path) -> None:
    added = []

    def fill() -> None:
        for number in range(100):
            added.append(f"u{number}")
            folder.add(msgspec.structs.replace(ROW, request=added[-1], reason="x" * 10_000))

    with RunFolder.create(small_disk, "full") as folder:
        (small_disk / "other").write_bytes(bytes(200_000))
        with pytest.raises(Unwritable, match=r"events\.jsonl cannot be written"):
            fill()
        (small_disk / "other").unlink()
    kept = load_run(folder.path)
    assert kept.info.status == "finished"
    assert kept.requests["request"].to_list() == added
    assert kept.events["kind"].to_list() == ["row"] * len(added)


@pytest.mark.parametrize("table", ["requests", "reqests"])
def test_a_journal_with_a_row_of_no_table_is_one_sentence(tmp_path: Path, table: str) -> None:
    with RunFolder.create(tmp_path, "odd") as folder:
        pass
    (folder.path / "requests.parquet").unlink()
    line = msgspec.json.encode({"time": 1, "kind": "row", "table": table, "row": {"round": 7}}) + b"\n"
    with pytest.raises(NotARun, match=rf"events\.jsonl holds a row that is none of {table}: "):
        load_run(_spoil(folder.path, "events.jsonl", line))


def _spoil(path: Path, name: str, content: bytes) -> Path:
    (path / name).write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("run.json", b"{", "is no readable run"),
        ("run.json", b'{"status": "asleep"}', "is no readable run"),
        ("requests.parquet", b"PAR1", "requests.parquet cannot be read"),
        ("events.jsonl", b"nonsense\n", "line 1 of .* is no event"),
    ],
)
def test_a_spoilt_run_is_one_sentence(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    with RunFolder.create(tmp_path, "spoilt") as folder:
        pass
    with pytest.raises(NotARun, match=sentence) as caught:
        load_run(_spoil(folder.path, name, content))
    assert "\n" not in str(caught.value)


def test_a_folder_without_run_json_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(NotARun, match="is no run: it has no"):
        load_run(tmp_path / "nowhere")


def test_a_table_of_another_version_names_the_column(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "old") as folder:
        pass
    pl.read_parquet(folder.path / "requests.parquet").drop("utility").write_parquet(folder.path / "requests.parquet")
    with pytest.raises(NotARun, match="no fitting column utility"):
        load_run(folder.path)


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunFolder]:
    with RunFolder.create(tmp_path_factory.mktemp("runs"), "any") as folder:
        yield folder


@given(
    prompt=TEXT,
    reason=TEXT,
    quality=st.none() | st.floats(allow_nan=False),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_row_survives_journal_and_parquet(
    shared_folder: RunFolder, prompt: str, reason: str, quality: float | None, seed: int
) -> None:
    row = msgspec.structs.replace(ROW, prompt=prompt, reason=reason, quality=quality, seed=seed)
    frame = table_of(RequestRow, [row])
    assert frame.row(0) == msgspec.structs.astuple(row)
    assert msgspec.json.decode(msgspec.json.encode(row), type=RequestRow).prompt == prompt


def test_the_commit_is_of_the_packages_own_checkout(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
            check=True, capture_output=True,
        )  # fmt: skip

    git("init")
    (tmp_path / "code.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    found = record._commit(tmp_path)
    assert found is not None
    assert len(found.id) == 40
    assert not found.dirty
    (tmp_path / "code.py").write_text("2")
    dirty = record._commit(tmp_path)
    assert dirty is not None
    assert dirty.dirty
    (tmp_path / "site-packages").mkdir()
    assert record._commit(tmp_path / "site-packages") is None
