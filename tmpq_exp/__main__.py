"""Command line: compose the configuration, hand every job to its door, and turn failures into one clear message."""

from __future__ import annotations

import os
import sys

import hydra

from tmpq_exp import sweep_end
from tmpq_exp.config import register_schema
from tmpq_exp.jobs import conf_dir, report_failure, reporting_job, run_job
from tmpq_exp.overrides import EXIT_INTERRUPTED

__all__ = ["conf_dir", "main", "report_failure", "run_job"]


def main() -> None:
    """Entry of ``python -m tmpq_exp`` and of ``tmpq-exp``.

    Exit status 0: done, 2: bad input, 1: anything else. Of a sweep: 0 where all jobs are done, else that of the first
    job that is not.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise instead of printing, so that errors are explained here
    register_schema()
    application = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(reporting_job)
    status = 0
    try:
        application()
    except KeyboardInterrupt:
        how = "hydra.run.dir" if sweep_end.directory() is None else f"hydra.sweep.dir={sweep_end.directory()}"
        print(f"tmpq-exp: interrupted; start again with the same {how} to go on", file=sys.stderr)
        status = EXIT_INTERRUPTED
    except Exception as error:
        status = report_failure(error)
    if sweep_end.directory() is not None:
        status = sweep_end.say_end() or status
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
