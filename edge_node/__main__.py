"""One edge on its own: ``python -m edge_node SETTINGS.json``, or ``--broker HOST:PORT`` to enrol for a place."""

import sys

from edge_node.node import EdgeSettings
from edge_node.process import prepare, serve
from node.enrolment import start
from semct.diffusion import ModelNotFound, NoSuchDevice
from semct.language_model import LanguageModelError
from semct.prompts import EncoderNotFound

if __name__ == "__main__":
    unfit = (ModelNotFound, NoSuchDevice, EncoderNotFound, LanguageModelError)
    sys.exit(start(EdgeSettings, serve, "edge", prepare=prepare, unfit=unfit))
