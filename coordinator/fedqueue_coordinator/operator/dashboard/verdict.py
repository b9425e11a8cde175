"""Is a run well, and if not, who has to do what? One sentence for a run, one for each site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

WELL, WATCH, WRONG, ENDED = "well", "watch", "wrong", "ended"
QUIET_SECONDS = 60.0
"""A running run without a version for longer than this, and than ten usual versions, is watched."""
LAST_VERSIONS = 10
NAMED = 5


def of_run(run: Mapping[str, Any]) -> tuple[str, str]:
    """Return a level and a sentence for what `RunSource.shown` returns of a run."""
    if run["state"] != "running":
        because = run["stopped_because"]
        return (WRONG, f"failed: {because}") if run["failed"] else (ENDED, because)
    if not run["leader"]:
        return WRONG, "no coordinator leads this run: start `fedqueue coordinator` again; it continues where it was"
    if run["waiting"]:
        level = WATCH if run["version"] == 0 else WRONG
        return level, run["waiting"]
    quiet, usual = run["quiet_seconds"], run["usual_seconds"]
    if quiet is not None and quiet > max(QUIET_SECONDS, LAST_VERSIONS * usual):
        return WATCH, f"no version for {quiet // 10 * 10:.0f} s, and usually one takes {usual:.1f} s: look at the sites"
    broken = [site["name"] for site in run["clients"] if site["level"] == WRONG]
    odd = [site["name"] for site in run["clients"] if site["level"] == WATCH]
    if broken or odd:
        without = f", without {_names(broken)}" if broken else ""
        look = f"; have a look at {_names(odd)}" if odd else ""
        return WATCH, f"versions are made{without}{look}: the sites below say why"
    return WELL, f"{run['alive']} sites take part, a version takes {run['usual_seconds']:.2g} s"


def of_site(site: Mapping[str, Any], live: Mapping[str, Any] | None, running: bool) -> tuple[str, str]:
    """Return a level and a sentence for one site; `live`: what Redis says about it, None for a run that has ended."""
    if live is not None and running and (wrong := _why_absent(site, live)):
        return WRONG, wrong
    problem, notes, merged = site["problem"], site["notes"], site["merged"]
    if problem:
        return (WATCH, f"its newest job was {problem}") if merged else (WRONG, problem)
    if not merged and not running:
        return WRONG, "no update of it was merged"
    if notes:
        return WATCH, "; ".join(notes)
    if not merged:
        return WELL, "no update of it was merged yet"
    at_work = live["phase"] if live else ""
    return WELL, at_work or ("waits for its next job" if running else "took part")


def _why_absent(site: Mapping[str, Any], live: Mapping[str, Any]) -> str:
    """Say why a site of a running run trains nothing, and who has to do what; empty if it trains or may."""
    problem = site["problem"]
    if problem.startswith("unavailable"):
        why = problem.split(": ", 2)[-1]
        return f"cannot load its data ({why}): its operator has to repair the task or the data, and start the worker"
    if not live["alive"]:
        since = " any more" if site["merged"] else ""
        return f"no worker serves it{since}: its operator has to start `fedqueue-worker`"
    if live["stalled"]:
        return f"its job makes no progress while {live['phase']}: its operator has to look at the worker"
    return ""


def _names(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
