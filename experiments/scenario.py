"""Scenario files: what to run, typed, with errors that name the line, what stands there and what is allowed."""

from __future__ import annotations

import random
import re
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
import yaml
from msgspec import Meta

from broker.messages import Name
from experiments.faults import Faults
from netem.choice import Wanted
from netem.course import Setting
from netem.link import BadLink, decode_quantity, encode_quantity, quantity_schema
from node.settings import TorchDevice

FOLDER = Path(__file__).parent

Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]
Steps = Annotated[int, Meta(ge=0, le=1000)]


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of a scenario; a key that it does not know is an error."""


class Prompts(Part, frozen=True, kw_only=True):
    """Where the users' personal prompts come from: ``list``, or ``groups`` of a prompt ``set``.

    ``set`` names a set that comes with the package or a YAML file beside the scenario; no ``groups`` means all
    of them. Users take the prompts in order and start again at the first when there are more users;
    ``shuffle`` draws a new order from the seed for every repetition.
    """

    set: str = "embedded"
    groups: tuple[str, ...] = ()
    list: tuple[Annotated[str, Meta(min_length=1, max_length=2000)], ...] = ()
    shuffle: bool = False


class Edge(Part, frozen=True, kw_only=True):
    """The edge node that plans. ``compute`` is hardware to emulate, or ``native``; ``rows`` bounds a denoiser call.

    ``models`` are those that it holds beside the scenario's ``model``; they run on the ``torch_device``: ``cpu``, a GPU
    (``cuda``, ``cuda:1``), or ``auto``, a GPU where torch sees one.
    """

    compute: str = "a100"
    rows: Count = 8
    models: tuple[str, ...] = ()
    torch_device: TorchDevice = "cpu"


class MoreEdges(Edge, frozen=True, kw_only=True):
    """A number of like edge nodes beside the one that plans, each behind its link to the cell."""

    count: Count = 1
    links: Setting = Setting()


class Cloud(Edge, frozen=True, kw_only=True):
    """The cloud node: the edge program in a distant data centre, behind a link, without planning."""

    links: Setting = Setting()


class Devices(Part, frozen=True, kw_only=True):
    """A number of like devices; ``models`` are those that each holds beside the scenario's ``model``.

    ``links`` are theirs, where they differ from the scenario's. ``torch_device`` as for an edge; one GPU may serve
    them all. ``attached`` leaves the place to one real device, of this name, which computes as it does.
    """

    count: Count = 1
    attached: Name | None = None
    compute: str = "rtx-3090-ti"
    models: tuple[str, ...] = ()
    torch_device: TorchDevice = "cpu"
    links: Setting | None = None


class DeviceLinks(Setting, frozen=True, kw_only=True):
    """The devices' links. They begin anew with every round, so that all frameworks meet the same.

    ``congestion`` is TCP's congestion control, which what a link gives depends on. ``shaped_by`` is the
    implementation: by default netem where the kernel has it, else userspace links; ``none`` leaves links alone.
    """

    congestion: Annotated[str, Meta(pattern=r"^[a-z0-9_-]{1,15}$")] = "cubic"
    shaped_by: Wanted = "auto"


class Cache(Part, frozen=True, kw_only=True):
    """The edge's cache of intermediate latents: its size, what it drops, and how long a framework's cache lasts.

    ``lcbfu`` is NIRVANA's policy; ``gain`` weighs uses and steps saved against size and age. A cache that lasts a
    ``round`` is new for every framework and repetition, one that lasts the ``run`` is new for every framework.
    """

    megabytes: Positive = 256.0
    policy: Literal["lru", "lfu", "lcbfu", "gain"] = "gain"
    lasts: Literal["round", "run"] = "round"


class Planning(Part, frozen=True, kw_only=True):
    """How frameworks plan: number of clusters K (or how to find it), who words public prompts, which quality curves.

    ``most_shared`` bounds the shared steps of a request; 13 of 28 is what the system model of [13] allows. ``tier``
    says who chooses splits: the ``exact`` search, or agents that ``learned`` to.
    """

    clusters: Count | Literal["utility", "silhouette"] = 3
    most_shared: Steps = 13
    tier: Literal["exact", "learned"] = "exact"
    writer: str = "smollm2"
    cache: Cache = Cache()
    quality: str = "embedded"


class Utility(Part, frozen=True, kw_only=True):
    """The weights of content quality, service latency and energy; they sum to 1."""

    quality: Annotated[float, Meta(ge=0, le=1)] = 0.4
    latency: Annotated[float, Meta(ge=0, le=1)] = 0.3
    energy: Annotated[float, Meta(ge=0, le=1)] = 0.3


class Radio(Part, frozen=True, kw_only=True):
    """Transmission power in watts of a device and of the edge's cell."""

    device_watts: Annotated[float, Meta(ge=0)] = 0.2
    edge_watts: Annotated[float, Meta(ge=0)] = 1.0


