"""What a stranger's file can do: fail. Nothing is unpickled or evaluated, no page runs what it shows."""

from __future__ import annotations

import ast
import json
import pickle
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import tmpq_exp
from tests.report.example import candidate, make_report, make_trials
from tmpq_exp.compare import compare
from tmpq_exp.config import Config, PathsConfig, UserError
from tmpq_exp.job_record import JobRecord, JobState, write_record
from tmpq_exp.metrics.inception import PytorchFidInception
from tmpq_exp.metrics.lpips import Lpips
from tmpq_exp.metrics.statistics import read_npz
from tmpq_exp.plain_data import parse_json, parse_json_object, read_yaml_mapping
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.recipe import apply_recipe
from tmpq_exp.report import report_html
from tmpq_exp.rundir import RunDirectory
from tmpq_exp.search.trials import Trial, TrialLog, read_trials
from tmpq_exp.sweep import conclude
from tmpq_exp.winograd.scales import read_scales
from tmpq_exp.winograd.spec import WinogradSpec
from tmpq_exp.zoo.pipeline_folder import open_pipeline
from tmpq_exp.zoo.weights import read_state_dict, read_tensors

PACKAGE = Path(tmpq_exp.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "jsonpickle"}
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.jit.load", "torch.hub.load"),
    *("yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle", "runpy.run_path", "importlib.import_module"),
}
NEEDED_ARGUMENTS = {
    "torch.load": {"weights_only": True},
    "np.load": {"allow_pickle": False},
    "trainer.fit": {"weights_only": True},
}
"""Calls that read files are safe with these arguments only; a fit without a checkpoint reads none."""


def dotted(node: ast.expr) -> str:
    return ast.unparse(node) if isinstance(node, (ast.Name, ast.Attribute)) else ""


