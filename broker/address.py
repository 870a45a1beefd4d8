"""Addresses as a person writes them: a broker's (``HOST``, ``HOST:PORT``, ``mqtt[s]://...``), or a place to listen."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import msgspec

_PORTS = {"mqtt": 1883, "mqtts": 8883}


class BadAddress(ValueError):
    """A text is no address; one sentence says what one looks like."""


class Address(msgspec.Struct, frozen=True):
    """A broker's host (a name or an IP address), its port, and whether it talks TLS."""

    host: str
    port: int
    tls: bool = False

    @classmethod
    def parse(cls, text: str) -> Address:
        """The address in a text; raises ``BadAddress``."""
        try:
            parts = urlsplit(text if "://" in text else f"mqtt://{text}")
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        plain = not (parts.path.strip("/") or parts.query or parts.fragment or parts.username or parts.password)
        if parts.scheme not in _PORTS or not plain or not re.fullmatch(r"[A-Za-z0-9_.:-]+", parts.hostname or ""):
            raise BadAddress(
                f"{_shown(text)!r} is no address of a broker: write mqtt://HOST:PORT, or mqtts://HOST:PORT with TLS"
            )
        return cls(parts.hostname or "", _PORTS[parts.scheme] if port is None else port, parts.scheme == "mqtts")


def listener(text: str, purpose: str, *, least: int = 0) -> tuple[str, int]:
    """Where to listen, from ``PORT`` (of loopback) or ``ADDRESS:PORT``; ``least`` is the lowest port that will do.

    Raises ``BadAddress`` with the ``purpose``, such as "for the live page".
    """
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or not least <= int(port) < 65536:
        raise BadAddress(f"{text!r} is no place {purpose}: give a port, or an address and a port")
    return host or "127.0.0.1", int(port)


def _shown(text: str) -> str:
    """A text for an error, without what may be a password in it."""
    return re.sub(r"//.*@", "//...@", text)[:80]
