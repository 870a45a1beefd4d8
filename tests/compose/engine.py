"""Docker from the repository's root, as a person types it there."""

import subprocess
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]


def docker(*words: str, check: bool = True, environment: Mapping[str, str] | None = None) -> str:
    """What Docker says to a command, which must go well unless it need not."""
    done = subprocess.run(
        ["docker", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0 or not check, (words, done.stdout[-3000:] + done.stderr[-3000:])
    return done.stdout.strip()
