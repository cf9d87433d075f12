"""task=report: one page and one CSV file that compare finished runs, such as the jobs of a sweep."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tmpq_exp.config import Config, UserError
from tmpq_exp.report.comparison import ComparedRun, groups_of, mixed_message, write_comparison_csv
from tmpq_exp.report.comparison_page import comparison_html, comparison_tables
from tmpq_exp.rundir import RunDirectory, writing
from tmpq_exp.runs import differing_settings, past_runs
from tmpq_exp.terminal import print_table


def compare(config: Config, resolved: dict[str, Any]) -> None:
    """Write ``comparison.html`` and ``comparison.csv`` into the run directory and print the tables.

    Runs that were measured under different fingerprints stand in tables and plots of their own, and the page says in
    what they differ. Runs that are not finished are named.

    Args:
        config: Checked configuration; ``runs`` names the runs.
        resolved: The same as plain data; kept as ``config.yaml``.

    Raises:
        UserError: If a run cannot be read, is of another task, or none is finished.
    """
    found = past_runs(config.runs)
    for past in found:
        if past.kind != "run":
            raise UserError(
                f"runs: {past.directory.path} is of task={past.kind}; task=report compares runs of task=run"
            )
    settings = differing_settings(found)
    runs = [
        ComparedRun(past.name, past.directory.path, past.report, differs, len(past.trials))
        for past, differs in zip(found, settings, strict=True)
    ]
    groups = groups_of(runs)
    if not groups:
        raise UserError(f"runs: none of the {len(runs)} runs is finished (no report.json); resume them first")
    path = Path(config.paths.run_dir)
    with writing(path), _damaged_reports():
        tables = comparison_tables(runs)
        directory = RunDirectory.claim(path, resolved)
        comparison_html(directory.comparison_html, runs)
        write_comparison_csv(directory.comparison_csv, runs)
    for table in tables:
        print_table(table)
    for message in filter(None, [mixed_message(groups)]):
        print(f"note: {message}", file=sys.stderr)
    print(f"report  {directory.comparison_html}\ncsv     {directory.comparison_csv}")


@contextmanager
def _damaged_reports() -> Iterator[None]:
    """Reports have their keys, but anything may stand under them."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"runs: a report.json holds a value of another kind than it should ({error!r})") from error
