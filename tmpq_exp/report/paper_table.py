"""Published figures beside ours: the rows of ``task=table``, what each can be taken for, and its Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from tmpq_exp.report.classification import all_rows
from tmpq_exp.report.content import number

HEADINGS = ("row", "of", "metric", "paper", "ours", "difference", "tolerance", "verdict")
"""Columns of every form of the table, in order."""

NUM_TEXT_COLUMNS = 3
"""Columns at the left that hold text; numbers stand right."""

SMOKE = "tier=smoke: reduced sizes, or a stand-in with random weights; its figures mean nothing here"

_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        **{character: rf"\{character}" for character in "&%$#_{}"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
    }
)


class Verdict(str, Enum):
    """What a row can be taken for."""

    WITHIN = "within"
    OUTSIDE = "outside"
    OTHER_PROTOCOL = "other protocol"
    NOT_PUBLISHED = "not published"
    NOT_MEASURED = "not measured"
    NOT_FINISHED = "not finished"
    SMOKE = "smoke"


@dataclass(frozen=True)
class PaperRow:
    """A published figure and ours of one run.

    Args:
        title: The paper.
        row: Row of the paper's table.
        preset: Preset of the run.
        run: Name of the run's directory.
        entry: Entry of its report.
        metric: Name of the metric.
        published, tolerance: The figure, and how far ours may be off; None where not known.
        source: Who published it.
        ours: The run's figure; None where it was not measured.
        interval: 95 % interval over images of ours; None where it is not known.
        fingerprint: Of ours; empty where nothing was measured.
        is_finished: Whether the run has a report.
        is_smoke: Whether the run is a smoke tier.
        differences: What the run did otherwise than the preset's protocol, in words.
        remark: How the published figure was measured differently from what the preset does.
    """

    title: str
    row: str
    preset: str
    run: str
    entry: str
    metric: str
    published: float | None
    tolerance: float | None
    source: str
    ours: float | None
    interval: tuple[float, float] | None
    fingerprint: str
    is_finished: bool
    is_smoke: bool
    differences: tuple[str, ...]
    remark: str

    @property
    def difference(self) -> float | None:
        """Ours less the published figure; None where there is no such thing, as for a stand-in."""
        if self.published is None or self.ours is None or self.is_smoke:
            return None
        return self.ours - self.published

    @property
    def verdict(self) -> Verdict:
        """``within`` or ``outside`` the tolerance only where the run kept to the protocol."""
        if not self.is_finished:
            return Verdict.NOT_FINISHED
        if self.is_smoke:
            return Verdict.SMOKE
        if self.ours is None:
            return Verdict.NOT_MEASURED
        if self.difference is None or self.tolerance is None:
            return Verdict.NOT_PUBLISHED
        if self.differences:
            return Verdict.OTHER_PROTOCOL
        return Verdict.WITHIN if abs(self.difference) <= self.tolerance else Verdict.OUTSIDE

    def cells(self) -> tuple[str, ...]:
        """Text of the row under ``HEADINGS``."""
        interval = "" if self.interval is None else f" ({number(self.interval[0])} to {number(self.interval[1])})"
        difference = "-" if self.difference is None else f"{self.difference:+,.2f}"
        tolerance = "-" if self.tolerance is None else f"± {number(self.tolerance)}"
        verdict = self.verdict.value + ("" if self.verdict is not Verdict.OTHER_PROTOCOL else ", see notes")
        figures = (number(self.published), number(self.ours) + interval, difference, tolerance)
        return tuple(map(_one_line, (f"{self.row} ({self.run})", self.entry, self.metric, *figures, verdict)))


def paper_rows(
    name: str, config: Mapping[str, Any], report: Mapping[str, Any] | None, flat: Mapping[str, Any]
) -> list[PaperRow]:
    """Rows of a run of a preset, one a published figure.

    Args:
        name: Name of its directory.
        config: Its resolved configuration, with ``paper``.
        report: Content of its ``report.json``, of ``task=run`` or ``task=classify``; None if it is not finished.
        flat: The configuration under dotted keys.
    """
    paper = config["paper"]
    differences = tuple(protocol_differences(paper["protocol"], flat))
    is_smoke = config.get("tier") == "smoke"
    return [
        PaperRow(
            title=paper["title"],
            row=paper["row"],
            preset=paper["preset"],
            run=name,
            published=figure["figure"],
            is_finished=report is not None,
            is_smoke=is_smoke,
            differences=differences,
            **{key: figure[key] for key in ("entry", "metric", "tolerance", "source", "remark")},
            **_measured(report, figure["entry"], figure["metric"]),
        )
        for figure in paper["figures"]
    ]


def protocol_differences(protocol: Mapping[str, Any], flat: Mapping[str, Any]) -> Iterator[str]:
    """Settings of a run that are not those of its preset's protocol, in words."""
    for key, value in protocol.items():
        found = flat.get(key)
        if found != value:
            yield f"{key} {found} instead of {value}"


