"""`fedqueue certs`: a private certificate authority and its TLS certificates, for tests and small closed networks.

Keys are on the curve P-256. The authority signs only end-entity certificates (path length 0), each of them either for a
server or for a client.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedqueue.errors import ConfigurationError

Key = ec.EllipticCurvePrivateKey
CLOCK_SKEW = datetime.timedelta(minutes=5)
"""Certificates are valid from this long ago, so that machines with slow clocks accept them."""


def write_certificates(folder: Path, hosts: Sequence[str], clients: Sequence[str], days: int) -> list[Path]:
    """Write NAME.pem and NAME.key for `ca`, `server` and each of `clients`; returns the paths of the certificates.

    An existing authority in `folder` is used; the other certificates are replaced. `hosts` are the DNS names and IP
    addresses of the server. The certificates are valid for `days`. Keys are readable by their owner only. Raises
    ConfigurationError for less than one day, and for a ca.key of another type.
    """
    if days < 1:
        raise ConfigurationError("--days", days, "must be at least 1")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    ca_key, ca = _authority(folder, until)
    written = [folder / "ca.pem"]
    server = ("server", ExtendedKeyUsageOID.SERVER_AUTH, hosts)
    for name, usage, names in [server, *((c, ExtendedKeyUsageOID.CLIENT_AUTH, [c]) for c in clients)]:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _builder(name, ca.subject, key, min(until, ca.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectAlternativeName([_general_name(n) for n in names]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
            .sign(ca_key, hashes.SHA256())
        )
        written.append(_write_pair(folder, name, key, certificate))
    return written


def _authority(folder: Path, until: datetime.datetime) -> tuple[Key, x509.Certificate]:
    if (folder / "ca.key").exists():
        key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
        if not isinstance(key, Key):
            raise ConfigurationError(
                "DIR", str(folder), "its ca.key is not from `fedqueue certs`", "choose another folder"
            )
        return key, x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    key = ec.generate_private_key(ec.SECP256R1())
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    certificate = (
        _builder("fedqueue test CA", None, key, until)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    _write_pair(folder, "ca", key, certificate)
    return key, certificate


def _builder(name: str, issuer: x509.Name | None, key: Key, until: datetime.datetime) -> x509.CertificateBuilder:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer or subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(until, datetime.datetime.now(datetime.UTC)) - CLOCK_SKEW)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write_pair(folder: Path, name: str, key: Key, certificate: x509.Certificate) -> Path:
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = folder / f"{name}.key"
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
    (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return folder / f"{name}.pem"
