"""What the README says runs, exists and agrees with what the programs say."""

import re
import shlex
from pathlib import Path

import pytest

from convnn_geo.cli import _parsers

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_python_blocks_run_from_top_to_bottom(capsys):
    found = blocks("python")
    assert len(found) >= 5
    names = {}
    for number, block in enumerate(found, start=1):
        exec(compile(block, f"README.md, Python block {number}", "exec"), names)
        for line in block.splitlines():
            # What is said to come out comes out.
            call, _, shape = line.partition("  # torch.Size(")
            if shape:
                assert tuple(eval(call, names)) == tuple(eval(shape.removesuffix(")"))), line
    assert "ConvNN2d runs by" in capsys.readouterr().out  # of lowering.explain


def test_commands_are_understood():
    lines = [line.partition("#")[0] for block in blocks("sh") for line in block.splitlines()]
    commands = [shlex.split(line)[3:] for line in lines if line.startswith("python -m convnn_geo")]
    assert {command[0] for command in commands} == {
        *("demo", "verify", "show", "train", "experiment", "bench")
    }
    for command in commands:
        _parsers(command[0])[0].parse_args(command)
    shown = "show --image photo.png --pixel 40,60 --spectrum 5 --out spectrum.png"
    assert shown.split() in commands


def test_table_names_every_extra():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^(\w+) = ", section, re.MULTILINE))
    table = README.partition("| extra |")[2].partition("\n\n")[0]
    first_cells = re.findall(r"^\|([^|]*)\|", table, re.MULTILINE)
    assert extras and extras == set(re.findall(r"`(\w+)`", "".join(first_cells)))


def test_demo_takes_as_long_as_its_help_says(capsys):
    with pytest.raises(SystemExit):
        _parsers("demo")[0].parse_args(["demo", "--help"])
    told = re.search(
        r"about \d+ seconds on two idle CPU cores", " ".join(capsys.readouterr().out.split())
    )
    assert told
    times = re.findall(r"demo.*(about .*(?:second|minute).*)", README)
    assert times == [told.group()]


def test_what_show_leaves_is_ignored():
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert "/spectrum.png" in ignored and "runs/" in ignored


def test_pictures_are_there():
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert pictures and all((ROOT / picture).is_file() for picture in pictures)
