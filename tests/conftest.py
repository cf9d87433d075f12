"""What all tests share: warnings that Lightning is known to give, and the shared data folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("WANDB_SILENT", "true")

import pytest

from tmpq_exp.progress import EXPECTED_WARNINGS, quiet_lightning
from tmpq_exp.zoo.embedded import embedded_file


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


@pytest.fixture(scope="session")
def text_weights() -> None:
    """Weights of the embedded text models; skipped in a checkout that does not hold them."""
    for name in ("sd_digits", "clip_digits"):
        if not (path := embedded_file(name, "model.safetensors")).is_file():
            pytest.skip(f"no weights at {path}; task=train model={name} makes them")


@pytest.fixture(scope="session", autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A working directory that is thrown away, so that what a test writes by a relative path never stays."""
    with contextlib.chdir(tmp_path_factory.mktemp("working")):
        yield
