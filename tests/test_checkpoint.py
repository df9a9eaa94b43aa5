"""Checkpoints: whole or not there, and runs that continue from them as if nothing had happened."""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("lightning_fabric")
pytest.importorskip("sklearn")

from convnn_geo.train import (
    CheckpointError,
    Config,
    ConfigError,
    Watch,
    checkpoint,
    fit,
    load_model,
    setup,
)
from convnn_geo.train.checkpoint import load_checkpoint, save_checkpoint, write_atomically
from convnn_geo.train.commands import add_train

FLOW = {"epochs": 4, "image_size": 8, "batch_size": 128}


class Small(nn.Module):
    """Has what a checkpoint could forget: running means, and dropout's random numbers."""

    def __init__(self, name, layer=None, num_classes=10, in_channels=1, image_size=8):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, 8, 3, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(8 * ((image_size - 1) // 2) ** 2, num_classes),
        )

    def forward(self, x):
        return self.layers(x)


load = functools.cache(setup.load)  # reading the digits takes longer than training on them


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small are done before a second thread has begun."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(setup, "create_model", Small)
    monkeypatch.setattr(setup, "load", load)


class Cut(Watch):
    """Ends a run in the middle of an epoch."""

    def __init__(self, epoch, how):
        self.epoch, self.how, self.now, self.steps = epoch, how, 0, 0

    def begin(self, seed, epoch, epochs, steps):
        self.now, self.steps = epoch, 0

    def step(self):
        self.steps += 1
        if (self.now, self.steps) == (self.epoch, 3):
            self.how()


def interrupt():
    raise KeyboardInterrupt


def run_command(*arguments):
    parser = argparse.ArgumentParser()
    add_train(parser.add_subparsers(dest="name"))
    parsed = parser.parse_args(["train", *map(str, arguments)])
    return parsed.command(parsed)


def weights(folder):
    return torch.load(folder / "seed-0" / "weights.pt", weights_only=True)["weights"]


def same_bytes(a, b):
    assert a.keys() == b.keys() and a
    for key in a:
        assert a[key].numpy().tobytes() == b[key].numpy().tobytes(), key


def rows(folder):
    lines = (folder / "seed-0" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def state(number):
    return {"epoch": number, "tensor": torch.full((50,), float(number)), "none": None}


def test_a_checkpoint_comes_back_and_the_one_before_is_kept(tmp_path):
    assert load_checkpoint(tmp_path) is None
    for number in range(3):
        save_checkpoint(tmp_path, state(number))
    found = load_checkpoint(tmp_path)
    assert found["epoch"] == 2 and torch.equal(found["tensor"], state(2)["tensor"])
    (tmp_path / checkpoint.NAME).unlink()
    assert load_checkpoint(tmp_path)["epoch"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [checkpoint.PREVIOUS]


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    folder = tmp_path_factory.mktemp("content")
    save_checkpoint(folder, state(5))
    return folder, (folder / checkpoint.NAME).read_bytes()


@settings(max_examples=150, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_changed_byte_is_noticed(content, place, flip):
    folder, good = content
    bad = bytearray(good)
    bad[int(place * len(bad))] ^= flip
    (folder / checkpoint.NAME).write_bytes(bad)
    with pytest.raises(CheckpointError, match=rf"{checkpoint.NAME} is corrupt"):
        load_checkpoint(folder)


def test_changed_weights_are_noticed(content):
    folder, good = content
    at = good.index(state(5)["tensor"].numpy().tobytes())
    bad = bytearray(good)
    bad[at + 17] ^= 1
    (folder / checkpoint.NAME).write_bytes(bad)
    with pytest.raises(CheckpointError, match=r"corrupt.*checksum"):
        load_checkpoint(folder)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_file_cut_off_is_an_error_that_says_what_to_do(tmp_path, content, share):
    save_checkpoint(tmp_path, state(1))
    save_checkpoint(tmp_path, state(2))
    previous = (tmp_path / checkpoint.PREVIOUS).read_bytes()
    (tmp_path / checkpoint.NAME).write_bytes(content[1][: int(share * len(content[1]))])
    with pytest.raises(
        CheckpointError, match=r"corrupt.*delete it to continue from checkpoint.pre"
    ):
        load_checkpoint(tmp_path)
    assert (tmp_path / checkpoint.PREVIOUS).read_bytes() == previous
    (tmp_path / checkpoint.NAME).unlink()
    assert load_checkpoint(tmp_path)["epoch"] == 1


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_nothing_in_a_checkpoint_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, tmp_path / checkpoint.NAME)
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "executed").exists()


def full(*arguments):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, call):
    save_checkpoint(tmp_path, state(1))
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=r"No space.*kept"):
        patch.setattr(checkpoint.os, call, full)
        save_checkpoint(tmp_path, state(2))
    assert load_checkpoint(tmp_path)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == [checkpoint.NAME]


