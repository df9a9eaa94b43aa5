"""Training: what a step averages over, what each seed draws, when the test part is read."""

from __future__ import annotations

import argparse
import csv
import functools
import json
import math
import statistics
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("lightning_fabric")
pytest.importorskip("sklearn")

from convnn_geo.extras import MissingExtraError
from convnn_geo.train import (
    Config,
    ConfigError,
    DivergedError,
    Summary,
    Terminal,
    Watch,
    fit,
    load_model,
    setup,
    train,
)
from convnn_geo.train.commands import add_train
from convnn_geo.train.objective import mix, objective, psnr
from convnn_geo.train.order import pieces, seed_epoch, seed_model, share, smallest_piece
from convnn_geo.train.schedule import learning_rate

load = functools.cache(setup.load)  # reading the digits takes longer than training on them
SIZE = {"image_size": 8}
PLAIN = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}


class Small(nn.Module):
    """Two layers; remembers what it was given."""

    def __init__(
        self,
        name,
        layer=None,
        num_classes=10,
        in_channels=1,
        image_size=8,
        dropout=0.0,
        norm=False,
    ):
        super().__init__()
        self.flat = nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, 32))
        between = nn.BatchNorm1d(32) if norm else nn.ReLU()
        self.head = nn.Sequential(between, nn.Dropout(dropout), nn.Linear(32, num_classes))
        self.seen = []

    def forward(self, x):
        self.seen.append((x.dtype, len(x), self.training))
        return self.head(self.flat(x))


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small are done before a second thread has begun."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small(monkeypatch):
    made = []

    def create(*arguments, **options):
        made.append(Small(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(setup, "create_model", create)
    monkeypatch.setattr(setup, "check_options", lambda *_: None)  # which knows the real ones
    monkeypatch.setattr(setup, "load", load)
    return made


@pytest.fixture
def digits():
    return load("digits", root="data", seed=0, image_size=8, download=False)


def everything(part, task):
    (x,), y = task.collate([part[number] for number in range(len(part))])
    return x, y


def vector(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def run_command(*arguments):
    parser = argparse.ArgumentParser()
    add_train(parser.add_subparsers(dest="name"))
    parsed = parser.parse_args(["train", *map(str, arguments)])
    return parsed.command(parsed)


# --- order


@given(
    st.integers(1, 300), st.integers(1, 80), st.integers(1, 4), st.integers(1, 3), st.integers(0)
)
def test_each_example_comes_once_an_epoch_however_many_processes(count, size, world, each, seed):
    try:
        ranks = [pieces(count, size, seed, 2, rank, (world, each)) for rank in range(world)]
    except ConfigError:
        assert count // -(-count // size) < world * each
        return
    steps = len(ranks[0]) // each
    batches = [
        [n for rank in ranks for piece in rank[step * each : (step + 1) * each] for n in piece]
        for step in range(steps)
    ]
    assert batches == pieces(count, size, seed, 2)  # one process sees the same
    assert sorted(n for batch in batches for n in batch) == list(range(count))
    sizes = {len(batch) for batch in batches}
    assert max(sizes) <= size and max(sizes) - min(sizes) <= 1
    parts = {len(piece) for rank in ranks for piece in rank}
    assert min(parts) == smallest_piece(count, size, (world, each))


def test_order_follows_seed_and_epoch():
    orders = [pieces(50, 50, seed, epoch)[0] for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for k, a in enumerate(orders) for b in orders[:k])
    assert orders[0] == pieces(50, 50, 0, 0)[0]


@given(st.integers(0, 200), st.integers(1, 9))
def test_shares_are_a_partition(count, world):
    parts = [share(count, rank, world) for rank in range(world)]
    assert [n for part in parts for n in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_streams_of_random_numbers_differ():
    drawn = []
    for call in (
        *(lambda: seed_model(0), lambda: seed_model(1), lambda: seed_epoch(0, 0, 0)),
        *(lambda: seed_epoch(0, 1, 0), lambda: seed_epoch(0, 0, 1), lambda: seed_epoch(1, 0, 0)),
    ):
        call()
        drawn.append(float(torch.rand(1, dtype=torch.float64)))
    assert len(set(drawn)) == len(drawn)


# --- schedule and objective


def rates(steps, **options):
    config = Config(learning_rate=2.0, **options)
    return [learning_rate(config, step, steps) for step in range(config.epochs * steps)]


def test_schedules_by_hand():
    assert rates(2, epochs=2, schedule="constant") == [2, 2, 2, 2]
    assert rates(2, epochs=3, schedule="step", step_epochs=1, step_factor=0.5) == [
        *(2, 2, 1, 1, 0.5, 0.5)
    ]
    assert rates(1, epochs=6, schedule="step") == pytest.approx([2, 2, 0.2, 0.2, 0.02, 0.02])
    for steps, epochs in ((3, 9), (7, 15), (10, 7)):
        found = rates(steps, epochs=epochs, schedule="step", step_epochs=0.1 * epochs)
        due = [10 * step // (epochs * steps) for step in range(epochs * steps)]
        assert found == pytest.approx([2 * 0.1**drops for drops in due])
    assert rates(4, epochs=2, schedule="constant", warmup_epochs=1)[:5] == [0.5, 1, 1.5, 2, 2]
    cosine = rates(3, epochs=4, warmup_epochs=1)
    assert cosine[:3] == pytest.approx([2 / 3, 4 / 3, 2])
    assert cosine[3:] == pytest.approx([1 + math.cos(math.pi * k / 9) for k in range(9)])


def test_psnr_of_each_image_by_hand():
    clean = torch.full((2, 1, 4, 4), 0.5)
    noisy = clean + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    torch.testing.assert_close(psnr(noisy, clean), torch.tensor([20.0, 40.0]), atol=1e-3, rtol=0)
    assert psnr(clean, clean).tolist() == [100.0, 100.0]
    assert psnr(torch.full((1, 1, 2, 2), 9.0), torch.ones(1, 1, 2, 2)).item() == 100  # clamped


def test_mixup_is_the_loss_of_mixed_labels(small):
    x, y, model = torch.rand(6, 1, 8, 8), torch.arange(6), Small("")
    torch.manual_seed(3)
    mixed, own = mix(x, 0.5)
    assert 0 < own < 1
    torch.testing.assert_close(mixed[1], own * x[1] + (1 - own) * x[4])
    soft = own * F.one_hot(y, 10) + (1 - own) * F.one_hot(y.flip(0), 10)
    loss = objective("classification", 0.1).loss
    by_hand = F.cross_entropy(model(mixed), soft, label_smoothing=0.1, reduction="none")
    output = model(mixed)
    torch.testing.assert_close(own * loss(output, y) + (1 - own) * loss(output, y.flip(0)), by_hand)


# --- a run


def test_a_run_learns_and_leaves_its_files(small, tmp_path, digits):
    config = Config(epochs=5, learning_rate=0.01, tensorboard=False, out=str(tmp_path), **SIZE)
    run = fit(config, 3)
    folder = tmp_path / "seed-3"
    assert {p.name for p in folder.iterdir()} == {
        *("checkpoint.pt", "checkpoint.previous.pt", "metrics.csv", "metrics.jsonl"),
        *("result.json", "weights.pt"),
    }
    with (folder / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["epoch"] for row in table] == ["1", "2", "3", "4", "5"]
    losses = [float(row["validation_loss"]) for row in table]
    assert losses[-1] < losses[0] and run.validation["accuracy"] > 0.85
    assert Config.from_yaml(tmp_path / "config.json") == config
    model = run.model()
    assert not model.training
    for part, told in ((digits.test, run.test), (digits.validation, run.validation)):
        x, y = everything(part, digits)
        assert len(part) % config.batch_size  # a mean of batches would be another
        with torch.no_grad():
            output = model(x)
        assert told["accuracy"] == pytest.approx((output.argmax(1) == y).double().mean().item())
        assert told["loss"] == pytest.approx(F.cross_entropy(output, y).item(), rel=1e-5)
    result = json.loads((folder / "result.json").read_text())
    assert result["test"] == run.test and result["parameters"] == vector(model).numel()


def test_one_step_is_the_gradient_of_the_mean_loss(small, tmp_path, digits):
    options = {**PLAIN, **SIZE, "epochs": 1, "batch_size": 2000, "learning_rate": 0.5}
    run = fit(Config(**options, out=str(tmp_path)))
    seed_model(0)
    model = Small("")
    x, y = everything(digits.train, digits)
    loss = F.cross_entropy(model(x), y)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())])
    torch.testing.assert_close(vector(run.model()), vector(model) - 0.5 * gradient)
    assert run.history[0]["train_loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("accumulate", [2, 5])
def test_accumulation_changes_nothing(small, tmp_path, accumulate):
    options = {**PLAIN, **SIZE, "epochs": 2, "learning_rate": 0.1, "batch_size": 101}
    one = fit(Config(**options, out=str(tmp_path / "one")))
    weights = vector(one.model())
    many = fit(Config(**options, accumulate=accumulate, out=str(tmp_path / "many")))
    torch.testing.assert_close(vector(many.model()), weights, atol=1e-6, rtol=1e-5)
    assert many.history[0]["train_loss"] == pytest.approx(one.history[0]["train_loss"], rel=1e-6)
    first, second = (
        [size for _, size, training in model.seen if training] for model in (small[0], small[2])
    )
    assert len(second) == accumulate * len(first) and max(second) == -(-max(first) // accumulate)


def test_seeds_are_set_before_the_model_is_built(small, tmp_path):
    options = {**SIZE, "epochs": 1, "model_options": {"dropout": 0.5}}
    torch.manual_seed(1)
    a = fit(Config(**options, out=str(tmp_path / "a")), 0)
    torch.manual_seed(2)
    b = fit(Config(**options, out=str(tmp_path / "b")), 0)
    c = fit(Config(**options, out=str(tmp_path / "c")), 1)
    assert torch.equal(vector(a.model()), vector(b.model()))
    assert not torch.equal(vector(a.model()), vector(c.model()))


class Counting:
    def __init__(self, part):
        self.part, self.read = part, []

    def __len__(self):
        return len(self.part)

    def __getitem__(self, number):
        self.read.append(number)
        return self.part[number]


def test_the_test_part_is_read_once_after_the_last_epoch(small, tmp_path, monkeypatch, digits):
    test, validation = Counting(digits.test), Counting(digits.validation)
    task = replace(digits, test=test, validation=validation)
    monkeypatch.setattr(setup, "load", lambda *a, **o: task)
    counts = []

    class Look(Watch):
        def end(self, row):
            counts.append((len(test.read), len(validation.read)))

    fit(Config(epochs=3, out=str(tmp_path), **SIZE), watch=Look())
    n = len(validation)
    assert counts == [(0, n), (0, 2 * n), (0, 3 * n)]
    assert sorted(test.read) == list(range(len(test)))


def test_clipping_bounds_a_step(small, tmp_path):
    options = {**PLAIN, **SIZE, "epochs": 1, "batch_size": 2000, "learning_rate": 1.0}
    run = fit(Config(**options, clip_norm=0.01, out=str(tmp_path)))
    seed_model(0)
    moved = (vector(run.model()) - vector(Small(""))).norm()
    assert moved.item() == pytest.approx(0.01, rel=1e-2)


def test_losses_that_are_reported_know_no_smoothing(small, tmp_path, digits):
    config = Config(epochs=1, label_smoothing=0.3, out=str(tmp_path), **SIZE)
    run = fit(config)
    x, y = everything(digits.test, digits)
    with torch.no_grad():
        plain = F.cross_entropy(small[-1].eval()(x), y)
    assert run.test["loss"] == pytest.approx(float(plain), rel=1e-4)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"model_options": {"name": "resnet18"}}, r"'name' is not the model's to set: say model"),
        ({"model_options": {"layer": "convnn"}}, "say layer"),
        ({"model_options": {"num_classes": 7}}, "follows from the data"),
        ({"data_options": {"seed": 3}}, "say data_seed"),
    ],
)
def test_options_that_other_keys_own_are_refused(tmp_path, options, told):
    with pytest.raises(ConfigError, match=told):
        fit(Config(model="vgg11", epochs=1, out=str(tmp_path), **options))


