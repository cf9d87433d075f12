"""Command line: compose the configuration, check it, run the task, and turn every failure into one clear message."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from tmpq_exp.config import register_schema, to_config
from tmpq_exp.overrides import EXIT_INTERRUPTED, EXIT_UNEXPECTED, exit_status, explain, is_bad_input


class SweepJobError(Exception):
    """A job of a sweep failed and has said why; its exit status is the argument. The other jobs go on."""


def conf_dir() -> Path:
    """Folder of the configuration: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def run_job(composed: DictConfig) -> None:
    """One job of Hydra: the door through which a configuration enters."""
    config = to_config(composed)
    if config.wants_stand_in:
        from tmpq_exp.smoke import with_stand_in

        composed = with_stand_in(composed)
        config = to_config(composed)
    resolved = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    import torch  # after the checks, so that a typo fails at once

    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    instantiate(config.task)(config, resolved)


def reporting_job(composed: DictConfig) -> None:
    """``run_job`` that reports its own failure: it exits, or in a sweep lets the other jobs go on."""
    try:
        run_job(composed)
    except Exception as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            name = f"job {HydraConfig.get().job.num} ({HydraConfig.get().job.override_dirname}): "
            raise SweepJobError(report_failure(error, Path(composed.paths.run_dir), name)) from error
        sys.exit(report_failure(error, Path(composed.paths.run_dir)))


def main() -> None:
    """Entry of ``python -m tmpq_exp`` and of ``tmpq-exp``. Exit status 0: done, 2: bad input, 1: anything else."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise instead of printing, so that errors are explained here
    register_schema()
    application = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(reporting_job)
    try:
        application()
    except SweepJobError as error:
        _say("a job of the sweep failed; the reason is above")
        sys.exit(error.args[0])
    except KeyboardInterrupt:
        _say("interrupted; start again with the same hydra.run.dir to go on")
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        sys.exit(report_failure(error))


def report_failure(error: Exception, run_dir: Path | None = None, name: str = "") -> int:
    """Say in one line why a job failed; the traceback of what nobody foresaw goes into ``crash.log``.

    Args:
        error: What composing, checking or running raised.
        run_dir: The job's directory, if it got that far.
        name: Which job of a sweep.

    Returns:
        The exit status.
    """
    if is_bad_input(error):
        _say(name + explain(error, sys.argv[1:], conf_dir()))
        return exit_status(error)
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        _say(f"{name}{place}{error.strerror}; what was written before is kept, start again with the same hydra.run.dir")
        return EXIT_UNEXPECTED
    first_line = next(iter(str(error).splitlines()), "")
    _say(f"{name}unexpected error {type(error).__name__}: {first_line}; {_keep_traceback(error, run_dir)}")
    return EXIT_UNEXPECTED


def _keep_traceback(error: Exception, run_dir: Path | None) -> str:
    is_run = run_dir is not None and (run_dir / "config.yaml").exists()  # never litter a folder that is not ours
    path = (run_dir if run_dir is not None and is_run else Path.cwd()) / "crash.log"
    lines = "".join(traceback.format_exception(error))
    try:
        path.write_text(lines, encoding="utf-8")
    except OSError:
        return f"the traceback, which could not be written to {path}, follows; please report it\n{lines}"
    return f"the traceback is in {path}; please report it"


def _say(message: str) -> None:
    print(f"tmpq-exp: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
