"""Run directories: who may use one, which stages are done, and what an interrupted write leaves."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tmpq_exp.config import UserError
from tmpq_exp.config.identity import digest, flatten
from tmpq_exp.files import replace_file
from tmpq_exp.rundir import RunDirectory, bad_input, git_commit, write_json, writing

CONFIG: dict[str, Any] = {
    "seed": 0,
    "space": {"weight_bits": [8, 6], "groups": "quadratic"},
    "logger": {"name": "none"},
    "paths": {"run_dir": "here"},
}


def test_a_new_directory_is_made_with_its_configuration_and_environment(tmp_path: Path) -> None:
    run = RunDirectory.claim(tmp_path / "a" / "b", CONFIG)
    assert sorted(path.name for path in run.path.iterdir()) == [".lock", "config.yaml", "environment.json"]
    assert "weight_bits" in run.config.read_text()
    assert run.trials == run.path / "trials.jsonl"
    with pytest.raises(AttributeError, match="no_such_file"):
        run.no_such_file  # noqa: B018


def test_a_run_directory_can_be_copied_and_pickled(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert copy.deepcopy(run) == pickle.loads(pickle.dumps(run)) == run  # noqa: S301


def test_the_same_configuration_comes_back_and_every_start_is_recorded(tmp_path: Path) -> None:
    for _ in range(3):
        run = RunDirectory.claim(tmp_path, CONFIG)
    starts = json.loads(run.environment.read_text())["starts"]
    assert len(starts) == 3
    assert all({"command", "commit", "packages", "num_threads", "started"} <= start.keys() for start in starts)


def test_logger_and_paths_may_change(tmp_path: Path) -> None:
    run = RunDirectory.claim(tmp_path, CONFIG)
    before = run.config.read_bytes()
    again = RunDirectory.claim(tmp_path, CONFIG | {"logger": {"name": "wandb"}, "paths": {"run_dir": "there"}})
    assert again == run
    assert run.config.read_bytes() == before


def test_another_configuration_is_refused_and_the_keys_are_named(tmp_path: Path) -> None:
    RunDirectory.claim(tmp_path, CONFIG)
    other = CONFIG | {"seed": 1, "space": {"weight_bits": [8, 5], "steps": 3}}
    with pytest.raises(UserError, match=r"made by another configuration") as raised:
        RunDirectory.claim(tmp_path, other)
    message = str(raised.value)
    assert "seed: 0 there, 1 now" in message
    assert "space.weight_bits: [8, 6] there, [8, 5] now" in message
    assert "space.groups: 'quadratic' there, None now" in message
    assert "space.steps: None there, 3 now" in message
    assert len(json.loads((tmp_path / "environment.json").read_text())["starts"]) == 1


def test_many_differing_keys_are_counted(tmp_path: Path) -> None:
    RunDirectory.claim(tmp_path, {f"k{i}": i for i in range(9)})
    with pytest.raises(UserError, match="and 4 more"):
        RunDirectory.claim(tmp_path, {f"k{i}": -1 for i in range(9)})


def test_a_foreign_directory_or_file_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not empty and no run directory"):
        RunDirectory.claim(tmp_path, CONFIG)
    with pytest.raises(UserError, match="is a file"):
        RunDirectory.claim(tmp_path / "thesis.tex", CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("content", ["a: [", "- 1\n- 2\n", "just text", ""])
def test_a_damaged_configuration_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"config\.yaml|another configuration"):
        RunDirectory.claim(tmp_path, CONFIG)


def test_what_a_kill_left_of_a_write_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.123.tmp").write_text("half")
    run = RunDirectory.claim(tmp_path, CONFIG)  # killed before the configuration was there
    (tmp_path / ".supernet.safetensors.77.tmp").write_text("half")
    (tmp_path / ".mine.tmp").write_text("mine")
    RunDirectory.claim(tmp_path, CONFIG)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "config.yaml", "environment.json", ".mine.tmp"}
    assert run.config.exists()


def test_a_stage_is_computed_once_for_its_inputs_and_outputs(tmp_path: Path) -> None:
    run = RunDirectory.claim(tmp_path, CONFIG)
    output = tmp_path / "supernet.safetensors"
    calls: list[int] = []

    def compute() -> dict[str, int]:
        calls.append(1)
        output.write_text("made")
        return {"calls": len(calls)}

    assert run.stage("a", {"x": 1}, [output], compute) == {"calls": 1}
    assert RunDirectory(tmp_path).stage("a", {"x": 1}, [output], compute) == {"calls": 1}
    assert run.stage("b", {"x": 1}, [output], compute) == {"calls": 2}  # another stage has a record of its own
    assert run.stage("a", {"x": 2}, [output], compute) == {"calls": 3}
    output.unlink()
    assert run.stage("a", {"x": 2}, [output], compute) == {"calls": 4}
    assert run.stage("a", {"x": 1}, [output], compute) == {"calls": 5}  # only the last inputs are kept


def test_a_stage_that_fails_is_not_done(tmp_path: Path) -> None:
    run = RunDirectory.claim(tmp_path, CONFIG)

    def fail() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        run.stage("a", 1, [], fail)
    assert run.stage("a", 1, [], lambda: "done") == "done"


def test_times_of_resumed_parts_add_up(tmp_path: Path) -> None:
    run = RunDirectory.claim(tmp_path, CONFIG)
    run.add_stage_seconds("search", 1.25)
    run.add_stage_seconds("search", 2.5)
    run.stage("calibrate", 1, [], lambda: None)
    seconds = run.stage_seconds()
    assert seconds["search"] == 3.75
    assert seconds["calibrate"] >= 0


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'"x"', b"\xff", b'{"a": 1}', b'{"a": {"seconds": 1}}', b'{"a": nul']
)
def test_a_damaged_stage_file_is_named_with_advice(content: bytes, tmp_path: Path) -> None:
    run = RunDirectory.claim(tmp_path, CONFIG)
    run.stages.write_bytes(content)
    with pytest.raises(UserError, match=r"stages\.json is damaged .*; remove it to compute the stages again"):
        run.stage("a", 1, [], lambda: None)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"starts": 3}'])
def test_a_damaged_environment_file_is_named_with_advice(content: bytes, tmp_path: Path) -> None:
    run = RunDirectory.claim(tmp_path, CONFIG)
    run.environment.write_bytes(content)
    with pytest.raises(UserError, match=r"environment\.json is damaged .*; remove it"):
        RunDirectory.claim(tmp_path, CONFIG)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device.*Make room and start again"), writing(tmp_path):
        replace_file(path, b"new" * 1000)
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert json.loads(path.read_text()) == {"old": 1}


def test_a_disk_that_is_mounted_read_only_is_to_be_made_writable(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Read-only file system.*Make it writable and start again"), writing(tmp_path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_only_an_unwritable_disk_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), writing(tmp_path):
        (tmp_path / "missing").read_text()
    with pytest.raises(PermissionError), writing(tmp_path / "run"):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "weights of others"))


def test_json_files_are_strict(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_bad_input_keeps_the_message_and_the_cause() -> None:
    with pytest.raises(UserError, match="x must be 1; remove it") as raised, bad_input("; remove it"):
        raise ValueError("x must be 1")
    assert isinstance(raised.value.__cause__, ValueError)
    with pytest.raises(UserError, match=r"^own words$"), bad_input("; remove it"):
        raise UserError("own words")
    with pytest.raises(TypeError), bad_input():
        raise TypeError


def test_digests_depend_on_content_not_on_order() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_flatten_gives_dotted_keys() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {"a.b.c": 1, "a.d": [2], "e": None}


def test_a_directory_in_use_by_another_process_is_refused(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from tmpq_exp.rundir import RunDirectory;"
        f"RunDirectory.claim(Path({str(tmp_path / 'run')!r}), {{'a': 1}}); print('claimed', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"claimed\n"
        with pytest.raises(
            UserError,
            match=rf"in use by another process \(process {other.pid} on .* since .*\); wait for it or stop it",
        ):
            RunDirectory.claim(tmp_path / "run", {"a": 1})
        other.kill()
        other.wait()
    RunDirectory.claim(tmp_path / "run", {"a": 1})


def test_a_build_from_a_copy_says_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_COMMIT", "abc1234")
    assert git_commit() == "abc1234"
    monkeypatch.setenv("GIT_COMMIT", "")
    assert git_commit() != ""