def test_tuples_in_options_can_be_resumed(small, tmp_path):
    config = Config(epochs=1, model_options={"dropout": 0.0}, out=str(tmp_path), **SIZE)
    fit(config)
    same = replace(config, layer_options={})
    assert fit(same, resume=True).test
    with_tuple = replace(config, layer_options={"kernel_size": (3,)})
    with_tuple.check_same({**config.to_dict(), "layer_options": {"kernel_size": [3]}}, "there")
    with_tuple.check_same(with_tuple.to_dict(), "there")


def test_every_seeds_folder_is_looked_at_first(small, tmp_path):
    config = Config(epochs=1, out=str(tmp_path), **SIZE)
    fit(config, seed=1)
    with pytest.raises(ConfigError, match="seed-1 holds a run already"):
        train(replace(config, seeds=2))
    assert not (tmp_path / "seed-0").exists()


@pytest.mark.parametrize("name, content", [("result.json", "{}"), ("result.json", "[1]")])
def test_files_of_others_are_no_runs(small, tmp_path, name, content):
    config = Config(epochs=1, out=str(tmp_path), **SIZE)
    (tmp_path / "seed-0").mkdir()
    (tmp_path / "seed-0" / name).write_text(content)
    with pytest.raises(ConfigError, match="no result of a run"):
        fit(config, resume=True)


