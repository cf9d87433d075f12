"""What a finished run shows: ``report.json``, ``report.html``, the two pictures and the terminal table."""

from tmpq_exp.report.content import (
    BASELINE_NAMES,
    ENTRY_KEYS,
    REPORT_KEYS,
    SCHEMA,
    SEARCH_KEYS,
    WINOGRAD_KEYS,
    further_table,
    summary_table,
    validate_report,
    write_report_json,
)
from tmpq_exp.report.page import report_html
from tmpq_exp.report.pictures import pareto_png, samples_png
from tmpq_exp.report.points import Point, SearchView, search_view

__all__ = [
    "BASELINE_NAMES",
    "ENTRY_KEYS",
    "REPORT_KEYS",
    "SCHEMA",
    "SEARCH_KEYS",
    "WINOGRAD_KEYS",
    "Point",
    "SearchView",
    "further_table",
    "pareto_png",
    "report_html",
    "samples_png",
    "search_view",
    "summary_table",
    "validate_report",
    "write_report_json",
]
