"""Experiments: grids build and train, finished runs are kept, the report says the numbers."""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

pytest.importorskip("lightning_fabric")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("skimage")
pytest.importorskip("torchvision")
pytest.importorskip("timm")

from convnn_geo import convert
from convnn_geo.candidates import Window
from convnn_geo.convert import PatchCandidates, PatchPositions
from convnn_geo.experiments import (
    EXPERIMENTS,
    Experiment,
    Published,
    Result,
    Row,
    Setting,
    paragraphs,
    run,
    train_setting,
    write_report,
)
from convnn_geo.experiments.changes import (
    Interpolate,
    InterpolateHeads,
    LookAmong,
    LookAround,
    PublishedMix,
    attentions,
    choosing,
)
from convnn_geo.experiments.commands import add_experiment
from convnn_geo.experiments.full_size import at_full_size
from convnn_geo.experiments.parts import HeadInterpolation, Sample
from convnn_geo.experiments.pictures import draw
from convnn_geo.metrics import interpolate
from convnn_geo.models import create_model
from convnn_geo.nn import ConvNNAttention
from convnn_geo.points import Points
from convnn_geo.search import knn
from convnn_geo.train import Config, ConfigError, DivergedError, fit, setup
from convnn_geo.workers import one_thread

RUN = importlib.import_module("convnn_geo.experiments.run")
TINY = Config(
    model="vgg11", model_options={"width": 0.05}, image_size=8, epochs=1, accelerator="cpu"
)


def tiny(*settings, published=None, pairs=()):
    """An experiment of these settings."""
    return Experiment(
        "tiny", "Tiny", "Does it run?", "place", lambda quick: list(settings), "", published, pairs
    )


def told(experiment, table, score="accuracy"):
    """Sentences on made-up test scores, {(series, at): scores}; validation is the same."""
    return " ".join(paragraphs(experiment, rows_of(table, score)))


def rows_of(table, score="accuracy", validation=None):
    rows = []
    for (series, at), scores in table.items():
        seen = (validation or {}).get((series, at), scores)
        results = [
            Result(score, test, other, 10, 0.5, 200)
            for test, other in zip(scores, seen, strict=True)
        ]
        rows.append(Row(Setting(series, at, replace(TINY, epochs=2)), results))
    return rows


class TestGrids:
    @pytest.mark.parametrize("name", EXPERIMENTS)
    def test_every_setting_of_the_quick_grid_takes_its_data(self, name, monkeypatch):
        tasks = {}
        for setting in EXPERIMENTS[name].settings(True):
            config = setting.config
            data = repr((config.data, config.data_options, config.image_size))
            task = tasks.setdefault(data, setup.load_task(config))
            torch.manual_seed(0)
            model = setup.build(setup.model_arguments(config, task))
            if setting.change is not None:
                setting.change(model)
            setup.check_fits(task, model)

    @pytest.mark.parametrize("name", EXPERIMENTS)
    def test_full_grids_hold_the_quick_ones_series_and_no_setting_twice(self, name):
        experiment = EXPERIMENTS[name]
        full, quick = experiment.settings(False), experiment.settings(True)
        assert len({setting.label for setting in full}) == len(full) >= len(quick)
        assert {s.series for s in quick} == {s.series for s in full if s.longer_than is None}
        assert all(s.config.epochs == 1 for s in quick)
        assert all(s.config.epochs > 1 for s in full)
        series = {s.series for s in full}
        assert {one for pair in experiment.pairs for one in pair} <= series

    @pytest.mark.parametrize("name", EXPERIMENTS)
    def test_of_what_is_trained_longer_nothing_else_is_changed(self, name):
        full = EXPERIMENTS[name].settings(False)
        assert len({s.key() for s in full if s.longer_than}) == sum(
            bool(s.longer_than) for s in full
        )
        short = {(s.series, s.at): s for s in full if s.longer_than is None}
        for setting in full:
            if setting.longer_than is not None:
                base = short[setting.longer_than, setting.at]
                assert setting.config == replace(base.config, epochs=4 * base.config.epochs)
                assert setting.change == base.change
                assert setting.series == f"{base.series}, {setting.config.epochs} epochs"

    def test_what_is_asked_for_is_there(self):
        assert set(EXPERIMENTS) == {
            *("branching_ratio", "k_sweep", "candidate_sweep", "lambda_sweep"),
            *("learned_lambda", "attention_variants", "denoising", "point_spectrum"),
        }
        grid = EXPERIMENTS["branching_ratio"].settings(False)
        assert {s.config.data for s in grid} == {"digits", "patches"}
        ratios = [s.config.layer_options["ratio"] for s in grid]
        assert [s.at for s in grid] == ratios
        assert len(set(ratios)) == 9 and {0.0, 1.0} <= set(ratios)
        assert {s.config.layer_options["metric"] for s in grid} == {"cosine", "paper_mix"}

    def test_published_numbers_are_those_of_the_papers(self):
        curves = EXPERIMENTS["branching_ratio"].published.curves
        assert [value for _, value in curves["CIFAR-10"]] == [81.1, 82.2, 83.1, 81.9, 68.8]
        assert [value for _, value in curves["CIFAR-100"]] == [46.3, 48.4, 50.0, 51.0, 32.8]
        curves = EXPERIMENTS["denoising"].published.curves
        assert dict(curves["UNet"]) == {"convolution": 28.22, "branching": 28.46, "ConvNN": 26.92}
        assert dict(curves["DnCNN"]) == {"convolution": 26.63, "branching": 27.78, "ConvNN": 23.84}
        curves = EXPERIMENTS["k_sweep"].published.curves
        assert curves["attention (ViT-Base)"] == [(None, 80.95)]
        assert curves["convolution (ResNet-50)"] == [(None, 79.16)]


