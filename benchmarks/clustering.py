"""Clustering 10,000 prompts against fastcluster: ``python benchmarks/clustering.py``.

Average linkage on cosine distances, from sentence vectors to the dendrogram; embedding is not counted, for either.
The peer is fastcluster 1.3 called the way its documentation shows, ``linkage(vectors, "average", metric="cosine")``
(``pip install "fastcluster>=1.3"``; the project does not need it), and once more from the finished matrix of
distances, which is the part that both do alike. The vectors are synthetic: 300 directions of 384 numbers with noise
around them, so that cosines lie where prompts' do. Times are CPU time of all threads, the fastest of the repetitions,
which are interleaved. Both must find the same merges.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.cluster.hierarchy import linkage

from semct.clustering import cosine_distances, dendrogram

MOST = 1.2


def prompts(n: int) -> NDArray[np.float32]:
    """Unit vectors (n, 384) around 300 directions."""
    rng = np.random.default_rng(0)
    themes = rng.normal(size=(300, 384))
    vectors = themes[rng.integers(len(themes), size=n)] + rng.normal(size=(n, 384))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def main() -> None:
    """Print the table; exit with 1 where the project is slower than allowed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    try:
        import fastcluster  # noqa: PLC0415
    except ImportError:
        sys.exit('benchmarks/clustering.py: the peer is missing; pip install "fastcluster>=1.3"')
    vectors = prompts(arguments.prompts)
    doubled = vectors.astype(np.float64)
    distances = cosine_distances(vectors)
    parts: dict[str, Callable[[], Any]] = {
        "semct, from vectors": lambda: dendrogram(vectors),
        "fastcluster, from vectors": lambda: fastcluster.linkage(doubled, "average", metric="cosine"),
        "scipy (as semct uses it), from distances": lambda: linkage(distances, "average"),
        "fastcluster, from distances": lambda: fastcluster.linkage(distances, "average"),
    }
    seconds = {name: float("inf") for name in parts}
    found: dict[str, Any] = {}
    for _ in range(arguments.repetitions):
        for name, part in parts.items():
            start = time.process_time()
            found[name] = part()
            seconds[name] = min(seconds[name], time.process_time() - start)
    mine = np.array([merge.similarity for merge in found["semct, from vectors"].merges])
    error = float(np.abs(mine - (1 - found["fastcluster, from vectors"][:, 2])).max())
    table = Table(title=f"{arguments.prompts} prompts, CPU seconds")
    table.add_column("")
    table.add_column("seconds", justify="right")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.2f}")
    Console().print(table)
    ratio = seconds["semct, from vectors"] / seconds["fastcluster, from vectors"]
    print(f"ratio {ratio:.2f} (at most {MOST}); similarities of merges differ by at most {error:.1e}")
    if ratio > MOST or error > 1e-6:
        sys.exit(1)


if __name__ == "__main__":
    main()
