"""Configurations: what is refused by name, what a file says, and what flags say above it."""

from __future__ import annotations

import argparse
import json

import pytest
from torch import nn

from convnn_geo.cli import main
from convnn_geo.train import Config, ConfigError
from convnn_geo.train.commands import _config, add_train
from convnn_geo.train.config import read_yaml


def configured(*flags):
    """The configuration of a command line."""
    parser = argparse.ArgumentParser()
    add_train(parser.add_subparsers(dest="name"))
    return _config(parser.parse_args(["train", *map(str, flags)]))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"epoch": 3}, r"unknown key 'epoch'; did you mean 'epochs'"),
        ({"qqq": 3}, r"unknown key 'qqq'; known: model, layer"),
        ({"k": 3, "layer_options": {"k": 4}}, r"'k' is there twice, alone and in layer_options"),
        ({"k": 3, "layer_options": [4]}, r"layer_options: expected a mapping"),
        ({"tensorboard": 1}, r"tensorboard: expected true or false, got 1"),
        ({"epochs": 0}, r"epochs: expected an integer of at least 1, got 0"),
        ({"epochs": 2.5}, r"epochs: expected an integer, got 2\.5"),
        ({"learning_rate": 0}, r"learning_rate: .*greater than 0"),
        ({"learning_rate": "fast"}, r"learning_rate: expected a number, got 'fast'"),
        ({"label_smoothing": 1.0}, r"label_smoothing: expected less than 1"),
        ({"ema": 1}, r"ema: expected less than 1"),
        ({"optimizer": "adam"}, r"unknown optimizer 'adam'; expected one of: adamw, sgd"),
        ({"model": "vgg12"}, r"unknown model 'vgg12'"),
        ({"data": "digit"}, r"unknown data 'digit'"),
        ({"compile": "no"}, r"compile: expected true or false"),
        ({"layer": 3}, r"layer: expected a name"),
        ({"layer_options": [1]}, r"layer_options: expected a mapping"),
        ({"layer_options": {"metric": nn.ReLU()}}, r"layer_options: expected numbers, text"),
        ({"layer_options": {"k": 1}, "model_options": {"k": 2}}, r"k: in layer_options and in"),
    ],
)
def test_a_configuration_is_checked_by_name(values, told):
    with pytest.raises(ConfigError, match=told):
        Config.from_dict(values)


@pytest.mark.parametrize(("key", "field"), [("lr", "learning_rate"), ("data_dir", "data_root")])
def test_names_of_others_are_understood(key, field):
    with pytest.raises(ConfigError, match=f"unknown key '{key}'; did you mean '{field}'"):
        Config.from_dict({key: 1})


def test_options_that_have_a_flag_stand_among_the_fields_as_well(tmp_path):
    pytest.importorskip("yaml")
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: vit_tiny\nlayer: branching\nratio: 0.25\nmetric: cosine\nk: 9\ndrop_path: 0.1\n"
        "layer_options: {self_point: first}\n"
    )
    layer = {"ratio": 0.25, "metric": "cosine", "k": 9, "self_point": "first"}
    model = {"drop_path": 0.1}
    wanted = Config("vit_tiny", "branching", layer_options=layer, model_options=model)
    assert Config.from_yaml(file) == wanted
    flags = "--model vit_tiny --layer branching --ratio 0.25 --metric cosine --k 9 --drop-path 0.1"
    assert configured(*flags.split(), "--set", "layer_options.self_point=first") == wanted
    changed = configured("--config", file, "--k", 4, "--drop-path", 0.2)  # flags stand above
    assert changed.layer_options == {**layer, "k": 4} and changed.model_options["drop_path"] == 0.2


def test_a_configuration_is_read_from_yaml(tmp_path):
    pytest.importorskip("yaml")
    file = tmp_path / "run.yaml"
    file.write_text("layer: convnn\nlayer_options: {k: 4}\nlearning_rate: 1e-3\nema: null\n")
    config = Config.from_yaml(file)
    assert config == Config(layer="convnn", layer_options={"k": 4}, learning_rate=0.001)
    file.write_text(json.dumps(config.to_dict()))
    assert Config.from_yaml(file) == config
    file.write_text("")
    assert Config.from_yaml(file) == Config()
    file.write_text("model_options: &few {k: 9}\nlayer_options: {<<: *few, k: 4}\n")
    assert read_yaml(file) == {"model_options": {"k": 9}, "layer_options": {"k": 4}}
    file.write_text("a: &a {k: 9}\nb:\n  c: &b\n    <<: *a\n    k: 4\nd:\n  <<: *b\n")
    assert read_yaml(file) == {"a": {"k": 9}, "b": {"c": {"k": 4}}, "d": {"k": 4}}
    twice = "epochs: 1\nseeds: 2\nepochs: 3"
    inside = "layer_options:\n  k: 4\n  k: 5"
    for bad, told in (
        *((twice, "'epochs' is there twice"), (inside, "'k' is there twice")),
        *(("a: !!map [1]", "no YAML"), ("a: [", "no YAML")),
        ("- 1", "expected keys"),
        ("epohcs: 1", "'epochs'"),
    ):
        file.write_text(bad)
        with pytest.raises(ConfigError, match=told):
            Config.from_yaml(file)
    with pytest.raises(FileNotFoundError):
        Config.from_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"momentum": 0.8}, r"momentum: expected optimizer 'sgd' with it, .*optimizer 'adamw'"),
        ({"step_epochs": 2}, r"step_epochs: expected schedule 'step' with it, .*'cosine'"),
        ({"step_factor": 0.5, "schedule": "constant"}, r"step_factor: .*schedule 'constant'"),
        ({"warmup_epochs": 3, "epochs": 2}, r"warmup_epochs: expected at most epochs, 2, got 3"),
        (
            {"schedule": "step", "step_epochs": 30},
            r"step_epochs: expected less than epochs, 30, got 30",
        ),
    ],
)
def test_what_would_have_no_effect_is_refused(values, told):
    with pytest.raises(ConfigError, match=told):
        Config(**values)


def test_what_has_an_effect_is_taken():
    Config(optimizer="sgd", momentum=0.8)
    Config(schedule="step", step_epochs=2, step_factor=0.5, epochs=3)
    Config(warmup_epochs=2, epochs=2)


def test_what_a_file_needs_may_come_from_a_flag(tmp_path):
    pytest.importorskip("yaml")
    file = tmp_path / "run.yaml"
    file.write_text("schedule: step\nmomentum: 0.8\nlayer_options: {k: 4}\n")
    config = configured("--config", file, "--optimizer", "sgd", "--epochs", 60, "--lam", 1)
    assert (config.momentum, config.epochs) == (0.8, 60)
    assert config.layer_options == {"k": 4, "lam": 1.0}
    file.write_text("layer_options: [4]\n")
    with pytest.raises(ConfigError, match="layer_options: expected a mapping"):
        configured("--config", file)


def test_a_tilde_is_the_users_home(tmp_path, monkeypatch, capsys):
    for package in ("yaml", "lightning_fabric", "torchvision"):
        pytest.importorskip(package)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("data: mnist\ndata_root: ~/lost\nout: ~/run\n")
    config = Config.from_yaml(tmp_path / "run.yaml")
    assert (config.folder, config.data_folder) == (tmp_path / "run", tmp_path / "lost")
    assert main(["train", "--config=~/run.yaml"]) == 2
    assert f"expected the files of MNIST in {tmp_path}/lost" in capsys.readouterr().err
    assert Config(out="~nobody-here/x").folder.parts[0] == "~nobody-here"