class TestFullSize:
    @pytest.fixture
    def root(self, tmp_path):
        x, y = np.random.default_rng(0).integers(0, 256, (40, 28, 28), np.uint8), np.arange(40) % 10
        np.savez(tmp_path / "mnist.npz", x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])
        return str(tmp_path)

    @pytest.mark.parametrize("name", ["branching_ratio", "k_sweep", "attention_variants"])
    def test_every_question_is_asked_of_mnist_and_of_patches(self, name):
        small, full = EXPERIMENTS[name], at_full_size(EXPERIMENTS[name], "data")
        asked = [
            s for s in small.settings(False) if s.config.data == "digits" and s.longer_than is None
        ]
        found = full.settings(False)
        assert [s.config.data for s in found] == [d for d in ("mnist", "patches") for _ in asked]
        assert len({s.label for s in found}) == len({s.key() for s in found}) == len(found)
        assert all(s.config.image_size == 32 and s.config.epochs > 10 for s in found)
        assert all("width" not in s.config.model_options for s in found)
        layers = [s.config.layer_options for s in asked]
        assert [s.config.layer_options for s in found] == 2 * layers
        assert {one for pair in full.pairs for one in pair} <= {s.series for s in found}
        assert len(full.pairs) == 2 * len(small.pairs)

    def test_models_take_their_data(self, root):
        full = at_full_size(EXPERIMENTS["k_sweep"], root, quick=True)
        for model in ("vgg11", "vit_tiny"):
            config = next(
                s.config
                for s in full.settings(True)
                if (s.config.model, s.config.data) == (model, "mnist")
            )
            assert config.epochs == 1
            task = setup.load_task(config)
            setup.check_fits(task, setup.build(setup.model_arguments(config, task)))

    @pytest.mark.parametrize("name", ["denoising", "point_spectrum"])
    def test_others_have_one_size(self, name):
        with pytest.raises(ConfigError, match=f"{name} comes in one size"):
            at_full_size(EXPERIMENTS[name], "data")


