"""The demonstration from beginning to end."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from convnn_geo import datasets, verify, viz
from convnn_geo.bench.machine import versions
from convnn_geo.checks import check_int
from convnn_geo.console import Tick, print_table, progress
from convnn_geo.demo import neighbors
from convnn_geo.demo.errors import print_errors
from convnn_geo.demo.experiments import Experiment, experiments
from convnn_geo.demo.record import PACKAGES, cores, machine, write_metrics
from convnn_geo.demo.report import COLUMNS, Picture, Section, score_cells, write_report
from convnn_geo.demo.summary import scores, sentences
from convnn_geo.demo.training import Job, Run
from convnn_geo.extras import require
from convnn_geo.workers import run_jobs

EXTRAS = ("sklearn", "skimage", "matplotlib", "rich")
LAMS = neighbors.spectrum(5)
QUICK_RECIPES = ("conv2d", "conv2d_by_position", "multihead_attention", "kvt")


@dataclass(frozen=True)
class Demonstration:
    """What a demonstration left.

    Args:
        report: the page to open.
        passed: whether every recipe was within its bound.
    """

    report: Path
    passed: bool


def run(
    out: str | Path = "runs/demo", seeds: int = 3, quick: bool = False, workers: int | None = None
) -> Demonstration:
    """Verify, draw neighbours, train along the spectrum, and write a report.

    Args:
        out: folder for the results; files of an earlier demonstration are replaced.
        seeds: runs of each network.
        quick: few recipes, one seed and little data: to see that it works.
        workers: networks that train at a time; one a core by default, up to four.

    Raises:
        MissingExtraError: an extra is not installed.
        OSError: the folder can't be written.
    """
    for module in EXTRAS:
        require(module, extra="data,viz")
    check_int("seeds", seeds)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if workers is None:
        workers = 1 if quick else min(4, cores())
    seconds: dict[str, float] = {}

    with _stage("verify", seconds) as tick:
        rows = verify.run(QUICK_RECIPES if quick else None, tick)
    print_errors(rows)
    with _stage("neighbours", seconds):
        sections = [_draw_neighbors(out)]
    trained = experiments(LAMS, 1 if quick else seeds, quick)
    with _stage("train", seconds) as tick:
        runs = _train(trained, check_int("workers", workers), tick)
    sections += [_report(experiment, runs, out) for experiment in trained]

    write_metrics(runs, out / "metrics.csv")
    config = _config(seeds, quick, workers, seconds)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_report(out / "report.html", rows, sections, _facts(config))
    return Demonstration(out / "report.html", all(row.passed for row in rows))


@contextmanager
def _stage(name: str, seconds: dict[str, float]) -> Iterator[Tick]:
    """A progress bar, and the time that the stage took."""
    start = time.perf_counter()
    with progress(name) as tick:
        yield tick
    seconds[name] = round(time.perf_counter() - start, 1)


def _draw_neighbors(out: Path) -> Section:
    photo = datasets.photograph(neighbors.PHOTOGRAPH)
    image = datasets.photograph(neighbors.PHOTOGRAPH, neighbors.WIDTH)
    pixels = [neighbors.shrink(pixel, photo, image) for pixel in neighbors.PIXELS.values()]
    hoods = neighbors.along_spectrum(image, pixels, neighbors.NEIGHBORS, LAMS)
    figure = viz.draw_neighbors(
        image,
        pixels,
        hoods,
        [neighbors.panel_title(lam) for lam in LAMS],
        names=list(neighbors.PIXELS),
        backdrop=photo,
    )
    figure.savefig(out / "neighbors.png")
    what = (
        f"The {neighbors.NEIGHBORS} nearest pixels of three pixels of a photograph, by "
        "(1 − λ) · squared distance of positions + λ · squared distance of features. A pixel's "
        "feature is the 5 × 5 patch around it; both parts are scaled to the same variance. "
        "At λ = 0 the neighbourhood is the window of a convolution, round here; at λ = 1 it is "
        "wherever the photograph looks alike."
    )
    caption = (
        f"Each star is a pixel, the squares of its colour are its {neighbors.NEIGHBORS} "
        f"neighbours, searched on a copy {neighbors.WIDTH} pixels wide. {neighbors.TIES}"
    )
    medians = ", ".join(
        f"{neighbors.median_distance(hood, pixels, image.shape[2]):.1f} at λ = {lam:g}"
        for lam, hood in zip(LAMS, hoods, strict=True)
    )
    said = f"Median distance from a pixel to its neighbours, in pixels of the copy: {medians}."
    return Section("Who is a neighbour?", what, [Picture("neighbors.png", caption)], said=[said])


def _train(trained: Sequence[Experiment], workers: int, tick: Tick) -> list[Run]:
    jobs = [
        Job(experiment.name, experiment.load, network, experiment.settings)
        for experiment in trained
        for network in experiment.networks
    ]
    tick("", 0, len(jobs))
    runs: dict[int, list[Run]] = {}
    for number, found in run_jobs(dict(enumerate(jobs)), workers):
        runs[number] = found
        tick(jobs[number].network.name, len(runs), len(jobs))
    return [run for number in range(len(jobs)) for run in runs[number]]


def _report(experiment: Experiment, runs: Sequence[Run], out: Path) -> Section:
    """Print the accuracies, draw them, and say what they show."""
    scored = scores(runs, experiment.name)
    print_table(experiment.title, COLUMNS, [score_cells(score) for score in scored])
    along = [score for score in scored if score.lam is not None]
    figure = viz.plot_spectrum(
        [score.lam for score in along if score.lam is not None],
        [score.test for score in along],
        {score.network: score.test for score in scored if score.lam is None},
        experiment.title,
    )
    picture = f"{experiment.name}.png"
    figure.savefig(out / picture)
    pictures = [
        Picture(
            picture,
            f"{experiment.title}: test accuracy along the spectrum, from neighbours by position on "
            "the left to neighbours by feature on the right; networks without a λ as lines across.",
        )
    ]
    splits = experiment.load()
    if isinstance(splits, datasets.CloudSplits):
        examples = [splits.train[number] for number in range(5)]
        drawn = viz.draw_clouds(
            [example.pos for example in examples],
            [f"digit {int(example.y)}" for example in examples],
            ("row", "column", "height (4 × ink)"),
        )
        drawn.savefig(out / "clouds_examples.png")
        caption = (
            "The first five digits of the training part as point clouds, seen from above: the more "
            "ink, the higher a point, and the darker and larger it is drawn."
        )
        pictures.insert(0, Picture("clouds_examples.png", caption))
    said = sentences(scored, len(splits.test))
    print("\n".join(said) + "\n")
    return Section(experiment.title, experiment.what, pictures, scored, said)


def _config(seeds: int, quick: bool, workers: int, seconds: dict[str, float]) -> dict[str, Any]:
    count = 1 if quick else seeds
    return {
        "seeds": list(range(count)),
        "quick": quick,
        "lams": LAMS,
        "photograph": {
            "name": neighbors.PHOTOGRAPH,
            "width": neighbors.WIDTH,
            "pixels": list(neighbors.PIXELS.values()),
            "k": neighbors.NEIGHBORS,
        },
        "training": {
            experiment.name: dataclasses.asdict(experiment.settings)
            for experiment in experiments(LAMS, count, quick)
        },
        "versions": versions(PACKAGES),
        "machine": machine(),
        "finished": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        "workers": workers,
        "seconds": seconds,
    }


def _facts(config: dict[str, Any]) -> dict[str, str]:
    machine, seconds, workers = config["machine"], config["seconds"], config["workers"]
    option = "--quick" if config["quick"] else f"--seeds {len(config['seeds'])}"
    at_a_time = "one network at a time" if workers == 1 else f"{workers} networks at a time"
    return {
        "Command": f"python -m convnn_geo demo {option}",
        "Finished": config["finished"],
        "Machine": f"{machine['processor']}, {_count(machine['cores'], 'core')}, "
        f"{machine['system']}; no GPU is used; {at_a_time}, one thread each",
        "Versions": ", ".join(f"{name} {version}" for name, version in config["versions"].items()),
        "Seeds": ", ".join(map(str, config["seeds"])),
        "Time": f"{sum(seconds.values()):.0f} s: "
        + ", ".join(f"{name} {value} s" for name, value in seconds.items()),
    }


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