def test_a_file_that_may_not_grow_leaves_what_was_there(tmp_path):
    save_checkpoint(tmp_path, state(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # as a quota would
    try:
        with pytest.raises(CheckpointError, match="can't write"):
            save_checkpoint(tmp_path, state(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load_checkpoint(tmp_path)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == [checkpoint.NAME]


def test_an_end_between_the_renames_leaves_the_one_before(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, state(1))
    real = os.replace

    def once(old, new):
        if str(old).endswith(".tmp"):
            raise KeyboardInterrupt
        real(old, new)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.os, "replace", once)
        save_checkpoint(tmp_path, state(2))
    assert load_checkpoint(tmp_path)["epoch"] == 1


def test_text_is_written_at_once(tmp_path, monkeypatch):
    write_atomically(tmp_path / "a.txt", "é")
    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"a\.txt"):
        write_atomically(tmp_path / "a.txt", "b")
    assert (tmp_path / "a.txt").read_bytes() == "é".encode()


OPTIONS = {
    "adamw": {},
    "all": {"mixup": 0.4, "ema": 0.9, "label_smoothing": 0.1, "clip_norm": 1.0, "accumulate": 2},
    "sgd": {"optimizer": "sgd", "schedule": "step", "step_epochs": 2, "warmup_epochs": 1},
    "bf16": {"precision": "bf16-mixed", "channels_last": True},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("epoch", [1, 3])
def test_a_run_continues_bit_for_bit(tmp_path, name, epoch):
    options = {**FLOW, **OPTIONS[name]}
    whole = fit(Config(**options, out=str(tmp_path / "whole")))
    config = Config(**options, out=str(tmp_path / "cut"))
    with pytest.raises(KeyboardInterrupt):
        fit(config, watch=Cut(epoch, interrupt))
    assert len(rows(tmp_path / "cut")) == epoch - 1
    torch.rand(7)  # what came between must not matter
    parts = fit(config, resume=True)
    same_bytes(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")
    assert parts.test == whole.test and len(parts.history) == 4


SCRIPT = """
    import os, signal, sys
    import torch
    torch.set_num_threads(1)
    sys.path.insert(0, {tests!r})
    import test_checkpoint as here
    here.setup.create_model = here.Small
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
    here.fit(here.Config(**here.FLOW, out={out!r}), watch=here.Cut(3, kill))
"""


def test_a_killed_run_loses_its_last_epoch_at_most(tmp_path):
    out = tmp_path / "cut"
    script = textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parent), out=str(out)))
    done = subprocess.run([sys.executable, "-c", script], timeout=300, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert len(rows(out)) == 2 and not (out / "seed-0" / "weights.pt").exists()
    fit(Config(**FLOW, out=str(tmp_path / "whole")))
    fit(Config(**FLOW, out=str(out)), resume=True)
    same_bytes(weights(tmp_path / "whole"), weights(out))


def test_a_run_that_is_done_is_not_done_again(tmp_path):
    config = Config(**FLOW, out=str(tmp_path))
    first = fit(config)
    watch = Cut(1, interrupt)
    assert fit(config, resume=True, watch=watch) == first
    (tmp_path / "seed-0" / "result.json").unlink()  # ended between the last epoch and the result
    again = fit(config, resume=True, watch=watch)
    assert again.test == first.test and again.history == first.history
    with pytest.raises(ConfigError, match="holds a run already"):
        fit(config)


def test_a_run_that_lost_its_weights_says_which_file_and_writes_it_again(tmp_path):
    config = Config(**FLOW, out=str(tmp_path))
    run = fit(config)
    before, file = weights(tmp_path), run.folder / "weights.pt"
    file.unlink()
    with pytest.raises(CheckpointError, match=r"seed-0/weights\.pt.*no such file.*with resume"):
        run.model()
    told = r"expected .*seed-0/weights\.pt beside result\.json.*delete result\.json"
    with pytest.raises(CheckpointError, match=told):
        run_command("--config", tmp_path / "config.json", "--out", tmp_path, "--resume")
    (run.folder / "result.json").unlink()
    assert fit(config, resume=True).test == run.test
    same_bytes(before, weights(tmp_path))


def test_another_file_of_a_run_is_no_model(tmp_path):
    run = fit(Config(**FLOW, out=str(tmp_path)))
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt, got config, .*choose weights\.pt"):
        load_model(run.folder / checkpoint.NAME)


def test_another_configuration_is_not_continued(tmp_path):
    fit(Config(**FLOW, out=str(tmp_path)))
    other = Config(**{**FLOW, "epochs": 5, "mixup": 0.1}, out=str(tmp_path))
    with pytest.raises(ConfigError, match=r"epochs: 4 there, 5 now, mixup: 0\.0 there, 0\.1 now"):
        fit(other, resume=True)
    workers = Config(**FLOW, out=str(tmp_path), data_root="elsewhere", seeds=2)
    assert len(fit(workers, resume=True).history) == 4


def test_a_corrupt_checkpoint_ends_the_command_and_the_one_before_serves(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fit(Config(**FLOW, out=str(whole)))
    with pytest.raises(KeyboardInterrupt):
        fit(Config(**FLOW, out=str(cut)), watch=Cut(4, interrupt))
    file = cut / "seed-0" / checkpoint.NAME
    previous = file.with_name(checkpoint.PREVIOUS).read_bytes()
    file.write_bytes(file.read_bytes()[:-100])
    command = ["--config", cut / "config.json", "--out", cut, "--resume"]
    with pytest.raises(OSError, match=r"corrupt.*delete it to continue"):  # exit 2 of main
        run_command(*command)
    assert file.with_name(checkpoint.PREVIOUS).read_bytes() == previous
    file.unlink()
    assert run_command(*command) == 0
    same_bytes(weights(whole), weights(cut))


def test_a_disk_that_fills_up_ends_the_command_and_resume_goes_on(tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fit(Config(**FLOW, out=str(whole)))
    config = Config(**FLOW, out=str(cut))
    real, calls = os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) > 12:
            full()
        real(descriptor)

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="No space left"):
        patch.setattr(checkpoint.os, "fsync", fsync)
        fit(config)
    assert 1 <= len(rows(cut)) < 4
    fit(config, resume=True)
    same_bytes(weights(whole), weights(cut))


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    from convnn_geo.train import Terminal

    monkeypatch.setattr(Terminal, "step", lambda self: interrupt())
    assert run_command("--epochs", 1, "--image-size", 8, "--out", tmp_path) == 130
    assert "--resume" in capsys.readouterr().err


def test_a_folder_is_one_runs_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    from convnn_geo.train.alone import alone

    with alone(tmp_path / "seed-0"):
        with pytest.raises(ConfigError, match=r"seed-0 is in use: another run is writing there"):
            fit(Config(out=str(tmp_path), **{**FLOW, "epochs": 1}))
        assert not (tmp_path / "config.json").exists()
    fit(Config(out=str(tmp_path), **{**FLOW, "epochs": 1}))  # free again


def test_a_lock_that_was_removed_after_it_was_opened_holds_nobody_off(tmp_path, monkeypatch):
    """Who held it removes it; who opened it before takes the next one, not what is gone."""
    fcntl = pytest.importorskip("fcntl")
    from convnn_geo.train.alone import alone

    lock, seen = fcntl.flock, []

    def late(file, how):
        if not seen:
            (tmp_path / "run" / ".lock").unlink()
        seen.append(file.name)
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with alone(tmp_path / "run"):
        assert len(seen) == 2 and (tmp_path / "run" / ".lock").exists()
        monkeypatch.undo()
        with pytest.raises(ConfigError, match="in use"), alone(tmp_path / "run"):
            pass
    assert not (tmp_path / "run").exists()


def test_folders_that_know_no_locks_are_used_all_the_same(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    from convnn_geo.train.alone import alone

    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with alone(tmp_path):
        pass