class TestRun:
    SETTINGS = (
        Setting("plain", None, TINY),
        Setting("wide", 0.5, replace(TINY, model_options={"width": 0.1})),
    )

    def test_a_run_is_that_of_the_trainer(self, tmp_path):
        config = replace(TINY, layer="convnn", layer_options={"metric": "cosine"})
        with one_thread():
            found = train_setting(Setting("mixed", 0.5, config), seed=1)
            other = fit(replace(config, out=str(tmp_path)), seed=1)
        assert found.test == other.test["accuracy"]
        assert found.validation == other.validation["accuracy"]
        assert found.parameters == other.parameters
        assert found.score == "accuracy" and found.test_size == 360 and found.learned == {}

    def test_workers_change_nothing(self, tmp_path):
        def scores(workers):
            found = run(tiny(*self.SETTINGS), tmp_path / str(workers), 1, workers=workers)
            return [(s.label, [(r.test, r.validation) for r in results]) for s, results in found]

        assert scores(1) == scores(2)

    def test_a_second_call_goes_on_where_the_first_was_stopped(self, tmp_path, monkeypatch):
        ran = []

        def stopping(setting, seed):
            if len(ran) == 3:
                raise KeyboardInterrupt
            return counting(setting, seed)

        def counting(setting, seed):
            ran.append((setting.label, seed))
            return Result("accuracy", 0.5 + seed / 10, 0.25, 7, 0.1, 100, {"0": 0.5})

        monkeypatch.setattr(RUN, "train_setting", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(tiny(*self.SETTINGS), tmp_path, 2, workers=1)
        assert len(list(tmp_path.glob("*.json"))) == 3
        monkeypatch.setattr(RUN, "train_setting", counting)
        lines = []
        found = run(tiny(*self.SETTINGS), tmp_path, 2, workers=1, tell=lines.append)
        assert len(ran) == len(set(ran)) == 4  # none twice
        assert lines[0] == "3 of 4 runs are there already" and len(lines) == 2
        assert [[r.test for r in results] for _, results in found] == [[0.5, 0.6], [0.5, 0.6]]
        assert found[0][1][0].learned == {"0": 0.5}
        run(tiny(*self.SETTINGS), tmp_path, 2, workers=1)
        assert len(ran) == 4

    def test_what_changes_the_numbers_is_trained_anew(self, tmp_path, monkeypatch):
        ran = []
        result = Result("accuracy", 0.5, 0.5, 7, 0.1, 100)
        monkeypatch.setattr(RUN, "train_setting", lambda *job: ran.append(job) or result)
        base = self.SETTINGS[0]
        for setting, count in (
            (base, 1),
            (replace(base, series="other name"), 1),
            (replace(base, config=replace(TINY, seeds=5, out="elsewhere")), 1),
            (replace(base, config=replace(TINY, epochs=2)), 2),
            (replace(base, change=PublishedMix(0.5)), 3),
            (replace(base, change=PublishedMix(0.25)), 4),
            (replace(base, change=PublishedMix(0.25)), 4),
        ):
            run(tiny(setting), tmp_path, 1, workers=1)
            assert len(ran) == count, setting

    def test_a_learned_place_is_recorded(self):
        layer = {"layer": "interpolated_conv2d", "layer_options": {"metric": "euclidean"}}
        config = replace(TINY, **layer)
        found = train_setting(Setting("learned", 0.5, config, Interpolate(0.5, True)), 0).learned
        assert len(found) == 8 and all(0 <= lam <= 1 for lam in found.values())
        assert any(lam != 0.5 for lam in found.values())
        assert (
            train_setting(Setting("fixed", 0.5, config, Interpolate(0.5, False)), 0).learned == {}
        )


class TestChanges:
    def vit(self, layer="attention", **options):
        torch.manual_seed(0)
        size = {"image_size": 12, "patch_size": 2, "depth": 2, "width": 0.125}
        return create_model("vit_tiny", layer, in_channels=1, **size, **options).eval()

    def test_interpolate_weighs_alike_and_learns_only_where_asked(self):
        x = torch.randn(2, 1, 8, 8)
        models = []
        for learnable in (False, True):
            torch.manual_seed(0)
            model = create_model("vgg11", "conv", in_channels=1, image_size=8, width=0.05)
            Interpolate(0.6, learnable)(model)
            models.append(model.eval())
            lams = [p for n, p in model.named_parameters() if n.endswith("metric.lam")]
            assert len(lams) == 8 and all(p.requires_grad == learnable for p in lams)
        assert torch.equal(models[0](x), models[1](x))
        places = convert.interpolation(models[0]).values()
        assert len(places) == 8 and all(lam == pytest.approx(0.6) for lam in places)

    def test_heads_are_as_one_place_where_they_are_equal(self):
        x = torch.randn(2, 1, 12, 12)
        one, heads = (self.vit("interpolated_attention", k=5) for _ in range(2))
        Interpolate(0.3, True)(one)
        InterpolateHeads(0.3)(heads)
        assert torch.allclose(one(x), heads(x), atol=1e-5)
        heads(x).square().sum().backward()
        lams = [p for n, p in heads.named_parameters() if n.endswith("metric.lam")]
        assert [p.shape for p in lams] == [(3,), (3,)]
        assert all((p.grad != 0).all() for p in lams)
        assert list(RUN.learned(heads)) == [
            f"blocks.{block}.attn.attention, head {head}" for block in (0, 1) for head in range(3)
        ]

    def test_heads_have_places_of_their_own(self):
        patches = PatchPositions((3, 3), prefix=1)
        metric = HeadInterpolation(patches, 2, 0.5)
        metric.lam.data = torch.tensor([0.2, 0.9])
        x = torch.randn(1, 2, 10, 4)
        distances = metric(Points(x))
        for head, lam in enumerate((0.2, 0.9)):
            alone = interpolate(patches, "scaled_dot", lam)(Points.from_tokens(x[:, head]))
            assert torch.allclose(distances[:, head], alone, atol=1e-5)

    def test_heads_come_back_from_beyond_the_ends(self):
        metric = HeadInterpolation(PatchPositions((3, 3), prefix=1), 2, 0.5)
        metric.lam.data = torch.tensor([1.02, -0.01])
        points = Points(torch.randn(1, 2, 10, 4))
        distances = metric(points)
        metric.lam.data = torch.tensor([1.0, 0.0])
        assert torch.equal(distances, metric(points))
        distances.square().sum().backward()
        assert (metric.lam.grad != 0).all()

    def test_the_published_mix_at_its_end_chooses_by_features(self):
        model = create_model("vgg11", "convnn", in_channels=1, image_size=8, width=0.05)
        layer = next(layer for _, layer in choosing(model))
        points = Points.from_image(torch.randn(1, 1, 6, 6))
        PublishedMix(1)(model)
        at_end = knn(points, points, k=5, metric=layer.metric).index
        PublishedMix(0.999)(model)
        near_end = knn(points, points, k=5, metric=layer.metric).index
        assert torch.equal(at_end, near_end)
        PublishedMix(0)(model)
        assert not torch.equal(at_end, knn(points, points, k=5, metric=layer.metric).index)

    @pytest.mark.parametrize("shift", [False, True])
    def test_a_square_of_patches(self, shift):
        size, side = (4, 5), 3
        border = {"border": "shift"} if shift else {"padding": "same"}
        window = PatchCandidates(Window(side, **border), PatchPositions(size, prefix=1))
        tokens = Points.from_tokens(torch.zeros(1, 21, 1))
        mask = window(tokens, tokens).mask
        assert mask[0].all() and mask[:, 0].all()
        for row, col in ((0, 0), (1, 2), (3, 4), (0, 3)):
            r, c = (min(max(row, 1), 2), min(max(col, 1), 3)) if shift else (row, col)
            expected = [abs(r - i) <= 1 and abs(c - j) <= 1 for i in range(4) for j in range(5)]
            assert mask[1 + row * 5 + col, 1:].tolist() == expected
            assert not shift or sum(expected) == side**2

    def test_attention_sees_no_further_than_its_square(self):
        model = self.vit()
        LookAround(3)(model)
        layer = next(attentions(model))[1]
        _, weights = layer(torch.randn(1, 37, layer.embed_dim))
        assert (weights[0, 1] > 0).nonzero().flatten().tolist() == [0, 1, 2, 7, 8]

    def test_samples(self):
        image = Points.from_image(torch.zeros(1, 1, 5, 5))
        small = Points.from_image(torch.zeros(1, 1, 2, 2))
        assert Sample("strided", 3)(image, image).index.tolist() == [
            [0, 2, 4, 10, 12, 14, 20, 22, 24]
        ]
        assert Sample("strided", 3)(small, small).index.tolist() == [[0, 1, 2, 3]]
        assert Sample("random", 4)(small, small).index is None
        drawn = Sample("random", 9).eval()(image, image).index
        assert drawn.shape == (1, 9) and len(set(drawn[0].tolist())) == 9
        tokens = Points.from_tokens(torch.zeros(1, 10, 1))
        strided = Sample("strided", 2, PatchPositions((3, 3), prefix=1))
        assert strided(tokens, tokens).index.tolist() == [[0, 1, 3, 7, 9]]

    def test_random_candidates_are_fixed_when_scored(self):
        model = self.vit("convnn_attention", k=5, self_point="first")
        LookAmong("random", 12)(model)
        model.eval()
        x = torch.randn(1, 1, 12, 12)
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x))
        assert sum(isinstance(layer, ConvNNAttention) for _, layer in choosing(model)) == 2

    def test_changes_are_told_apart_by_their_repr(self):
        changes = [
            Interpolate(0.5, True),
            Interpolate(0.5, False),
            InterpolateHeads(0.5),
            LookAmong("random", 9),
            LookAround(3),
            LookAround(3, shift=True),
            PublishedMix(0.5),
        ]
        keys = {Setting("a", 0, TINY, change).key() for change in changes}
        assert len(keys) == len(changes)