def test_averaged_weights_are_what_is_scored_and_saved(small, tmp_path):
    def weights(name, **options):
        options = {**PLAIN, **SIZE, "batch_size": 2000, "learning_rate": 0.5, **options}
        return vector(fit(Config(**options, out=str(tmp_path / name))).model())

    one, two = weights("one", epochs=1), weights("two", epochs=2)
    averaged = weights("averaged", epochs=2, ema=0.75)
    torch.testing.assert_close(averaged, 0.75 * one + 0.25 * two)


def test_biases_do_not_decay(small, tmp_path):
    options = {**PLAIN, **SIZE, "epochs": 1, "batch_size": 2000, "learning_rate": 0.5}
    plain = fit(Config(**options, out=str(tmp_path / "a"))).model().state_dict()
    decayed = fit(Config(**{**options, "weight_decay": 0.1}, out=str(tmp_path / "b"))).model()
    seed_model(0)
    first = Small("").state_dict()
    for name, value in decayed.state_dict().items():
        change = 0.5 * 0.1 * first[name] if name.endswith("weight") else 0.0
        torch.testing.assert_close(value, plain[name] - change)


@pytest.mark.parametrize(
    "options", [{"precision": "bf16-mixed"}, {"channels_last": True}, {"workers": 1}], ids=str
)
def test_other_ways_to_compute_learn_the_same(small, tmp_path, options):
    base = {**SIZE, "epochs": 2, "learning_rate": 0.01}
    plain = fit(Config(**base, out=str(tmp_path / "a")))
    other = fit(Config(**base, **options, out=str(tmp_path / "b")))
    assert abs(plain.test["accuracy"] - other.test["accuracy"]) < 0.02
    assert other.test["loss"] == pytest.approx(plain.test["loss"], rel=0.02)
    kinds = {dtype for dtype, _, _ in small[1].seen}
    assert kinds == {torch.float32}  # inputs, too: half a position chooses other neighbours
    if "precision" in options:
        assert other.test["loss"] != plain.test["loss"]


