"""The name of every Redis key that fedqueue writes; nothing else spells one.

All keys of a run share the hash tag `{RUN}`, so on Redis Cluster they live in one slot and the scripts stay
atomic. RQ's own keys (`rq:*`) are RQ's to name.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

RUNS = "fedqueue:runs"  # set of run names: the only key outside a run's hash tag
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_TAG = re.compile(r"(?<=-[0-9]{8})-[0-9a-f]{12}$")
CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def client_tag(run: str, client: str) -> str:
    """Twelve characters for a client of a run, at the end of each name of its jobs.

    Access rights are patterns of keys, and those of RQ's keys have room for nothing but the job's name, in RQ's
    alphabet. A tag has one length, so that no client's pattern matches another's jobs: 48 bits of SHA-256.
    """
    return hashlib.sha256(f"{run}/{client}".encode()).hexdigest()[:12]


def job_name(run: str, epoch: int, number: int, client: str) -> str:
    """Names of different epochs differ: a straggler's update cannot be taken for another job's."""
    return f"{run}-{f'e{epoch}-' if epoch else ''}{number:08d}-{client_tag(run, client)}"


def job_without_tag(job: str) -> str:
    """What two jobs of one run never share; jobs of runs before there were tags have none."""
    return _TAG.sub("", job)


@dataclass(frozen=True)
class Keys:
    """The keys of one run."""

    run: str

    def _key(self, name: str) -> str:
        return f"fedqueue:{{{self.run}}}:{name}"

    @property
    def config(self) -> str:
        """hash: config (JSON), manifest (msgpack), state, started, stopped_because"""
        return self._key("config")

    @property
    def leader(self) -> str:
        """hash: token (fencing, rises), owner, expires (server ms)"""
        return self._key("leader")

    @property
    def head(self) -> str:
        """hash: version, job_number, counters of the run as the last commit left them"""
        return self._key("head")

    @property
    def versions(self) -> str:
        """zset: the versions whose chunks are stored, scored by number"""
        return self._key("versions")

    @property
    def clients(self) -> str:
        """set: the clients that the run knows, each with a `site` and a stream of `updates` of its own"""
        return self._key("clients")

    @property
    def site_prefix(self) -> str:
        return self._key("site:")

    def site(self, client: str) -> str:
        """hash: holder (token of the worker that serves it), alive (end, server ms), job (its open one), registration
        (msgpack), refused:REASON (posts refused at the door)"""
        return f"{self.site_prefix}{client}"

    @property
    def turns(self) -> str:
        """hash: client -> the number of its last job"""
        return self._key("turns")

    @property
    def jobs(self) -> str:
        """set: the jobs that are open or posted and not yet committed"""
        return self._key("jobs")

    def job(self, job: str) -> str:
        """hash: client, order (msgpack). Only a coordinator writes it."""
        return self._key(f"job:{job}")

    def attempt(self, job: str) -> str:
        """hash: number, holder, base (version), held (base is not deleted), lease (end, server ms), posted, chunks"""
        return self._key(f"attempt:{job}")

    @property
    def pinned(self) -> str:
        """set: versions that the coordinator keeps stored, whatever jobs do"""
        return self._key("pinned")

    @property
    def updates_prefix(self) -> str:
        return self._key("updates:")

    def updates(self, client: str) -> str:
        """stream: what the client's worker reports (updates, joins, leaves, hand-backs, failures) until a script
        deletes it; that without a client is the coordinator's own"""
        return f"{self.updates_prefix}{client}"

    @property
    def wakeup(self) -> str:
        """channel: names the stream of `updates` that has just got an entry; a hint, see `inbox.py`"""
        return self._key("wakeup")

    @property
    def ledger(self) -> str:
        """stream: one entry per version, rejection, abandonment and evaluation"""
        return self._key("ledger")

    @property
    def model_prefix(self) -> str:
        return self._key("model:")

    def model(self, version: int) -> str:
        """string chunks at `…:0`, `…:1`, …"""
        return f"{self.model_prefix}{version}"

    def staged_model(self, token: int) -> str:
        """string chunks that expire: what the leader with that token is about to commit as a version"""
        return f"{self.model_prefix}staged:{token}"

    @property
    def state_prefix(self) -> str:
        return self._key("state:")

    def state(self, version: int) -> str:
        """string chunks: the server optimizer's state after `version`"""
        return f"{self.state_prefix}{version}"

    def staged_state(self, token: int) -> str:
        """string chunks that expire: the server optimizer's state that belongs to `staged_model`"""
        return f"{self.state_prefix}staged:{token}"

    @property
    def payload_prefix(self) -> str:
        return self._key("payload:")

    def payload(self, job: str, attempt: int) -> str:
        """string chunks: the frame of one attempt's update"""
        return f"{self.payload_prefix}{job}:{attempt}"

    def kept_payload(self, job: str, attempt: int) -> str:
        """string chunks: the same after its merge, where payloads are kept"""
        return f"{self.payload_prefix}kept:{job}:{attempt}"

    @property
    def pattern(self) -> str:
        """Matches every key of the run, for SCAN."""
        return f"fedqueue:{{{self.run}}}:*"

    def queue(self, client: str) -> str:
        """The name of the client's RQ queue (RQ adds its own prefix)."""
        return f"fedqueue:{self.run}:{client}"
