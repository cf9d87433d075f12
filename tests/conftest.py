"""What all tests share: warnings that Lightning is known to give, and the shared data folder."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("WANDB_SILENT", "true")

import pytest

from tmpq_exp.progress import EXPECTED_WARNINGS, quiet_lightning


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors, except those that the command line leaves out too."""
    for message in EXPECTED_WARNINGS:
        config.addinivalue_line("filterwarnings", f"ignore:{message}")
    quiet_lightning()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real inputs that are not part of the repository: ``TMPQ_EXP_DATA``, or ``../shared/data`` beside the checkout."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("TMPQ_EXP_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no real inputs at {folder}; name their folder in TMPQ_EXP_DATA")
    return folder
