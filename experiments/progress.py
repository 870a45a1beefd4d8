"""What a person sees while an experiment runs: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)


class Watcher:
    """Shows the steps of a run on a console, for as long as the ``with`` block lasts."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._rounds = self._bars.add_task("rounds", total=None)
        self._users = self._bars.add_task("starting", total=None)
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def note(self, text: str) -> None:
        """One line that stays, with the seconds since the start."""
        self.console.print(f"[dim]{time.monotonic() - self._started:6.1f} s[/]  {text}", highlight=False)

    def rounds(self, done: int, total: int) -> None:
        """So many rounds are over."""
        self._bars.update(self._rounds, completed=done, total=total)

    def answered(self, framework: str, done: int, total: int) -> None:
        """So many users of the current round have their picture."""
        self._bars.update(self._users, description=framework, completed=done, total=total)
