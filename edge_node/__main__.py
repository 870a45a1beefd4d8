"""One edge on its own: ``python -m edge_node SETTINGS.json``, or ``--broker HOST:PORT`` to enrol for a place."""

import sys

from edge_node.node import EdgeSettings
from edge_node.process import serve
from node.enrolment import start

if __name__ == "__main__":
    sys.exit(start(EdgeSettings, serve, "edge"))