class Poisson(Part, frozen=True, kw_only=True):
    """Users ask at random times: so many of them each second, on average."""

    poisson: Positive


class Broker(Part, frozen=True, kw_only=True):
    """The local broker; by default Mosquitto where it is installed, else amqtt."""

    implementation: Literal["mosquitto", "amqtt"] | None = None
    port: Annotated[int, Meta(ge=1, le=65535)] = 1883


class Scenario(Part, frozen=True, kw_only=True):
    """One experiment: every framework serves the same users with the same noise, ``repetitions`` times.

    ``model`` is the diffusion model that runs on every node, ``small_model`` a smaller one of the same latents that
    some nodes may hold beside it; ``emulated_model`` and ``emulated_small_model`` are those whose size and pace
    emulated nodes show for the two. ``edge`` plans, ``edges`` are others beside it. ``arrivals`` say when users ask:
    all at once, at random, or each at a time of its own in seconds, device by device. ``steps`` is T; ``scorer``
    judges the pictures against their prompts, ``objective_scorer`` (a CLIP model, none by default) by themselves;
    ``timeout`` are the seconds that a request has until its deadline, ``window`` those for which the edge collects a
    batch, ``patience`` those that a device waits for the edge before it does it alone (by default as long as the
    deadline allows); ``slowdown`` stretches emulated time, and is divided out of the record. ``faults`` break things.
    """

    name: Name
    description: str = ""
    seed: Annotated[int, Meta(ge=0, lt=2**31)] = 0
    repetitions: Count = 1
    frameworks: Annotated[tuple[str, ...], Meta(min_length=1)] = ("semct", "device-only")
    devices: Annotated[tuple[Devices, ...], Meta(min_length=1)]
    edge: Edge = Edge()
    edges: tuple[MoreEdges, ...] = ()
    cloud: Cloud | None = None
    prompts: Prompts = Prompts()
    arrivals: Poisson | Literal["batch"] | tuple[Annotated[float, Meta(ge=0, le=3600)], ...] = "batch"
    model: str = "embedded"
    small_model: str = "embedded-small"
    emulated_model: str = "sd3-medium"
    emulated_small_model: str = "sd3-800m"
    scorer: str = "embedded"
    objective_scorer: str | None = None
    steps: Annotated[int, Meta(ge=1, le=1000)] = 28
    latent_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    links: DeviceLinks = DeviceLinks()
    planning: Planning = Planning()
    utility: Utility = Utility()
    radio: Radio = Radio()
    broker: Broker = Broker()
    slowdown: Annotated[float, Meta(ge=1)] = 1.0
    window: Positive = 5.0
    timeout: Positive = 120.0
    patience: Positive | None = None
    faults: Faults = Faults()

    @property
    def users(self) -> int:
        """The number of devices."""
        return sum(group.count for group in self.devices)

    @property
    def attached(self) -> tuple[str, ...]:
        """The names of the real devices that it leaves a place to."""
        return tuple(group.attached for group in self.devices if group.attached is not None)

    @property
    def nodes(self) -> dict[str, bool]:
        """The names of the testbed's own nodes, and whether each has a link: the edge that plans stands at the hub."""
        edges = 1 + sum(group.count for group in self.edges)
        groups = [group for group in self.devices for _ in range(group.count)]
        devices = {f"device-{n}": True for n, group in enumerate(groups, 1) if group.attached is None}
        return {"edge": False, **{f"edge-{n}": True for n in range(2, edges + 1)}, **devices} | (
            {"cloud": True} if self.cloud else {}
        )

    @property
    def shaping(self) -> Wanted:
        """What is to shape links; ``none`` where the scenario says nothing of any."""
        said = self.links != DeviceLinks() or self.faults.on_links
        said = said or any(setting != Setting() for setting in self.own_links)
        return self.links.shaped_by if said else "none"

    @property
    def own_links(self) -> list[Setting]:
        """What single groups say of their links."""
        groups = (*self.devices, *self.edges, *((self.cloud,) if self.cloud else ()))
        return [group.links for group in groups if group.links is not None]


class PromptGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Prompts that belong together, and how close they are in meaning."""

    name: str
    prompts: tuple[str, ...]
    closeness: str = ""


class PromptSet(msgspec.Struct, frozen=True, kw_only=True):
    """A file of personal prompts in groups."""

    name: str
    groups: tuple[PromptGroup, ...]
    description: str = ""
    domain: str = ""


class BadScenario(ValueError):
    """A scenario or prompt file is not right: one sentence says where and what is allowed."""


def load_scenario(path: Path) -> Scenario:
    """The scenario in a YAML file; raises ``BadScenario``."""
    scenario: Scenario = load_part(path, Scenario, "scenario")
    weights = scenario.utility
    if abs(weights.quality + weights.latency + weights.energy - 1) > 1e-6:
        raise BadScenario(f"{path}: the weights under `utility` must sum to 1, these are {weights}")
    if scenario.users > 1000:
        raise BadScenario(f"{path}: a cell holds at most 1000 devices, `devices` asks for {scenario.users}")
    _check_attached(scenario, path)
    if isinstance(scenario.arrivals, tuple) and len(scenario.arrivals) != scenario.users:
        times = len(scenario.arrivals)
        raise BadScenario(f"{path}: `arrivals` must give each of {scenario.users} devices a time, it gives {times}")
    if scenario.small_model == scenario.model:
        raise BadScenario(f"{path}: `small_model` must be another model than `model`, both are {scenario.model!r}")
    last = max((c.device or 0 for links in (scenario.links, *scenario.own_links) for c in links.changes), default=0)
    if last > scenario.users:
        raise BadScenario(f"{path}: `changes` has the link of device {last} change, and there are {scenario.users}")
    if scenario.faults.on_links and scenario.links.shaped_by == "none":
        raise BadScenario(f"{path}: faults on links need links that are shaped, `links.shaped_by` is none")
    if wrong := scenario.faults.problem(scenario.nodes):
        raise BadScenario(f"{path}, at `faults`: {wrong}")
    twice = {f for f in scenario.frameworks if scenario.frameworks.count(f) > 1}
    if twice:
        raise BadScenario(f"{path}: framework {twice.pop()!r} stands twice under `frameworks`")
    return scenario


def _check_attached(scenario: Scenario, path: Path) -> None:
    names = [group.attached for group in scenario.devices if group.attached is not None]
    taken = re.compile(r"edge(-\d+)?|device-\d+|cloud|runner|registrar")
    wrong = [name for name in names if names.count(name) > 1 or taken.fullmatch(name)]
    if wrong:
        raise BadScenario(f"{path}: `attached: {wrong[0]}` must be a name that no other node has")
    if any(group.attached is not None and group.count != 1 for group in scenario.devices):
        raise BadScenario(f"{path}: an `attached` device is a single one; give each a group of its own")
    if names and scenario.slowdown != 1:
        raise BadScenario(f"{path}: {names[0]} is a real device and runs in real time, so `slowdown` must be 1")


def arrival_times(scenario: Scenario, repetition: int) -> list[float]:
    """When each device's user asks, in seconds of the emulated world after the round begins."""
    match scenario.arrivals:
        case "batch":
            return [0.0] * scenario.users
        case Poisson(poisson=rate):
            chance = random.Random(f"{scenario.seed}/{repetition}/arrivals")  # noqa: S311  no secret
            return list(accumulate(chance.expovariate(rate) for _ in range(scenario.users)))
        case times:
            return list(times)


def load_prompts(scenario: Scenario, beside: Path) -> tuple[str, ...]:
    """The scenario's personal prompts; ``beside`` is the folder of the scenario. Raises ``BadScenario``."""
    wanted = scenario.prompts
    if wanted.list:
        return wanted.list
    path, prompts = load_prompt_set(wanted.set, beside)
    groups = {g.name: g for g in prompts.groups}
    unknown = [name for name in wanted.groups if name not in groups]
    if unknown:
        raise BadScenario(f"prompt set {path} has no group {unknown[0]!r}; it has {', '.join(groups)}")
    chosen = [groups[name] for name in wanted.groups] if wanted.groups else list(prompts.groups)
    found = tuple(prompt for group in chosen for prompt in group.prompts)
    if not found:
        raise BadScenario(f"the chosen groups of prompt set {path} hold no prompts")
    return found


