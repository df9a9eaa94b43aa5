"""The paper's questions, asked of models small enough for two CPU cores, and honestly scored.

An experiment is a file that names its grid; the rest is shared: every finished run is kept, so that
a second call goes on; the result is a table with mean and deviation over seeds, a picture beside
the published curve, and paragraphs made from the numbers.

    python -m convnn_geo experiment branching_ratio --quick

Example:
    >>> from convnn_geo.experiments import EXPERIMENTS
    >>> EXPERIMENTS["branching_ratio"].axis
    'share of ConvNN channels'
"""

from convnn_geo.experiments import (
    attention_variants,
    branching_ratio,
    candidate_sweep,
    denoising,
    k_sweep,
    lambda_sweep,
    learned_lambda,
    point_spectrum,
)
from convnn_geo.experiments.base import Experiment, Published, Setting
from convnn_geo.experiments.report import write_report
from convnn_geo.experiments.run import Result, run, train_setting
from convnn_geo.experiments.summary import Row, paragraphs

EXPERIMENTS = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (
        branching_ratio,
        k_sweep,
        candidate_sweep,
        lambda_sweep,
        learned_lambda,
        attention_variants,
        denoising,
        point_spectrum,
    )
}
"""By name."""

__all__ = [
    "EXPERIMENTS",
    "Experiment",
    "Published",
    "Result",
    "Row",
    "Setting",
    "run",
    "paragraphs",
    "train_setting",
    "write_report",
]
