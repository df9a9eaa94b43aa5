"""What the runs say, in numbers and in sentences that are made from the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from convnn_geo.demo.training import Run
from convnn_geo.viz import mean_deviation


@dataclass(frozen=True)
class Score:
    """The runs of one network together.

    Args:
        network: its name.
        lam: its place on the spectrum.
        rate: learning rate that was chosen.
        parameters: numbers that were learned.
        validation: accuracies on the validation part after the last epoch, one a seed.
        test: accuracies on the test part, one a seed.
    """

    network: str
    lam: float | None
    rate: float
    parameters: int
    validation: tuple[float, ...]
    test: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean test accuracy."""
        return mean_deviation(self.test)[0]

    @property
    def deviation(self) -> float:
        """Sample standard deviation of test accuracy over seeds."""
        return mean_deviation(self.test)[1]


def scores(runs: Sequence[Run], task: str) -> list[Score]:
    """One score a network of a task, in the order of the runs; rates not chosen are left out."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.task == task and run.test is not None:
            groups.setdefault(run.network, []).append(run)
    return [
        Score(
            name,
            group[0].lam,
            group[0].rate,
            group[0].parameters,
            tuple(run.validation[-1] for run in group),
            tuple(run.test for run in group if run.test is not None),
        )
        for name, group in groups.items()
    ]


def percent(values: Sequence[float]) -> str:
    """Mean and deviation in percent.

    Example:
        >>> percent([0.9, 0.92])
        '91.0 ± 1.4'
    """
    mean, deviation = mean_deviation([100 * value for value in values])
    return f"{mean:.1f} ± {deviation:.1f}" if len(values) > 1 else f"{mean:.1f}"


def sentences(scored: Sequence[Score], test_size: int) -> list[str]:
    """What these scores do and do not show.

    Args:
        scored: of one task: networks along the spectrum, and others.
        test_size: examples that each accuracy was measured on.
    """
    along = [score for score in scored if score.lam is not None]
    others = [score for score in scored if score.lam is None]
    best = max(along, key=lambda score: score.mean)
    worst = min(along, key=lambda score: score.mean)
    said = [
        f"Along the spectrum the mean test accuracy is highest at λ = {best.lam:g} "
        f"({percent(best.test)} %) and lowest at λ = {worst.lam:g} ({percent(worst.test)} %)."
    ]
    if len(best.test) > 1:
        said += [compare(first, second) for first, second in _pairs(along, others)]
    else:
        said.append("With a single seed there is no deviation to judge differences by.")
    said.append(
        f"Each accuracy is measured on {test_size} examples of one split, so one example is "
        f"{100 / test_size:.2f} points."
    )
    return said


def _pairs(along: Sequence[Score], others: Sequence[Score]) -> list[tuple[Score, Score]]:
    """Who is compared: position with the plain networks and with feature, the best of what lies
    between with the better end.
    """
    position, *inner, feature = along
    pairs = [(position, other) for other in (*others, feature)]
    if inner:
        between = max(inner, key=lambda score: score.mean)
        pairs.append((between, max(position, feature, key=lambda score: score.mean)))
    return pairs


def compare(first: Score, second: Score) -> str:
    """Which of two did better, or that the runs do not tell."""
    difference = 100 * (first.mean - second.mean)
    spread = 100 * (first.deviation + second.deviation)
    if abs(difference) > spread:
        ahead, behind = (first, second) if difference > 0 else (second, first)
        return (
            f"{ahead.network} is {abs(difference):.1f} points ahead of {behind.network}, more than "
            f"both deviations together ({spread:.1f})."
        )
    return (
        f"{first.network} and {second.network} differ by {abs(difference):.1f} points, no more "
        f"than both deviations together ({spread:.1f}): these runs do not tell them apart."
    )
