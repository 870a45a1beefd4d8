"""A local authority: one folder with the broker's certificate, everyone's password hashes and rights, and a file of
credentials for each name, to be carried to its device.

    ca.crt  broker.crt  broker.key  passwords  rights      what Mosquitto reads
    ca.key                                                 what signs; it need not be where the broker is
    NAME.json                                              what NAME shows; it need not stay here
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import os
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from broker.credentials import Credentials
from broker.local import CERTIFICATE, KEY, PASSWORDS, RIGHTS
from broker.rights import Role, device_rights, more_rights
from broker.topics import Topics

_CA, _CA_KEY = "ca.crt", "ca.key"
_VALID = timedelta(days=3650)
_ITERATIONS = 1000  # of PBKDF2; the passwords are random and long, so that guessing is hopeless anyway


class NoAuthority(ValueError):
    """A folder holds no authority, or cannot be written."""


def make_authority(folder: Path, hosts: Sequence[str]) -> None:
    """Make an authority, where there is none, and a certificate of the broker for these names and addresses.

    Raises ``NoAuthority``.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (folder / _CA_KEY).exists():
            _make_ca(folder)
        _certify(folder, hosts)
        for name, text in ((PASSWORDS, ""), (RIGHTS, device_rights())):
            if not (folder / name).exists():
                _write(folder / name, text.encode())
    except OSError as error:
        raise NoAuthority(f"the authority's folder {folder} cannot be written: {error.strerror}") from error


def enroll(folder: Path, name: str, *, role: Role = "device") -> Path:
    """Give a name a new password and its rights; the file to carry to the device. Raises ``NoAuthority``.

    A password that the name had before is no longer good.
    """
    try:
        Topics(name)
        ca = (folder / _CA).read_text(encoding="ascii")
        passwords = (folder / PASSWORDS).read_text(encoding="ascii").splitlines()
        rights = (folder / RIGHTS).read_text(encoding="ascii")
    except OSError as error:
        raise NoAuthority(f"{folder} holds no authority: `semct enroll --ca ADDRESS` makes one") from error
    except ValueError as error:
        raise NoAuthority(str(error)) from error
    password = secrets.token_urlsafe(32)
    others = [line for line in passwords if not line.startswith(f"{name}:")]
    own = [part for part in rights.split("\n\n") if not part.startswith(f"user {name}\n")]
    try:
        _write(folder / RIGHTS, ("\n\n".join(own).rstrip("\n") + "\n" + more_rights(name, role)).encode())
        _write(folder / PASSWORDS, "".join(f"{line}\n" for line in [*others, f"{name}:{hashed(password)}"]).encode())
        path = folder / f"{name}.json"
        _write(path, msgspec.json.encode(Credentials(name=name, password=password, ca=ca)) + b"\n")
    except OSError as error:
        raise NoAuthority(f"the authority's folder {folder} cannot be written: {error.strerror}") from error
    return path


def hashed(password: str) -> str:
    """A password as Mosquitto 2 keeps it: PBKDF2 with SHA-512 and a random salt."""
    salt = secrets.token_bytes(12)  # what Mosquitto 2.0 reads
    key = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, _ITERATIONS)
    return f"$7${_ITERATIONS}${base64.b64encode(salt).decode()}${base64.b64encode(key).decode()}"


def _make_ca(folder: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"SemCT testbed {secrets.token_hex(4)}")])
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    builder = (
        _builder(name, name, key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    certificate = builder.sign(key, hashes.SHA256())
    _write(folder / _CA_KEY, _pem(key))
    _write(folder / _CA, certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)


def _certify(folder: Path, hosts: Sequence[str]) -> None:
    authority = x509.load_pem_x509_certificate((folder / _CA).read_bytes())
    signer = serialization.load_pem_private_key((folder / _CA_KEY).read_bytes(), password=None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)  # noqa: S101  _make_ca wrote it
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "SemCT broker")])
    names = x509.SubjectAlternativeName([_general(host) for host in dict.fromkeys([*hosts, "localhost", "127.0.0.1"])])
    signed_by = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    builder = (
        _builder(subject, authority.subject, key.public_key())
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(signed_by, critical=False)
    )
    _write(folder / KEY, _pem(key))
    _write(folder / CERTIFICATE, builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # for devices whose clocks are behind
        .not_valid_after(now + _VALID)
    )


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
    new.replace(path)
