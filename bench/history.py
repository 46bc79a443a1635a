"""The results that were ever committed, from git: one Report per file, device and measured commit.

A result file is overwritten when it is measured again. Its older versions are in git's history.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from bench.record import RESULTS, ROOT, Report, output


def committed(root: Path = ROOT) -> list[Report]:
    """Every version of every file in bench/results, oldest first; none without git.

    Args:
        root: of the repository.
    """
    below = RESULTS.relative_to(ROOT).as_posix()
    git = ("git", "-C", str(root))
    log = output(*git, "log", "--format=%x00%H %ct", "--name-only", "--diff-filter=AM", "--", below)
    reports = []
    for entry in (log or "").split("\0")[1:]:
        head, *paths = entry.split("\n")
        commit, stored = head.split()
        for path in filter(lambda path: path.endswith(".json"), paths):
            text = output(*git, "show", f"{commit}:{path}")
            assert text is not None
            name = Path(path).relative_to(below).with_suffix("").as_posix()
            reports.append(Report(name, json.loads(text), float(stored)))
    return reports[::-1]


def measured_at(report: Report) -> float:
    """When it was measured, in Unix seconds; else when its commit, or the file, was committed."""
    date = report.environment.get("date")
    if date is not None:
        return datetime.fromisoformat(date).timestamp()
    commit = (report.environment.get("commit") or "").removesuffix("-dirty")
    known = output("git", "show", "-s", "--format=%ct", commit) if commit else None
    return float(known or report.stored or 0)


def runs(reports: Iterable[Report]) -> list[Report]:
    """The reports by time, without those that were stored again with another wording.

    Of reports that agree in name, device and measured commit the last one is kept.
    """
    last = {(r.name, r.device, r.environment.get("commit")): r for r in reports}
    return sorted(last.values(), key=measured_at)