def test_the_model_is_tried_in_the_precision_of_the_run(digits):
    """So that what can't be lowered is refused before any work."""

    class Whole(Small):
        def forward(self, x):
            if self.flat(x).dtype != torch.float32:
                raise TypeError("expected float32")
            return super().forward(x)

    setup.check_fits(digits, Whole(""), "32-true")
    for precision in ("bf16-mixed", "16-mixed"):
        with pytest.raises(ConfigError, match=r"can't take digits.*expected float32"):
            setup.check_fits(digits, Whole(""), precision)


def test_channels_last_reaches_the_model(tmp_path, monkeypatch):
    seen = []

    class Wide(nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            last = {"memory_format": torch.channels_last}
            seen.append((x.is_contiguous(**last), self.conv.weight.is_contiguous(**last)))
            return x + self.conv(x).mean(1, keepdim=True)

    monkeypatch.setattr(setup, "create_model", lambda **options: Wide())
    options = {"data": "denoising", "data_options": {"count": 5, "size": 12}, "epochs": 1}
    fit(Config(**options, channels_last=True, out=str(tmp_path)))
    assert seen[0] == (False, False) and set(seen[1:]) == {(True, True)}


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(small, tmp_path):
    base = {**SIZE, "epochs": 1, "learning_rate": 0.01}
    plain = fit(Config(**base, out=str(tmp_path / "a")))
    compiled = fit(Config(**base, compile=True, out=str(tmp_path / "b")))
    torch.testing.assert_close(
        vector(plain.model()), vector(compiled.model()), atol=1e-3, rtol=1e-3
    )


def test_a_run_that_diverges_says_so(small, tmp_path):
    with pytest.raises(DivergedError, match=r"epoch 1 of seed 0.*lower learning_rate"):
        fit(Config(**{**PLAIN, **SIZE}, epochs=2, learning_rate=1e30, out=str(tmp_path)))
    assert not (tmp_path / "seed-0" / "checkpoint.pt").exists()


def test_a_run_that_diverges_in_its_last_step_says_so(small, tmp_path):
    config = {**PLAIN, **SIZE, "batch_size": 4096}  # the only step, after a loss that was finite
    with pytest.raises(DivergedError, match=r"the validation loss became .* in epoch 1 of seed 0"):
        fit(Config(**config, epochs=1, learning_rate=1e30, out=str(tmp_path)))
    assert not (tmp_path / "seed-0" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"model": "unet"}, r"needs outputs of shape \(2, 10\); the model gives \(2, 1, 32, 32\)"),
        ({"model": "point_classifier"}, r"can't take digits"),
        ({"model_options": {"widht": 2}}, r"model all_conv_net: .*widht.*width"),
        ({"layer": "nonsense"}, r"model all_conv_net: .*nonsense"),
        ({"data_options": {"sise": 2}}, r"data digits: unknown option 'sise'"),
        ({"data": "digit_clouds", "mixup": 0.2}, r"mixup: mixes images"),
        ({"data": "digit_clouds", "channels_last": True}, r"channels_last: points"),
        ({"data": "digit_clouds", "image_size": 8}, r"image_size: digit_clouds holds clouds"),
        ({"precision": "16-mixed", "accelerator": "cpu"}, r"16-mixed needs a GPU"),
        ({"batch_size": 2, "accumulate": 3}, r"can't be cut into 1 processes times 3 pieces"),
        (
            {"data": "denoising", "data_options": {"count": 5}, "label_smoothing": 0.1},
            r"denoising has no labels",
        ),
    ],
)
def test_what_does_not_fit_is_an_error_before_any_work(tmp_path, options, told):
    config = Config(**{"model": "all_conv_net", "epochs": 1, **options, "out": str(tmp_path)})
    with pytest.raises(ConfigError, match=told):
        fit(config)


