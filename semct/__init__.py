"""The method: prompts, clusters, public prompts, routes, the denoiser and its engine, quality, cost, planner and
frameworks; and ``load_run``, which reads what a run left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from semct.runs import load_run

__all__ = ["load_run"]


def __getattr__(name: str) -> Any:
    """Import the reader of runs once somebody asks for it: nodes do without its polars."""
    if name == "load_run":
        from semct.runs import load_run  # noqa: PLC0415

        return load_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
