"""``python -m edge_node SETTINGS.json``: one edge on its own."""

import sys

import msgspec

from edge_node.node import EdgeSettings
from edge_node.process import main
from node.settings import read_settings

if __name__ == "__main__":
    sys.exit(main(msgspec.to_builtins(read_settings(EdgeSettings, sys.argv[1:]))))
