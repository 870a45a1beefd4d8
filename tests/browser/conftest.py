"""A headless Chromium of the machine, and what its pages complained of."""

import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, async_playwright

PICTURES = Path(__file__).parents[2] / "build" / "browser"
"""Where screenshots are kept."""


@pytest_asyncio.fixture
async def browser() -> AsyncIterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium, "these tests need Chromium: install Debian's package chromium"
    quiet = ["--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # it has none for root
    async with async_playwright() as playwright:
        launched = await playwright.chromium.launch(executable_path=chromium, args=[*quiet, *sandbox])
        yield launched
        await launched.close()


@pytest.fixture
def complaints() -> list[str]:
    return []


@pytest.fixture
def attend(complaints: list[str]) -> Callable[[Page], None]:
    """Notes down what a page complains of."""

    def attend(page: Page) -> None:
        page.on("console", lambda m: complaints.append(m.text) if m.type in {"error", "warning"} else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))

    return attend