def _measured(report: Mapping[str, Any] | None, entry: str, metric: str) -> dict[str, Any]:
    """Value, interval and fingerprint of an entry's metric; nothing where the run has no such figure."""
    nothing: dict[str, Any] = {"ours": None, "interval": None, "fingerprint": ""}
    if report is None:
        return nothing
    if "classification" in report:
        rows = {row["name"]: row for row in all_rows(report)}
        if entry not in rows or metric != "top1":
            return nothing
        low, high = rows[entry]["top1_interval"]
        return {"ours": rows[entry]["top1"], "interval": (low, high), "fingerprint": report["fingerprint"]}
    entries = {found["name"]: found for found in (*report["baselines"], report["best"])}
    if entry not in entries or entries[entry]["metrics"].get(metric) is None:
        return nothing
    found = entries[entry]
    interval = found["intervals"].get(metric)
    return {
        "ours": found["metrics"][metric],
        "interval": None if interval is None else (interval[0], interval[1]),
        "fingerprint": found["further"].get(metric, found["fingerprint"]),
    }


def notes_of(rows: Sequence[PaperRow]) -> list[str]:
    """What a reader of the rows must know, each once: tiers, protocols, sources, fingerprints."""
    notes: dict[str, None] = {}
    for row in rows:
        if row.is_smoke:
            notes[f"{row.run}: {SMOKE}."] = None
        elif row.differences:
            notes[f"{row.run}: another protocol than the preset's: {'; '.join(row.differences)}."] = None
        if row.fingerprint:
            notes[f"{row.run}: {row.metric} was measured under fingerprint {row.fingerprint}."] = None
    return [*map(_one_line, (*notes, *_sources(rows), *_mixed(rows)))]


def _one_line(text: str) -> str:
    """A text that ends no cell and no comment."""
    return " ".join(text.split())


def _sources(rows: Sequence[PaperRow]) -> Iterator[str]:
    """Where the published figures are from, and how they were measured differently."""
    cited: dict[tuple[str, str, str, str], dict[str, None]] = {}
    for row in rows:
        if row.published is not None:
            key = (row.row, row.entry, row.source, row.remark)
            cited.setdefault(key, {})[f"{row.metric} {number(row.published)}"] = None
    for (table_row, entry, source, remark), figures in cited.items():
        yield f"{table_row}: {entry}, {' and '.join(figures)}: {source}{f' ({remark})' if remark else ''}"


def _mixed(rows: Sequence[PaperRow]) -> Iterator[str]:
    """Runs of one preset whose figures of a metric were measured differently."""
    for preset, metric in dict.fromkeys((row.preset, row.metric) for row in rows):
        same = [row for row in rows if (row.preset, row.metric) == (preset, metric) and row.fingerprint]
        if len({row.fingerprint for row in same}) > 1:
            runs = ", ".join(dict.fromkeys(row.run for row in same))
            yield f"{metric} of {preset} was measured under different fingerprints by {runs}: they do not compare."


def by_paper(rows: Sequence[PaperRow]) -> dict[str, list[PaperRow]]:
    """Rows by the paper they belong to, in the order of the first."""
    found: dict[str, list[PaperRow]] = {}
    for row in rows:
        found.setdefault(row.title, []).append(row)
    return found


def markdown(rows: Sequence[PaperRow]) -> str:
    """One table a paper, with its notes, as Markdown."""
    lines: list[str] = ["# Published figures and ours", ""]
    for title, members in by_paper(rows).items():
        lines += [f"## {title}", "", _markdown_line(HEADINGS)]
        lines.append(_markdown_line(["---" if i < NUM_TEXT_COLUMNS else "---:" for i in range(len(HEADINGS))]))
        lines += [_markdown_line(row.cells()) for row in members]
        lines += ["", *(f"- {note}" for note in notes_of(members)), ""]
    return "\n".join(lines)


def _markdown_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def latex(rows: Sequence[PaperRow]) -> str:
    """One table a paper, as LaTeX that needs no package; the notes are comments."""
    lines: list[str] = []
    alignment = "l" * NUM_TEXT_COLUMNS + "r" * (len(HEADINGS) - NUM_TEXT_COLUMNS)
    for title, members in by_paper(rows).items():
        lines += [r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{{alignment}}}", r"\hline"]
        lines += [_latex_line(HEADINGS), r"\hline", *(_latex_line(row.cells()) for row in members), r"\hline"]
        lines += [r"\end{tabular}", rf"\caption{{{title.translate(_LATEX)}}}", r"\end{table}"]
        lines += [f"% {note}" for note in notes_of(members)]
    return "\n".join(lines) + "\n"


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(cell.translate(_LATEX) for cell in cells) + r" \\"


def terminal_tables(rows: Sequence[PaperRow]) -> list[Table]:
    """One table a paper for the terminal."""
    tables = []
    for title, members in by_paper(rows).items():
        table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
        for index, heading in enumerate(HEADINGS):
            is_text = index < NUM_TEXT_COLUMNS
            table.add_column(heading, justify="left" if is_text else "right", no_wrap=index > 0, overflow="fold")
        for row in members:
            table.add_row(*map(escape, row.cells()), style="bold green" if row.verdict is Verdict.WITHIN else "")
        tables.append(table)
    return tables