@pytest.mark.parametrize("pieces_of_one", [{"batch_size": 1}, {"batch_size": 4, "accumulate": 3}])
def test_one_value_a_channel_is_refused_before_training(small, tmp_path, pieces_of_one):
    options = {**SIZE, **pieces_of_one, "epochs": 1, "model_options": {"norm": True}}
    with pytest.raises(ConfigError, match=r"got one in head\.0 of the model.*raise batch_size"):
        fit(Config(**options, out=str(tmp_path)))
    assert not list(tmp_path.iterdir())
    assert not any(training for _, _, training in small[0].seen)


def test_one_example_of_many_pixels_is_normalised(tmp_path):
    few = {"data": "denoising", "data_options": {"count": 5, "size": 8}, "batch_size": 1}
    model = {"model": "dncnn", "model_options": {"width": 0.125, "depth": 3}}
    assert fit(Config(**few, **model, epochs=1, out=str(tmp_path))).test["psnr"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(ConfigError, match="sees no GPU"):
        fit(Config(accelerator="cuda"))


# --- real models


def test_small_images_are_enlarged_for_classification(tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "load", load)
    assert setup.load_task(Config()).image_size == 32
    assert setup.load_task(Config(image_size=16)).image_size == 16
    clouds = Config(data="digit_clouds")
    assert setup.load_task(clouds).image_size is None
    assert "image_size" not in setup.model_arguments(clouds, setup.load_task(clouds))


REAL = {
    "image": {
        "model": "all_conv_net",
        "model_options": {"width": 0.125},
        "image_size": 8,
    },
    "denoising": {
        "model": "dncnn",
        "model_options": {"width": 0.125, "depth": 3},
        "data": "denoising",
        "data_options": {"count": 8, "size": 16},
        "learning_rate": 0.01,
    },
    "points": {
        "model": "point_classifier",
        "model_options": {"width": 0.125},
        "layer_options": {"k": 4},
        "data": "digit_clouds",
    },
}


@pytest.mark.parametrize("name", REAL)
def test_models_of_the_package_train(tmp_path, name):
    config = Config(**REAL[name], epochs=2, out=str(tmp_path))
    run = fit(config)
    assert run.history[1]["train_loss"] < run.history[0]["train_loss"]
    assert math.isfinite(run.test["loss"])
    again = load_model(tmp_path / "seed-0" / "weights.pt")
    assert torch.equal(vector(again), vector(run.model()))
    assert set(run.test) == {"loss", "psnr" if name == "denoising" else "accuracy"}


def test_points_of_a_cloud_are_items_of_their_own(tmp_path, monkeypatch):
    """Clouds of unequal size: losses and scores are means over points."""
    from torch_geometric.data import Data

    from convnn_geo.datasets.task import Task, collate_points

    class Clouds(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, number):
            pos = torch.rand(3 + number, 3, generator=torch.Generator().manual_seed(number))
            return Data(pos=pos, y=(pos[:, 0] > 0.5).long())

    class PointWise(nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, pos, batch):
            return self.linear(pos)

    part = Clouds()
    parts = {"train": part, "validation": part, "test": part}
    facts = {"num_classes": 2, "in_channels": 3, "image_size": None, "collate": collate_points}
    task = Task(name="clouds", kind="point_segmentation", **parts, **facts)
    monkeypatch.setattr(setup, "load", lambda *a, **o: task)
    monkeypatch.setattr(setup, "create_model", PointWise)
    options = {**PLAIN, "epochs": 1, "batch_size": 12, "accumulate": 5, "learning_rate": 0.5}
    run = fit(Config(**options, out=str(tmp_path)))
    pos = torch.cat([part[k].pos for k in range(12)])
    y = torch.cat([part[k].y for k in range(12)])
    seed_model(0)
    model = PointWise()
    loss = F.cross_entropy(model(pos, None), y)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())])
    trained = run.model()
    torch.testing.assert_close(vector(trained), vector(model) - 0.5 * gradient)
    right = (trained(pos, None).argmax(1) == y).double().mean().item()
    assert run.test["accuracy"] == pytest.approx(right)


