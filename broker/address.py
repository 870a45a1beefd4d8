"""Where a broker is, as a person writes it: ``HOST``, ``HOST:PORT`` or ``mqtt://HOST:PORT``."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import msgspec

_PORT = 1883


class BadAddress(ValueError):
    """A text is no broker's address; one sentence says what one looks like."""


class Address(msgspec.Struct, frozen=True):
    """A broker's host (a name or an IP address) and port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """The address in a text; raises ``BadAddress``."""
        try:
            parts = urlsplit(text if "://" in text else f"mqtt://{text}")
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        plain = not (parts.path.strip("/") or parts.query or parts.fragment or parts.username or parts.password)
        if parts.scheme != "mqtt" or not plain or not re.fullmatch(r"[A-Za-z0-9_.:-]+", parts.hostname or ""):
            raise BadAddress(f"{text[:80]!r} is no address of a broker: write mqtt://HOST or mqtt://HOST:PORT")
        return cls(parts.hostname or "", _PORT if port is None else port)
