"""Records of a sweep's jobs: what is kept, what a damaged file costs, and the hash that names a directory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import DictConfig

from tmpq_exp import locks
from tmpq_exp.config import register_schema
from tmpq_exp.job_record import (
    LOCK_NAME,
    RECORD_NAME,
    JobRecord,
    JobState,
    config_hash,
    job_name,
    read_record,
    state_now,
    write_record,
)
from tmpq_exp.jobs import conf_dir

RECORD = JobRecord(3, ["seed=1", "winograd=f4"], "seed=1,winograd=f4")


def test_a_record_comes_back(tmp_path: Path) -> None:
    for record in (RECORD, replace(RECORD, state=JobState.FAILED, exit_status=2, cause="no <b>", seconds=1.5)):
        write_record(tmp_path, record)
        assert read_record(tmp_path) == record
    assert job_name(tmp_path) == "3_seed=1,winograd=f4"


def test_a_job_that_runs_holds_its_lock(tmp_path: Path) -> None:
    assert state_now(tmp_path, RECORD) is JobState.STOPPED
    locks.hold(tmp_path / LOCK_NAME)
    assert state_now(tmp_path, RECORD) is JobState.RUNNING
    locks.release(tmp_path / LOCK_NAME)
    assert state_now(tmp_path, replace(RECORD, state=JobState.FAILED)) is JobState.FAILED


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=5,
)


@given(key=st.sampled_from([*RECORD.__dataclass_fields__]), value=json_values)
@example(key="overrides", value={"": float("nan")})
def test_a_record_of_a_stranger_does_no_more_than_miss(
    key: str, value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("job")
    write_record(directory, RECORD)
    content = json.loads((directory / RECORD_NAME).read_text())
    (directory / RECORD_NAME).write_text(json.dumps(content | {key: value}))
    found = read_record(directory)
    assert found is None or json.dumps(getattr(found, key)) == json.dumps(value)  # as text, for NaN is not itself
    job_name(directory)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"{}", b"[" * 100_000])
def test_a_damaged_record_is_as_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / RECORD_NAME).write_bytes(content)
    assert read_record(tmp_path) is None
    assert job_name(tmp_path) == tmp_path.name


def composed(*overrides: str) -> DictConfig:
    register_schema()
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return compose("config", ["paths.run_dir=somewhere", *overrides], return_hydra_config=True)


def test_the_hash_follows_what_changes_results_and_nothing_else() -> None:
    default = config_hash(composed())
    assert len(default) == 16
    same = ["logger=none", "paths.run_dir=elsewhere", "sweep.retry_failed=true", "seed=0", "budget=w6a6"]
    for override in same:
        assert config_hash(composed(override)) == default, override
    others = [config_hash(composed(override)) for override in ("seed=1", "budget=w5a5", "winograd=f4", "task=cost")]
    assert len({default, *others}) == 5


def test_a_configuration_without_all_its_values_still_has_a_hash() -> None:
    config = composed()
    config.calibration.states = "${nowhere.at.all}"
    assert config_hash(config) != config_hash(composed())
    assert len(config_hash(config)) == 16
