"""Which kind of links a testbed gets."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from netem.hosts import Links, LinksUnavailable, NamespaceError, enter_host
from netem.kernel import NetemLinks, PlainLinks
from netem.userspace import UserspaceLinks, try_a_device

Wanted = Literal["auto", "netem", "userspace", "none"]


def choose(wanted: Wanted, *, seed: int | None = None) -> Links:
    """The links of a kind, not open yet; ``auto`` is the kernel's netem where it works, else the userspace kind.

    The process has entered the hub. ``seed`` makes the losses of userspace links repeatable; netem has its own
    chances. ``auto`` raises `LinksUnavailable` with what both kinds lack; another kind does so when it is opened.
    """
    match wanted:
        case "none":
            return PlainLinks()
        case "netem":
            return NetemLinks()
        case "userspace":
            return UserspaceLinks(seed=seed)
        case "auto":
            # The thread tries in a namespace of its own, which goes with it.
            with ThreadPoolExecutor(max_workers=1) as scratch:
                return scratch.submit(_choose_what_works, seed).result()


def _choose_what_works(seed: int | None) -> Links:
    lacking = []
    try:
        enter_host()
    except NamespaceError as error:
        raise LinksUnavailable(str(error)) from error
    netem = NetemLinks()
    try:
        netem.open()
        netem.close()
        return NetemLinks()
    except LinksUnavailable as error:
        lacking.append(str(error))
    try:
        try_a_device()
        return UserspaceLinks(seed=seed)
    except LinksUnavailable as error:
        lacking.append(str(error))
    raise LinksUnavailable("; ".join(lacking))
