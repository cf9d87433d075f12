"""What tier=smoke changes in the configuration of a preset, and what it leaves as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose
from omegaconf import DictConfig, OmegaConf

from tmpq_exp.config import UserError, to_config
from tmpq_exp.config.identity import flatten
from tmpq_exp.smoke import METRIC, POPULATION, small_search, with_stand_in

pytestmark = pytest.mark.usefixtures("hydra")


def composed(*overrides: str) -> DictConfig:
    return compose("config", ["paths.run_dir=somewhere", *overrides])


def test_the_model_its_files_and_the_search_are_replaced_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = composed("experiment=tmpq_dm/sd14_w6a6", "tier=smoke", f"paths.cache_dir={tmp_path}")
    after = with_stand_in(before)
    assert before == composed("experiment=tmpq_dm/sd14_w6a6", "tier=smoke", f"paths.cache_dir={tmp_path}")
    assert "its figures mean nothing" in capsys.readouterr().err
    old, new = (flatten(OmegaConf.to_container(config, resolve=True)) for config in (before, after))
    changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    places = ("model.path", "model.prompts", "evaluation.metric", "evaluation.reference", "metrics", "search")
    assert {key for key in changed if not key.startswith(places)} == set()
    config = to_config(after)
    assert not config.wants_stand_in
    assert (config.evaluation.metric["name"], config.evaluation.further) == (METRIC, ["clip_score"])
    assert config.search["population_size"] == POPULATION
    for path in (config.model["path"], config.model["prompts"], config.evaluation.reference):
        assert Path(path).exists()


def test_a_search_shrinks_in_proportion() -> None:
    release = dict(composed("search=tmpq_release").search)
    small = small_search(release)
    assert small == {"population_size": POPULATION, "num_parents": 2, "num_mutants": 3, "num_crossovers": 1}
    assert small_search({"population_size": 4, "num_parents": 4}) == {}
    with pytest.raises(UserError, match="found 'many'"):
        small_search({"population_size": "many"})