def unsafe_calls(source: str) -> list[str]:
    """What in a source could run what a file holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"line {node.lineno}: import of {n}" for n in names if n.split(".")[0] in FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call):
            continue
        name, given_to = dotted(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        if name in FORBIDDEN_CALLS:
            found.append(f"line {node.lineno}: {name}")
        if name in NEEDED_ARGUMENTS and not (name == "trainer.fit" and "ckpt_path" not in given_to):
            for argument, wanted in NEEDED_ARGUMENTS[name].items():
                value = given_to.get(argument)
                if not isinstance(value, ast.Constant) or value.value is not wanted:
                    found.append(f"line {node.lineno}: {name} without {argument}={wanted}")
        for argument in ("shell", "trust_remote_code"):
            value = given_to.get(argument)
            if value is not None and not (isinstance(value, ast.Constant) and value.value is False):
                found.append(f"line {node.lineno}: {name} with {argument}")
        if name == "yaml.load" and "SafeLoader" not in source:
            found.append(f"line {node.lineno}: yaml.load without a safe loader")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_read_from_disk_is_unpickled_or_evaluated(path: Path) -> None:
    assert unsafe_calls(path.read_text(encoding="utf-8")) == []


def test_what_is_unsafe_is_found() -> None:
    for line in (
        "import pickle", "from pickle import loads", "from joblib import load", "torch.load(p)", "eval(x)",
        "torch.load(p, weights_only=False)", "np.load(p)", "trainer.fit(m, ckpt_path=p)", "yaml.load(p)",
        "subprocess.run(c, shell=True)", "A.from_pretrained(p, trust_remote_code=True)",
        "torch.load(p, weights_only=w)",
    ):  # fmt: skip
        assert len(unsafe_calls(line)) == 1, line
    assert unsafe_calls("model.eval(); trainer.fit(m); torch.load(p, weights_only=True)") == []


class Trap:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


READERS: dict[str, Callable[[Path], Any]] = {
    "model.th": lambda path: read_state_dict(path, "weights"),
    "inception.pth": PytorchFidInception,
    "alexnet.pth": lambda path: Lpips(str(path)),
    "model.safetensors": lambda path: read_tensors(path, "weights"),
    "statistics.npz": lambda path: read_npz(path, 1, [("mu", "sigma")]),
}
"""Every kind of binary file that is read, by its reader."""


SLOW_READERS = ("alexnet.pth", "inception.pth")
"""They build their network first."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW_READERS else name for name in READERS]
)
@pytest.mark.parametrize("form", ["pickle", "torch", "legacy torch", "numpy"])
def test_a_hostile_pickle_is_refused_unread(name: str, form: str, tmp_path: Path) -> None:
    path, trace = tmp_path / name, tmp_path / "trace"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Trap(trace)))
    elif form == "numpy":
        with path.open("wb") as file:
            np.savez(file, mu=np.array([Trap(trace)], dtype=object), sigma=np.eye(1))
    else:
        torch.save({"state_dict": Trap(trace)}, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        READERS[name](path)
    assert not trace.exists()


def test_a_pipeline_with_pickled_weights_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DModel"]}))
    (tmp_path / "unet" / "config.json").write_text("{}")
    torch.save(Trap(tmp_path / "trace"), tmp_path / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no safetensors file"):
        open_pipeline(str(tmp_path)).unet()
    (tmp_path / "model_index.json").write_text(json.dumps({"unet": ["os", "system"]}))
    with pytest.raises(ValueError, match="found system"):
        open_pipeline(str(tmp_path)).unet()
    assert not (tmp_path / "trace").exists()


class TestPlainData:
    def test_deep_nesting_is_bad_input(self, tmp_path: Path) -> None:
        for text in ("[" * 200_000, '{"a":' * 200_000):
            with pytest.raises(ValueError, match=r"nested too deeply|Expecting"):
                parse_json(text)
        path = tmp_path / "config.yaml"
        path.write_text("[" * 20_000)
        with pytest.raises(ValueError, match=r"config\.yaml is no YAML"):
            read_yaml_mapping(path)

    def test_yaml_makes_no_objects_and_no_bombs(self, tmp_path: Path) -> None:
        path, trace = tmp_path / "config.yaml", tmp_path / "trace"
        path.write_text(f"a: !!python/object/apply:pathlib.Path.touch [!!python/object:pathlib.Path [{trace}]]\n")
        with pytest.raises(ValueError, match="no YAML"):
            read_yaml_mapping(path)
        assert not trace.exists()
        lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 40))]
        path.write_text("\n".join(lines))
        with pytest.raises(ValueError, match="aliases"):
            read_yaml_mapping(path)
        path.write_text("a: ${oc.env:HOME}\nb: 1\n")
        assert read_yaml_mapping(path) == {"a": "${oc.env:HOME}", "b": 1}

    def test_what_this_program_writes_comes_back(self, tmp_path: Path) -> None:
        values = {"a": {"b": [1, 2.5, 1e-05, None, True]}, "c": "1e3", "d": "on", "e": "2026-01-01", "f": "x: [y]"}
        path = tmp_path / "config.yaml"
        path.write_text(OmegaConf.to_yaml(values))
        assert read_yaml_mapping(path) == values

    @given(st.binary(max_size=40) | st.text(max_size=40))
    def test_any_text_is_data_or_bad_input(self, text: str | bytes) -> None:
        with suppress(ValueError):
            assert isinstance(parse_json_object(text), dict)


odd_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([-1, 0, 10**30, 2**63, "../../x", "/etc/passwd", "<script>", "inf", [], {}]),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=4), children, max_size=3),
    max_leaves=4,
)  # fmt: skip


