"""What all tests share: warnings that Lightning is known to give, and the shared data folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

os.environ.setdefault("WANDB_SILENT", "true")

import pytest

from tmpq_exp.progress import EXPECTED_WARNINGS, quiet_lightning


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors, except those that the command line leaves out too."""
    for message in EXPECTED_WARNINGS:
        config.addinivalue_line("filterwarnings", f"ignore:{message}")
    quiet_lightning()


@pytest.fixture(scope="session", autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A working directory that is thrown away, so that what a test writes by a relative path never stays."""
    with contextlib.chdir(tmp_path_factory.mktemp("working")):
        yield
