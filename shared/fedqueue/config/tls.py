"""TLS to Redis: which certificates are trusted and shown, and what a failed handshake means in one line."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from pathlib import Path

from fedqueue.errors import ConfigurationError

_EXPIRED, _OTHER_HOST, _OTHER_ADDRESS = 10, 62, 64  # OpenSSL's X509_V_ERR_…
_ALERTS = {
    "certificate required": "the server wants a client certificate: set redis.cert_file and redis.key_file",
    "handshake failure": "the server wants a client certificate, or other ciphers: set redis.cert_file, redis.key_file",
    "unknown ca": "the server does not know the CA of redis.cert_file",
    "certificate expired": "redis.cert_file has expired",
    "bad certificate": "the server does not accept redis.cert_file",
    "certificate unknown": "the server does not accept redis.cert_file",
}


@dataclass(frozen=True)
class Tls:
    """PEM files. Without `ca_file` the system's authorities are trusted; with it, nobody but the ones in it."""

    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""

    def __post_init__(self) -> None:
        if bool(self.cert_file) != bool(self.key_file):
            missing, other = ("key_file", "cert_file") if self.cert_file else ("cert_file", "key_file")
            raise ConfigurationError(f"redis.{missing}", "", f"is needed with redis.{other}")

    def context(self) -> ssl.SSLContext:
        """A context for one connection, so that renewed files count from the next one on; TLS 1.2 at least.

        Raises ConfigurationError that names the file which cannot be used.
        """
        for key in ("ca_file", "cert_file", "key_file"):
            path = getattr(self, key)
            if path and not Path(path).is_file():
                raise ConfigurationError(f"redis.{key}", path, "is no file that can be read")
        try:
            context = ssl.create_default_context(cafile=self.ca_file or None)
        except (ssl.SSLError, OSError) as error:
            raise ConfigurationError("redis.ca_file", self.ca_file, f"holds no certificates: {error}") from None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.cert_file:
            try:
                context.load_cert_chain(self.cert_file, self.key_file)
            except (ssl.SSLError, OSError) as error:
                accepted = f"is no certificate that belongs to redis.key_file {self.key_file}: {error}"
                raise ConfigurationError("redis.cert_file", self.cert_file, accepted) from None
        return context

    def explain(self, error: Exception) -> str:
        """What has to be put right, where waiting does not help; an empty string for what may pass."""
        if isinstance(error, ssl.SSLCertVerificationError):
            if error.verify_code == _EXPIRED:
                return "the server's certificate has expired"
            if error.verify_code in (_OTHER_HOST, _OTHER_ADDRESS):
                return f"the server's certificate is for another host ({error.verify_message})"
            trusted = f"redis.ca_file {self.ca_file}" if self.ca_file else "a CA of this system (set redis.ca_file)"
            return f"the server's certificate is not signed by {trusted}: {error.verify_message}"
        text = str(error).lower().replace("_", " ")
        if "wrong version number" in text or "record layer failure" in text:
            return "the server does not speak TLS on this port: is it redis:// instead of rediss://?"
        alert = re.search(r"alert ([a-z ]+?) *[\](']", text)
        return _ALERTS.get(alert[1], "") if alert else ""