def places_of(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values inside; of long lists only the first."""
    children = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    return [prefix] * bool(prefix) + [place for key, child in children for place in places_of(child, (*prefix, key))]


def changed(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """A copy with something else at a place."""
    if not place:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = changed(copy[place[0]], place[1:], new)
    return copy


def fuzz(check: Callable[[st.DataObject], None], num_examples: int) -> None:
    """Call a check with that many strange inputs."""

    @settings(max_examples=num_examples, deadline=None)
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        check(data)

    run()


FEW_OR_MANY = pytest.mark.parametrize("num_examples", [8, pytest.param(200, marks=pytest.mark.slow)])


def strange(data: st.DataObject, value: Any) -> Any:
    """The same with something odd at one place."""
    return changed(value, data.draw(st.sampled_from(places_of(value))), data.draw(odd_values))


@FEW_OR_MANY
def test_a_strange_trial_is_taken_or_left_out(num_examples: int, tmp_path: Path) -> None:
    path, good = tmp_path / "trials.jsonl", recorded(candidate(1), 1)

    def check(data: st.DataObject) -> None:
        path.write_text(json.dumps(strange(data, recorded(candidate(0), 0))) + "\n" + json.dumps(good) + "\n")
        trials, warnings = read_trials(path)
        assert len(trials) + len(warnings) == 2
        assert trials[-1].index == 1
        for trial in trials:
            trial.score("fd_digits")
        TrialLog(tmp_path / "new" / "trials.jsonl", [tmp_path])

    fuzz(check, num_examples)


def recorded(proposed: Candidate, index: int) -> dict[str, Any]:
    """A trial as it stands in the file."""
    return asdict(
        Trial(
            index, "search", None, 0, proposed.key(), proposed.to_json(), 10**9, 10, 10, {"fd_digits": 9.0}, 128, 1,
            "search-f", "state", None, {"fd_digits": [8.0, 10.0]}, None, {"ssim": "f"}, {"ssim": "no"}, 8,
        )
    )  # fmt: skip


def write_run(directory: Path, report: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.yaml").write_text("task: {_target_: tmpq_exp.pipeline.run}\nseed: 0\n")
    (directory / "report.json").write_text(json.dumps(report))
    write_record(directory, JobRecord(0, ["seed=0"], "seed=0", JobState.FINISHED, 0))
    return directory


@FEW_OR_MANY
def test_a_strange_report_is_compared_or_refused(num_examples: int, tmp_path: Path) -> None:
    def check(data: st.DataObject) -> None:
        run = write_run(tmp_path / "sweep", strange(data, make_report()))
        config = Config(runs=[str(run)], paths=PathsConfig(run_dir=str(tmp_path / "out")))
        try:
            compare(config, {"seed": 0})
        except UserError as error:
            assert str(error).startswith("runs: ")  # noqa: PT017  either is right
        conclude(tmp_path)
        assert "<script" not in (tmp_path / "sweep.html").read_text()

    fuzz(check, num_examples)


@FEW_OR_MANY
def test_strange_files_of_a_run_directory_are_refused(num_examples: int, tmp_path: Path) -> None:
    usual = {"config.yaml": '{"seed": 0}', "stages.json": "{}", "environment.json": "{}"}

    def check(data: st.DataObject) -> None:
        odd = data.draw(st.sampled_from(sorted(usual)))
        for name, text in usual.items():
            (tmp_path / name).write_text(json.dumps(data.draw(odd_values)) if name == odd else text)
        try:
            run = RunDirectory.claim(tmp_path, {"seed": 0})
            run.stage("a", 1, [], lambda: 1)
            run.stage_seconds()
        except UserError as error:
            assert str(tmp_path) in str(error)  # noqa: PT017  either is right

    fuzz(check, num_examples)
    RunDirectory(tmp_path).release()


@FEW_OR_MANY
def test_strange_scales_are_read_or_refused(num_examples: int, tmp_path: Path) -> None:
    path, ones = tmp_path / "winograd_scales.json", {"s_b": [1.0] * 6, "s_g": [1.0] * 6, "s_a": [1.0] * 6}
    content = {"schema": 1, "tiles": {"4": {"points": ["0", "1", "-1", "2", "-2", "inf"], "r": 3, "scales": ones}}}

    def check(data: st.DataObject) -> None:
        path.write_text(json.dumps(strange(data, content)))
        try:
            read_scales(path, WinogradSpec(4))
        except ValueError as error:
            assert str(path) in str(error) or "scales" in str(error)  # noqa: PT017  either is right

    fuzz(check, num_examples)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small recipe, as a run writes it."""
    from tests.test_recipe import STATIC, make_candidate, make_module, write
    from tmpq_exp.zoo.digits import DigitsDDPM

    module = make_module(DigitsDDPM().task(), STATIC)
    return write(module, make_candidate(module, "winograd"), tmp_path_factory.mktemp("recipe"))


@FEW_OR_MANY
def test_a_strange_recipe_is_taken_or_refused(num_examples: int, recipe: Path) -> None:
    content, path = json.loads(recipe.read_text()), recipe.with_name("strange.json")

    def check(data: st.DataObject) -> None:
        path.write_text(json.dumps(strange(data, content)))
        try:
            apply_recipe(path)
        except ValueError as error:
            assert str(recipe.parent) in str(error)  # noqa: PT017  either is right

    fuzz(check, num_examples)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "a/../../secret.safetensors", "..", "", "."])
