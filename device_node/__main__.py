"""``python -m device_node SETTINGS.json``: one device on its own."""

import sys

import msgspec

from device_node.node import DeviceSettings
from device_node.process import main
from node.settings import read_settings

if __name__ == "__main__":
    sys.exit(main(msgspec.to_builtins(read_settings(DeviceSettings, sys.argv[1:]))))
