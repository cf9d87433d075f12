"""What the pages say: every command in them is one, those of the README run, and the pages build without a warning."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser

import tmpq_exp
from tmpq_exp.__main__ import conf_dir
from tmpq_exp.config import to_config
from tmpq_exp.metrics.inception import PYTORCH_FID_URL
from tmpq_exp.zoo.stand_ins import PROMPTS, pipeline_stand_in

ROOT = Path(tmpq_exp.__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
PROGRAM = "python -m tmpq_exp"

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMENTS = re.compile(r"(?:^<!-- .* -->\n)+\Z", re.MULTILINE)
REPLACED = re.compile(r"<!-- in tests: (\S+) -> (.+?) \(.+\) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Args:
        language: ``bash``, ``python``, ...; empty for output.
        text: Its lines.
        replaced: What tests put in the place of what: ``(old, new)``, from the comments right above it.
    """

    language: str
    text: str
    replaced: list[tuple[str, str]]


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        comments = COMMENTS.search(text, 0, found.start())
        yield Block(found[1], found[2], [] if comments is None else REPLACED.findall(comments[0]))


def lines(text: str) -> list[str]:
    """Commands of a block, continued lines joined."""
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def commands(page: Path) -> list[str]:
    """Calls of the program in blocks and in tables of a page, or in the head of a preset."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".yaml":
        return re.findall(rf"^#\s+({PROGRAM}.*)$", text, re.MULTILINE)
    fenced = [line for block in blocks(page) if block.language == "bash" for line in lines(block.text)]
    return [line for line in fenced if PROGRAM in line] + re.findall(rf"^\|.*`({PROGRAM}[^`]*)`", text, re.MULTILINE)


PRESETS = sorted((conf_dir() / "experiment").rglob("*.yaml"))
"""Each has its own command in its head."""

COMMANDS = sorted({command for page in [*PAGES, *PRESETS] for command in commands(page)})


def test_commands_stand_in_blocks_that_say_bash() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert block.language or PROGRAM not in block.text, f"{page.name}: ```bash, or no test runs\n{block.text}"


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_a_comment_above_a_block_says_what_tests_replace(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    comments = "<!-- in tests: gpu -> cpu (none here) -->\n<!-- in tests: make -> make -n (long) -->\n"
    page.write_text(f"{comments}text\n```\nout\n```\n{comments}```bash\nmake all gpu \\\n  now\n```\n")
    output, block = blocks(page)
    assert (output.language, output.replaced) == ("", [])
    (line,) = lines(block.text)
    assert small(line, block.replaced).split() == ["make", "-n", "all", "cpu", "now"]
    assert small(f"{PROGRAM} tier=full  # why", []) == f"{PROGRAM} tier=full num_threads=1 # why"


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_pages_composes_and_is_accepted(hydra: None, command: str) -> None:
    words = shlex.split(command, comments=True)
    if {"-h", "--config-dir=my_conf"} & set(words):
        return  # the help text, and options that a reader writes
    parsed = OverridesParser.create().parse_overrides([word for word in words[3:] if not word.startswith("--")])
    chosen = []
    for override in parsed:
        values = list(override.sweep_string_iterator()) if override.is_sweep_override() else []
        chosen.append(f"{override.get_key_element()}={values[-1]}" if values else str(override.input_line))
    kept = [override for override in chosen if not override.startswith("hydra")]
    config = to_config(compose("config", [*kept, "paths.run_dir=somewhere"]))  # refuses what cannot be
    assert config.paths.run_dir == "somewhere"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, inception_weights: Path) -> Path:
    """Where the README's commands run, with the files that a reader would bring, small and random."""
    folder = tmp_path_factory.mktemp("readme")
    made = pipeline_stand_in("stable_diffusion", folder / "made")
    (folder / "my_pipeline").symlink_to(made / "pipeline")
    (folder / "my_clip").symlink_to(made / "clip")
    (folder / "references").mkdir()
    for name in ("prompts.txt", "references/coco2017_val_5k.txt"):
        (folder / name).write_text("\n".join(PROMPTS), encoding="utf-8")
    np.savez(folder / "references" / "coco2017_val.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    checkpoints = folder / "torch" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / PYTORCH_FID_URL.rsplit("/", 1)[-1]).symlink_to(inception_weights)
    for block in blocks(README):
        named = re.match(r"# (\w+\.py)\n", block.text)
        if block.language == "python" and named:
            (folder / named[1]).write_text(block.text, encoding="utf-8")
    return folder


def small(line: str, replaced: list[tuple[str, str]]) -> str:
    """A line of the README as it runs here: small sizes, one thread, and what the comment above its block says."""
    for old, new in replaced:
        line = line.replace(old, new)
    if PROGRAM not in line or "-h" in line.split():
        return line
    added = [word for word in ("tier=smoke", "num_threads=1") if f"{word.partition('=')[0]}=" not in line]
    command, mark, comment = line.partition(" #")
    return " ".join([command.rstrip(), *added]) + mark + comment


STEPS = [
    (text, block.language, block.replaced)
    for block in blocks(README)
    if block.language in ("bash", "python")
    for text in (lines(block.text) if block.language == "bash" else [block.text])
]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(STEPS)))
def test_every_command_of_the_readme_runs(number: int, home: Path) -> None:
    """In the order of the page, in one folder: later ones read what earlier ones wrote."""
    text, language, replaced = STEPS[number]
    line = small(text, replaced) if language == "bash" else text
    start = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
    done = subprocess.run(
        [*start, line],
        cwd=ROOT if line.startswith("make") else home,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "TORCH_HOME": str(home / "torch"),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert "recipe.json gives" not in done.stderr, "the recipe must give the winner's images back to the last bit"


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="needs the docs extra")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "sphinx",
            "--fail-on-warning",
            "--keep-going",
            "-q",
            "-b",
            "html",
            "docs",
            str(tmp_path),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "api.html").read_text(encoding="utf-8")
    for name in ("tmpq_exp.load", "tmpq_exp.save", "tmpq_exp.apply_recipe"):
        assert f'id="{name}"' in api
    assert "evaluation" in (tmp_path / "configuration.html").read_text(encoding="utf-8")
