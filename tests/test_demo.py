"""The demonstration: its protocol is honest, its results repeat, its report says what they say."""

import csv
import dataclasses
import json
import re

import pytest
import torch
from torch import nn

from convnn_geo.datasets import ImageSplit, ImageSplits, digit_clouds, digits, photograph
from convnn_geo.demo import clouds, neighbors, run, spectrum
from convnn_geo.demo.summary import Score, compare, percent, scores, sentences
from convnn_geo.demo.training import Job, Network, Run, Settings, accuracy, train
from convnn_geo.workers import in_one_thread, run_jobs


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    (out / "report.html").write_text("of an earlier run")
    return run(out, quick=True)


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_demo_leaves_its_files(done):
    from PIL import Image

    folder = done.report.parent
    assert done.passed
    names = {"config.json", "metrics.csv", "report.html"}
    pictures = {"neighbors.png", "spectrum.png", "clouds.png", "clouds_examples.png"}
    assert {path.name for path in folder.iterdir()} == names | pictures
    for name in pictures:
        with Image.open(folder / name) as picture:
            assert picture.size[0] >= 800 and picture.size[1] >= 300


def test_metrics_hold_every_epoch_and_one_test_accuracy_a_run(done):
    rows = table(done.report.parent / "metrics.csv")
    runs = {}
    for row in rows:
        key = (row["task"], row["network"], row["seed"], row["learning_rate"])
        runs.setdefault(key, []).append(row)
    assert len(runs) == 7 + 6
    for history in runs.values():
        assert [row["epoch"] for row in history] == ["1", "2"]
        assert [bool(row["test_accuracy"]) for row in history] == [False, True]
        assert 0 <= float(history[-1]["test_accuracy"]) <= 1
    lams = {row["lam"] for row in rows if row["task"] == "spectrum"}
    assert lams == {"", "0.0", "0.25", "0.5", "0.75", "1.0"}


def test_config_says_how_and_not_where(done):
    text = (done.report.parent / "config.json").read_text()
    config = json.loads(text)
    assert config["seeds"] == [0] and config["versions"]["torch"] == torch.__version__
    assert config["training"]["spectrum"]["rates"] == [0.03]
    assert set(config["seconds"]) == {"verify", "neighbours", "train"}
    assert set(config["machine"]) == {"processor", "cores", "system"}
    assert str(done.report.parent) not in text and "/home" not in text


def test_report_says_what_was_run_and_seen_first(done):
    page = done.report.read_text(encoding="utf-8")
    titles = ("What was run", "What was seen", "Who is a neighbour?")
    ran, seen, rest = (page.index(f">{title}</h2>") for title in titles)
    assert ran < seen < rest
    config = json.loads((done.report.parent / "config.json").read_text())
    told = page[ran:seen]
    assert "python -m convnn_geo demo --quick" in told and config["finished"] in told
    assert config["machine"]["processor"] in told and torch.__version__ in told
    named = set(re.findall(r'href="#([^"]+)"', page[seen:rest]))
    assert named == set(re.findall(r'<h2 id="([^"]+)"', page)) and len(named) == 4
    assert page.count("<figcaption>") == page.count("<img ") == 4
    assert "Ties go to the lowest index" in page


def test_report_shows_pictures_and_the_numbers_of_the_metrics(done):
    page = done.report.read_text(encoding="utf-8")
    shown = re.findall(r'<img src="([^"]+)"', page)
    assert shown == ["neighbors.png", "spectrum.png", "clouds_examples.png", "clouds.png"]
    assert "multihead_attention" in page and "checks within bounds" in page
    for row in table(done.report.parent / "metrics.csv"):
        if row["test_accuracy"]:
            assert f"<td>{100 * float(row['test_accuracy']):.1f}</td>" in page


def test_results_are_the_same_in_another_process():
    settings = Settings(seeds=(0, 1), epochs=1, rates=(0.01, 0.03), train_size=100)
    job = Job("digits", digits, spectrum.networks([0.5])[-1], settings)
    torch.manual_seed(5)
    jobs = {"first": job, "second": job}
    here = dict(run_jobs(jobs, workers=1))
    torch.manual_seed(6)
    assert here == dict(run_jobs(jobs, workers=2))


def test_clouds_train_alike_every_time():
    settings = Settings(seeds=(0,), epochs=1, rates=(0.03,), train_size=60)
    job = Job("clouds", digit_clouds, clouds.networks([0.5])[-1], settings)
    assert in_one_thread(job) == in_one_thread(job)


