"""Cohorts: the updates whose weighted sum makes a version. Names them, and says which are large enough.

Pure: the coordinator's state machine and the keepers apply the same rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from fedqueue.protocol.messages import Cohort, Offer
from fedqueue.protocol.msgpack import pack
from fedqueue.protocol.signed_envelope import DOMAIN, Scope, digest_of


def offer_digest(offer: Offer) -> str:
    """The name of an offered update in answers and cohorts: SHA-256 of its fields, in hex."""
    return digest_of(pack([offer.client, offer.job, offer.attempt, offer.base, offer.header]))


def cohort_id(scope: Scope, cohort: Cohort) -> str:
    """The name of a cohort: SHA-256 of run, instance, epoch, version and members in their order, in hex."""
    members = [list(member) for member in cohort.members]
    return digest_of(pack([DOMAIN, "cohort", scope.run, scope.instance, scope.epoch, cohort.version, members]))


def crowd_problem(members: Iterable[tuple[str, int]], min_cohort: int, weight_levels: int) -> str:
    """Why the sum of these updates, each a client and an integer weight, would tell too much about one client.

    Empty where it has at least m = `min_cohort` clients, none of which weighs more than `weight_levels` nor more than
    one part in m of all. Then (Σ w)² / Σ w², the effective number of clients, is at least m, too.
    """
    of_client: Counter[str] = Counter()
    for client, weight in members:
        of_client[client] += weight
    if len(of_client) < min_cohort:
        return f"updates of {len(of_client)} clients, of {min_cohort} at least"
    client, most = max(of_client.items(), key=lambda item: item[1])
    if most > weight_levels:
        return f"client {client} weighs {most}, at most {weight_levels} is allowed"
    if most * min_cohort > (total := of_client.total()):
        return f"client {client} weighs {most} of {total}, more than one part in {min_cohort}"
    return ""