def load_prompt_set(name: str, beside: Path) -> tuple[Path, PromptSet]:
    """A prompt set that comes with the package, or a YAML file of ``beside``, and its path; or ``BadScenario``."""
    path = FOLDER / "prompts" / f"{name}.yaml"
    if not path.exists():
        path = beside / name
    if not path.is_file():
        have = ", ".join(sorted(p.stem for p in (FOLDER / "prompts").glob("*.yaml")))
        raise BadScenario(
            f"there is no prompt set {name!r}: it is neither a file {path} nor one of those that come "
            f"with the package ({have})"
        )
    prompts: PromptSet = load_part(path, PromptSet, "prompt set")
    return path, prompts


def schema() -> dict[str, Any]:
    """The JSON schema of a scenario file."""
    return msgspec.json.schema(Scenario, schema_hook=quantity_schema)


def to_yaml(scenario: Scenario) -> str:
    """The scenario with every default spelled out."""
    return yaml.safe_dump(msgspec.to_builtins(scenario, enc_hook=encode_quantity), sort_keys=False, allow_unicode=True)


def load_part(path: Path, kind: Any, what: str) -> Any:
    """The YAML file as a struct of that kind; ``what`` names it in errors. Raises ``BadScenario``."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadScenario(f"the {what} {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadScenario(f"the {what} {path} is no text in UTF-8") from error
    try:
        document = yaml.compose(text, Loader=yaml.SafeLoader)
        return msgspec.convert(yaml.safe_load(text), kind, strict=True, dec_hook=decode_quantity)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise BadScenario(f"{path}, line {line}: this is no YAML ({error.problem})") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise BadScenario(f"{path} is no YAML: {str(error).splitlines()[0]}") from error
    except BadLink as error:
        raise BadScenario(f"{path}: {error}") from error
    except msgspec.ValidationError as error:
        raise BadScenario(f"{path}, line {_sentence(text, document, kind, str(error))}") from error


def _sentence(text: str, document: yaml.Node | None, kind: type[Any], error: str) -> str:
    """Where in the text the validator's ``error`` applies, what stands there, and what is allowed."""
    message, _, where = error.partition(" - at `")
    where = where.rstrip("`").removeprefix("key in ").removeprefix("$").lstrip(".")
    node = _node_at(document, where)
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", message)
    found = ""
    if unknown is not None and isinstance(node, yaml.MappingNode):
        node = next(key for key, _ in node.value if key.value == unknown[1])
        allowed = ", ".join(_struct_at(kind, where).__struct_fields__)
        message = f"there is no key {unknown[1]!r} here; there is {allowed}"
    elif isinstance(node, yaml.ScalarNode):
        stands = repr(text[node.start_mark.index : node.end_mark.index])
        found = "" if message.startswith(stands) else f" {stands}"
    line = node.start_mark.line + 1 if node is not None else 1
    place = f", at `{where}`" if where else ""
    return f"{line}{place}{found}: {message[0].lower() + message[1:]}"


def _struct_at(kind: Any, path: str) -> Any:
    """The struct type that a path such as ``devices[0]`` leads to."""
    for step in re.findall(r"[^.\[\]]+", path):
        if not step.isdigit() and step != "...":
            kind = get_type_hints(kind)[step]
        while not hasattr(kind, "__struct_fields__"):
            kind = get_args(kind)[0]
    return kind


def _node_at(node: yaml.Node | None, path: str) -> yaml.Node | None:
    """The YAML node that a path such as ``devices[0].count`` leads to, or the last one on the way."""
    for step in re.findall(r"[^.\[\]]+", path):
        if isinstance(node, yaml.MappingNode):
            below = next((value for key, value in node.value if key.value == step), None)
        elif isinstance(node, yaml.SequenceNode) and step.isdigit() and int(step) < len(node.value):
            below = node.value[int(step)]
        else:
            below = None
        if below is None:
            return node
        node = below
    return node