class TestSentences:
    def test_a_clear_peak(self):
        said = told(
            tiny(),
            {("a", 0.0): [0.8, 0.81], ("a", 0.5): [0.9, 0.91], ("a", 1.0): [0.6, 0.61]},
        )
        assert (
            "a: the mean is highest at 0.5 (90.50 ± 0.71 %) and lowest at 1 (60.50 ± 0.71 %)."
            in said
        )
        assert (
            "a at 0.5 is 10.00 points above a at 0, more than both deviations together (1.42)."
            in said
        )
        assert "a at 0.5 is 30.00 points above a at 1" in said
        assert "standard deviation over 2 seeds" in said and "one is 0.50 percentage points" in said

    def test_a_peak_within_the_noise(self):
        said = told(tiny(), {("a", 0.0): [0.80, 0.90], ("a", 1.0): [0.82, 0.92]})
        assert "a at 1 is 2.00 points above a at 0, within both deviations together (14.14)" in said
        assert "do not tell" in said and "more than" not in said

    def test_the_top_may_be_an_end(self):  # then the best in between is named
        said = told(
            tiny(), {("a", 0.0): [0.9, 0.9], ("a", 0.5): [0.8, 0.8], ("a", 1.0): [0.7, 0.7]}
        )
        assert "highest at 0 (" in said
        assert "Between its ends the validation part would choose 0.5 (80.00 ± 0.00 %)." in said
        assert "a at 0 is 10.00 points above a at 0.5, more than" in said
        assert "a at 0.5 is 10.00 points above a at 1, more than" in said

    def test_equal_means_and_single_runs(self):
        said = told(tiny(), {("a", 0.0): [0.5], ("a", 1.0): [0.5]})
        assert "a: the mean is the same everywhere, 50.00 %." in said
        assert "With a single seed there is no deviation" in said
        said = told(tiny(), {("a", 0.0): [0.5], ("a", 1.0): [0.6]})
        assert "by a single run of each" in said and "±" not in said

    def test_series_are_compared_by_what_validation_chooses(self):
        table = {("a", 0.0): [0.9, 0.9], ("a", 1.0): [0.8, 0.8], ("b", None): [0.85, 0.85]}
        validation = {("a", 0.0): [0.1, 0.1], ("a", 1.0): [0.7, 0.7]}
        said = " ".join(paragraphs(tiny(pairs=[("a", "b")]), rows_of(table, validation=validation)))
        assert "validation part would choose 1 (80.00 ± 0.00 %)" in said
        assert "b is 5.00 points above a at 1" in said

    def test_what_is_compared_was_not_chosen_by_the_test_part(self):
        places = (0.0, 0.3, 0.6, 1.0)
        table = dict(zip([("a", at) for at in places], ([0.5], [0.9], [0.8], [0.6]), strict=True))
        validation = dict(zip(table, ([0.5], [0.7], [0.8], [0.6]), strict=True))
        said = " ".join(paragraphs(tiny(), rows_of(table, validation=validation)))
        assert "highest at 0.3" in said and "would choose 0.6 (80.00 %)" in said
        assert "a at 0.6 is 30.00 points above a at 0," in said and "a at 0.3 is" not in said

    def test_how_many_settings_are_beaten_is_counted(self):
        table = {("a", None): [0.8, 0.8]}
        table |= {("b", at): [score, score] for at, score in ((0.0, 0.7), (0.5, 0.8), (1.0, 0.9))}
        said = told(tiny(pairs=[("a", "b")]), table)
        assert "It is above 1 of the 3 settings of b." in said

    def test_after_a_single_epoch_nothing_is_compared(self):
        results = [Result("accuracy", 0.1, 0.1, 1, 0.1, 100)]
        rows = [Row(Setting("a", at, TINY), results) for at in (0.0, 0.5, 1.0)]
        assert paragraphs(tiny(), rows) == [
            "A single epoch: this shows that it runs. Nothing can be compared."
        ]
        assert "a single epoch" in draw(tiny(), rows).get_suptitle()

    def test_names_are_compared_with_the_first(self):
        table = {("m", "x"): [20.0, 20.0], ("m", "y"): [25.0, 25.2], ("m", "z"): [22.0, 22.0]}
        said = told(tiny(), table, "psnr")
        assert "m at y is 5.10 dB above m at x, more than both deviations together (0.14)." in said
        assert "200 test images" in said and "percentage" not in said

    def test_how_long_all_were_trained_is_said_first(self):
        first, *_ = paragraphs(tiny(), rows_of({("a", 0.0): [0.5, 0.5], ("a", 1.0): [0.6, 0.6]}))
        assert "all is after 2 epochs, which are few" in first
        assert "none were trained longer here" in first

    def test_longer_training_stands_beside_the_shorter(self):
        table = {("a", 0.0): [0.5, 0.5], ("a", 1.0): [0.6, 0.7], ("b", None): [0.6, 0.6]}
        long = {("a, 8", 0.0): [0.8, 0.8], ("a, 8", 1.0): [0.6, 0.7], ("b, 8", None): [0.9, 0.9]}
        rows = rows_of(table)
        for row in rows_of(long):
            name = row.setting.series
            config = replace(TINY, epochs=8)
            setting = replace(row.setting, config=config, longer_than=name.partition(",")[0])
            rows.append(replace(row, setting=setting))
        said = paragraphs(tiny(pairs=[("a", "b")]), rows)
        assert said[0].endswith("3 of 3 settings were trained longer, too.")
        assert (
            "Trained longer: a at 0 rises by 30.00 points, to 80.00 ± 0.00 % (8 epochs in the "
            "place of 2); a at 1 stays at 65.00 ± 7.07 % (8 epochs in the place of 2); b rises by "
            "30.00 points, to 90.00 ± 0.00 % (8 epochs in the place of 2). 2 of 3 change by more "
            "than both deviations together: there the shorter training was too short"
        ) in said[3]
        assert "a, 8 at 0 is 15.00 points above a, 8 at 1, more than" in said[4]
        assert "a at 1 is 5.00 points above b" in said[2] and "b, 8 is 10.00 points" in said[5]
        ours = draw(tiny(), rows).axes[0]
        first, longer = ours.containers
        assert first.lines[0].get_color() == longer.lines[0].get_color()
        assert longer.lines[0].get_markerfacecolor() == "white"

    def test_where_lambda_ended_and_what_is_published(self):
        results = [
            Result("accuracy", 0.5, 0.5, 1, 0.1, 100, {"0": low, "3": high})
            for low, high in ((0.1, 0.8), (0.3, 0.8))
        ]
        published = Published("them", "%", {"C": [(0.0, 1.5), (0.5, 2.5)], "D": [(None, 2.0)]})
        row = Row(Setting("l", 0.5, replace(TINY, epochs=2)), results)
        said = " ".join(paragraphs(tiny(published=published), [row]))
        assert (
            "l at 0.5: when training ended, after 2 epochs, λ was at 0.20 ± 0.14, 0.80 ± 0.00, "
            "first to last, 0.30 from where it began on average." in said
        )
        assert "settle" not in said
        assert "highest for C at 0.5 (2.5); D 2." in said


