"""Compose files for machines with GPUs, and stacks for swarms, made from ``compose.yaml`` and a scenario.

Compose cannot map the replicas of a service to GPUs (docker/compose#11863), so that each device becomes a service of
its own there. A stack knows neither start order nor builds, and its overlay network wants names without a virtual
address.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import yaml

Document = dict[str, Any]
"""A compose file as plain data."""

_NEEDED: Final = ("broker", "edge", "device", "experiment")
_GPU = re.compile(r"\d+|(GPU|MIG)-[0-9a-fA-F-]+")
_NOT_IN_STACKS: Final = ("build", "depends_on", "restart", "security_opt")
_STACK_FORMAT: Final = "3.8"  # what `docker stack deploy` reads
_GENERIC: Final = "NVIDIA-GPU"  # as nodes of a swarm announce theirs


class CannotCompose(ValueError):
    """A compose file cannot be made: the one it is made from is not right, or the GPUs are not there."""


class Pinning(msgspec.Struct, frozen=True, kw_only=True):
    """Which GPU each node computes on, by index or UUID; devices in the order of their names."""

    edge: str
    devices: tuple[str, ...]

    @property
    def sharers(self) -> dict[str, int]:
        """How many nodes compute on each GPU."""
        return dict(Counter((self.edge, *self.devices)))


def parse_gpus(text: str, present: Sequence[str]) -> tuple[str, ...]:
    """The GPUs that ``4`` (the first four), ``0,2,3`` or UUIDs mean; raises ``CannotCompose``.

    ``present`` names this machine's GPUs in the order of their indices; empty where they cannot be asked for, as when
    the file is made for another machine: then all are believed.
    """
    words = [word.strip() for word in text.split(",")]
    if len(words) == 1 and words[0].isdigit():
        words = [str(n) for n in range(int(words[0]))]
    if not words:
        raise CannotCompose("0 GPUs were asked for: without one, compose.yaml is used as it is")
    for word in words:
        if not _GPU.fullmatch(word):
            raise CannotCompose(f"{word!r} names no GPU: give a number of GPUs, or indices or UUIDs between commas")
        if present and word.isdigit() and int(word) >= len(present):
            raise CannotCompose(f"there is no GPU {word} here: this machine has {len(present)}, counted from 0")
    if len(set(words)) < len(words):
        raise CannotCompose(f"a GPU is named twice in {text!r}")
    return tuple(words)


def pin(devices: int, gpus: Sequence[str]) -> Pinning:
    """The first GPU is the edge's own, devices take the others in turn; a single one is everybody's."""
    others = list(gpus[1:]) or list(gpus)
    return Pinning(edge=gpus[0], devices=tuple(others[n % len(others)] for n in range(devices)))


def read_compose(path: Path, scenario: Path) -> Document:
    """The services of a testbed's compose file, with another default scenario; raises ``CannotCompose``."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        missing = [name for name in _NEEDED if name not in found["services"]]
    except (OSError, UnicodeDecodeError) as error:
        raise CannotCompose(f"{path} cannot be read ({error}): name the testbed's compose file with --file") from error
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise CannotCompose(f"{path} is no compose file: {error}") from error
    if missing:
        raise CannotCompose(f"{path} is no testbed's: it has no service {missing[0]!r}")
    found["services"]["experiment"]["environment"]["SCENARIO"] = f"${{SCENARIO:-{scenario}}}"
    return {key: value for key, value in found.items() if not key.startswith("x-")}


def with_gpus(document: Document, pinning: Pinning) -> Document:
    """The compose file with a service for each device, every node's GPU, and the image with CUDA."""
    made = copy.deepcopy(document)
    services = made["services"]
    device = services.pop("device")
    device.get("deploy", {}).pop("replicas", None)
    _reserve(services["edge"], pinning.edge)
    names = [f"device-{number}" for number in range(1, len(pinning.devices) + 1)]
    for name, gpu in zip(names, pinning.devices, strict=True):
        services[name] = copy.deepcopy(device)
        services[name]["command"] = [*device["command"], "--name", name]
        _reserve(services[name], gpu)
    for service in services.values():
        if "build" in service:
            service["build"].setdefault("args", {})["TORCH"] = "cuda"
        waits = service.get("depends_on", [])
        if "device" in waits:
            service["depends_on"] = [*(part for part in waits if part != "device"), *names]
    return made


def as_stack(document: Document, *, devices: int, gpus: bool) -> Document:
    """The stack that ``docker stack deploy`` takes: so many devices over all hosts, one edge, one broker.

    With ``gpus``, the edge and every device take a GPU that their host announces as a generic resource.
    """
    made = copy.deepcopy(document)
    made.pop("name", None)
    # An overlay network keeps its interfaces where nobody on the host sees them, so that no links can be shaped.
    made["services"] = {
        name: service
        for name, service in made["services"].items()
        if service.get("network_mode") != "host" and "profiles" not in service
    }
    made.pop("volumes", None)
    for name, service in made["services"].items():
        for key in _NOT_IN_STACKS:
            service.pop(key, None)
        if "volumes" in service:
            service["volumes"] = [volume for volume in service["volumes"] if volume.startswith((".", "/"))]
        deploy = service.setdefault("deploy", {})
        deploy["endpoint_mode"] = "dnsrr"
        # Who only runs once must not run again; nodes come back, and enrol again.
        again = "none" if name == "experiment" else "any"
        deploy["restart_policy"] = {"condition": again, "delay": "1s"}
        if name == "device":
            deploy["replicas"] = devices
        if name in {"broker", "experiment"}:  # what they keep is on the host that people log in to
            deploy["placement"] = {"constraints": ["node.role == manager"]}
        if gpus and name in {"edge", "device"}:
            wanted = [{"discrete_resource_spec": {"kind": _GENERIC, "value": 1}}]
            deploy["resources"] = {"reservations": {"generic_resources": wanted}}
        if "ports" in service:
            service["ports"] = [_on_host(port) for port in service["ports"]]
    for network in made["networks"].values():
        network |= {"driver": "overlay", "attachable": True}
    return {"version": _STACK_FORMAT, **made}


def to_yaml(document: Document, heading: str) -> str:
    """The text of a compose file, with a heading that says what it is."""
    remarks = "".join(f"# {line}\n" for line in heading.splitlines())
    return remarks + yaml.dump(document, Dumper=_InFull, sort_keys=False, width=120)


class _InFull(yaml.SafeDumper):
    """Writes out what several services have in common, for each of them."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002  the base class names it
        return True


def _reserve(service: Document, gpu: str) -> None:
    deploy = service.setdefault("deploy", {})
    device = {"driver": "nvidia", "device_ids": [gpu], "capabilities": ["gpu"]}
    deploy.setdefault("resources", {}).setdefault("reservations", {})["devices"] = [device]


def _on_host(port: str) -> Document:
    """A published port of the host that the service runs on: the swarm's own routing would need a virtual address."""
    published, _, target = port.rpartition(":")
    found = re.search(r":(\$\{[^}]*\}|\d+)$", f":{published}")
    made: Document = {"target": int(target), "mode": "host", "protocol": "tcp"}
    if found and found[1] != "0" and not found[1].endswith(":-0}"):
        made["published"] = int(found[1]) if found[1].isdigit() else found[1]
    return made