# --- seeds, command, processes


def test_a_summary_is_over_seeds(small, tmp_path):
    summary = train(Config(epochs=1, seeds=3, out=str(tmp_path), **SIZE))
    scores = [
        json.loads((tmp_path / f"seed-{seed}" / "result.json").read_text())["test"]["accuracy"]
        for seed in range(3)
    ]
    assert len(set(scores)) > 1 and summary.scores == scores
    assert summary.mean == statistics.mean(scores)
    assert summary.deviation == pytest.approx(statistics.stdev(scores))
    saved = json.loads((tmp_path / "summary.json").read_text())
    assert saved["mean"] == summary.mean and len(saved["runs"]) == 3
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert Summary(summary.config, summary.runs[:1]).deviation is None
    assert "±" in str(summary) and "(3 seeds)" in str(summary)


def test_the_command_takes_flags_above_the_file(small, tmp_path, capsys):
    pytest.importorskip("yaml")
    file, out = tmp_path / "run.yaml", tmp_path / "out"
    file.write_text(f"epochs: 9\nbatch_size: 100\nmodel_options: {{dropout: 0.9}}\nout: {out}\n")
    flags = ["--config", file, "--epochs", 1, "--image-size", 8, "--no-compile", "--seeds", 2]
    assert run_command(*flags, "--set", "model_options.dropout=0.25") == 0
    config = Config.from_yaml(out / "config.json")
    assert (config.epochs, config.batch_size, config.seeds) == (1, 100, 2)
    assert config.model_options == {"dropout": 0.25}
    told = capsys.readouterr().out
    assert "seed 1  epoch 1" in told and "test accuracy" in told and str(out) in told


