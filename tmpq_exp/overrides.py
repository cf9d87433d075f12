"""Tells bad input from faults of the program, and explains it: the override, what was found, the nearest valid name."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException, InstantiationException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tmpq_exp.config import UserError

EXIT_UNEXPECTED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130


def exit_status(error: BaseException) -> int:
    """Exit status of a job that ended with this error."""
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return EXIT_BAD_INPUT if is_bad_input(error) else EXIT_UNEXPECTED


def is_bad_input(error: BaseException) -> bool:
    """Whether the user can set right what raised this error: a refused override, or a value one of our checks refused.

    Args:
        error: What composing, checking or running raised.
    """
    cause = _root(error)
    if isinstance(cause, (HydraException, OmegaConfBaseException, UserError)):
        return True
    module = _raising_module(cause)
    if isinstance(cause, ValueError) and module.startswith("tmpq_exp."):
        return True
    if type(cause).__name__ == "MisconfigurationException":  # Lightning's, for instance trainer=gpu without a GPU
        return True
    if isinstance(cause, (FileExistsError, NotADirectoryError)) and module == "pathlib":
        return _is_run_dir_error(cause)
    if _slurm_problem(cause) is not None:
        return True
    # a target's signature does not take the keys (also a parse failure of Hydra's own command line)
    return module.startswith(("hydra.", "antlr4.")) and isinstance(cause, (TypeError, ValueError, LookupError))


def _root(error: BaseException) -> BaseException:
    """The error behind those that Hydra wraps around what a ``_target_`` raised."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _raising_module(error: BaseException) -> str:
    names = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return names[-1] if names else ""


def _is_run_dir_error(error: BaseException) -> bool:
    """Whether Hydra failed to make the run directory."""
    return any(
        frame.f_globals.get("__name__") == "hydra.core.utils" and frame.f_code.co_name == "run_job"
        for frame, _ in list(traceback.walk_tb(error.__traceback__))[-3:-1]
    )


def _slurm_problem(error: BaseException) -> str | None:
    """Why SLURM took no jobs; None if the error is of another kind."""
    module = _raising_module(error)
    is_there = not isinstance(error, FileNotFoundError) or error.filename != "sbatch"
    if is_there and module == "submitit.core.utils" and isinstance(error, RuntimeError):
        return f"hydra/launcher=submitit_slurm: {_first_line(error)}"
    if is_there and module != "submitit.slurm.slurm":
        return None
    return (
        "hydra/launcher=submitit_slurm: found no sbatch and srun on this host; start the sweep where SLURM takes jobs, "
        "or set hydra/launcher=submitit_local or hydra/launcher=joblib"
    )


def is_out_of_time(error: BaseException) -> bool:
    """Whether a job on a cluster has reached its time limit, and is not queued again."""
    return _raising_module(error) == "submitit.core.job_environment"


def lost_process(error: BaseException) -> str | None:
    """How a process of a launcher ended without a word to this one, in one line; None if the error is another."""
    names = {cls.__name__ for cls in type(error).__mro__}
    if names.isdisjoint(("UncompletedJobError", "TerminatedWorkerError")):  # submitit's, joblib's
        return None
    return " ".join(line.strip() for line in str(error).splitlines()[:2])


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def explain(error: BaseException, arguments: Iterable[str], conf_dir: Path) -> str:
    """One message for the user.

    Args:
        error: What composing, checking or running raised.
        arguments: The command line behind the program's name.
        conf_dir: Folder of the configuration groups.
    """
    error, arguments = _root(error), list(arguments)
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        return f"hydra.run.dir: {error.filename} is a file or lies below one; a directory was expected"
    if isinstance(error, HydraException):
        for override in _parsed(arguments):
            problem = _group_problem(override, [conf_dir, *_own_dirs(arguments)]) or _key_problem(override, conf_dir)
            if problem:
                return problem
    slurm_problem = _slurm_problem(error)
    if slurm_problem is not None:
        return slurm_problem
    full_key, message = getattr(error, "full_key", None), _first_line(error)
    cause = error.__cause__
    if isinstance(error, HydraException) and cause is not None and str(cause) not in message:
        message += f" ({str(cause).splitlines()[0]})"
    return f"{full_key}: {message}" if full_key and full_key not in message else message


def _parsed(arguments: Iterable[str]) -> list[Override]:
    parser = OverridesParser.create()
    overrides = []
    for argument in arguments:
        if argument.startswith("-"):
            continue
        try:
            overrides += parser.parse_overrides([argument])
        except HydraException:
            continue
    return overrides


def _own_dirs(arguments: Iterable[str]) -> list[Path]:
    """Folders of the user's own options, given as ``--config-dir``."""
    words = list(arguments)
    given = [word.partition("=")[2] for word in words if word.startswith(("--config-dir=", "-cd="))]
    given += [value for name, value in pairwise(words) if name in ("--config-dir", "-cd")]
    return [Path(value) for value in given]


def _group_problem(override: Override, conf_dirs: Iterable[Path]) -> str | None:
    groups = [path for folder in conf_dirs if (path := folder / override.key_or_group).is_dir()]
    if not groups:
        return None
    files = {str(path.relative_to(group).with_suffix("")) for group in groups for path in group.rglob("*.yaml")}
    options = sorted(files)
    value = override.value()
    choices = [str(choice) for choice in (value.list if isinstance(value, ChoiceSweep) else [value])]
    for choice in choices:
        if choice not in options and choice != "None":
            known = f"options: {', '.join(options)}"
            return f"{override.key_or_group}={choice}: no such option{_nearest(choice, options)}; {known}"
    return None


def _key_problem(override: Override, conf_dir: Path) -> str | None:
    if override.is_add():
        return None
    key = override.key_or_group
    known = _known_keys(conf_dir)
    if key in known or key.startswith("hydra"):
        return None
    return f"{key}: no such key or group{_nearest(key, known)}"


def _nearest(name: str, names: Iterable[str]) -> str:
    candidates = sorted(names)
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    if not close:  # a wrong path may still end in a known name
        leaf = name.rsplit(".", 1)[-1]
        by_leaf = {candidate.rsplit(".", 1)[-1]: candidate for candidate in candidates}
        close = [by_leaf[match] for match in difflib.get_close_matches(leaf, list(by_leaf), n=1, cutoff=0.6)]
    return f"; nearest: {close[0]}" if close else ""


def _known_keys(conf_dir: Path) -> set[str]:
    """Groups and keys of the default configuration, dotted, inner nodes included."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir.resolve())):
        composed = compose("config")
    keys: set[str] = {path.name for path in conf_dir.iterdir() if path.is_dir()}

    def collect(node: Any, prefix: str) -> None:
        for name, child in node.items():
            key = f"{prefix}{name}"
            keys.add(key)
            if isinstance(child, dict):
                collect(child, f"{key}.")

    collect(OmegaConf.to_container(composed, throw_on_missing=False), "")
    return keys
