"""What the runs say: a row a setting, and sentences that are made from the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from convnn_geo.experiments.base import Experiment, Published, Setting, place
from convnn_geo.experiments.run import Result
from convnn_geo.viz import mean_deviation


@dataclass(frozen=True)
class Row:
    """The runs of a setting, in percent or in decibels.

    Args:
        setting: what was trained.
        results: one a seed.
    """

    setting: Setting
    results: Sequence[Result]

    @property
    def unit(self) -> str:
        """Of the scores."""
        return "dB" if self.results[0].score == "psnr" else "%"

    @property
    def scores(self) -> list[float]:
        """On the test part."""
        return [self._scale * result.test for result in self.results]

    @property
    def validation(self) -> float:
        """Mean on the validation part: what to choose by."""
        return mean_deviation([self._scale * result.validation for result in self.results])[0]

    @property
    def mean(self) -> float:
        """Of :attr:`scores`, rounded as it is shown, so that sentences add up."""
        return round(mean_deviation(self.scores)[0], 2)

    @property
    def deviation(self) -> float:
        """Sample standard deviation of :attr:`scores`; 0 for a single run."""
        return round(mean_deviation(self.scores)[1], 2)

    @property
    def seconds(self) -> float:
        """Of training, an epoch."""
        return mean_deviation([result.seconds for result in self.results])[0]

    @property
    def shown(self) -> str:
        """Mean and deviation as text."""
        return f"{self.mean:.2f}" + (f" ± {self.deviation:.2f}" if len(self.results) > 1 else "")

    @property
    def where(self) -> str:
        """The setting in a sentence."""
        at = self.setting.at
        return self.setting.series if at is None else f"{place(at)} ({self.shown} {self.unit})"

    @property
    def learned(self) -> dict[str, tuple[float, float]]:
        """Where each layer was when training ended: mean and deviation over seeds, by name."""
        return {
            name: mean_deviation([result.learned[name] for result in self.results])
            for name in self.results[0].learned
        }

    @property
    def _scale(self) -> float:
        return 1.0 if self.results[0].score == "psnr" else 100.0


def series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by their series, in order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.setting.series, []).append(row)
    return found


def best(rows: Sequence[Row]) -> Row:
    """The row of the highest mean test score."""
    return max(rows, key=lambda row: row.mean)


def chosen(rows: Sequence[Row]) -> Row:
    """The row that one would choose without a look at the test part."""
    return max(rows, key=lambda row: row.validation)


def paragraphs(experiment: Experiment, rows: Sequence[Row]) -> list[str]:
    """What was seen, series by series, and what these runs can't tell.

    Args:
        experiment: names the series that are compared.
        rows: of all settings.
    """
    if all(row.setting.config.epochs == 1 for row in rows):
        return ["A single epoch: this shows that it runs. Nothing can be compared."]
    short = [row for row in rows if row.setting.longer_than is None]
    long = [row for row in rows if row.setting.longer_than is not None]
    said = [_budget(short, long), *_seen(series(short), experiment.pairs)]
    if long:
        names = {row.setting.longer_than: row.setting.series for row in long}
        pairs = [
            (names[one], names[other])
            for one, other in experiment.pairs
            if one in names and other in names
        ]
        said += [_longer(short, long), *_seen(series(long), pairs)]
    said += [_ended(row) for row in rows if row.learned]
    if experiment.published is not None:
        said.append(_published(experiment.published))
    return [*said, _caution(rows)]


def _seen(groups: Mapping[str, Sequence[Row]], pairs: Sequence[tuple[str, str]]) -> list[str]:
    """A paragraph a series, and one on pairs of them."""
    said = [" ".join(_along(name, group)) for name, group in groups.items() if len(group) > 1]
    told = [_pair(groups[one], groups[other]) for one, other in pairs]
    if told:
        said.append(
            "Each series taken at the point that the validation part would choose: "
            + " ".join(told)
        )
    return said


def budget(rows: Sequence[Row]) -> str:
    """How long all were trained that were not trained longer, as text."""
    found = {row.setting.config.epochs for row in rows if row.setting.longer_than is None}
    return f"{' or '.join(map(str, sorted(found)))} epochs"


def _budget(short: Sequence[Row], long: Sequence[Row]) -> str:
    """A caution, as no curve here was followed until it was level."""
    said = (
        f"Where nothing else is said, all is after {budget(short)}, which are few: settings are "
        "compared at that budget, and longer training may order them otherwise"
    )
    if not long:
        return f"{said}; none were trained longer here."
    return f"{said}. {len(long)} of {len(short)} settings were trained longer, too."


def _longer(short: Sequence[Row], long: Sequence[Row]) -> str:
    """What more epochs change, and how often by more than the deviations."""
    before = {(row.setting.series, row.setting.at): row for row in short}
    pairs = [(before[str(row.setting.longer_than), row.setting.at], row) for row in long]
    told, changed = [], 0
    for first, then in pairs:
        difference = round(then.mean - first.mean, 2)
        changed += abs(difference) > round(first.deviation + then.deviation, 2)
        verb = "rises" if difference > 0 else "falls"
        by = f"{verb} by {abs(difference):.2f} {points(then)}, to" if difference else "stays at"
        epochs = first.setting.config.epochs, then.setting.config.epochs
        told.append(
            f"{first.setting.label} {by} {then.shown} {then.unit} "
            f"({epochs[1]} epochs in the place of {epochs[0]})"
        )
    said = f"Trained longer: {'; '.join(told)}."
    if len(long[0].results) < 2:
        return said
    if not changed:
        return f"{said} None changes by more than both deviations together."
    verb = "changes" if changed == 1 else "change"
    return (
        f"{said} {changed} of {len(pairs)} {verb} by more than both deviations together: there "
        "the shorter training was too short, and compares how fast settings learn. Whether the "
        "longer is long enough is not known."
    )


def _along(name: str, group: Sequence[Row]) -> list[str]:
    """Where a curve is highest and lowest, and what lies between its ends beside them; of names,
    how the first, which is the plain one, compares to another. What is compared, the validation
    part has chosen: the best of many by the test part would seem better than it is.
    """
    top, bottom = best(group), min(group, key=lambda row: row.mean)
    if top.mean == bottom.mean:
        return [f"{name}: the mean is the same everywhere, {top.mean:.2f} {top.unit}."]
    said = [f"{name}: the mean is highest at {top.where} and lowest at {bottom.where}."]
    if chosen(group) is not top:
        said[0] = f"{said[0][:-1]}; the validation part would choose {chosen(group).where}."
    first, *others = group
    if isinstance(top.setting.at, str):
        return [*said, compare(chosen(others), first)]
    *between, last = others
    if not between:
        return [*said, compare(first, last)]
    inner = chosen(between)
    if inner is not chosen(group):
        said.append(f"Between its ends the validation part would choose {inner.where}.")
    return [*said, compare(inner, first), compare(inner, last)]


def _pair(one: Sequence[Row], other: Sequence[Row]) -> str:
    """Two series, each at the point that the validation part chooses, and how many of the other's
    settings the first is above.
    """
    said = compare(chosen(one), chosen(other))
    if len(other) < 2:
        return said
    below = sum(row.mean < chosen(one).mean for row in other)
    return f"{said} It is above {below} of the {len(other)} settings of {other[0].setting.series}."


def compare(first: Row, second: Row) -> str:
    """Which of two has the higher mean, and whether by more than both deviations together."""
    ahead, behind = (first, second) if first.mean >= second.mean else (second, first)
    difference = round(ahead.mean - behind.mean, 2)
    names = f"{ahead.setting.label}", f"{behind.setting.label}"
    if difference == 0:
        return f"{names[0]} and {names[1]} have the same mean, {ahead.mean:.2f} {ahead.unit}."
    lead = f"{names[0]} is {difference:.2f} {points(ahead)} above {names[1]}"
    if len(ahead.results) < 2:
        return f"{lead}, by a single run of each."
    spread = round(ahead.deviation + behind.deviation, 2)
    if difference > spread:
        return f"{lead}, more than both deviations together ({spread:.2f})."
    return f"{lead}, within both deviations together ({spread:.2f}): these runs do not tell."


def points(row: Row) -> str:
    """The unit of a difference."""
    return "dB" if row.unit == "dB" else "points"


def _ended(row: Row) -> str:
    """Where λ was at the end, which need not be where it would come to rest."""
    layers = [f"{mean:.2f} ± {deviation:.2f}" for mean, deviation in row.learned.values()]
    means = [mean for mean, _ in row.learned.values()]
    if len(row.results) < 2:
        layers = [f"{mean:.2f}" for mean in means]
    said = (
        f"{row.setting.label}: when training ended, after {row.setting.config.epochs} epochs, λ "
        f"was at {', '.join(layers)}, first to last"
    )
    if not isinstance(row.setting.at, float):
        return f"{said}."
    moved = sum(abs(mean - row.setting.at) for mean in means) / len(means)
    return f"{said}, {moved:.2f} from where it began on average."


def _published(published: Published) -> str:
    """Where the published curves are highest, and the baselines."""
    tops = {
        name: max(curve, key=lambda point: point[1]) for name, curve in published.curves.items()
    }
    told = ", ".join(
        f"{name} at {place(at)} ({value:g})" for name, (at, value) in tops.items() if at is not None
    )
    baselines = ", ".join(f"{name} {value:g}" for name, (at, value) in tops.items() if at is None)
    return f"The published numbers are highest for {told}{f'; {baselines}' if baselines else ''}."


def _caution(rows: Sequence[Row]) -> str:
    result, seeds = rows[0].results[0], len(rows[0].results)
    spread = (
        f"What follows ± is the sample standard deviation over {seeds} seeds, of weights and of "
        "the order of examples, on one split"
        if seeds > 1
        else "With a single seed there is no deviation to judge differences by"
    )
    if result.score == "psnr":
        return f"{spread}; {result.test_size} test images."
    sizes = sorted({row.results[0].test_size for row in rows})
    told = ", ".join(
        f"of {size} test examples, one is {100 / size:.2f} percentage points" for size in sizes
    )
    return f"{spread}; {told}."