def test_the_command_passes_options_of_the_layer(tmp_path, monkeypatch):
    given = {}

    def create(**options):
        given.update(options)
        return Small(options["name"], **{k: options[k] for k in ("num_classes", "image_size")})

    monkeypatch.setattr(setup, "create_model", create)
    monkeypatch.setattr(setup, "check_options", lambda *_: None)
    flags = "--model vgg11 --layer branching --ratio 0.5 --metric cosine --k 9 --lam 1 --epochs 1"
    more = ["--set", "layer_options.shuffle=2", "--set", "layer_options.encoding=coordinates"]
    assert run_command(*flags.split(), *more, "--image-size", 8, "--out", tmp_path) == 0
    assert given == {
        **{"name": "vgg11", "layer": "branching", "num_classes": 10, "in_channels": 1},
        **{"image_size": 8, "ratio": 0.5, "metric": "cosine", "k": 9, "lam": 1.0},
        **{"shuffle": 2, "encoding": "coordinates"},
    }


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--set", "depth=3"], "--set: expected KEY=VALUE"),
        (["--set", "model_options.depth"], "--set: expected KEY=VALUE"),
        (["--epochs", "0"], "epochs: expected an integer of at least 1"),
        (["--model", "vgg"], "unknown model 'vgg'"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path, capsys, flags, told):
    assert run_command(*flags, "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_help_has_a_flag_a_field(capsys):
    with pytest.raises(SystemExit):
        run_command("--help")
    told = capsys.readouterr().out
    for name in Config().to_dict():
        assert name.endswith("_options") or "--" + name.replace("_", "-") in told


def test_a_terminal_gets_a_bar(small, tmp_path, monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with Terminal() as terminal:
        fit(Config(epochs=2, out=str(tmp_path), **SIZE), watch=terminal)
    assert "epoch 2" in capsys.readouterr().out


def test_a_pipe_is_told_now_and_then_how_far_an_epoch_is(small, tmp_path, capsys):
    fit(Config(epochs=1, out=str(tmp_path), **SIZE), watch=Terminal(every=0.0))
    assert "seed 0, epoch 1 of 1, step 1 of " in capsys.readouterr().out
    with pytest.raises(ConfigError):
        fit(Config(epochs=1, out=str(tmp_path), **SIZE))
    fit(Config(epochs=1, out=str(tmp_path / "other"), **SIZE), watch=Terminal(every=1e9))
    assert ", step " not in capsys.readouterr().out


@pytest.mark.parametrize("there", [True, False])
def test_tensorboard_is_written_where_it_is_installed(small, tmp_path, monkeypatch, there):
    """By default; what is asked for and not there is an error, what is not asked for is not."""
    pytest.importorskip("tensorboard")
    if not there:
        monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert (
        fit(Config(epochs=1, out=str(tmp_path / "a"), **SIZE)).folder / "tensorboard"
    ).is_dir() == there
    flags = ["--epochs", 1, "--image-size", 8, "--no-tensorboard", "--out", tmp_path / "b"]
    assert run_command(*flags) == 0 and not list((tmp_path / "b").rglob("tensorboard"))
    if not there:
        with pytest.raises(MissingExtraError, match="tensorboard"):
            fit(Config(epochs=1, tensorboard=True, out=str(tmp_path / "c"), **SIZE))


def test_unknown_options_are_told_before_what_the_folder_holds(tmp_path, capsys):
    config = Config("all_conv_net", image_size=8, epochs=1, out=str(tmp_path))
    fit(config)
    for run in (fit, train):
        with pytest.raises(ConfigError, match="unknown option 'rate' of all_conv_net"):
            run(replace(config, layer="convnn", layer_options={"rate": 3}))
        with pytest.raises(ConfigError, match="unknown layer of all_conv_net 'convn'"):
            run(replace(config, layer="convn"))


def test_weights_that_nobody_has_published_are_refused(tmp_path):
    options = {"width": 0.125, "pretrained": True}
    with pytest.raises(ConfigError, match="no weights are published"):
        fit(Config("all_conv_net", image_size=8, model_options=options, out=str(tmp_path)))
    assert not list(tmp_path.iterdir())


class Deaf(Small):
    """With a parameter that nothing depends on."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.lam = nn.Parameter(torch.tensor(0.5))


def test_what_gets_no_gradient_is_left_out_of_training(small, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "create_model", Deaf)
    with pytest.warns(UserWarning, match="lam: no gradient comes here"):
        run = fit(Config(epochs=1, optimizer="sgd", weight_decay=0.1, out=str(tmp_path), **SIZE))
    assert run.model().lam == 0.5
    model = Small("")
    setup.freeze_unused(model, model(torch.zeros(1, 1, 8, 8)))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_tensorboard_gets_the_metrics(small, tmp_path):
    pytest.importorskip("tensorboard")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = fit(Config(epochs=2, tensorboard=True, out=str(tmp_path), **SIZE))
    found = events.EventAccumulator(str(run.folder / "tensorboard")).Reload()
    values = [(e.step, e.value) for e in found.Scalars("validation_accuracy")]
    told = [(row["epoch"], row["validation_accuracy"]) for row in run.history]
    assert values == [pytest.approx(pair) for pair in told]


SCRIPT = """
    import sys
    import torch
    sys.path.insert(0, {tests!r})
    import test_train as here
    here.setup.create_model, here.setup.check_options = here.Small, lambda *_: None
    options = dict(epochs=2, batch_size=21, learning_rate=0.1, accumulate=2, out={out!r})
    here.train(here.Config(**here.PLAIN, **here.SIZE, **options, ema=0.5, clip_norm=0.5))
    assert torch.distributed.get_world_size() == 2

    options = dict(epochs=1, model_options=dict(norm=True, dropout=0.1), out={out!r} + "-norm")
    config = here.Config(**here.SIZE, **options)
    before = here.fit(config)
    if torch.distributed.get_rank() == 0:
        (before.folder / "result.json").unlink()
    torch.distributed.barrier()
    assert here.fit(config, resume=True).test == before.test  # from the checkpoint

    here.setup.create_model = here.Deaf  # whose gradient no process may wait for
    here.fit(here.Config(**here.SIZE, epochs=2, out={out!r} + "-deaf"))
"""


def test_two_processes_learn_what_one_does(small, tmp_path, digits):
    """Halves of 21 examples are unequal: each example must count the same."""
    out, file = tmp_path / "two", tmp_path / "script.py"
    file.write_text(textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parent), out=str(out))))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", str(file)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    options = {"epochs": 2, "batch_size": 21, "learning_rate": 0.1, "ema": 0.5, "clip_norm": 0.5}
    one = fit(Config(**PLAIN, **SIZE, **options, out=str(tmp_path / "one")))
    two = load_model(out / "seed-0" / "weights.pt")
    torch.testing.assert_close(vector(two), vector(one.model()), atol=1e-6, rtol=1e-5)
    result = json.loads((out / "seed-0" / "result.json").read_text())
    assert result["test"]["accuracy"] == pytest.approx(one.test["accuracy"], abs=1e-9)
    for name in ("train_loss", "validation_loss"):
        for a, b in zip(result["history"], one.history, strict=True):
            assert a[name] == pytest.approx(b[name], rel=1e-5)

    # Running means of the processes differ; all score by those that are saved.
    folder = Path(f"{out}-norm", "seed-0")
    x, y = everything(digits.test, digits)
    with torch.no_grad():
        loss = F.cross_entropy(load_model(folder / "weights.pt")(x), y)
    told = json.loads((folder / "result.json").read_text())["test"]["loss"]
    assert told == pytest.approx(loss.item(), rel=1e-5)
