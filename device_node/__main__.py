"""One device on its own: ``python -m device_node SETTINGS.json``, or ``--broker HOST:PORT`` to enrol for a place."""

import sys

from device_node.node import DeviceSettings
from device_node.process import serve
from node.enrolment import start
from semct.diffusion import ModelNotFound, NoSuchDevice
from semct.prompts import EncoderNotFound

if __name__ == "__main__":
    sys.exit(start(DeviceSettings, serve, "device", unfit=(ModelNotFound, NoSuchDevice, EncoderNotFound)))