class TestReport:
    TABLE: ClassVar = {
        ("a", 0.0): [0.8, 0.82],
        ("a", 1.0): [0.9, 0.92],
        ("plain", None): [0.85, 0.87],
    }
    PUBLISHED = Published(
        "VGG-11, CIFAR-10", "accuracy (%)", {"CIFAR-10": [(0.0, 81.1), (1.0, 68.8)]}
    )

    def test_the_three_files(self, tmp_path):
        experiment = tiny(published=self.PUBLISHED)
        path = write_report(experiment, rows_of(self.TABLE), tmp_path, "convnn-geo experiment tiny")
        page = path.read_text()
        assert path.name == "tiny.md" and "![Tiny](tiny.png)" in page
        assert "| a | 1 | 2 | 91.00 ± 1.41 | 91.00 | 10 | 0.50 |" in page
        assert "| plain |  | 2 | 86.00 ± 1.41 | 86.00 | 10 | 0.50 |" in page
        assert "VGG-11, CIFAR-10" in page and "`convnn-geo experiment tiny`" in page
        assert "\n\n".join(paragraphs(experiment, rows_of(self.TABLE))) in page
        with (tmp_path / "tiny.csv").open() as file:
            lines = list(csv.DictReader(file))
        assert [(r["series"], r["at"], r["seed"], float(r["test"])) for r in lines] == [
            (series, "" if at is None else f"{at:g}", str(seed), score)
            for (series, at), scores in self.TABLE.items()
            for seed, score in enumerate(scores)
        ]
        assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")

    def test_the_picture_has_ours_beside_theirs(self):
        figure = draw(tiny(published=self.PUBLISHED), rows_of(self.TABLE))
        ours, theirs = figure.axes
        means = ours.containers[0].lines[0].get_xydata()
        assert means.tolist() == [[0.0, 81.0], [1.0, 91.0]]
        assert theirs.lines[0].get_xydata().tolist() == [[0.0, 81.1], [1.0, 68.8]]
        assert len(draw(tiny(), rows_of(self.TABLE)).axes) == 1

    def test_what_is_named_alike_is_coloured_alike_and_baselines_go_across(self):
        curves = {"b (big)": [(0.0, 1.0)], "a (big)": [(0.0, 2.0)], "plain (big)": [(None, 3.0)]}
        published = Published("them", "%", curves)
        table = {
            ("a (small)", 0.0): [0.8],
            ("b (small)", 0.0): [0.9],
            ("plain (small)", None): [0.7],
        }
        ours, theirs = draw(tiny(published=published), rows_of(table)).axes

        def colors(axis):
            handles, labels = axis.get_legend_handles_labels()
            lines = [getattr(handle, "lines", [handle])[0] for handle in handles]
            return {label[0]: line.get_color() for label, line in zip(labels, lines, strict=True)}

        assert colors(ours) == colors(theirs) and len(set(colors(ours).values())) == 3
        assert list(theirs.lines[2].get_ydata()) == [3.0, 3.0]

    def test_curves_that_meet_are_moved_apart(self):
        rows = rows_of({(name, at): [0.5] for name in "ab" for at in (0.0, 1.0)})
        first, second = draw(tiny(), rows).axes[0].containers
        moved = second.lines[0].get_xdata() - first.lines[0].get_xdata()
        assert (moved > 0).all() and (moved < 0.05).all()

    def test_a_series_may_have_a_panel_of_its_own(self):
        rows = rows_of({(name, at): [0.5] for name in "ab" for at in (0.0, 0.01)})
        together, alone = draw(replace(tiny(), apart={"b": 0.01}), rows).axes
        assert len(together.containers) == len(alone.containers) == 1
        assert alone.get_xscale() == "symlog"

    def test_names_stand_along_the_axis(self):
        rows = rows_of({("m", "x"): [20.0], ("m", "y"): [25.0]}, "psnr")
        (axis,) = draw(tiny(), rows).axes
        assert [label.get_text() for label in axis.get_xticklabels()] == ["x", "y"]
        assert axis.get_ylabel() == "PSNR (dB)"

    def test_where_lambda_ended_is_drawn_and_tabled(self, tmp_path):
        results = [Result("accuracy", 0.5, 0.5, 1, 0.1, 100, {"0": 0.25, "3": 0.75})]
        rows = [Row(Setting("l", 0.5, replace(TINY, epochs=2)), results)]
        figure = draw(tiny(), rows)
        assert figure.axes[1].containers[0].lines[0].get_ydata().tolist() == [0.25, 0.75]
        page = write_report(tiny(), rows, tmp_path, "x").read_text()
        heads = [Result("accuracy", 0.5, 0.5, 1, 0.1, 100, {"0, head 0": 0.25, "0, head 1": 0.75})]
        rows.append(replace(rows[0], results=heads))
        _, layers, apart = draw(tiny(), rows).axes
        assert layers.containers[0].lines[0].get_linestyle() == "-"
        assert apart.containers[0].lines[0].get_linestyle() == "None"
        assert "| setting | 0 | 3 |" in page and "| l at 0.5 | 0.25 | 0.75 |" in page


