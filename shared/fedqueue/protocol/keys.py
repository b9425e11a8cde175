"""The names of all Redis keys that fedqueue writes; no other module spells one.

All keys of a run share the hash tag `{RUN}`. On Redis Cluster they are therefore in one slot, which scripts require.
RQ names its own keys (`rq:*`).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

RUNS = "fedqueue:runs"  # set of run names: the only key outside a run's hash tag
_TAG = re.compile(r"(?<=-[0-9]{8})-[0-9a-f]{12}$")


def client_tag(run: str, client: str) -> str:
    """A tag of twelve characters that ends the name of each job of this client in this run.

    Access rules are patterns of keys, and RQ's keys contain nothing but the job's name, in RQ's alphabet. All tags
    have the same length, 48 bits of SHA-256, so that no client's pattern matches another client's jobs.
    """
    return hashlib.sha256(f"{run}/{client}".encode()).hexdigest()[:12]


def job_name(run: str, epoch: int, number: int, client: str) -> str:
    """The name of a job; it contains the epoch, so a late update cannot be mistaken for another job's."""
    return f"{run}-{f'e{epoch}-' if epoch else ''}{number:08d}-{client_tag(run, client)}"


def job_without_tag(job: str) -> str:
    """A job's name without its client's tag: two jobs of a run never share it."""
    return _TAG.sub("", job)