def test_a_recipe_reads_no_file_outside_of_its_folder(file: str, recipe: Path, tmp_path: Path) -> None:
    content = json.loads(recipe.read_text())
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(recipe.with_suffix(".safetensors").read_bytes())
    content["state"]["file"] = file
    (inner / "recipe.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(str(inner))):
        apply_recipe(inner / "recipe.json")


def test_a_hub_id_of_a_recipe_is_no_folder_of_this_machine(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.loads(recipe.read_text())
    (tmp_path / "private" / "pipeline").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for hub in ("private/pipeline", "../private", "/etc", "~/x", "a/b/c", 7, ["a/b"]):
        content["source"] = {"kind": "pipeline", "hub": hub, "text": False, "settings": {}}
        (tmp_path / "recipe.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"source\.hub must be a hub id|is damaged"):
            apply_recipe(tmp_path / "recipe.json")


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"' [red]"


class Active(HTMLParser):
    """Elements and attributes that run something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [tag] * (tag in ("script", "iframe", "object", "embed"))
        self.found += [f"{tag} {n}" for n, value in attrs if n.startswith("on") or "javascript:" in (value or "")]
        self.found += [f"{tag} {value}" for name, value in attrs if name in ("src", "href") and value == "x"]


def hostile(value: Any, place: str = "") -> Any:
    """The same with hostile text wherever a report holds free text."""
    free = ("model", "label", "points", "reason", "warnings", "layers", "commit", "unit", "winograd_choice")
    if isinstance(value, dict):
        return {key: hostile(child, key) for key, child in value.items()}
    if isinstance(value, list):
        return [hostile(child, place) for child in value]
    return f"{value}{HOSTILE}" if isinstance(value, str) and place in free else value


def test_pages_show_hostile_names_and_run_nothing(tmp_path: Path) -> None:
    report = hostile(make_report())
    report["warnings"] = [HOSTILE]
    report_html(tmp_path / "report.html", report, make_trials(), {})
    text = (tmp_path / "report.html").read_text()
    assert Active(text).found == ["script", "script"], "its own data and its own drawing, and nothing else"
    assert "alert(1)" in text
    name = "seed=</td><script>alert(3)<"  # what a file name can hold
    run = write_run(tmp_path / "sweep", report)
    run = run.rename(tmp_path / name.replace("/", ""))
    write_record(run, JobRecord(0, [HOSTILE], HOSTILE, JobState.FINISHED, 0, HOSTILE))
    compare(Config(runs=[str(run)], paths=PathsConfig(run_dir=str(tmp_path / "out"))), {"seed": 0})
    conclude(tmp_path)
    for page in (tmp_path / "out" / "comparison.html", tmp_path / "sweep.html"):
        assert Active(page.read_text()).found == []
        assert "alert(1)" in page.read_text()
    policy = """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;"""
    without_scripts = [tmp_path / "out" / "comparison.html", tmp_path / "sweep.html"]
    for page in (tmp_path / "report.html", *without_scripts):
        assert page.read_text().count(policy) == 1, f"{page.name} may load from elsewhere"
    assert not any("script-src" in page.read_text() for page in without_scripts)
    for template in sorted((PACKAGE / "report").glob("*.html")):
        source = template.read_text()
        if "<body>" in source:  # the others are parts of pages; every page has the one head
            assert re.search(r"{(% call|{) head\(", source), f"{template.name} may load from elsewhere"
            assert "<head>" not in source
