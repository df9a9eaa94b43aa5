"""One process or many: Lightning Fabric, and the few sums that our loop adds to it."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from convnn_geo.extras import require
from convnn_geo.train.config import Config, ConfigError

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def start(config: Config) -> Fabric:
    """Join the processes that ``torchrun`` started, or run in this one.

    Args:
        config: has the accelerator and the precision.

    Raises:
        ConfigError: no GPU for ``"cuda"``, or float16 on a CPU.
        MissingExtraError: Lightning Fabric is not installed.
    """
    fabric = require("lightning_fabric", extra="train")
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces each process
    there = torch.cuda.is_available()
    if config.accelerator == "cuda" and not there:
        raise ConfigError("accelerator: torch sees no GPU here; take cpu")
    device = "cpu" if config.accelerator == "cpu" or not there else "cuda"
    if device == "cpu" and config.precision == "16-mixed":
        raise ConfigError("precision: 16-mixed needs a GPU; take bf16-mixed or 32-true")
    world = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    started = fabric.Fabric(
        accelerator=device,
        devices=local,
        num_nodes=world // local,
        strategy="ddp" if world > 1 else "auto",
        plugins=_precision(config.precision, device),
    )
    started.launch()
    return started


def total(fabric: Fabric, *values: Tensor) -> Tensor:
    """Each value summed over all processes, ``(len(values),)`` in float64."""
    summed = torch.stack([value.double() for value in values])
    if fabric.world_size > 1:
        torch.distributed.all_reduce(summed)
    return summed


def share_buffers(fabric: Fabric, module: nn.Module) -> None:
    """Give all processes the buffers of the first, such as running means, which may differ."""
    if fabric.world_size > 1:
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, 0)


def _precision(name: str, device: str) -> list[Any]:
    if name == "32-true":
        return []
    amp = require("lightning_fabric.plugins.precision.amp", extra="train")

    class Autocast(amp.MixedPrecision):  # type: ignore[name-defined]
        """Leaves inputs as they are: half as many bits of a position choose wrong neighbours."""

        def convert_input(self, data: Any) -> Any:
            return data

    return [Autocast(name, device)]
