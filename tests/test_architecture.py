"""Imports point one way: every module of the package stands in one list, and imports only modules above it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tmpq_exp

PACKAGE = Path(tmpq_exp.__file__).parent

ORDER = (
    # (0) what every layer may use
    "files",
    "plain_data",
    "locks",
    "seeding",
    "progress",
    "terminal",
    # (1) what a candidate is, configuration, exact algebra, timestep sequences, pure functions
    "quant",
    "quant.allocation",
    "config.identity",
    "config.checks",
    "config.quantization",
    "config.winograd",
    "config.search",
    "config.paper",
    "config.root",
    "config",
    "overrides",
    "job_record",
    "quant.primitives",
    "winograd",
    "winograd.transform",
    "winograd.points",
    "diffusion",
    "diffusion.schedule",
    "metrics",
    "metrics.names",
    # (2) quantizers and layers, the staged convolution, sampling, cost
    "quant.quantizer",
    "winograd.spec",
    "winograd.matrices",
    "winograd.shaping",
    "winograd.stages",
    "winograd.conv",
    "winograd.integer",
    "winograd.noise",
    "winograd.scales",
    "quant.lru_cache",
    "quant.layers",
    "quant.attention_products",
    "quant.compiling",
    "quant.timestep_path",
    "diffusion.sampler",
    "cost",
    "release_scale",
    "attention",
    "trace",
    # (3) float tasks, data, metrics, the supernet and what is fitted to it
    "data",
    "scenes",
    "zoo",
    "zoo.weights",
    "zoo.training",
    "zoo.conditioning",
    "zoo.decoding",
    "zoo.task",
    "zoo.resnet",
    "zoo.embedded",
    "zoo.digits",
    "zoo.cifar",
    "zoo.text",
    "zoo.clip",
    "zoo.text_to_image",
    "zoo.compvis",
    "zoo.architecture",
    "zoo.schedulers",
    "zoo.pipeline_folder",
    "zoo.pipelines",
    "zoo.kept_timesteps",
    "zoo.stand_ins",
    "metrics.accuracy",
    "metrics.metric",
    "metrics.fidelity",
    "metrics.statistics",
    "metrics.reference",
    "metrics.frechet",
    "metrics.control",
    "metrics.inception",
    "metrics.inception_metrics",
    "metrics.lpips",
    "metrics.clip",
    "smoke",
    "quant.seams",
    "quant.supernet",
    "quant.static_ranges",
    "quant.packed",
    "quant.states",
    "quant.units",
    "quant.activations",
    "quant.means",
    "quant.rounding",
    "quant.reconstruction",
    "quant.passes",
    "quant.blockwise",
    "quant.calibration",
    "winograd.learning",
    "winograd.network",
    # (4) run directory, search, recipe, tracking, report
    "rundir",
    "search",
    "search.steps",
    "search.space",
    "search.evidence",
    "search.budget",
    "search.tile_rule",
    "search.trials",
    "search.algorithm",
    "search.random",
    "search.evolution",
    "search.greedy",
    "search.nsga2",
    "search.evaluation",
    "search.memory",
    "search.protocol",
    "search.objective",
    "search.executor",
    "search.module",
    "model_card",
    "recipe",
    "quantized_pipeline",
    "report.content",
    "report.points",
    "report.pictures",
    "report.charts",
    "report.winograd",
    "report.candidates",
    "report.page",
    "report",
    "report.classification",
    "report.classification_page",
    "report.comparison",
    "report.comparison_page",
    "report.sweep_page",
    "report.paper_table",
    "runs",
    "tracking.tracker",
    "tracking.training",
    "tracking.records",
    "tracking.wandb_run",
    "tracking.lightning_files",
    "tracking.opening",
    "tracking",
    # (5) the line, and its parts
    "measuring",
    "trainers",
    "batch_size",
    "choices",
    "experiment",
    "worker",
    "learner",
    "ranks",
    "elastic",
    "sharing",
    "calibrating",
    "tiling",
    "ranging",
    "stages",
    "weighing",
    "results",
    "train",
    "pricing",
    "states",
    "unet_calls",
    "forecast",
    "pipeline",
    "classification",
    "classify",
    "relog",
    "compare",
    "sweep",
    "tabulate",
    # (6) the doors: the package's public names, and the command line
    "",
    "sweep_end",
    "jobs",
    "__main__",
)
"""From low to high; a package stands where its ``__init__`` belongs, ``""`` is ``tmpq_exp`` itself."""

FORBIDDEN = {"utils", "util", "core", "base", "common", "misc", "helpers", "registry"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported_modules(source: str) -> set[str]:
    """Modules of the package that this source imports anywhere: at the top, in functions, under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            module = node.module or ""
            names = [module]
            for alias in node.names:  # "from tmpq_exp import recipe" imports tmpq_exp.recipe
                child = f"{module}.{alias.name}"
                if child.removeprefix("tmpq_exp.") in MODULES:
                    names = [*(name for name in names if name != module), child]
        else:
            continue
        found |= {name.removeprefix("tmpq_exp").lstrip(".") for name in names if name.split(".")[0] == "tmpq_exp"}
    return found


def test_every_module_has_its_place() -> None:
    assert len(set(ORDER)) == len(ORDER)
    assert set(MODULES) == set(ORDER), "a module was added, moved or removed: give it its place in ORDER"


@pytest.mark.parametrize("name", MODULES, ids=lambda name: name or "tmpq_exp")
def test_a_module_imports_only_what_stands_before_it(name: str) -> None:
    imported = imported_modules(MODULES[name].read_text(encoding="utf-8"))
    unknown = imported - set(ORDER)
    assert not unknown
    later = {other for other in imported if ORDER.index(other) >= ORDER.index(name)}
    assert not later, f"tmpq_exp.{name} imports {sorted(later)}, which stand at or above it"


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
import tmpq_exp.cost
from tmpq_exp import recipe
from tmpq_exp.zoo import digits, task
if TYPE_CHECKING:
    from tmpq_exp.config import Config
def f():
    from tmpq_exp import __version__
    import torch
"""
    assert imported_modules(source) == {"cost", "recipe", "zoo.digits", "zoo.task", "config", ""}


def test_names_say_what_a_module_owns() -> None:
    parts = {part for name in MODULES for part in name.split(".")}
    assert not parts & FORBIDDEN
    for path in MODULES.values():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path} does not say what it owns"


def test_composing_and_checking_imports_no_torch() -> None:
    script = """
import sys
import tmpq_exp
from hydra import compose, initialize_config_dir
from tmpq_exp.__main__ import conf_dir
from tmpq_exp.config import register_schema, to_config
register_schema()
with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
    to_config(compose("config", ["paths.run_dir=x"]))
heavy = {"torch", "lightning", "diffusers", "transformers", "wandb", "matplotlib", "sklearn"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_costs_are_counted_without_lightning_and_diffusers() -> None:
    script = """
import sys
import tmpq_exp.pricing, tmpq_exp.zoo.architecture, tmpq_exp.zoo.compvis
heavy = {"lightning", "diffusers", "transformers", "wandb", "matplotlib", "sklearn"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
