"""What is printed as a table in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

MAX_TABLE_WIDTH = 400
"""Most columns of text that a printed table takes."""


def print_table(table: Table) -> None:
    """Print a table at its full width: where a terminal is narrower its lines wrap, and no figure is cut."""
    console = Console()
    needed = console.measure(table, options=console.options.update(max_width=MAX_TABLE_WIDTH)).maximum
    Console(width=max(console.width, needed)).print(table)
