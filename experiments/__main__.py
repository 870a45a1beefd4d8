"""``python -m experiments``: the same as the installed command ``semct``."""

from experiments.cli import main

if __name__ == "__main__":
    main()
