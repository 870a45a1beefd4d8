"""Which links a testbed gets, on this machine and on one that has nothing."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from netem import choice, userspace
from netem.choice import choose
from netem.hosts import LinksUnavailable
from netem.kernel import NetemLinks, PlainLinks
from netem.userspace import UserspaceLinks
from tests.netem.conformance import ROOT

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs namespaces")

OPENED = """
import asyncio, json
from netem.choice import choose
from netem.hosts import Hub, LinksUnavailable, enter_hub

async def opens(wanted):
    links = choose(wanted)  # with a loop running, as in a testbed
    try:
        async with Hub(links):
            return links.implementation
    except LinksUnavailable as error:
        return None

enter_hub()
print(json.dumps({wanted: asyncio.run(opens(wanted)) for wanted in ("auto", "netem", "userspace", "none")}))
"""


@root
def test_automatic_links_are_netem_where_it_works_and_else_userspace() -> None:
    process = subprocess.run([sys.executable, "-c", OPENED], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    opened = json.loads(process.stdout)
    assert opened["none"] == "unshaped"
    assert opened["userspace"] == "userspace"
    assert opened["netem"] in {"netem", None}
    assert opened["auto"] == (opened["netem"] or "userspace")


@pytest.mark.parametrize(
    ("wanted", "kind"), [("none", PlainLinks), ("netem", NetemLinks), ("userspace", UserspaceLinks)]
)
def test_a_kind_that_is_asked_for_is_not_tried(wanted: choice.Wanted, kind: type) -> None:
    assert type(choose(wanted)) is kind


@root
def test_a_machine_with_neither_says_what_both_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoNetem(NetemLinks):
        def open(self) -> Any:
            raise LinksUnavailable("no sch_netem")

    monkeypatch.setattr(choice, "NetemLinks", NoNetem)
    monkeypatch.setattr(userspace, "_TUN", "/dev/net/none")
    with pytest.raises(LinksUnavailable, match="no sch_netem; userspace links need /dev/net/none"):
        choose("auto")