class Counted:
    """A split that counts how often its examples are read."""

    def __init__(self, split):
        self.split, self.reads = split, 0

    def __len__(self):
        return len(self.split)

    def batch(self, index):
        self.reads += len(index)
        return self.split.batch(index)


def parts(count=40):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, 2, 2, generator=generator)
    return Counted(ImageSplit(x, (x.flatten(1).sum(1) > 0).long()))


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))


def test_test_part_is_read_once_a_chosen_run():
    splits = ImageSplits(parts(), parts(), parts())
    settings = Settings(seeds=(0, 1, 2), epochs=3, batch_size=16, rates=(1e-6, 0.1))
    runs = train("task", Network("linear", linear), splits, settings)
    chosen = [run for run in runs if run.test is not None]
    assert [run.seed for run in chosen] == [0, 1, 2]
    assert {run.rate for run in chosen} == {0.1}  # validates better than next to no learning
    assert splits.test.reads == 3 * len(splits.test)
    assert splits.validation.reads == 4 * 3 * len(splits.validation)
    assert splits.train.reads == 4 * 3 * len(splits.train)
    assert all(len(run.losses) == len(run.validation) == 3 for run in runs)


def test_training_leaves_the_random_stream_alone():
    splits = ImageSplits(parts(), parts(), parts())
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    train("task", Network("linear", linear), splits, Settings(epochs=1))
    assert torch.equal(torch.rand(1), expected)


def test_accuracy_weighs_examples_and_not_batches():
    y = torch.tensor([0, 0, 0, 0, 1])
    split = ImageSplit(torch.zeros(5, 1, 1, 1), y)
    always_zero = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        always_zero[1].bias.copy_(torch.tensor([1.0, 0.0]))
    assert accuracy(always_zero, split, batch_size=4) == pytest.approx(0.8)


def test_position_end_of_the_network_is_the_convolution():
    torch.manual_seed(0)
    x = torch.rand(3, 1, 8, 8)
    plain = spectrum.DigitNet(spectrum.convolution, 4).eval()
    other = spectrum.DigitNet(lambda width: spectrum.interpolated(width, 0.0), 4).eval()
    other.load_state_dict(plain.state_dict())
    torch.testing.assert_close(other(x), plain(x))


def test_position_end_trains_like_the_convolution():
    settings = Settings(seeds=(0,), epochs=2, rates=(0.03,), train_size=400)
    plain, _, other = spectrum.networks([0.0])
    assert other.lam == 0.0
    (expected,), (found,) = (train("", network, digits(), settings) for network in (plain, other))
    one = 1 / 359  # an example on the border between two classes may go either way
    assert found.validation == pytest.approx(expected.validation, abs=one)
    assert found.losses == pytest.approx(expected.losses, rel=1e-4)


def test_networks_have_about_as_many_parameters():
    count = {
        network.name: sum(p.numel() for p in network.build().parameters())
        for network in spectrum.networks([0.0, 1.0])
    }
    assert max(count.values()) < 1.1 * min(count.values())


def test_neighbours_are_a_disc_at_one_end_and_like_colours_at_the_other():
    image = photograph("astronaut", width=64)
    near, far = neighbors.along_spectrum(image, [(40, 34)], k=21, lams=[0.0, 1.0])
    row, column = near.index[0] // 64, near.index[0] % 64
    assert ((row - 40) ** 2 + (column - 34) ** 2).max() <= 8
    features = neighbors.patches(image)
    own = features[40 * 64 + 34]
    spread = [(features[hood.index[0]] - own).square().sum(1).mean() for hood in (near, far)]
    assert spread[1] < spread[0]


def test_pixels_of_a_flat_picture_have_neighbours():
    (hood,) = neighbors.along_spectrum(torch.full((3, 5, 5), 0.5), [(2, 2)], 5, [0.5])
    assert sorted(hood.index[0].tolist()) == [7, 11, 12, 13, 17]


def score(network, lam, *test):
    return Score(network, lam, 0.01, 10, test, test)