@dataclass(frozen=True)
class Keys:
    """The keys of one run."""

    run: str

    def _key(self, name: str) -> str:
        return f"fedqueue:{{{self.run}}}:{name}"

    @property
    def config(self) -> str:
        """hash: config (JSON), manifest (msgpack), state, stopped_because, epoch, descriptor (signed)"""
        return self._key("config")

    @property
    def leader(self) -> str:
        """hash: token (fencing; rises with each leader), owner, expires (server ms), waiting (what keeps the run from
        going on)"""
        return self._key("leader")

    @property
    def head(self) -> str:
        """hash: version, totals (msgpack: the committed counters), job_number, state_chunks, token of its commit,
        commits_since_scan (commits since the last scan for base versions in use)"""
        return self._key("head")

    @property
    def versions(self) -> str:
        """zset: the versions whose chunks are stored, scored by number"""
        return self._key("versions")

    @property
    def clients(self) -> str:
        """set: the clients that the run knows, each with its own `site` and its own stream of `updates`"""
        return self._key("clients")

    @property
    def site_prefix(self) -> str:
        """The beginning of each key of `site`."""
        return self._key("site:")

    def site(self, client: str) -> str:
        """hash: holder (token of the worker process that serves the client), alive (end of its lease, server ms), job
        (the client's open job), registration (msgpack), refused:REASON (number of posts and claims refused)"""
        return f"{self.site_prefix}{client}"

    @property
    def question(self) -> str:
        """string that expires: what `fedqueue describe` asks of the sites before the run begins, signed"""
        return self._key("question")

    def answer(self, client: str) -> str:
        """hash that expires: claim:PART (the worker process that answers), PART:PIECE (a piece of the answer,
        signed)"""
        return self._key(f"answer:{client}")

    @property
    def last_jobs(self) -> str:
        """hash: client -> the number of its last job"""
        return self._key("last_jobs")

    @property
    def jobs(self) -> str:
        """set: the jobs that have no ledger record yet"""
        return self._key("jobs")

    def job(self, job: str) -> str:
        """hash: client, order (msgpack). Only a coordinator writes it."""
        return self._key(f"job:{job}")

    def attempt(self, job: str) -> str:
        """hash: number, holder, base (version), pinned (the base must stay stored), lease (end, server ms), posted,
        chunks"""
        return self._key(f"attempt:{job}")

    @property
    def pinned(self) -> str:
        """set: versions that stay stored until the run ends"""
        return self._key("pinned")

    @property
    def updates_prefix(self) -> str:
        """The beginning of each key of `updates`."""
        return self._key("updates:")

    def updates(self, client: str) -> str:
        """stream: what the client's worker reports (updates, joins, leaves, hand-backs, failures) until a script
        deletes the entry; with an empty client, the coordinator's own stream"""
        return f"{self.updates_prefix}{client}"

    @property
    def wakeup(self) -> str:
        """channel: carries the name of each stream of `updates` that gets an entry; a hint, see `inbox.py`"""
        return self._key("wakeup")

    @property
    def ledger(self) -> str:
        """stream: one entry per version, rejection, abandonment and evaluation"""
        return self._key("ledger")

    @property
    def counts(self) -> str:
        """hash: merged:CLIENT, rejected:REASON, abandoned:REASON (numbers of the ledger's records), evaluation, failure
        (the newest record of an evaluation, and of a failure: msgpack)"""
        return self._key("counts")

    @property
    def model_prefix(self) -> str:
        """The beginning of each key of `model`."""
        return self._key("model:")

    def model(self, version: int) -> str:
        """string chunks at `…:0`, `…:1`, …"""
        return f"{self.model_prefix}{version}"

    def staged_model(self, token: int) -> str:
        """string chunks that expire: a model that the leader with this fencing token has staged for its next commit"""
        return f"{self.model_prefix}staged:{token}"

    @property
    def frozen(self) -> str:
        """string chunks at `…:0`, `…:1`, …: the model's frozen tensors, which are in no version"""
        return f"{self.model_prefix}frozen"

    @property
    def state_prefix(self) -> str:
        """The beginning of each key of `state`."""
        return self._key("state:")

    def state(self, version: int) -> str:
        """string chunks: the server optimizer's state after `version`"""
        return f"{self.state_prefix}{version}"

    def staged_state(self, token: int) -> str:
        """string chunks that expire: the server optimizer's state for `staged_model`"""
        return f"{self.state_prefix}staged:{token}"

    @property
    def payload_prefix(self) -> str:
        """The beginning of each key of `payload`."""
        return self._key("payload:")

    def payload(self, job: str, attempt: int) -> str:
        """string chunks: the frame of one attempt's update"""
        return f"{self.payload_prefix}{job}:{attempt}"

    def kept_payload(self, job: str, attempt: int) -> str:
        """string chunks: the payload after its merge, if payloads are kept"""
        return f"{self.payload_prefix}kept:{job}:{attempt}"

    @property
    def keeper_prefix(self) -> str:
        """The beginning of each key of `keeper`."""
        return self._key("keeper:")

    def keeper(self, keeper: str) -> str:
        """string: the keeper's encryption key for this run instance, signed by it"""
        return f"{self.keeper_prefix}{keeper}"

    def asks(self, keeper: str) -> str:
        """stream: what the coordinator asks of the keeper (offers, cohorts), until the updates' jobs have ended"""
        return self._key(f"asks:{keeper}")

    @property
    def says_prefix(self) -> str:
        """The beginning of each key of `says`."""
        return self._key("says:")

    def says(self, keeper: str) -> str:
        """stream: the keeper's answers, until the coordinator has read them"""
        return f"{self.says_prefix}{keeper}"

    @property
    def cohort(self) -> str:
        """string: the cohort under way, signed by the coordinator, until its version is committed"""
        return self._key("cohort")

    @property
    def mask_prefix(self) -> str:
        """The beginning of each key of `mask`."""
        return self._key("mask:")

    def mask(self, cohort: str, keeper: str) -> str:
        """string chunks: the weighted sum of the masks of the cohort with this id, as the keeper released it"""
        return f"{self.mask_prefix}{keeper}:{cohort}"

    @property
    def kept_mask_prefix(self) -> str:
        """The beginning of each key of `kept_mask`."""
        return self._key("kept_mask:")

    def kept_mask(self, cohort: str, keeper: str) -> str:
        """string chunks: the masks of a cohort whose version is committed, if payloads are kept"""
        return f"{self.kept_mask_prefix}{keeper}:{cohort}"

    @property
    def pattern(self) -> str:
        """A pattern for SCAN that matches every key of the run."""
        return f"fedqueue:{{{self.run}}}:*"

    def queue(self, client: str) -> str:
        """The name of the client's RQ queue (RQ adds its own prefix)."""
        return f"fedqueue:{self.run}:{client}"
