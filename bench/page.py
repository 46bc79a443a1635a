"""The one table and the one HTML page of a folder of result files.

The page needs no network: pictures are SVG inside it. It shows what the JSON says, and where a file
lacks something (older ones have no options and no time), it says so.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench import plots
from bench.history import measured_at, runs
from bench.record import Report
from bench.sections import SECTIONS, Line, Picture, Section, milliseconds, times

STYLE = """
:root { --ink: #1d2328; --soft: #5b6670; --line: #d8dee4; --ours: #1c7a70; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: #fff;
       max-width: 1120px; margin: 0 auto; padding: 24px; }
h1 { margin: 0 0 4px; font-size: 28px; }
h2 { margin: 48px 0 4px; padding-top: 12px; border-top: 2px solid var(--line); font-size: 22px; }
h3 { margin: 24px 0 4px; font-size: 16px; }
p { margin: 6px 0; max-width: 90ch; }
.soft, figcaption, summary { color: var(--soft); font-size: 14px; }
nav a { margin-right: 14px; }
a { color: #2457a6; }
figure { margin: 16px 0; }
figure img { width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; margin: 10px 0; }
th, td { padding: 3px 10px 3px 0; text-align: left; border-bottom: 1px solid var(--line); }
th { font-weight: 600; vertical-align: bottom; }
.raw td, .raw th, td.figure { white-space: nowrap; }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td.faster { color: var(--ours); font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; font-size: 14px; }
dt { color: var(--soft); }
dd { margin: 0; }
"""
HEADER = (
    "what was measured",
    "ours",
    "time: median (p20 to p80)",
    "fastest other",
    "its time over ours",
)


@dataclass(frozen=True)
class Block:
    """The rows of one section that were measured on one device, at one commit and versions."""

    section: Section
    reports: list[Report]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [row for report in self.reports for row in self.section.rows(report)]

    @property
    def lines(self) -> list[Line]:
        return list(self.section.lines(self.rows))


def blocks(reports: Iterable[Report]) -> list[Block]:
    """The reports' rows by section, device, commit and versions."""
    reports = list(reports)
    found = []
    for section in SECTIONS:
        groups: dict[tuple[str, ...], list[Report]] = {}
        for report in reports:
            if section.rows(report):
                key = (report.device, report.commit, str(report.versions))
                groups.setdefault(key, []).append(report)
        found += [Block(section, group) for group in groups.values()]
    return found


def text_table(found: Sequence[Block]) -> str:
    """The one table, as the terminal shows it: a heading per section and device."""
    rows: list[tuple[str, ...]] = [HEADER]
    for block in found:
        rows.append((f"-- {block.section.title}: {block.reports[0].device}",))
        rows += [_cells(line) for line in block.lines]
    whole = [row for row in rows if len(row) > 1]
    widths = [max(len(row[at]) for row in whole) for at in range(len(HEADER))]
    written = ("  ".join(c.ljust(w) for c, w in zip(row, widths)) for row in rows)  # noqa: B905
    return "\n".join(line.rstrip() for line in written)


def _cells(line: Line) -> tuple[str, ...]:
    ratio = "" if line.over_ours is None else times(line.over_ours)
    return (line.case, line.ours, line.time, line.peer, ratio)


def write_page(found: Sequence[Block], older: Iterable[Report], path: Path) -> None:
    """Writes the page.

    Args:
        found: what is shown.
        older: further reports, for the history.
    """
    shown = list(dict.fromkeys(block.section.title for block in found))
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>mem1_kernels: benchmarks</title><style>{STYLE}</style></head><body>",
        "<h1>mem1_kernels: benchmarks</h1>",
        f'<p class="soft">Written {now} from {_names(found)}.</p>',
        "<p>mem1_kernels computes attention over trajectories whose older tokens expire, and prunes"
        " the KV cache to match. Each benchmark times ours and the others in turns, in one process."
        " A time is the median over the rounds, with the 20th and the 80th percentile.</p>",
        "<p><b>Its time over ours</b> says how many times as long another implementation takes,"
        " as the median of the rounds' ratios. 2x: it takes twice as long as ours. Machines are"
        " noisy; these ratios are steadier than the times.</p>",
        "<nav>",
        *(f'<a href="#{_anchor(t)}">{t}</a>' for t in (*shown, "History")),
        "</nav>",
        _glance(found),
    ]
    for title in shown:
        here = [block for block in found if block.section.title == title]
        section = here[0].section
        parts.append(f'<h2 id="{_anchor(title)}">{title}</h2><p>{section.text}</p>')
        parts.append(_list(section.terms([row for block in here for row in block.rows])))
        parts += [_block(block) for block in here]
    reports = [report for block in found for report in block.reports]
    parts.append(_history([*older, *reports]))
    parts.append("</body></html>")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _names(found: Sequence[Block]) -> str:
    names = dict.fromkeys(report.name for block in found for report in block.reports)
    return ", ".join(f"{escape(name)}.json" for name in names)


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-").replace(",", "")


