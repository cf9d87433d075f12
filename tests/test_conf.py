"""Every file of conf/ is composed, checked against the schema, and bound to the signature it feeds."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tmpq_exp.__main__ import conf_dir
from tmpq_exp.config import Config, UserError, register_schema, to_config

CONF = conf_dir()
OPTIONS = sorted(path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.rglob("*.yaml"))
NEEDED = {
    "budget/bitops": ["budget.bitops=1000000"],
    "budget/macs": ["budget.macs=1000000"],
    "space/joint_tile": ["quant=groupwise"],
}
"""What an option cannot do without."""

DEFAULT_OPTIONS = ("hydra/default", "config")
"""Part of every composed config; nobody chooses them."""


@pytest.fixture(scope="module", autouse=True)
def hydra() -> Iterator[None]:
    """One initialized Hydra for the file."""
    register_schema()
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        yield


@pytest.fixture(scope="module")
def default(hydra: None) -> DictConfig:
    """The default job, composed once."""
    return composed()


def composed(*overrides: str) -> DictConfig:
    return compose("config", ["paths.run_dir=somewhere", *overrides])


def checked(*overrides: str) -> Config:
    return to_config(composed(*overrides))


def bind(node: Any, path: str = "") -> Iterator[str]:
    """Bind every ``_target_`` below ``node`` to its signature; yields where they were."""
    if isinstance(node, list):
        for index, child in enumerate(node):
            yield from bind(child, f"{path}[{index}]")
    if not isinstance(node, dict):
        return
    for key, child in node.items():
        yield from bind(child, f"{path}.{key}".lstrip("."))
    if "_target_" in node:
        target = get_object(node["_target_"])
        arguments = {key: value for key, value in node.items() if not key.startswith("_")}
        signature = inspect.signature(target)
        try:
            (signature.bind_partial if node.get("_partial_") else signature.bind)(**arguments)
        except TypeError as error:
            raise AssertionError(f"{path} does not fit {node['_target_']}{signature}: {error}") from error
        yield path


@pytest.mark.parametrize("option", [option for option in OPTIONS if option not in DEFAULT_OPTIONS])
def test_every_option_composes_and_binds_to_its_target(option: str) -> None:
    group, _, choice = option.partition("/")
    assert choice, f"conf/{option}.yaml is in no group, so no test and no user reaches it"
    config = composed(f"{group}={choice}", *NEEDED.get(option, []))
    assert {"task", "model", "data", "search", "trainer", "metrics.fd_digits", "metrics.fid"} <= set(
        bind(OmegaConf.to_container(config, resolve=True))
    )
    to_config(config)


def test_every_option_says_what_it_is_for() -> None:
    for path in CONF.rglob("*.yaml"):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert any(line.startswith("#") and "@package" not in line for line in lines), f"{path} says nothing"


def test_binding_refuses_a_misspelt_key() -> None:
    node = {"model": {"_target_": "tmpq_exp.zoo.digits.DigitsDDPM", "chekpoint": None}}
    with pytest.raises(AssertionError, match="model does not fit"):
        list(bind(node))


def test_every_folder_is_a_group_of_the_defaults_list() -> None:
    defaults = OmegaConf.load(CONF / "config.yaml").defaults
    listed = {next(iter(entry)) for entry in defaults if not isinstance(entry, str)}
    assert listed == {path.name for path in CONF.iterdir() if path.is_dir()}


def test_an_overlay_counts_more_than_the_defaults_and_the_command_line_most() -> None:
    assert checked().num_threads is None
    assert checked("debug=tiny").num_threads == 1
    assert checked("debug=tiny", "num_threads=2").num_threads == 2


def test_two_smoke_overlays_compose_together() -> None:
    config = checked("tier=smoke", "winograd=f4", "experiment=digits_w5a5", "ablation=bits_only", "debug=tiny")
    assert (config.tier, config.winograd.tile, config.budget.weight_bits) == ("smoke", 4, 5)
    assert not config.space.search_timesteps
    assert config.calibration.num_images == 8


def schema_nodes(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for entry in dataclasses.fields(value):
        child = getattr(value, entry.name)
        if dataclasses.is_dataclass(child):
            yield from schema_nodes(child, f"{prefix}{entry.name}.")
        else:
            yield f"{prefix}{entry.name}", child


def test_defaults_of_the_schema_are_those_of_the_default_options() -> None:
    used, schema = dict(schema_nodes(checked())), dict(schema_nodes(Config()))
    differing = {
        key: (value, used[key])
        for key, value in schema.items()
        if value != "???" and value != used[key] and key not in ("paths.run_dir",)
    }
    assert not differing


BAD_VALUES = [
    ("seed", "-1", "at least 0"),
    ("num_threads", "0", "at least 1"),
    ("quant.softmax_bits", "1", "2..16"),
    ("quant.softmax_bits", "17", "2..16"),
    ("quant.cache_max_bytes", "-1", "at least 0"),
    ("quant.weight.group_size", "0", "at least 1"),
    ("quant.act.group_size", "-3", "at least 1"),
    ("quant.act.estimator", "max", "minmax, mse or percentile"),
    ("quant.weight.granularity", "per_row", "per_tensor, per_channel, per_group"),
    ("quant.act.percentile", "50", "(50, 100]"),
    ("quant.act.percentile", "100.1", "(50, 100]"),
    ("winograd.tile", "1", "2..6"),
    ("winograd.tile", "7", "2..6"),
    ("winograd.scales", "best", "standard, closed_form or learned"),
    ("winograd.group_size", "-1", "at least 1, or all"),
    ("winograd.group_size", "some", "at least 1, or all"),
    ("winograd.method", "best", "groups, per_tensor, per_tap, bqw_style, fsq_style"),
    ("winograd.m_scale", "image", "tile or tap"),
    ("winograd.act_scales", "learned", "dynamic or static"),
    ("winograd.v_bits", "17", "2..16"),
    ("winograd.transform_bits", "3", "4..16 or null"),
    ("winograd.pixel_correlation", "1", "[0, 1)"),
    ("winograd.learning.noise", "brown", "gaussian, uniform or pink"),
    ("winograd.m_bits", "1", "2..16"),
    ("winograd.learning.num_steps", "-1", "at least 0"),
    ("winograd.learning.layers_per_step", "0", "at least 1"),
    ("winograd.learning.learning_rate", "0", "above 0"),
    ("winograd.learning.init", "random", "closed_form or standard"),
    ("calibration.num_images", "0", "at least 1"),
    ("calibration.num_timesteps", "0", "at least 1"),
    ("calibration.max_values", "1023", "at least 1024"),
    ("calibration.method", "best", "ranges, uniform_prefix or sampled"),
    ("calibration.weight_iterations", "-1", "at least 0"),
    ("calibration.act_iterations", "-1", "at least 0"),
    ("calibration.batch_size", "0", "at least 1"),
    ("calibration.weight_learning_rate", "0", "above 0"),
    ("calibration.act_learning_rate", "-0.1", "above 0"),
    ("calibration.max_cache_bytes", "-1", "at least 0"),
    ("space.num_inference_steps", "0", "at least 1"),
    ("space.groups", "cubic", "quadratic, uniform or free"),
    ("space.min_steps", "0", "at least 1"),
    ("space.max_steps", "9", "at least 10"),
    ("space.min_steps_per_group", "-1", "at least 0"),
    ("space.max_steps_per_group", "0", "at least 1"),
    ("space.bits_per_step", "none", "shared or per_step"),
    ("budget.weight_bits", "1", "2..16"),
    ("budget.act_bits", "17", "2..16"),
    ("budget.bitops", "0", "at least 1"),
    ("cost.weight_bits", "1", "2..16 or 32 (float)"),
    ("cost.act_bits", "31", "2..16 or 32 (float)"),
    ("cost.scale", "paper", "exact or release"),
    ("objective.num_images", "1", "at least 2"),
    ("objective.control_images", "1", "0 or at least 2"),
    ("evaluation.num_images", "1", "at least 2"),
    ("evaluation.num_finalists", "0", "at least 1"),
    ("evaluation.reference_steps", "0", "at least 1"),
    ("evaluation.micro_batch", "0", "at least 1"),
    ("executor.name", "dask", "local or ray"),
    ("executor.start_timeout_seconds", "0", "above 0"),
    ("logger.name", "mlflow", "wandb, csv, tensorboard or none"),
    ("logger.mode", "on", "offline, online or disabled"),
]


@pytest.mark.parametrize(("key", "value", "accepted"), BAD_VALUES)
def test_a_value_out_of_range_is_named_with_what_is_accepted(
    default: DictConfig, key: str, value: str, accepted: str
) -> None:
    config = copy.deepcopy(default)
    OmegaConf.update(config, key, value)
    with pytest.raises(UserError) as caught:
        to_config(config)
    message = str(caught.value)
    assert message.startswith(key)
    assert accepted in message
    assert value in message


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("space.weight_bits=[8,1]", "2..16, found 1"),
        ("space.act_bits=[17]", "2..16, found 17"),
        ("space.weight_bits=[]", "must not be empty"),
        ("space.act_bits=[8,8]", "must not repeat"),
        ("winograd.report_tiles=[2,7]", "2..6, found 7"),
        ("classification.scales=[best]", "standard, closed_form, learned, found 'best'"),
        ("classification.tiles=[{m: 7}]", "2..6, found 7"),
        ("classification.tiles=[{m: 4, points: best}]", "standard or improved, found 'best'"),
        ("classification.tiles=[{m: 2}, {m: 2}]", "names must differ, found f2_standard_closed_form"),
        ("classification.further=[{name: mine, m: 1}]", "2..6, found 1"),
        ("classification.further=[{name: mine, scales: best}]", "learned, found 'best'"),
        ("classification.further=[{name: mine, winograd: {m_bits: 1}}]", "mine: winograd.m_bits must be in 2..16"),
        ("classification.further=[{name: mine, winograd: {m_bits: few}}]", "mine: Value 'few'"),
        ("classification.further=[{name: mine, winograd: {mbits: 8}}]", "mine: Key 'mbits'"),
        ("classification.further=[{name: mine, winograd: {tile: 4}}]", "mine: winograd.tile is set by the row itself"),
        ("winograd.shaped_stages=[u,x]", "u, v or m, found 'x'"),
    ],
)
def test_bad_entries_of_lists_are_named(override: str, found: str) -> None:
    with pytest.raises(UserError, match=override.split("=", maxsplit=1)[0]) as caught:
        checked(override)
    assert found in str(caught.value)


@pytest.mark.parametrize("override", ["quant.weight.group_size=1.5", "seed=abc", "space.weight_bits=8"])
def test_a_wrong_type_is_refused(override: str) -> None:
    with pytest.raises((HydraException, OmegaConfBaseException), match=r"(?i)convert|invalid|merg"):
        checked(override)


@pytest.mark.parametrize("search", ["random", "greedy", "nsga2"])
def test_searches_are_compared_at_equal_evaluations(search: str) -> None:
    one, other = checked(f"search={search}").search, checked().search
    counts = [settings["population_size"] * settings["num_generations"] for settings in (one, other)]
    assert counts[0] == counts[1]


def test_fewer_groups_than_steps_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(UserError, match=r"must meet 0\.\.4, .*found 5\.\.20"):
        checked("space=joint_k", "space.num_inference_steps=2")
    with pytest.raises(UserError, match=r"must meet 10\.\.10, .*found 5\.\.5"):
        checked("space.min_steps=5", "space.max_steps=5")
    assert checked("space.groups=free", "space.min_steps=5", "space.max_steps=30").space.max_steps == 30


@pytest.mark.parametrize("key", ["foo", "quant.foo", "winograd.learning.foo"])
def test_an_added_key_that_nothing_reads_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=f"{key}: no such key"):
        checked(f"+{key}=1")


def test_the_releases_scale_knows_no_tiles() -> None:
    with pytest.raises(UserError, match=r"winograd\.tile must be 0 under cost\.scale=release, found 4"):
        checked("cost.scale=release", "winograd=f4")


def test_a_budget_of_its_own_needs_its_number() -> None:
    for name in ("bitops", "macs"):
        with pytest.raises(UserError, match=rf"budget\.{name} must be given and at least 1, found 0"):
            checked(f"budget={name}")
    with pytest.raises(UserError, match=r"budget\.bitops and budget\.macs: give one of them, found 5 and 6"):
        checked("budget.bitops=5", "budget.macs=6")


def test_conf_lies_beside_the_package_in_a_checkout() -> None:
    assert (CONF / "config.yaml").is_file()
    assert Path(CONF).is_absolute()


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [("num_workers", "0", "at least 1"), ("address", "head", "auto, host:port or null"), ("address", "head:x", "auto")],
)
def test_settings_of_a_cluster_are_checked(key: str, value: str, accepted: str) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    with pytest.raises(UserError, match=rf"^executor\.{key} must be .*{accepted}.*, found .*{value}"):
        checked("executor=ray", f"executor.{key}={value}")


def test_workers_without_a_cluster_are_refused() -> None:
    with pytest.raises(UserError, match=r"executor\.num_workers are of executor=ray, .* trainer\.devices$"):
        checked("executor.num_workers=2")


def test_a_cluster_without_ray_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tmpq_exp.config.root.find_spec", lambda name: None)
    checked()
    with pytest.raises(UserError, match=r"executor=ray needs the package ray, .* pip install 'tmpq-exp\[ray\]'"):
        checked("executor=ray")
