"""task=table: the published figures of finished runs of presets beside ours, as Markdown, LaTeX and on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tmpq_exp.config import Config, PaperConfig, UserError
from tmpq_exp.config.identity import flatten
from tmpq_exp.files import replace_file
from tmpq_exp.report.paper_table import PaperRow, latex, markdown, notes_of, paper_rows, terminal_tables
from tmpq_exp.rundir import RunDirectory, writing
from tmpq_exp.runs import PastRun, past_runs
from tmpq_exp.terminal import print_table


def tabulate(config: Config, resolved: dict[str, Any]) -> None:
    """Write ``table.md`` and ``table.tex`` into the run directory and print the table with its notes.

    A figure of a run that did not keep to its preset's protocol is shown with its difference and without a verdict, and
    what was different stands in the notes; of a smoke tier not even the difference is shown.

    Args:
        config: Checked configuration; ``runs`` names the runs.
        resolved: The same as plain data; kept as ``config.yaml``.

    Raises:
        UserError: If a run cannot be read, or was not made by a preset of a paper.
    """
    rows = [row for past in past_runs(config.runs) for row in rows_of(past)]
    path = Path(config.paths.run_dir)
    with writing(path):
        directory = RunDirectory.claim(path, resolved)
        replace_file(directory.table_markdown, markdown(rows).encode())
        replace_file(directory.table_latex, latex(rows).encode())
    for table in terminal_tables(rows):
        print_table(table)
    for note in notes_of(rows):
        print(f"note: {note}")
    print(f"table  {directory.table_markdown}\nlatex  {directory.table_latex}")


def rows_of(past: PastRun) -> list[PaperRow]:
    """Rows of one run.

    Raises:
        UserError: If it has no published figures, or its configuration says them in another form.
    """
    path = past.directory.path
    if past.kind not in ("run", "classify"):
        raise UserError(f"runs: {path} is of task={past.kind}; task=table takes runs of task=run and task=classify")
    stated = past.config.get("paper")
    if stated is None:
        raise UserError(
            f"runs: {path} was not made by a preset of a paper (its config.yaml has no paper); start such a run with "
            "experiment=tmpq_dm/... or experiment=winograd/..."
        )
    try:
        paper = OmegaConf.to_container(
            OmegaConf.merge(OmegaConf.structured(PaperConfig), stated), throw_on_missing=True
        )
    except OmegaConfBaseException as error:
        raise UserError(f"runs: paper in {past.directory.config} is damaged ({str(error).splitlines()[0]})") from error
    flat = flatten({key: value for key, value in past.config.items() if key != "paper"})
    return paper_rows(past.name, {**past.config, "paper": paper}, past.report, flat)
