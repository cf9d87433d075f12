"""task=states makes the states that a run then takes, once, and says in one line what is wrong with a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from tmpq_exp.__main__ import conf_dir
from tmpq_exp.config import Config, UserError, register_schema, to_config
from tmpq_exp.quant.states import cached_states
from tmpq_exp.states import make_states
from tmpq_exp.zoo.digits import DigitsDDPM


def config(tmp_path: Path, *overrides: str) -> Config:
    register_schema()
    paths = [f"paths.run_dir={tmp_path / 'run'}", f"paths.cache_dir={tmp_path / 'cache'}"]
    small = ["task=states", "calibration.num_images=2", "calibration.num_timesteps=3"]
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return to_config(compose("config", [*paths, *small, *overrides]))


def test_states_are_made_once_for_all_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_states(config(tmp_path), {})
    (path,) = (tmp_path / "cache").iterdir()
    assert str(path) in capsys.readouterr().out
    stamp = path.stat().st_mtime_ns
    make_states(config(tmp_path, "calibration=sampled", "calibration.num_images=2", "calibration.num_timesteps=3"), {})
    assert path.stat().st_mtime_ns == stamp
    _, taken = cached_states(DigitsDDPM().task(), config(tmp_path).calibration, 0, tmp_path / "cache")
    assert taken == path
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_no_states_is_named(tmp_path: Path) -> None:
    wrong = Path(DigitsDDPM().checkpoint)
    with pytest.raises(UserError, match="a file of task=states was expected") as error:
        make_states(config(tmp_path, f"calibration.states={wrong}"), {})
    assert str(wrong) in str(error.value)


def test_a_model_without_images_has_no_states(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="DigitsClassifier makes no images"):
        make_states(config(tmp_path, "model=digits_classifier"), {})
