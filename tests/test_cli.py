"""The command line: exit codes, files, and one clear line for input that can't be used."""

import importlib
import json
import subprocess
import sys

import pytest
import torch

from convnn_geo import extras, verify
from convnn_geo.cli import _GROUPS, _parsers, main
from convnn_geo.console import plain_table
from convnn_geo.demo.errors import error_table, verdict


def hide(monkeypatch, package):
    """Make a package look as if it were not installed."""
    real = importlib.import_module

    def import_module(name):
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return real(name)

    monkeypatch.setattr(extras.importlib, "import_module", import_module)


@pytest.fixture
def photo(tmp_path):
    from PIL import Image

    path = tmp_path / "photo.png"
    pixels = torch.randint(0, 256, (30, 40, 3), generator=torch.Generator().manual_seed(0))
    Image.frombytes("RGB", (40, 30), bytes(pixels.flatten().tolist())).save(path)
    return path


def row(error=0.0, recipe="conv2d", backend="native", dtype="float64"):
    return verify.Row(recipe, "a case", "nn.Conv2d", backend, dtype, error, 0.0, 1e-10)


def test_verify_prints_a_line_a_recipe_and_backend(capsys, tmp_path):
    file = tmp_path / "errors.json"
    assert main(["verify", "--recipe", "max_pool2d", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    entries = json.loads(file.read_text())
    backends = {entry["backend"] for entry in entries}
    lines = [line for line in printed.splitlines() if "max_pool2d" in line]
    assert len(lines) == len(backends) > 1
    assert all("nn.MaxPool2d" in line and "yes" in line for line in lines)
    assert {entry["recipe"] for entry in entries} == {"max_pool2d"}
    assert {entry["dtype"] for entry in entries} == {"float64", "float32"}
    assert all(entry["passed"] and entry["error_output"] <= entry["bound"] for entry in entries)
    assert f"{len(entries)} of {len(entries)} checks within bounds" in printed


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_verify_fails_where_an_error_exceeds_its_bound(monkeypatch, capsys, tmp_path, error):
    monkeypatch.setattr(
        verify, "run", lambda names, progress: [row(), row(error, backend="gather")]
    )
    file = tmp_path / "errors.json"
    assert main(["verify", "--json", str(file)]) == 1
    assert "1 of 2 checks" in capsys.readouterr().out
    saved = [entry["error_output"] for entry in json.loads(file.read_text())]
    assert saved == [0.0, None if error != error else error]


def test_verify_without_rich_prints_plain_text(monkeypatch, capsys):
    hide(monkeypatch, "rich")
    monkeypatch.setattr(verify, "run", lambda names, progress: [row(), row(1.0, "kvt")])
    assert main(["verify"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["recipe", "peer", "backend"]
    assert lines[2].split()[0] == "conv2d" and lines[3].split()[:2] == ["!", "kvt"]


def test_verify_checks_numeric_cases_too(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(verify, "run", lambda names, progress: [row()])
    monkeypatch.setattr(verify, "golden", lambda directory: [row(recipe=str(directory))])
    assert main(["verify", "--golden", "cases"]) == 0
    assert "cases" in capsys.readouterr().out


def test_error_table_takes_the_worst_of_each_group():
    lines, failed = error_table(
        [row(1e-12), row(1e-11), row(1e-6, dtype="float32"), row(float("nan"), backend="gather")]
    )
    assert [line[2:6] for line in lines] == [
        ["native", "1.0e-11", "0.0e+00", "1.0e-06"],
        ["gather", "nan", "0.0e+00", "-"],
    ]
    assert failed == {0, 1}
    assert verdict([row(), row(1.0)]).startswith("1 of 2")


def test_plain_table_is_aligned():
    text = plain_table("T", ["a", "long"], [["x", "1"], ["yyy", "2"]], marked=[1])
    assert text == "T\n  a    long\n  x    1\n! yyy  2"


def test_show_writes_a_picture(photo, tmp_path, capsys):
    from PIL import Image

    out = tmp_path / "spectrum.png"
    arguments = ["--image", str(photo), "--pixel", "10,20", "--pixel", "29,39", "--out", str(out)]
    assert main(["show", *arguments, "--k", "5", "--spectrum", "3"]) == 0
    assert str(out) in capsys.readouterr().out
    with Image.open(out) as picture:
        assert picture.size[0] == 880


def test_show_takes_a_shipped_photograph(tmp_path):
    assert main(["show", "--spectrum", "2", "--out", str(tmp_path / "a.pdf")]) == 0
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")


def saved(directory, mode, size, **options):
    from PIL import Image

    path = directory / "photo.png"
    Image.linear_gradient("L").resize(size).convert(mode).save(path, **options)
    return str(path)


@pytest.mark.parametrize(
    ("mode", "size"),
    [
        ("RGB", (120, 90)),
        ("RGBA", (300, 200)),
        ("LA", (64, 300)),
        ("P", (700, 60)),
        ("1", (61, 41)),
        ("I;16", (90, 80)),
    ],
)
def test_command_of_the_readme_takes_any_photograph(tmp_path, monkeypatch, mode, size):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path, mode, size)
    command = "show --image photo.png --pixel 40,60 --spectrum 5 --out spectrum.png"
    assert main(command.split()) == 0
    assert (tmp_path / "spectrum.png").stat().st_size > 1000


def test_a_tilde_is_the_users_home(photo, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["show", "--image=~/photo.png", "--k=4", "--out=~/a.png"]) == 0
    assert (tmp_path / "a.png").is_file()


def test_help_tells_of_ties(capsys):
    with pytest.raises(SystemExit):
        main(["show", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "Ties go to the lowest index" in told
    assert "the starred pixel itself may not be among its nearest" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "missing.png"], "no file missing.png"),
        (["--image", "TEXT"], "expected a picture"),
        (["--image", "PHOTO", "--pixel", "30,0"], "row from 0 to 29 and a column from 0 to 39"),
        (["--image", "PHOTO", "--pixel", "0,-1"], "outside the picture"),
        (["--image", "PHOTO", "--pixel", "4"], "expected ROW,COLUMN such as 40,60, got '4'"),
        (["--image", "PHOTO", "--pixel", "a,b"], "expected ROW,COLUMN"),
        (["--image", "PHOTO", "--spectrum", "1"], "spectrum: expected an integer of at least 2"),
        (["--image", "PHOTO", "--k", "0"], "k: expected an integer of at least 1"),
        (["--image", "PHOTO", "--k", "1201"], "larger than the number of candidates, 1200"),
        (["--image", "PHOTO", "--width", "0"], "width: expected"),
        (["--image", "PHOTO", "--out", "no/such/folder/a.png"], "No such file or directory"),
        (["--image", "PHOTO", "--out", "FOLDER"], "FOLDER"),
        (["--image", "PHOTO", "--out", "a.xyz"], "'xyz' is not supported"),
    ],
)
def test_show_refuses_in_one_line(photo, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "FOLDER.png").mkdir()
    named = {"PHOTO": str(photo), "TEXT": "notes.txt", "FOLDER": "FOLDER.png"}
    given = [named.get(argument, argument) for argument in arguments]
    assert main(["show", *given]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert printed.err.startswith("convnn-geo show: error: ") and message in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "--recipe", "conv4d"], "unknown recipe 'conv4d'; expected one of:"),
        (["verify", "--json", "no/folder/errors.json"], "there is no folder no/folder"),
        (["verify", "--recipe", "max_pool2d", "--golden", "no/folder"], "--golden: no *.npz"),
        (["demo", "--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["demo", "--quick", "--out", "file"], "file"),
    ],
)
def test_other_commands_refuse_in_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and message in error


@pytest.mark.parametrize("package", ["sklearn", "skimage", "matplotlib", "rich"])
def test_demo_names_missing_extras(monkeypatch, capsys, tmp_path, package):
    hide(monkeypatch, package)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert f"{package} is not installed" in (error := capsys.readouterr().err)
    assert "pip install 'convnn-geo[data,viz]'" in error
    assert not (tmp_path / "out").exists()


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "python -m convnn_geo show --image photo.png --pixel 40,60" in capsys.readouterr().out


def imported_by(arguments):
    """Packages of convnn_geo that a command's help imports."""
    script = (
        "import sys\nimport convnn_geo.cli\n"
        f"try:\n    convnn_geo.cli.main({arguments!r})\nexcept SystemExit:\n    pass\n"
        "print(*{name.split('.')[1] for name in sys.modules if name.startswith('convnn_geo.')})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    return set(done.stdout.splitlines()[-1].split())


def test_help_imports_no_command():
    late = {"train", "experiments", "bench", "datasets", "verify", "demo"}
    assert not imported_by(["--help"]) & late
    assert imported_by(["train", "--help"]) & late == {"train", "datasets"}


@pytest.mark.parametrize("broken", ["train", "experiments", "bench"])
def test_a_broken_command_leaves_the_others(monkeypatch, broken):
    monkeypatch.setitem(sys.modules, f"convnn_geo.{broken}.commands", None)
    for command in ("verify", "demo", "show", *_GROUPS):
        stops = ImportError if command == broken.removesuffix("s") else SystemExit
        with pytest.raises(stops):
            main([command, "--help"])


def test_commands_are_listed_as_they_say_themselves():
    brief = _parsers("")[0].format_help()
    for name, (_, text) in _GROUPS.items():
        assert _parsers(name)[0].format_help() == brief and text in " ".join(brief.split())


def test_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "convnn_geo", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("convnn-geo ")


def test_an_unknown_flag_gets_its_commands_usage_and_a_hint(capsys):
    pytest.importorskip("lightning_fabric")
    for given, told in (
        (["--epohcs", "3"], "unrecognized arguments: --epohcs 3; did you mean --epochs?"),
        (["--raito=0.5", "--k", "9"], "unrecognized arguments: --raito=0.5; did you mean --ratio?"),
        (["--qqqqqq"], "unrecognized arguments: --qqqqqq\n"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["train", "--model", "vgg11", *given])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and told in error
        assert error.startswith("usage: convnn-geo train ") and "--batch-size" in error