def _glance(found: Sequence[Block]) -> str:
    """A line per block: where it was measured, and the range of the ratios."""
    rows = []
    for block in found:
        lines = block.lines
        ratios = [line.over_ours for line in lines if line.over_ours is not None]
        said = f"{times(min(ratios))} to {times(max(ratios))}" if ratios else ""
        title = block.section.title
        link = f'<a href="#{_anchor(title)}">{title}</a>'
        first = block.reports[0]
        package = "triton" if "capability" in first.content else "torch"
        version = f"{package} {first.versions.get(package, 'not recorded')}"
        cells = (first.device, version, _measured(first), str(len(lines)))
        rows.append(f"<tr><td>{link}</td>{''.join(f'<td>{escape(x)}</td>' for x in cells)}")
        rows.append(f'<td class="number">{said}</td></tr>')
    head = (
        "benchmark",
        "device",
        "version",
        "commit",
        "cases",
        "fastest other: its time over ours",
    )
    return _table(head, "".join(rows))


def _table(head: Sequence[str], body: str) -> str:
    cells = "".join(f"<th>{name}</th>" for name in head)
    return f'<div class="wide"><table><tr>{cells}</tr>{body}</table></div>'


def _lines(block: Block) -> str:
    """The lines as a table, without the columns that none of them fills."""
    written = [_cells(line) for line in block.lines]
    used = [at for at in range(len(HEADER)) if any(cells[at] for cells in written)]
    rows = []
    for line, cells in zip(block.lines, written, strict=True):
        faster = " faster" if (line.over_ours or 0) > 1.05 else ""
        classes = ("", "figure", "figure", "", f"number{faster}")
        row = "".join(f'<td class="{classes[at]}">{escape(cells[at])}</td>' for at in used)
        rows.append(f"<tr>{row}</tr>")
    return _table([HEADER[at] for at in used], "".join(rows))


def _block(block: Block) -> str:
    first = block.reports[0]
    quick = any(report.content.get("options", {}).get("quick") for report in block.reports)
    heading = first.device + (" (--quick: a smoke run, not a measurement)" if quick else "")
    parts = [f"<h3>{escape(heading)}</h3>", _environment(block)]
    pictures = block.section.pictures(block.rows, first.device)
    parts += [_picture(picture) for picture in pictures[:1]]
    if pictures[1:]:
        parts.append("<details><summary>The same at other sizes</summary>")
        parts += [*map(_picture, pictures[1:]), "</details>"]
    parts.append(_lines(block))
    parts.append(f"<details><summary>All {len(block.rows)} rows</summary>{_raw(block.rows)}")
    return "\n".join([*parts, "</details>"])


