"""Tables in the terminal show every figure whole."""

from __future__ import annotations

import pytest
from rich.table import Table

from tmpq_exp.terminal import print_table


def test_no_figure_of_a_table_is_cut(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    table = Table(title="figures")
    row = [f"{number}.123456789" for number in range(12)]
    for number in row:
        table.add_column(f"column {number}")
    table.add_row(*row)
    print_table(table)
    printed = capsys.readouterr().out
    assert all(number in printed for number in row)
    assert "…" not in printed