class TestCommand:
    def call(self, *words):
        parser = argparse.ArgumentParser()
        add_experiment(parser.add_subparsers(dest="name"))
        arguments = parser.parse_args(["experiment", *map(str, words)])
        return arguments.command(arguments)

    def test_list(self, capsys):
        assert self.call("--list") == 0
        text = capsys.readouterr().out
        assert all(name in text for name in EXPERIMENTS)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["branching_ration"], "branching_ratio"),
            ([], "expected the NAME of one: branching_ratio"),
            (["denoising", "--seeds", 0], "--seeds: expected an integer of at least 1"),
            (["denoising", "--workers", 0], "--workers: expected an integer of at least 1"),
            (["denoising", "--full"], "denoising comes in one size"),
        ],
    )
    def test_bad_input_is_refused_before_any_work(self, words, message, capsys, monkeypatch):
        monkeypatch.setattr(RUN, "train_setting", None)
        assert self.call(*words) == 2
        assert message in capsys.readouterr().err

    def test_full_size_needs_mnist(self, tmp_path, capsys):
        words = ("--full", "--quick", "--data-root", tmp_path / "data", "--out", tmp_path)
        assert self.call("k_sweep", *words, "--workers", 1) == 2
        assert str(tmp_path / "data") in capsys.readouterr().err

    def test_full_size_without_a_gpu_is_warned_of(self, tmp_path, capsys, monkeypatch):
        words = ("--full", "--quick", "--out", tmp_path)

        def refusing(*_):
            raise ConfigError("no need to run")

        monkeypatch.setattr("convnn_geo.experiments.run", refusing)
        for there in (False, True):
            monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
            assert self.call("k_sweep", *words) == 2
            warned = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
            assert len(warned) == (not there)
            assert all("sized for a GPU" in line for line in warned)

    def test_from_end_to_end(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setitem(EXPERIMENTS, "tiny", tiny(*TestRun.SETTINGS))
        words = ("tiny", "--quick", "--workers", 1, "--out", tmp_path)
        assert self.call(*words) == 0
        first = capsys.readouterr().out
        assert "1/2  plain, seed 0: accuracy" in first and "tiny.md" in first
        assert self.call(*words) == 0
        assert "2 of 2 runs are there already" in capsys.readouterr().out
        assert {p.suffix for p in tmp_path.glob("tiny.*")} == {".md", ".csv", ".png"}
        assert len(list((tmp_path / "runs" / "tiny").glob("*.json"))) == 2

    def test_what_is_corrupt_or_diverges_is_told(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setitem(EXPERIMENTS, "tiny", tiny(TestRun.SETTINGS[0]))
        words = ("tiny", "--seeds", 1, "--workers", 1, "--out", tmp_path)

        def diverging(setting, seed):
            raise DivergedError("the loss became nan")

        with monkeypatch.context() as patch:
            patch.setattr(RUN, "train_setting", diverging)
            assert self.call(*words) == 1
        assert "the loss became nan" in capsys.readouterr().err
        assert self.call(*words) == 0
        (file,) = (tmp_path / "runs" / "tiny").glob("*.json")
        kept = json.loads(file.read_text())
        for wrong in (
            *({"test": "0.9"}, {"test": math.nan}, {"learned": [1]}, {"learned": {"a": "b"}}),
            *({"score": 1}, {"seconds": None}, {"surprise": 1}),
        ):
            file.write_text(json.dumps({**kept, **wrong}))
            assert self.call(*words) == 2
            assert "delete it to train anew" in capsys.readouterr().err
        file.write_text("{")
        assert self.call(*words) == 2
        assert "delete it to train anew" in capsys.readouterr().err
        file.unlink()
        assert self.call(*words) == 0

    @pytest.mark.slow
    @pytest.mark.parametrize("name", EXPERIMENTS)
    def test_quick(self, name, tmp_path):
        assert self.call(name, "--quick", "--workers", 1, "--out", tmp_path) == 0


def example():
    path = Path(__file__).parents[1] / "examples" / "denoise_photograph.py"
    spec = importlib.util.spec_from_file_location("denoise_photograph", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_trains_draws_and_puts_tiles_back(tmp_path, monkeypatch, capsys):
    denoise = example()
    image = torch.rand(3, denoise.SIDE, denoise.SIDE)
    assert torch.allclose(denoise.joined(denoise.tiles(image)), image, atol=1e-6)
    assert torch.equal(denoise.tiles(image)[1], image[:, :16, 8:24])
    assert denoise.psnr(image + 0.1, image) == pytest.approx(20, abs=1)
    monkeypatch.setattr(denoise, "STEPS", 2)
    path = tmp_path / "denoise.png"
    monkeypatch.setattr("sys.argv", ["denoise_photograph.py", str(path)])
    denoise.main()
    assert path.read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    scores = [float(line.split()[2]) for line in lines[2:5]]
    assert len(scores) == 3 and all(math.isfinite(score) for score in scores)
    results = path.parents[0] / "results.csv"
    results.write_text(
        "series,at,test\nUNet,convolution,9\n"
        + "".join(f"DnCNN,{layer},{score}\n" for layer in denoise.LAYERS for score in (20, 21))
    )
    monkeypatch.setattr(denoise, "RESULTS", results)
    assert list(denoise.over_seeds()) == [
        "DnCNN, 2 seeds, test patches: convolution 20.50 ± 0.71 dB, branching 20.50 ± 0.71 dB, "
        "ConvNN 20.50 ± 0.71 dB"
    ]
