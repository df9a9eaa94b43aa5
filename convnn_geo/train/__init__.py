"""Training by one loop, the same on a CPU, a GPU, or many nodes of them, and honest about scores.

The loop is ours, on Lightning Fabric, which brings what is easy to get wrong and no more: devices,
processes, mixed precision, and when gradients are exchanged. A trainer that owned the loop would
hide what a step averages over and when the test part is read; accelerate does the same for the
loop as Fabric, but configures itself by a file beside the command. So

    python -m convnn_geo train ...
    torchrun --nproc-per-node 8 --nnodes 4 ... -m convnn_geo train ...

are one command. ``batch_size`` counts examples of a step over all processes, and a step takes the
mean over them, so the number of processes does not change what is learned. Batch normalisation is
the exception: a process normalises by its own examples, each piece of ``accumulate`` by itself.
Batches differ by one example at most, so that none is left over; where a piece would still give it
a single value of a channel (one example, one pixel), ``ConfigError`` says so before training.

Seeds are set before a model is built; choices are made on the validation part; the test part is
read once, after the last epoch; means are over examples; a result is a mean and a deviation over
seeds. What an epoch draws depends on (seed, epoch, rank) alone, so that a checkpoint, one an epoch,
is enough to continue bit for bit.

Example:
    >>> import tempfile
    >>> from convnn_geo.train import Config, train
    >>> config = Config("all_conv_net", image_size=8, epochs=1, out=tempfile.mkdtemp())
    >>> train(config).score
    'accuracy'
"""

from convnn_geo.train.checkpoint import CheckpointError
from convnn_geo.train.config import Config, ConfigError
from convnn_geo.train.loop import fit
from convnn_geo.train.plots import plot_curves
from convnn_geo.train.record import Run
from convnn_geo.train.seeds import Summary, train
from convnn_geo.train.setup import load_model
from convnn_geo.train.training import DivergedError
from convnn_geo.train.watch import Terminal, Watch

__all__ = [
    "Config",
    "ConfigError",
    "train",
    "fit",
    "Run",
    "Summary",
    "load_model",
    "CheckpointError",
    "DivergedError",
    "Terminal",
    "Watch",
    "plot_curves",
]
