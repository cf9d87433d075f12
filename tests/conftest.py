"""What all tests share: warnings that Lightning is known to give, and the shared data folder."""

from __future__ import annotations

import os

os.environ.setdefault("WANDB_SILENT", "true")

import pytest

from tmpq_exp.progress import EXPECTED_WARNINGS, quiet_lightning


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors, except those that the command line leaves out too."""
    for message in EXPECTED_WARNINGS:
        config.addinivalue_line("filterwarnings", f"ignore:{message}")
    quiet_lightning()
