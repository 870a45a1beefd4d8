"""The architecture of DESIGN.md, held by the source itself: who may import whom."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "semct": set(),
    "broker": set(),
    "netem": set(),
    "node": {"semct", "broker"},
    "edge_node": {"node", "semct", "broker"},
    "device_node": {"node", "semct", "broker"},
    "experiments": {"semct", "broker", "netem", "node", "edge_node", "device_node"},
}
"""The packages of this repository, and what each may import of the others."""


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """The top-level packages that a file imports anywhere in it, with the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name.split(".")[0], node.lineno
        elif isinstance(node, ast.ImportFrom):
            yield ("." * node.level + (node.module or "")).split(".")[0] or "(relative)", node.lineno


def test_all_packages_are_known() -> None:
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert found == set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_down_only(package: str) -> None:
    assert modules(package)
    forbidden = {*PACKAGES, "tests", "benchmarks", "(relative)"} - PACKAGES[package] - {package}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules(package)
        for name, line in imported(path)
        if name in forbidden
    ]
    assert wrong == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_says_what_it_is(package: str) -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in modules(package)
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert silent == []


@pytest.mark.parametrize("package", PACKAGES)
def test_there_is_no_grab_bag(package: str) -> None:
    bags = {"utils", "util", "common", "helpers", "misc"}
    parts = {part for path in modules(package) for part in path.relative_to(ROOT).with_suffix("").parts}
    assert not parts & bags


def test_the_command_line_starts_light() -> None:
    """Importing it starts no thread, since the hub must be entered before there are any, and answers at once."""
    check = (
        "import os, sys, experiments.cli;"
        "heavy = sorted({'numpy', 'torch', 'scipy', 'polars', 'diffusers', 'transformers'} & set(sys.modules));"
        "print(len(os.listdir('/proc/self/task')), heavy)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip() == "1 []", done.stderr


SCHEDULER = {"forwarding.py", "scheduler.py"}
"""The modules of netem's packet scheduler, which is a process of its own."""


@pytest.mark.parametrize("package", ["broker", "netem"])
def test_bus_and_links_need_none_of_the_methods_libraries(package: str) -> None:
    """The hub above all: importing them would start threads before it is entered."""
    heavy = {"torch", "diffusers", "transformers", "scipy", "numpy", "numba"}
    light = [path for path in modules(package) if path.name not in SCHEDULER]
    assert not heavy & {name for path in light for name, _ in imported(path)}


def test_the_hub_does_not_import_the_packet_scheduler() -> None:
    check = (
        "import sys, netem.userspace;"
        "print(sorted({'numpy', 'numba', 'netem.forwarding', 'netem.scheduler'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_reading_a_run_takes_nothing_of_the_testbed() -> None:
    others = sorted({"torch", "transformers", "scipy", *PACKAGES} - {"semct"})
    check = f"import sys; from semct import load_run; print(load_run.__module__, set({others}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip() == "semct.runs set()", done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_is_raised_where_a_group_is_taken_apart(package: str) -> None:
    """Early Pythons 3.11, as Debian's in the image, wrap what an ``except*`` raises in a group of its own."""
    raised = [
        f"{path.relative_to(ROOT)}:{inner.lineno}"
        for path in modules(package)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.TryStar)
        for handler in node.handlers
        for inner in ast.walk(handler)
        if isinstance(inner, ast.Raise)
    ]
    assert raised == []
