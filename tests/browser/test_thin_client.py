"""The thin client for browsers in a real browser, over WebSockets, in a real run beside an emulated device."""

import asyncio
import functools
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.async_api import Browser, expect

from broker.authority import enroll, make_authority
from semct import load_run

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[2]
SCENARIO = """
name: beside
frameworks: [edge-device]
devices: [{count: 1}, {attached: phone, links: {up: {rate: 20mbit}, down: {rate: 20mbit}}}]
steps: 12
prompts: {list: [a cat in the snow, a dog in the snow]}
planning: {writer: medoid}
"""


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def pages() -> Iterator[str]:
    """This repository's files over HTTP."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=ROOT)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("guarded", [False, True])
async def test_a_browser_is_a_device(
    tmp_path: Path, browser: Browser, pages: str, unused_tcp_port: int, *, guarded: bool
) -> None:
    (tmp_path / "beside.yaml").write_text(SCENARIO)
    door = f"127.0.0.1:{unused_tcp_port}"
    command = [sys.executable, "-m", "experiments", "run", "beside.yaml", "--listen", door]
    if guarded:
        make_authority(tmp_path / "authority", ["127.0.0.1"])
        credentials = enroll(tmp_path / "authority", "phone")
        command += ["--authority", "authority"]
    run = await asyncio.create_subprocess_exec(*command, cwd=tmp_path)
    try:
        page = await browser.new_page(ignore_https_errors=guarded)  # the authority is not one that browsers know
        scheme = "wss" if guarded else "ws"
        await page.goto(f"{pages}/examples/thin_client.html?broker={scheme}://{door}/mqtt&name=phone")
        if guarded:
            await page.set_input_files("#credentials", credentials)
        await expect(page.locator("#pictures img")).to_have_count(1, timeout=180_000)
        assert await page.evaluate("document.querySelector('#pictures img').naturalWidth") >= 64
        await expect(page.locator("#state")).to_have_text("over", timeout=60_000)
        async with asyncio.timeout(60):
            assert await run.wait() == 0
    finally:
        if run.returncode is None:
            run.kill()
            await run.wait()
    (folder,) = (tmp_path / "runs").iterdir()
    found = load_run(folder)
    assert set(found.requests["outcome"]) == {"answered"}
    phone = next(row for row in found.nodes.iter_rows(named=True) if row["node"] == "phone")
    assert abs(phone["clock_ahead_s"]) <= phone["clock_uncertainty_s"] + 0.01  # the browser's clock ticks in ms
