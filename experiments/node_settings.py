"""The settings of a scenario's nodes: what every program is told at its start."""

from __future__ import annotations

import os
from typing import Any

import msgspec

from device_node.node import DeviceSettings
from edge_node.node import EdgeSettings
from experiments.places.local import HOST
from experiments.scenario import Devices, Edge, Scenario
from netem.course import Setting
from semct.cache import CacheSettings
from semct.cost import Weights

EDGE = "edge"
CLOUD = "cloud"
TESTBED = "local"


def device_settings(scenario: Scenario) -> list[DeviceSettings]:
    """The settings of every device of a scenario, named device-1, device-2, ..., or as an attached one is."""
    groups = [group for group in scenario.devices for _ in range(group.count)]
    return [
        DeviceSettings(
            name=group.attached or f"device-{number}",
            edge=EDGE,
            **(_shared(scenario, group) | ({"profile": "native"} if group.attached else {})),
        )
        for number, group in enumerate(groups, 1)
    ]


def link_settings(scenario: Scenario) -> dict[str, Setting]:
    """What the scenario says of every node's link, devices first."""
    names = iter(d.name for d in device_settings(scenario))
    settings = {next(names): g.links or scenario.links for g in scenario.devices for _ in range(g.count)}
    others = [e.links for e in scenario.edges for _ in range(e.count)]
    if scenario.cloud is not None:
        others.append(scenario.cloud.links)
    return settings | {h.name: setting for h, setting in zip(helper_settings(scenario), others, strict=True)}


def helper_settings(scenario: Scenario) -> list[EdgeSettings]:
    """The settings of the edge nodes beside the planning one (edge-2, edge-3, ...) and of the cloud."""
    edges = [group for group in scenario.edges for _ in range(group.count)]
    helpers = [_site(scenario, node, f"{EDGE}-{number}") for number, node in enumerate(edges, 2)]
    if scenario.cloud is not None:
        helpers.append(msgspec.structs.replace(_site(scenario, scenario.cloud, CLOUD), kind="cloud"))
    return helpers


def edge_settings(scenario: Scenario) -> EdgeSettings:
    """The settings of a scenario's planning edge."""
    return msgspec.structs.replace(
        _site(scenario, scenario.edge, EDGE),
        plans=True,
        threads=max(1, len(os.sched_getaffinity(0)) // 2),
        small_model=scenario.small_model,
        clusters=scenario.planning.clusters,
        weights=weights(scenario),
        most_shared=scenario.planning.most_shared,
        tier=scenario.planning.tier,
        quality=scenario.planning.quality,
        writer=scenario.planning.writer,
        cache=msgspec.convert(scenario.planning.cache, CacheSettings, from_attributes=True),
    )


def _site(scenario: Scenario, node: Edge, name: str) -> EdgeSettings:
    """The settings of an edge or cloud node that does not plan."""
    return EdgeSettings(name=name, rows=node.rows, plans=False, **_shared(scenario, node))


def _shared(scenario: Scenario, node: Edge | Devices) -> dict[str, Any]:
    """What the settings of all kinds of node have in common; a node holds the scenario's model first."""
    return {
        "testbed": TESTBED,
        "host": HOST,
        "port": scenario.broker.port,
        "models": tuple(dict.fromkeys((scenario.model, *node.models))),
        "profile": node.compute,
        "emulated_models": {
            scenario.model: scenario.emulated_model,
            scenario.small_model: scenario.emulated_small_model,
        },
        "slowdown": scenario.slowdown,
        "latent_dtype": scenario.latent_dtype,
        "torch_device": node.torch_device,
    }


def weights(scenario: Scenario) -> Weights:
    """The weights of a scenario's utility."""
    u = scenario.utility
    return Weights(quality=u.quality, latency=u.latency, energy=u.energy)
