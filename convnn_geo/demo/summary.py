"""What the runs say, in numbers and in sentences that are made from the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

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
    def mean(self) -> Decimal:
        """Mean test accuracy in percent, as the tables show it."""
        return _shown(self.test)[0]

    @property
    def deviation(self) -> Decimal:
        """Sample standard deviation of test accuracy over seeds, as the tables show it."""
        return _shown(self.test)[1]


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


def _shown(values: Sequence[float]) -> tuple[Decimal, Decimal]:
    """Mean and deviation in percent, rounded once: sentences then say what the tables add up to."""
    mean, deviation = mean_deviation([100 * value for value in values])
    return Decimal(f"{mean:.1f}"), Decimal(f"{deviation:.1f}")


def percent(values: Sequence[float]) -> str:
    """Mean and sample standard deviation in percent.

    Example:
        >>> percent([0.9, 0.92])
        '91.0 ± 1.4'
    """
    mean, deviation = _shown(values)
    return f"{mean} ± {deviation}" if len(values) > 1 else f"{mean}"


def sentences(scored: Sequence[Score], test_size: int) -> list[str]:
    """What these scores do and do not show.

    Args:
        scored: of one task: networks along the spectrum, and others.
        test_size: examples that each accuracy was measured on.
    """
    along = [score for score in scored if score.lam is not None]
    others = [score for score in scored if score.lam is None]
    seeds = len(along[0].test)
    said = [_extremes(along)]
    if seeds > 1:
        said += [compare(first, second) for first, second in _pairs(along, others)]
        said.append(f"What follows ± is the sample standard deviation over {seeds} seeds.")
    else:
        said.append("With a single seed there is no deviation to judge differences by.")
    said.append(
        f"Each accuracy is measured on {test_size} examples of one split, so one example is "
        f"{100 / test_size:.2f} percentage points."
    )
    return said


def _extremes(along: Sequence[Score]) -> str:
    """Where on the spectrum the mean is highest and lowest; there may be several such places."""

    def where(mean: Decimal) -> str:
        at = [score for score in along if score.mean == mean]
        return " and ".join(f"λ = {score.lam:g} ({percent(score.test)} %)" for score in at)

    best, worst = (choose(score.mean for score in along) for choose in (max, min))
    if best == worst:
        return f"The mean test accuracy is the same all along the spectrum: {best} %."
    return (
        f"Along the spectrum the mean test accuracy is highest at {where(best)} and lowest at "
        f"{where(worst)}."
    )


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
    """Which of two did better, or that the runs do not tell.

    Example:
        >>> one = Score("one", 0.0, 0.01, 10, (), (0.90, 0.92))
        >>> compare(one, Score("other", 1.0, 0.01, 10, (), (0.80, 0.84)))
        'one is 9.0 percentage points ahead of other, more than both deviations together (4.2).'
    """
    if first.mean == second.mean:
        return (
            f"{first.network} and {second.network} have the same mean, {first.mean} %: these runs "
            "do not tell which is better."
        )
    ahead, behind = (first, second) if first.mean > second.mean else (second, first)
    difference, spread = ahead.mean - behind.mean, ahead.deviation + behind.deviation
    leads = f"{ahead.network} is {difference} percentage points ahead of {behind.network}"
    if difference > spread:
        return f"{leads}, more than both deviations together ({spread})."
    return (
        f"{leads}, no more than both deviations together ({spread}): these runs do not tell which "
        "is better."
    )