def test_sentences_follow_the_numbers():
    apart = compare(score("a", 0.0, 0.9, 0.91), score("b", 1.0, 0.8, 0.81))
    assert apart.startswith("a is 10.0 percentage points ahead of b")
    assert compare(score("b", 1.0, 0.8, 0.81), score("a", 0.0, 0.9, 0.91)) == apart
    close = compare(score("a", 0.0, 0.9, 0.8), score("b", 1.0, 0.84, 0.85))
    assert close.startswith("a is 0.5 percentage points ahead of b, no more than")
    assert "do not tell which is better" in close
    said = sentences(
        [
            score("plain", None, 0.5, 0.5),
            score("p", 0.0, 0.7, 0.7),
            score("m", 0.5, 0.9, 0.9),
            score("f", 1.0, 0.6, 0.6),
        ],
        test_size=200,
    )
    assert "highest at λ = 0.5 (90.0 ± 0.0 %) and lowest at λ = 1 (60.0 ± 0.0 %)" in said[0]
    assert any(s.startswith("m is 20.0 percentage points ahead of p") for s in said)
    assert any(s.startswith("p is 20.0 percentage points ahead of plain") for s in said)
    assert "200 examples" in said[-1] and "0.50 percentage points" in said[-1]
    alone = sentences([score("p", 0.0, 0.7), score("f", 1.0, 0.6)], 10)
    assert any("single seed" in s for s in alone) and not any("ahead" in s for s in alone)


def test_sentences_add_up_to_what_tables_show():
    # 98.06 and 84.99 are shown as 98.1 and 85.0, and the difference must not be said to be 13.07.
    one, other = score("a", 0.0, 0.9806, 0.9806), score("b", 1.0, 0.8499, 0.8499)
    assert compare(one, other).startswith("a is 13.1 percentage points ahead of b, more than")
    one, other = score("a", 0.0, 0.98148, 0.98148), score("b", 1.0, 0.85093, 0.85093)
    assert compare(one, other).startswith("a is 13.0 percentage points ahead of b")


def test_sentences_at_the_boundaries():
    # Means of 90 % and 88 %, and deviations of 1.0 each: no further apart than both together.
    step = 0.01 / 2**0.5
    one, other = score("a", 0.0, 0.9 - step, 0.9 + step), score("b", 1.0, 0.88 - step, 0.88 + step)
    assert compare(other, one) == (
        "a is 2.0 percentage points ahead of b, no more than both deviations together (2.0): these "
        "runs do not tell which is better."
    )
    level = compare(score("a", 0.0, 0.98, 0.981), score("b", 1.0, 0.9805, 0.9805))
    assert level.startswith("a and b have the same mean, 98.0 %: these runs do not tell")
    tied = sentences(
        [score("a", 0.0, 0.7, 0.9), score("b", 0.5, 0.8, 0.8), score("c", 1.0, 0.6, 0.6)], 9
    )
    assert tied[0] == (
        "Along the spectrum the mean test accuracy is highest at λ = 0 (80.0 ± 14.1 %) and "
        "λ = 0.5 (80.0 ± 0.0 %) and lowest at λ = 1 (60.0 ± 0.0 %)."
    )
    flat = sentences([score("a", 0.0, 0.7, 0.7), score("b", 1.0, 0.7, 0.7)], 9)
    assert flat[0] == "The mean test accuracy is the same all along the spectrum: 70.0 %."
    assert sum("have the same mean" in s for s in flat) == 1


def test_median_distance_of_neighbours():
    image = torch.rand(3, 9, 12)
    (near,) = neighbors.along_spectrum(image, [(4, 5), (4, 6)], 5, [0.0])
    assert neighbors.median_distance(near, [(4, 5), (4, 6)], 12) == 1.0  # itself at 0, four at 1
    aside = neighbors.median_distance(near, [(4, 2), (4, 3)], 12)  # 2, 3, twice √10, and 4
    assert aside == pytest.approx(10**0.5)


def test_scores_leave_out_rates_that_were_not_chosen():
    tried = Run("t", "n", 0.5, 0, 0.01, 7, (1.0,), (0.3,))
    chosen = dataclasses.replace(tried, rate=0.1, validation=(0.8,), test=0.9)
    other = dataclasses.replace(chosen, seed=1, test=0.7)
    (found,) = scores([tried, chosen, other], "t")
    assert found == Score("n", 0.5, 0.1, 7, (0.8, 0.8), (0.9, 0.7))
    assert str(found.mean) == "80.0" and percent(found.test) == "80.0 ± 14.1"
    assert scores([tried], "other") == []
