"""`fedqueue certs`: a private certificate authority and its TLS certificates, for tests and small closed networks.

Keys are on the curve P-256. The authority signs only end-entity certificates (path length 0), each of them either for a
server or for a client.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedqueue.config.names import CLIENT_ID
from fedqueue.errors import ConfigurationError
from fedqueue.protocol.key_files import write_private

Key = ec.EllipticCurvePrivateKey
AUTHORITY, SERVER = "ca", "server"
"""The names of the files of the authority and of the server."""
CLOCK_SKEW = datetime.timedelta(minutes=5)
"""Certificates are valid from this long ago, so that machines with slow clocks accept them."""


def write_certificates(folder: Path, hosts: Sequence[str], clients: Sequence[str], days: int) -> list[Path]:
    """Write NAME.pem and NAME.key for `ca`, `server` and each of `clients`; returns the paths of the certificates.

    An existing authority in `folder` is used, and certificates that it issued are replaced. `hosts` are the DNS names
    and IP addresses of the server. The certificates are valid for `days`. Keys are readable by their owner only.

    Raises ConfigurationError, before anything is written, for less than one day, for a client name that cannot be a
    file's or is the authority's or the server's, for a file of one of these names from elsewhere, and for an authority
    that has expired.
    """
    if days < 1:
        raise ConfigurationError("--days", days, "must be at least 1")
    for name in clients:
        if not CLIENT_ID.fullmatch(name) or name in (AUTHORITY, SERVER):
            problem = f"must be letters, digits, '.', '_' or '-', and neither {AUTHORITY} nor {SERVER}"
            raise ConfigurationError("--client", name, problem)
    former = _former_authority(folder)
    for name in (SERVER, *clients):
        _require_own(folder, name, former and former[1])
    until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    ca_key, ca = former or _new_authority(folder, until)
    written = [folder / f"{AUTHORITY}.pem"]
    server = (SERVER, ExtendedKeyUsageOID.SERVER_AUTH, hosts)
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


def _former_authority(folder: Path) -> tuple[Key, x509.Certificate] | None:
    """Return the key and the certificate of the authority that an earlier call made in `folder`; None without one."""
    files = [folder / f"{AUTHORITY}.key", folder / f"{AUTHORITY}.pem"]
    if not any(file.exists() for file in files):
        return None
    try:
        key = serialization.load_pem_private_key(files[0].read_bytes(), None)
        certificate = x509.load_pem_x509_certificate(files[1].read_bytes())
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm):
        raise _foreign(folder, AUTHORITY) from None
    if not isinstance(key, Key) or key.public_key() != certificate.public_key():
        raise _foreign(folder, AUTHORITY)
    if certificate.not_valid_after_utc <= datetime.datetime.now(datetime.UTC):
        problem = f"has a CA that expired on {certificate.not_valid_after_utc:%Y-%m-%d}, and what it signs is refused"
        hint = "choose another folder for a new CA, and give its ca.pem to every machine"
        raise ConfigurationError("DIR", str(folder), problem, hint)
    return key, certificate


def _require_own(folder: Path, name: str, authority: x509.Certificate | None) -> None:
    """Raise ConfigurationError if `folder` has a NAME.pem that `authority` did not issue, or a NAME.key without one."""
    pem = folder / f"{name}.pem"
    if not pem.exists() and not pem.with_suffix(".key").exists():
        return
    try:
        certificate = x509.load_pem_x509_certificate(pem.read_bytes())
        if authority is None:
            raise _foreign(folder, name)
        certificate.verify_directly_issued_by(authority)
    except (OSError, ValueError, TypeError, InvalidSignature):
        raise _foreign(folder, name) from None


def _foreign(folder: Path, name: str) -> ConfigurationError:
    problem = f"has a {name}.pem or {name}.key that `fedqueue certs` did not make there, and which would be replaced"
    return ConfigurationError("DIR", str(folder), problem, "choose another folder, or move these files")


def _new_authority(folder: Path, until: datetime.datetime) -> tuple[Key, x509.Certificate]:
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
    _write_pair(folder, AUTHORITY, key, certificate)
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
    write_private(folder / f"{name}.key", pem)
    write_private(folder / f"{name}.pem", certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    return folder / f"{name}.pem"
