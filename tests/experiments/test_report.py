"""The report: what it says, that nothing from a run can act in it, and that it needs nothing beside itself."""

import io
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import msgspec
import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from experiments import drawings
from experiments.figures import pareto
from experiments.record import RunFolder, Unwritable
from experiments.report import write_report
from semct.runs import FaultRow, LinkRow, NodeRow, NotARun, RequestRow, StageRow, schema

FRAMEWORKS = ("semct", "edge-device", "device-only")
FIGURES = {
    "clusters", "energy-by-node", "energy_j", "latency_s", "links", "pictures", "predictions", "quality", "tflop",
    "tradeoff", "utility", "waterfall-device-only", "waterfall-edge-device", "waterfall-semct", "where-energy-went",
    "where-time-went",
}  # fmt: skip
INLINE = FIGURES - {"pictures"}
HOSTILE = """<script>alert(1)</script><img src=x onerror=alert(2)>"'&$x^2$ {{ 7 * 7 }}"""


def png(size: int = 64) -> bytes:
    noise = np.random.default_rng(size).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def request(framework: str, user: int, **changes: Any) -> RequestRow:
    shares = framework == "semct"
    row = RequestRow(
        round=f"0-{framework}", framework=framework, repetition=0, request=f"u{user}", device=f"device-{user}",
        prompt=f"a cat with {user} hats", seed=user, steps=28, outcome="answered", cluster=0 if shares else None,
        public_prompt="a cat" if shares else None, public_source="llm" if shares else None,
        similarity=0.75 if shares else None, shared_steps=10 if shares else 0, edge_steps=10, device_steps=8,
        quality=0.3 + user / 100, latency_s=4.0 + user, energy_j=900.0, tflop=200.0, utility=0.5,
        predicted_quality=0.31, predicted_latency_s=4.1, predicted_energy_j=880.0, predicted_utility=0.5,
        upload_s=0.1, plan_s=0.9, edge_denoise_s=1.5, device_denoise_s=1.0, energy_edge_j=300.0,
        energy_device_j=600.0, modelled=True,
    )  # fmt: skip
    return msgspec.structs.replace(row, **changes)


def course(row: RequestRow) -> Iterator[StageRow]:
    """The stages of a request under way for four seconds, on a testbed twice as slow as the world it emulates."""
    at = 1e9
    for name, node, to, seconds in (
        ("transfer", row.device, "edge", 0.1), ("plan", "edge", None, 0.9), ("denoise", "edge", None, 1.5),
        ("transfer", "edge", row.device, 0.5), ("denoise", row.device, None, 1.0),
    ):  # fmt: skip
        wall = seconds if name == "plan" else 2 * seconds
        yield StageRow(
            round=row.round, framework=row.framework, request=row.request, name=name, node=node, to=to, start=at,
            stop=at + wall, seconds=seconds,
        )  # fmt: skip
        at += wall


def recorded(root: Path, *, users: int = 3, size: int = 64, repetitions: int = 1, late: float | None = None) -> Path:
    with RunFolder.create(root, "quickstart") as folder:
        folder.update(frameworks=FRAMEWORKS, compute="emulated", link="unshaped", seed=7)
        picture = png(size)
        for repetition in range(repetitions):
            for framework in FRAMEWORKS:
                for user in range(users):
                    row = request(framework, user, repetition=repetition, round=f"{repetition}-{framework}")
                    image = folder.image(framework, f"r{repetition}-u{user}", picture)
                    folder.add(msgspec.structs.replace(row, image=image))
                    for stage in course(row):
                        folder.add(stage)
                folder.add(
                    NodeRow(
                        round=f"{repetition}-{framework}", framework=framework, node="edge", role="edge",
                        denoiser_calls=28, rows=84, tflop=900.0, busy_s=3.0, energy_j=1200.0, overruns=0,
                    )
                )  # fmt: skip
        folder.add(
            LinkRow(
                round="0-semct", framework="semct", node="device-0", implementation="userspace",
                requested_up_rate_bps=5e6, measured_up_rate_bps=4.8e6, requested_down_delay_s=0.02,
                measured_down_delay_s=0.021, up_late_s=late,
            )
        )  # fmt: skip
    return folder.path


