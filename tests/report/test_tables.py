"""Tables of a report: figures stand together only where they were measured alike, further metrics among them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.report.example import make_report, render
from tmpq_exp.report import further_table, summary_table, write_report_json


def with_further(report: dict[str, Any]) -> dict[str, Any]:
    """The report with two further metrics."""
    report["further"] = [
        {"name": name, "fingerprint": found, "fingerprint_parts": {}} for name, found in (("ssim", "f1"), ("kid", "f2"))
    ]
    for number, shown in enumerate([*report["baselines"], report["best"]]):
        shown["further"] = {"ssim": "f1", "kid": "f2"}
        shown["metrics"] |= {"ssim": 0.5 + number / 16, "kid": None}
    return report


@pytest.mark.parametrize(
    ("place", "change"),
    [
        (("best",), {"fingerprint": "search-f"}),
        (("baselines", 2), {"fingerprint": "other"}),
        (("front", 1), {"fingerprint": "final-f"}),
        (("best",), {"further": {"ssim": "f1"}}),
        (("baselines", 0), {"further": {"ssim": "f1", "kid": "f3"}}),
    ],
)
def test_tables_refuse_figures_that_were_measured_differently(
    place: tuple[Any, ...], change: dict[str, Any], tmp_path: Path
) -> None:
    report = with_further(make_report())
    summary_table(report)
    changed: Any = report
    for key in place:
        changed = changed[key]
    changed.update(change)
    name = f"report.{place[0]}" + (f"\\[{place[1]}\\]" if len(place) > 1 else "")
    for show in (summary_table, further_table, lambda r: render(tmp_path, r), lambda r: write_report_json(tmp_path, r)):
        with pytest.raises(ValueError, match=f"{name}\\.{next(iter(change))} must be .* cannot stand in one table"):
            show(report)
    assert not list(tmp_path.iterdir())


def test_further_metrics_stand_in_a_table_of_their_own_and_on_the_page(tmp_path: Path) -> None:
    assert further_table(make_report()) is None
    report = with_further(make_report())
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(further_table(report))
    text = console.export_text()
    assert "ssim: higher is better; kid: lower is better" in " ".join(text.split())
    assert [line.split()[-2:] for line in text.splitlines() if "Best found" in line] == [["0.750", "-"]]
    page, _ = render(tmp_path, report)
    assert "<th>ssim</th><th>kid</th>" in page
    assert "<td>0.750</td><td>-</td>" in page