def _environment(block: Block) -> str:
    """Device, versions, commit, time and options as a list; what a file lacks is said."""
    said: dict[str, str] = {}
    first = block.reports[0]
    environment = first.environment
    said["commit"] = _measured(first)
    versions = [f"{name} {version}" for name, version in first.versions.items()]
    if environment.get("python"):
        versions.append(f"Python {environment['python']}")
    if environment.get("cuda"):
        versions.append(f"CUDA {environment['cuda']}, driver {environment['driver']}")
    if environment.get("simd"):
        versions.append(f"SIMD level {environment['simd']}")
    said["versions"] = ", ".join(versions)
    said["dtype"] = _dtype(block)
    for report in block.reports:
        options = report.content.get("options")
        label = f"options of {report.name}" if len(block.reports) > 1 else "options"
        if options is None:
            said[label] = "not recorded in this file"
        else:
            said[label] = ", ".join(
                f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
                for name, value in options.items()
                if value not in (None, False, "")
            )
    return _list(said)


def _dtype(block: Block) -> str:
    """The dtypes of the rows; else that of the options."""
    found = [row["dtype"] for row in block.rows if row.get("dtype")]
    found += [report.content.get("options", {}).get("dtype") for report in block.reports]
    named = ", ".join(dict.fromkeys(filter(None, found)))
    return named or "not recorded in this file"


def _list(said: dict[str, str]) -> str:
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in said.items())
    return f"<dl>{items}</dl>" if items else ""


def _measured(report: Report) -> str:
    """Commit and day of the measurement; where that day is not recorded, the commit's."""
    if report.environment.get("date"):
        return f"{report.commit}, {_day(measured_at(report))}"
    if report.environment.get("commit"):
        return f"{report.commit}, committed {_day(measured_at(report))}"
    return report.commit


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d")


def _picture(picture: Picture) -> str:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "picture.svg"
        picture.draw(path)
        data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="{escape(picture.caption)}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(picture.caption)}</figcaption></figure>"


def _raw(rows: Sequence[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_cell(row.get(name)))}</td>" for name in columns) + "</tr>"
        for row in rows
    )
    return f'<div class="raw">{_table([escape(name) for name in columns], body)}</div>'


def _cell(value: Any) -> str:
    if isinstance(value, dict) and "median_ms" in value:
        return milliseconds(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " ".join(f"{x:.2f}" for x in value)
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def _history(reports: Iterable[Report]) -> str:
    """A picture per benchmark and device over the commits that were measured."""
    parts = [
        '<h2 id="history">History</h2>',
        "<p>All results that were ever committed below bench/results, and those shown above, by"
        " the commit that was measured. A line is drawn where at least two runs have the case."
        "</p>",
    ]
    ordered = runs(reports)
    for section in (section for section in SECTIONS if section.trend):
        by_device: dict[str, dict[str, list[Report]]] = {}
        for report in ordered:
            if section.rows(report):
                of_commit = by_device.setdefault(report.device, {})
                of_commit.setdefault(report.commit, []).append(report)
        for device, by_commit in by_device.items():
            parts.append(f"<h3>{section.title}: {escape(device)}</h3>")
            parts.append(_trend(section, by_commit))
    return "\n".join(parts)


def _trend(section: Section, by_commit: dict[str, list[Report]]) -> str:
    assert section.trend is not None
    columns, labels = [], []
    for commit, reports in by_commit.items():
        columns.append(section.trend([row for report in reports for row in section.rows(report)]))
        labels.append(f"{_day(measured_at(reports[-1]))}\n{commit}")
    panels: dict[str, dict[str, list[float | None]]] = {}
    for heading in dict.fromkeys(heading for column in columns for heading in column):
        lines = dict.fromkeys(line for column in columns for line in column.get(heading, {}))
        values = {line: [c.get(heading, {}).get(line) for c in columns] for line in lines}
        drawn = {
            line: found
            for line, found in values.items()
            if sum(value is not None for value in found) > 1
        }
        if drawn:
            panels[heading] = drawn
    if not panels:
        said = ", ".join(label.replace("\n", " ") for label in labels)
        return f'<p class="soft">No case was measured in more than one run yet: {said}.</p>'
    caption = f"{section.title}: {section.unit}, over {len(columns)} runs."
    return _picture(
        Picture(caption, lambda path: plots.history(panels, labels, section.unit, path))
    )
