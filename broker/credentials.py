"""What a device shows a broker that asks for it: a file made by ``semct enroll``, kept by the device alone."""

from __future__ import annotations

import ssl
from pathlib import Path

import msgspec

from broker.messages import Name


class BadCredentials(ValueError):
    """A file of credentials cannot be read or is none."""


class Credentials(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A name, its password, and the certificate (PEM) of the authority that vouches for the broker.

    They only ever go over TLS, to a broker with a certificate of that authority.
    """

    name: Name
    password: str
    ca: str

    def __repr__(self) -> str:  # it must not show in a log or a traceback
        return f"Credentials(name={self.name!r})"

    def tls(self) -> ssl.SSLContext:
        """How to talk to the broker; raises ``BadCredentials``."""
        try:
            context = ssl.create_default_context(cadata=self.ca)
        except (ssl.SSLError, ValueError) as error:
            raise BadCredentials(f"the credentials of {self.name} name no authority: {error}") from error
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context


def load_credentials(path: Path) -> Credentials:
    """The credentials in a file; raises ``BadCredentials``."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Credentials)
    except OSError as error:
        raise BadCredentials(f"the credentials {path} cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise BadCredentials(f"{path} holds no credentials; `semct enroll NAME` makes some") from error