class Page(HTMLParser):
    """What a browser would make of the page: elements, ids, and visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def attributes(self, tag: str, name: str) -> list[str]:
        return [value for t, found in self.elements if t == tag and (value := found.get(name)) is not None]


def report(folder: Path) -> Page:
    write_report(folder)
    return read(folder)


def read(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = recorded(tmp_path_factory.mktemp("runs"))
    write_report(folder)
    return folder


def test_a_finished_run(finished: Path) -> None:
    page = read(finished)
    for words in (
        "quickstart", "finished", "3 users, 3 frameworks", "Transfers, over unshaped links",
        "Compute time of emulated nodes", "Difference to semct", "“a cat”", "10 / 10 / 8", "a cat with 2 hats",
        "Where a request's time went",
    ):  # fmt: skip
        assert words.strip("“”") in page.text, words
    assert "Before you read the numbers" not in page.text
    assert len(page.attributes("img", "src")) == 9
    assert {p.name for p in (finished / "figures").iterdir()} == {f"{n}.{k}" for n in FIGURES for k in ("svg", "pdf")}


def test_it_needs_nothing_beside_itself(finished: Path) -> None:
    page = read(finished)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    assert all(source.startswith("data:image/") for source in page.attributes("img", "src"))
    references = page.attributes("a", "href") + page.attributes("use", "xlink:href")
    assert references
    assert set(references) <= {f"#{name}" for _, a in page.elements if (name := a.get("id"))}


def test_ids_are_unique_and_pictures_have_words(finished: Path) -> None:
    page = read(finished)
    ids = [name for _, attributes in page.elements if (name := attributes.get("id"))]
    assert len(ids) == len(set(ids))
    assert "semct: a cat with 1 hats" in page.attributes("img", "alt")
    drawings = [a for tag, a in page.elements if a.get("role") == "img"]
    assert len(drawings) == len(INLINE)
    assert all(a.get("aria-label") for a in drawings)


def test_figures_follow_the_pages_colours_and_stand_alone_as_files(finished: Path) -> None:
    html = (finished / "report.html").read_text(encoding="utf-8")
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(drawings) == len(INLINE)
    for drawing in drawings:
        assert re.findall(r"(?:fill|stroke): #[0-9a-f]{6}", drawing) == []
    for file in (finished / "figures").glob("*.svg"):
        root = ET.parse(file).getroot()  # noqa: S314  our own file
        assert float(str(root.get("width")).removesuffix("pt")) == pytest.approx(3.5 * 72)
        assert "var(" not in file.read_text(encoding="utf-8")


def test_what_a_reader_must_know_first(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "trouble")
    with folder:
        folder.update(frameworks=FRAMEWORKS, overruns=3)
        folder.add(request("semct", 0))
        folder.add(request("semct", 1, outcome="failed", reason="the edge refused", quality=None))
        folder.add(request("semct", 2, outcome="failed", reason="no result within 5 s", quality=None))
        folder.add(request("semct", 3, outcome="degraded", reason="edge did not answer within 9 s"))
        for number, what in enumerate(("dies", "outage", "dies", "hangs")):
            began = None if what == "hangs" else 100.0
            folder.add(
                FaultRow(
                    round="r",
                    framework="semct",
                    fault=number,
                    what=what,
                    node=f"device-{number}",
                    at_s=1.0,
                    began=began,
                )
            )
    page = report(folder.path)
    warnings = page.text.index("Before you read the numbers")
    assert warnings < page.text.index("Results")
    assert "3 calls took longer than the hardware they emulate" in page.text
    assert "2 of 4 requests failed (semct): the edge refused; no result within 5 s" in page.text
    assert "1 of 4 requests were done by the device alone (semct): edge did not answer within 9 s" in page.text
    assert "2/4" in page.text
    assert "3 faults were part of this experiment (dies 2, outage 1), on device-0, device-1, device-2." in page.text


def test_packets_that_left_late_are_said_first(tmp_path: Path) -> None:
    text = report(recorded(tmp_path / "late", late=0.025)).text
    assert "Packets left 1 links up to 25 ms late (99th percentile): the machine was too busy for its links." in text
    assert "Packets left" not in report(recorded(tmp_path / "in time", late=0.0004)).text


def test_a_failed_run_is_reported_with_what_is_there(tmp_path: Path) -> None:
    def run() -> None:
        with folder:
            folder.update(frameworks=FRAMEWORKS)
            folder.add(request("semct", 0))
            raise NotARun("the edge ended with status 9")

    folder = RunFolder.create(tmp_path, "failed")
    with pytest.raises(NotARun):
        run()
    page = report(folder.path)
    assert "This run failed: the edge ended with status 9" in page.text
    assert "not run" in page.text
    assert "1 of 3 frameworks" in page.text


def test_an_empty_run(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "empty") as folder:
        pass
    page = report(folder.path)
    assert "No request was recorded." in page.text
    assert not page.attributes("img", "src")


def test_a_run_that_is_still_going_on(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "going-on") as folder:
        folder.add(request("semct", 0))
        assert "has not ended, or was killed" in report(folder.path).text


def test_only_failures_leave_no_figures(tmp_path: Path) -> None:
    nothing = dict.fromkeys(["quality", "latency_s", "energy_j", "tflop", "utility"])
    with RunFolder.create(tmp_path, "lost") as folder:
        folder.add(request("semct", 0, outcome="failed", **nothing))
    page = report(folder.path)
    assert "0/1" in page.text
    assert not [a for _, a in page.elements if a.get("role") == "img"]


def test_nothing_from_a_run_acts_in_the_page(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, HOSTILE) as folder:
        folder.scenario(HOSTILE)
        folder.update(frameworks=(HOSTILE,), reason=HOSTILE, broker=HOSTILE, link=HOSTILE, profiles={HOSTILE: HOSTILE})
        hostile = dict.fromkeys(["device", "prompt", "public_prompt", "public_source", "reason"], HOSTILE)
        folder.add(request(HOSTILE, 0, image=folder.image(HOSTILE, "u0", png()), **hostile))
        folder.add(request("semct", 1, image="no.png", **hostile))
        folder.add(request("device-only", 2, outcome="failed", quality=None, **hostile))
        folder.add(
            NodeRow(round="r", framework=HOSTILE, node=HOSTILE, role="edge", denoiser_calls=0, rows=0, tflop=0,
                    busy_s=0, energy_j=0, overruns=0, alive=False)
        )  # fmt: skip
        folder.add(LinkRow(round="r", framework=HOSTILE, node=HOSTILE, implementation=HOSTILE))
    page = report(folder.path)
    assert not page.attributes("img", "onerror")
    assert "script" not in {tag for tag, _ in page.elements}
    assert "<script>alert(1)</script>" in page.text  # as text
    assert "{{ 7 * 7 }}" in page.text


def test_a_picture_that_cannot_be_read_is_said_to_be_so(tmp_path: Path) -> None:
    (tmp_path / "private.png").write_bytes(png())  # a record cannot pull in files from elsewhere
    spoilt = [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a nonsense", png()[:200], png(300)[:-50]]
    with RunFolder.create(tmp_path, "spoilt") as folder:
        images = [folder.image("semct", f"u{user}", content) for user, content in enumerate(spoilt)]
        for user, image in enumerate([*images, "images/none.png", "../private.png"]):
            folder.add(request("semct", user, image=image))
    page = report(folder.path)
    assert not page.attributes("img", "src")
    assert page.text.count("unreadable") == 7


def test_large_pictures_are_scaled_down(tmp_path: Path) -> None:
    sources = report(recorded(tmp_path, users=1, size=1024)).attributes("img", "src")
    assert all(source.startswith("data:image/webp") for source in sources)
    assert max(map(len, sources)) < 50_000  # 40 of them stay under 2 MB


def test_several_repetitions_show_the_pictures_of_the_first(tmp_path: Path) -> None:
    page = report(recorded(tmp_path, repetitions=2))
    assert "The first of 2 repetitions is shown." in page.text
    assert len(page.attributes("img", "src")) == 9
    assert "6/6" in page.text


def test_an_unwritable_folder_is_one_sentence(tmp_path: Path) -> None:
    folder = recorded(tmp_path, users=1)
    (folder / "figures").write_text("a file in the way")
    with pytest.raises(Unwritable, match="the report cannot be written"):
        write_report(folder)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(NotARun):
        write_report(tmp_path)


def test_figures_fit_a_column_and_their_text_can_be_read(finished: Path) -> None:
    for file in (finished / "figures").glob("*.svg"):
        sizes = [float(size) for size in re.findall(r"font(?:-size)?:\s?(?:[a-z]+ )*([\d.]+)px", file.read_text())]
        assert sizes or file.name == "pictures.svg"
        assert min(sizes, default=7) >= 7, file.name  # matplotlib's px are points
    for file in (finished / "figures").glob("*.pdf"):
        (box,) = re.findall(rb"/MediaBox \[ ?0 0 ([\d.]+) ", file.read_bytes())
        assert float(box) == pytest.approx(3.5 * 72)


def test_a_waterfall_lays_stages_end_to_end_in_the_emulated_world(tmp_path: Path) -> None:
    rows = [msgspec.structs.asdict(stage) for stage in course(request("semct", 0))]
    course_of = pl.DataFrame(rows, schema=schema(StageRow))
    spans = drawings._spans(course_of, device="device-0", roles={"edge": "edge"}, slowdown=2.0)
    assert [s.part for s in spans] == ["upload_s", "plan_s", "edge_denoise_s", "download_s", "device_denoise_s"]
    assert [s.start for s in spans] == pytest.approx([0.0, 0.1, 1.0, 2.5, 3.0])


def test_the_front_is_what_nothing_beats() -> None:
    assert pareto([(2, 0.9), (1, 0.5), (3, 0.8), (1, 0.4), (4, 0.9)]) == [(1, 0.5), (2, 0.9)]


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1)), min_size=1, max_size=20))
def test_every_point_is_on_the_front_or_beaten_by_it(points: list[tuple[float, float]]) -> None:
    front = pareto(points)
    assert set(front) <= set(points)
    assert all(any(cost <= a and worth >= b for cost, worth in front) for a, b in points)
