"""What all tests share: warnings that Lightning is known to give, the shared data folder, and random networks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("WANDB_SILENT", "true")
os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")  # for all: a process reads the mode only once

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


@pytest.fixture(scope="session", autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A working directory that is thrown away, so that what a test writes by a relative path never stays."""
    with contextlib.chdir(tmp_path_factory.mktemp("working")):
        yield


@pytest.fixture(scope="module")
def hydra() -> Iterator[None]:
    """One initialized Hydra for a file, which composes the package's configuration."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from tmpq_exp.config import register_schema
    from tmpq_exp.jobs import conf_dir

    register_schema()
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        yield


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random InceptionV3 weights in a file that both libraries read; activations keep their size."""
    import torch
    from pytorch_fid import inception
    from torch import nn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
        network = inception.fid_inception_v3()
    generator = torch.Generator().manual_seed(0)
    for name, value in network.state_dict().items():
        if name.endswith("conv.weight"):
            nn.init.kaiming_normal_(value, generator=generator)
        elif name.endswith(("bn.bias", "running_mean")):
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def toy_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a small run of task=classify reads; see ``tests.classifying.write_inputs``."""
    from tests.classifying import write_inputs

    return write_inputs(tmp_path_factory.mktemp("inputs"))
