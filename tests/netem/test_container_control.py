"""The client of the service that shapes containers' links."""

import asyncio
from pathlib import Path

import pytest

from netem import container_control
from netem.container_control import LinksClient, LinksRefused, Using, read_question, write


async def test_the_client_waits_for_a_service_that_starts_later(tmp_path: Path) -> None:
    path = tmp_path / "links.sock"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_question(reader)
        write(writer, Using("userspace"))
        writer.close()

    opening = asyncio.create_task(LinksClient(path).open("auto", 0))
    await asyncio.sleep(0.05)
    assert not opening.done()
    async with await asyncio.start_unix_server(answer, path):
        async with asyncio.timeout(5):
            assert await opening == "userspace"


async def test_a_service_that_never_comes_gets_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container_control, "_PATIENCE", 0.1)
    path = tmp_path / "links.sock"
    with pytest.raises(LinksRefused, match=f"did not answer at {path} within 0.1 s: No such file"):
        await LinksClient(path).open("auto", 0)
