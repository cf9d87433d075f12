"""What users see: one clear line and exit status 2 for bad input, one directory a job, and help worth reading."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import save_file

import tmpq_exp
from tmpq_exp import __main__ as command_line
from tmpq_exp import jobs, sweep_end
from tmpq_exp.__main__ import conf_dir, report_failure
from tmpq_exp.config import UserError, register_schema
from tmpq_exp.job_record import job_name

ROOT = Path(tmpq_exp.__file__).parent.parent
WEIGHTS = Path(tmpq_exp.__file__).parent / "zoo"
SMOKE = ["tier=smoke", "logger=none", "num_threads=1"]


def tmpq(cwd: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program as a user does, in another working directory than the checkout's."""
    return subprocess.run(
        [sys.executable, "-m", "tmpq_exp", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def only_line(stderr: str) -> str:
    """The one line that explains a failure."""
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("tmpq-exp: ")
    return lines[0].removeprefix("tmpq-exp: ")


class TestRefusedAtTheDoor:
    """Composing and range checks: no torch, no run."""

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["sead=1"], "sead: no such key or group; nearest: seed"),
            (["model.chekpoint=x"], "nearest: model.checkpoint"),
            (["winogrd=f2"], "nearest: winograd"),
            (["winograd=f3"], "winograd=f3: no such option; nearest: f"),
            (["--multirun", "winograd=none,f9"], "winograd=f9: no such option"),
            (["quant.weight.group_size=1.5"], "quant.weight.group_size=1.5"),
            (["quant.act.group_size=0"], "quant.act.group_size must be at least 1, found 0"),
            (["space.weight_bits=[8,1]"], "space.weight_bits must be in 2..16, found 1"),
            (["space.tiles=[0,4]"], "found quant.weight.granularity per_channel"),
            (["space.tiles=[0,7]"], "space.tiles must hold 0 (direct) and tiles in 2..6, found 7"),
            (["space.tiles=[0,4,4]"], "space.tiles must not repeat a tile, found [0, 4, 4]"),
            (["space.tiles=[2,4]", "quant=groupwise"], "space.tiles must hold 0 (direct)"),
            (["space=joint_tile", "quant=groupwise", "winograd=f4"], "winograd.tile must be 0 (winograd=none)"),
            (["quant.softmax_bits=17"], "quant.softmax_bits must be in 2..16, found 17"),
            (["seed=many"], "seed=many"),
            (["logger=mlflow"], "logger=mlflow: no such option; options: csv, none, tensorboard, wandb"),
            (["=3"], "override"),
            (["--cfg", "job", "--multirun"], "Only one of"),
            (["hydra.run.dir=taken"], "hydra.run.dir: taken is a file"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_one_line_and_status_2(
        self,
        arguments: list[str],
        said: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        (tmp_path / "taken").touch()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["tmpq-exp", *arguments])
        monkeypatch.setattr(sweep_end, "_directories", [])
        GlobalHydra.instance().clear()
        with pytest.raises(SystemExit) as caught:
            command_line.main()
        assert caught.value.code == 2
        assert said in only_line(capsys.readouterr().err)

    def test_an_unknown_option_lists_the_known_ones(self, tmp_path: Path) -> None:
        done = tmpq(tmp_path, "budget=w6a7")
        assert done.returncode == 2
        assert only_line(done.stderr).endswith("nearest: w6a6; options: bitops, macs, w5a5, w6a6, w8a8")

    def test_a_typo_fails_within_two_seconds(self, tmp_path: Path) -> None:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = tmpq(tmp_path, "space.num_inference_step=4")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 2
        assert only_line(done.stderr).endswith("nearest: space.num_inference_steps")
        # processor time: what else runs on this machine does not count
        assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 2

    def test_help_names_groups_and_examples_without_torch(self, tmp_path: Path) -> None:
        done = tmpq(tmp_path, "-h", PYTHONPROFILEIMPORTTIME="1")
        assert done.returncode == 0
        assert "python -m tmpq_exp --multirun winograd=none,f2,f4,f6" in done.stdout
        for group in (path.name for path in conf_dir().iterdir() if path.is_dir() and path.name != "hydra"):
            assert f"\n{group}: " in done.stdout
        assert "hydra.core" in done.stderr
        assert not [line for line in done.stderr.splitlines() if line.rstrip().endswith(("| torch", "| lightning"))]


class Job:
    """Runs jobs in this process: the same door as the program's, without its start."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(self, *overrides: str, run_dir: Path | None = None) -> None:
        register_schema()
        GlobalHydra.instance().clear()
        run_dir = run_dir or self.directory / "run"
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            composed = compose("config", [*SMOKE, f"paths.run_dir='{run_dir}'", *overrides])
        command_line.run_job(composed)

    def refused(self, capsys: pytest.CaptureFixture[str], *overrides: str, run_dir: Path | None = None) -> str:
        """What the user is told; the status must be 2."""
        with pytest.raises(Exception) as caught:  # noqa: PT011  report_failure judges it
            self(*overrides, run_dir=run_dir)
        capsys.readouterr()
        assert report_failure(caught.value) == 2
        return only_line(capsys.readouterr().err)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tmpq-exp"])
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    return Job(tmp_path)


class TestRefusedOnceTheModelIsKnown:
    """Checks that need the model or the run directory."""

    def test_budget_below_the_cheapest_says_what_that_costs(self, job: Job, capsys: Any) -> None:
        message = job.refused(capsys, "budget=bitops", "budget.bitops=1000")
        assert "1000" in message.replace(",", "")
        assert "cheapest" in message
        assert max(int(word) for word in message.replace(",", "").replace(".", " ").split() if word.isdigit()) > 1000

    def test_more_steps_than_the_schedule_has(self, job: Job, capsys: Any) -> None:
        message = job.refused(capsys, "space.num_inference_steps=1001")
        assert "1001" in message
        assert "1000" in message

    def test_missing_checkpoint(self, job: Job, capsys: Any, tmp_path: Path) -> None:
        message = job.refused(capsys, f"model.checkpoint={tmp_path}/none.safetensors")
        assert "none.safetensors" in message
        assert "safetensors file was expected" in message

    def test_truncated_checkpoint(self, job: Job, capsys: Any, tmp_path: Path) -> None:
        path = tmp_path / "cut.safetensors"
        path.write_bytes((WEIGHTS / "ddpm_digits" / "model.safetensors").read_bytes()[:5000])
        message = job.refused(capsys, f"model.checkpoint={path}")
        assert f"{path} is truncated or no safetensors file" in message

    def test_checkpoint_of_another_model(self, job: Job, capsys: Any) -> None:
        path = WEIGHTS / "digits_classifier" / "model.safetensors"
        message = job.refused(capsys, f"model.checkpoint={path}")
        assert f"{path} holds weights of model digits_classifier" in message
        assert "ddpm_digits" in message

    def test_checkpoint_of_anything_else(self, job: Job, capsys: Any, tmp_path: Path) -> None:
        path = tmp_path / "foreign.safetensors"
        save_file({"weight": torch.zeros(3)}, path)
        message = job.refused(capsys, f"model.checkpoint={path}")
        assert "does not fit" in message
        assert "first missing key" in message

    def test_a_setting_of_the_search(self, job: Job, capsys: Any) -> None:
        assert "mutation_prob must lie in (0, 1], found 2" in job.refused(capsys, "search.mutation_prob=2")

    def test_a_key_its_target_does_not_take(self, job: Job, capsys: Any) -> None:
        assert "foo" in job.refused(capsys, "+model.foo=1")

    def test_a_model_that_is_there_for_another_task(self, job: Job, capsys: Any) -> None:
        message = job.refused(capsys, "model=sd14")
        assert message.startswith("model.path of sd14 must be a folder of a diffusers pipeline, or a hub id")
        message = job.refused(capsys, "model=digits_classifier", run_dir=job.directory / "other")
        assert message == "model: digits_classifier makes no images and can only be trained (task=train)"
        message = job.refused(capsys, "task=train", "model=sd14", run_dir=job.directory / "third")
        assert message == "model: sd14 has no training recipe here"

    def test_tasks_about_other_runs_want_some(self, job: Job, capsys: Any, tmp_path: Path) -> None:
        for task in ("report", "log"):
            message = job.refused(capsys, f"task={task}", "logger=csv")
            assert message.startswith("runs: no run directory given; for example 'runs=[outputs/")
            message = job.refused(capsys, f"task={task}", "logger=csv", f"runs=[{tmp_path}/gone]")
            assert message == f"runs: {tmp_path}/gone is no directory; a run directory, or one of a sweep, was expected"
        assert not (tmp_path / "run").exists()

    def test_foreign_run_directory(self, job: Job, capsys: Any, tmp_path: Path) -> None:
        directory = tmp_path / "holiday"
        directory.mkdir()
        (directory / "photo.jpg").touch()
        message = job.refused(capsys, run_dir=directory)
        assert f"{directory} is not empty and no run directory" in message
        assert [path.name for path in directory.iterdir()] == ["photo.jpg"]

    def test_run_directory_of_another_config(self, job: Job, capsys: Any, tmp_path: Path) -> None:
        too_late = ["space.num_inference_steps=1001"]  # claims the directory, then stops
        with pytest.raises(ValueError, match="1001"):
            job(*too_late)
        message = job.refused(capsys, *too_late, "seed=7", "quant.softmax_bits=6")
        assert "seed: 0 there, 7 now" in message
        assert "quant.softmax_bits: 8 there, 6 now" in message
        assert "made by another configuration" in message

    def test_run_directory_that_is_a_file(self, job: Job, capsys: Any, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_text("mine")
        assert f"{path} is a file" in job.refused(capsys, run_dir=path)
        assert path.read_text() == "mine"


class TestWhatNobodyForesaw:
    """Faults of the program and of the machine: status 1, one line, the traceback in a file."""

    @pytest.fixture
    def raised(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Exception], int]:
        def run(error: Exception) -> int:
            def fail(_: object) -> None:
                raise error

            monkeypatch.chdir(tmp_path)
            monkeypatch.setattr(jobs, "run_job", fail)
            monkeypatch.setattr(sys, "argv", ["tmpq-exp", "hydra.run.dir=run"])
            GlobalHydra.instance().clear()
            with pytest.raises(SystemExit) as caught:
                command_line.main()
            assert isinstance(caught.value.code, int)
            return caught.value.code

        return run

    def test_the_traceback_goes_into_the_run_directory(
        self, raised: Callable[[Exception], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.yaml").touch()
        assert raised(RuntimeError("shapes differ\nby one")) == 1
        path = tmp_path / "run" / "crash.log"
        expected = f"unexpected error RuntimeError: shapes differ; the traceback is in {path}; please report it"
        assert only_line(capsys.readouterr().err) == expected
        assert "Traceback (most recent call last)" in path.read_text()
        assert "by one" in path.read_text()

    def test_a_folder_that_is_no_run_directory_is_left_alone(
        self, raised: Callable[[Exception], int], tmp_path: Path
    ) -> None:
        assert raised(KeyError("layer")) == 1
        assert (tmp_path / "crash.log").exists()
        assert not list((tmp_path / "run").iterdir())

    def test_full_disk(self, raised: Callable[[Exception], int], capsys: pytest.CaptureFixture[str]) -> None:
        assert raised(OSError(28, "No space left on device", "run/stages.json")) == 2
        message = only_line(capsys.readouterr().err)
        assert message.startswith(
            "run/stages.json: No space left on device; what was written before is kept. Make room"
        )

    def test_a_broken_disk(self, raised: Callable[[Exception], int], capsys: pytest.CaptureFixture[str]) -> None:
        assert raised(OSError(5, "Input/output error", "run/stages.json")) == 1
        message = only_line(capsys.readouterr().err)
        assert message.startswith("run/stages.json: Input/output error; what was written before is kept, start again")

    def test_a_value_error_of_other_code_is_no_user_error(
        self, raised: Callable[[Exception], int], tmp_path: Path
    ) -> None:
        assert raised(ValueError("from a library")) == 1  # raised outside the package, here by the test
        assert raised(UserError("seed must be small")) == 2


def test_installed_package_runs_from_anywhere(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tmpq_exp", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    built = subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, source], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {f"tmpq_exp/conf/{path.relative_to(conf_dir())}" for path in conf_dir().rglob("*.yaml")} <= inside
    weights = {"tmpq_exp/zoo/ddpm_digits/model.safetensors", "tmpq_exp/zoo/digits_classifier/reference.safetensors"}
    pages = {f"tmpq_exp/report/{name}" for name in ("page.html", "page.js", "comparison.html", "style.css")}
    assert weights | pages <= inside
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True, capture_output=True)
    shown = tmpq(elsewhere, "--cfg", "job", PYTHONPATH=str(target))
    assert shown.returncode == 0, shown.stderr
    assert "_target_: tmpq_exp.pipeline.run" in shown.stdout
    refused = tmpq(elsewhere, "winograd=f7", PYTHONPATH=str(target))
    assert refused.returncode == 2
    assert only_line(refused.stderr).endswith("options: f2, f4, f4_shaped, f6, f6_paper, f6_shaped, none")
    found = [sys.executable, "-c", "import tmpq_exp; print(tmpq_exp.__file__)"]
    where = subprocess.run(found, cwd=elsewhere, env={**os.environ, "PYTHONPATH": str(target)}, capture_output=True)
    assert str(target) in where.stdout.decode()  # not the checkout


@pytest.mark.slow
def test_a_sweep_leaves_one_directory_a_job(tmp_path: Path) -> None:
    done = tmpq(tmp_path, "--multirun", *SMOKE, "winograd=none,f2,f4,f6", "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    reports = sorted((tmp_path / "sweep").glob("*/report.json"), key=lambda path: job_name(path.parent))
    assert [job_name(path.parent).split("_")[0] for path in reports] == ["0", "1", "2", "3"]
    for path, option in zip(reports, ("none", "f2", "f4", "f6"), strict=True):
        assert f"winograd={option}" in job_name(path.parent)
        report = json.loads(path.read_text(encoding="utf-8"))
        assert report["best"]["bitops"] > 0
        assert report["environment"]["sweep"] == "sweep", "jobs of a sweep know whose they are"
    compared = tmpq(tmp_path, "task=report", "runs=[sweep]", "hydra.run.dir=together")
    assert compared.returncode == 0, compared.stderr
    assert "winograd=f6" in compared.stdout
    assert (tmp_path / "together" / "comparison.csv").read_text().count("\n") == 1 + 4 * 5


def test_a_failing_job_does_not_stop_the_sweep(tmp_path: Path) -> None:
    done = tmpq(tmp_path, "--multirun", "seed=-1,-2", "hydra.sweep.dir=sweep")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "tmpq-exp: job 0 (seed=-1): seed must be at least 0, found -1",
        "tmpq-exp: job 1 (seed=-2): seed must be at least 0, found -2",
        "tmpq-exp: 2 failed; the same command with hydra.sweep.dir=sweep sweep.retry_failed=true goes on, and runs no "
        "finished job again",
    ]


def test_options_of_the_users_own_folder_count(tmp_path: Path) -> None:
    (tmp_path / "own" / "model").mkdir(parents=True)
    shutil.copy(conf_dir() / "model" / "ddpm_digits.yaml", tmp_path / "own" / "model" / "mine.yaml")
    done = tmpq(tmp_path, f"--config-dir={tmp_path / 'own'}", "model=mine", "sead=1")
    assert (done.returncode, only_line(done.stderr)) == (2, "sead: no such key or group; nearest: seed")
    done = tmpq(tmp_path, "--config-dir", str(tmp_path / "own"), "model=mime")
    assert done.returncode == 2
    assert "nearest: mine" in only_line(done.stderr)
