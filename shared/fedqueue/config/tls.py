"""TLS to Redis: which certificates are trusted and presented, and one-line explanations of failed handshakes."""

from __future__ import annotations

import datetime
import re
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

from fedqueue.errors import ConfigurationError

_NOT_YET_VALID, _EXPIRED, _OTHER_HOST, _OTHER_ADDRESS = 9, 10, 62, 64  # OpenSSL's X509_V_ERR_…
_ALERTS = {
    "certificate required": "the server requires a client certificate: set redis.cert_file and redis.key_file",
    "handshake failure": "the server requires a client certificate or other ciphers: "
    "set redis.cert_file and redis.key_file",
    "unknown ca": "the server does not know the CA of redis.cert_file: use one that the server's CA has signed",
    "certificate expired": "redis.cert_file has expired, or the CA that signed it: replace it by a new one",
    "bad certificate": "the server does not accept redis.cert_file: ask the server's operator for a new one",
    "certificate unknown": "the server does not accept redis.cert_file: ask the server's operator for a new one",
}


@dataclass(frozen=True)
class Tls:
    """Paths of PEM files. Without `ca_file` the system's authorities are trusted; with it, only those in the file."""

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None

    def __post_init__(self) -> None:
        if bool(self.cert_file) != bool(self.key_file):
            missing, other = ("key_file", "cert_file") if self.cert_file else ("cert_file", "key_file")
            raise ConfigurationError(f"redis.{missing}", None, f"missing; redis.{other} is set", f"set redis.{missing}")

    def context(self) -> ssl.SSLContext:
        """A new TLS context (1.2 at least) for one connection: the files are read again, so that renewed ones are used.

        Raises ConfigurationError that names the file which cannot be used.
        """
        for key in ("ca_file", "cert_file", "key_file"):
            path = getattr(self, key)
            if path and not Path(path).is_file():
                raise ConfigurationError(f"redis.{key}", path, "no such file")
        try:
            context = ssl.create_default_context(cafile=self.ca_file or None)
        except (ssl.SSLError, OSError) as error:
            raise ConfigurationError(
                "redis.ca_file", self.ca_file, f"holds no certificates: {error}", "write the path of a PEM file"
            ) from None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.cert_file:
            try:
                context.load_cert_chain(self.cert_file, self.key_file)
            except (ssl.SSLError, OSError) as error:
                problem = f"holds no certificate that belongs to redis.key_file {self.key_file}: {error}"
                hint = "write the paths of a certificate and of its key, both in PEM form"
                raise ConfigurationError("redis.cert_file", self.cert_file, problem, hint) from None
        return context

    def explain(self, error: Exception) -> str:
        """What to change, for errors that do not pass by waiting; an empty string for all other errors."""
        if isinstance(error, ssl.SSLCertVerificationError):
            return self._explain_verification(error)
        text = str(error).lower().replace("_", " ")
        if "wrong version number" in text or "record layer failure" in text:
            return "the server does not speak TLS on this port: is it redis:// instead of rediss://?"
        alert = re.search(r"alert ([a-z ]+?) *[\](']", text)
        return _ALERTS.get(alert[1], "") if alert else ""

    def _explain_verification(self, error: ssl.SSLCertVerificationError) -> str:
        """Say why this machine does not accept the server's certificate, and what to change."""
        if error.verify_code == _EXPIRED:
            if expired := _expired(self.ca_file):
                return f"redis.ca_file {self.ca_file} {expired}: the server needs a certificate of a new CA"
            return "the server's certificate has expired: the server needs a new one"
        if error.verify_code == _NOT_YET_VALID:
            return "the server's certificate is not valid yet: compare the clocks of both machines"
        if error.verify_code in (_OTHER_HOST, _OTHER_ADDRESS):
            return (
                f"the server's certificate is for another host ({error.verify_message}): "
                "write a name that is in the certificate into the URL, or make a certificate for this name"
            )
        trusted = f"redis.ca_file {self.ca_file}" if self.ca_file else "a CA of this system"
        return (
            f"the server's certificate is not signed by {trusted} ({error.verify_message}): "
            "set redis.ca_file to the file of the server's CA"
        )


def _expired(ca_file: str | None) -> str:
    """Say when the last CA in a PEM file expired; an empty string if one is valid, and for no such file."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(ca_file)
    except (ssl.SSLError, OSError, TypeError):
        return ""
    ends = [ssl.cert_time_to_seconds(str(certificate["notAfter"])) for certificate in context.get_ca_certs()]
    expired = bool(ends) and max(ends) < time.time()
    return f"expired on {datetime.datetime.fromtimestamp(max(ends), datetime.UTC):%Y-%m-%d}" if expired else ""
