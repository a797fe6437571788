"""The README does what it says: its commands parse, its settings load."""

import re
import shlex
from pathlib import Path

import pytest

from conf.load import load_benchmark, load_experiment
from flows.cli import parsed

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
SHELL = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
TURNOUT = [line for line in SHELL if line.startswith("turnout")]
MAKE = [line for line in SHELL if line.startswith("make")]
SCRIPTS = [line for line in SHELL if line.startswith("python")]


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    """Python blocks run in test_pipeline.py, against a champion."""
    assert {kind for kind, _ in BLOCKS} == {"bash", "yaml", "python", "text"}
    assert len([*TURNOUT, *MAKE, *SCRIPTS]) == len([line for line in SHELL if line])


@pytest.mark.parametrize("line", TURNOUT)
def test_commands_parse_and_name_real_settings(line: str) -> None:
    words = shlex.split(line.split(">")[0], comments=True)
    arguments = parsed(words[1:])
    if words[1] == "benchmark":
        kinds, folder = arguments.routers.split(","), {"directory": arguments.directory}
        assert load_benchmark(kinds, folder, tuple(arguments.overrides))
    else:
        assert load_experiment(arguments.config, tuple(arguments.overrides))


@pytest.mark.parametrize("line", MAKE)
def test_make_has_the_target(line: str) -> None:
    target = shlex.split(line, comments=True)[1]
    assert re.search(rf"^{target}:.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_settings_load(tmp_path: Path) -> None:
    (settings,) = [text for kind, text in BLOCKS if kind == "yaml"]
    file = tmp_path / "mine.yaml"
    file.write_text(settings)
    assert load_experiment(file).pairs[0].name() == "small--large"


def test_the_tree_names_what_is_there() -> None:
    (tree,) = [text for kind, text in BLOCKS if kind == "text"]
    for folder in re.findall(r"^(\w+)/", tree, re.MULTILINE):
        assert (ROOT / folder).is_dir()


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("line", SCRIPTS)
def test_scripts_are_there(line: str) -> None:
    assert (ROOT / shlex.split(line, comments=True)[1]).is_file()
