"""Links of which only the hub's end is shaped, as `Links`, so that the conformance table can be held to them."""

from netem.hosts import Host
from netem.kernel import OneEnd, PlainLinks
from netem.link import Link


class OneEndLinks(PlainLinks):
    """The device's end stays as the kernel made it, and passes bundles of packets."""

    implementation = "one end"

    def __init__(self) -> None:
        super().__init__()
        self._ends: dict[str, OneEnd] = {}

    def close(self) -> None:
        for end in self._ends.values():
            end.__exit__(None, None, None)
        super().close()

    def connect(self, host: Host, namespace: int) -> None:
        super().connect(host, namespace)
        self._ends[host.hub_interface] = OneEnd(host.hub_interface).__enter__()

    def disconnect(self, host: Host) -> None:
        self._ends.pop(host.hub_interface).__exit__(None, None, None)
        super().disconnect(host)

    def apply(self, host: Host, namespace: int, link: Link) -> None:  # noqa: ARG002
        self._ends[host.hub_interface].apply(link)

    def read(self, host: Host, namespace: int) -> Link:  # noqa: ARG002
        return self._ends[host.hub_interface].read()
