"""Command line: compose the configuration, check it, run the task, and turn every failure into one clear message."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tmpq_exp.config import UserError, register_schema, to_config
from tmpq_exp.overrides import explain

EXIT_BAD_INPUT = 2


def conf_dir() -> Path:
    """Folder of the configuration: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def run_job(composed: DictConfig) -> None:
    """One job of Hydra: the door through which a configuration enters."""
    config = to_config(composed)
    resolved = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    import torch  # after the checks, so that a typo fails at once

    from tmpq_exp.progress import quiet_lightning

    quiet_lightning()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    instantiate(config.task)(config, resolved)


def main() -> None:
    """Entry of ``python -m tmpq_exp`` and of ``tmpq-exp``. Exit status 0: done, 2: bad input, 1: anything else."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise instead of printing, so that errors are explained here
    register_schema()
    application = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(run_job)
    try:
        application()
    except (HydraException, OmegaConfBaseException, UserError) as error:
        sys.exit(_fail(explain(error, sys.argv[1:], conf_dir()), EXIT_BAD_INPUT))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted; start again with the same hydra.run.dir to go on", 130))


def _fail(message: str, status: int) -> int:
    print(f"tmpq-exp: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
