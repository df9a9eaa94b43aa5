"""From a configuration to its data and its model."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from convnn_geo.datasets import Task, load
from convnn_geo.models import create_model
from convnn_geo.models.registry import SHARED, check_options
from convnn_geo.train.checkpoint import WEIGHTS, CheckpointError, load_tensors, save_tensors
from convnn_geo.train.config import Config, ConfigError
from convnn_geo.train.order import seed_model, smallest_piece

_SAID = {
    "name": "say model (--model)",
    "layer": "say layer (--layer)",
    "image_size": "say image_size (--image-size)",
}
_DATA = "it follows from the data"
_SMALL = 32  # the least that networks which halve an image five times make something of


def check_names(config: Config) -> None:
    """Raise ``ConfigError`` for a layer, or for options, that the model does not know by name.

    This needs neither data nor a model, and so comes before all that does.
    """
    options = _options(config)
    try:
        check_options(config.model, config.layer, options)
    except ValueError as error:
        raise ConfigError(f"model {config.model}: {error}") from error


def _options(config: Config) -> dict[str, Any]:
    """Of the model and its layer; an error where other keys, or the data, have a say."""
    options = {**config.model_options, **config.layer_options}
    for name in options:
        if name in ("name", "layer", *SHARED):
            raise ConfigError(
                f"option {name!r} is not the model's to set: {_SAID.get(name, _DATA)}"
            )
    return options


def load_task(config: Config) -> Task:
    """The data, refused where the configuration asks of it what it can't give.

    Args:
        config: names the data.

    Raises:
        ConfigError: an option that the data don't take or that makes no sense for them.
        FileNotFoundError: the data are not there.
    """
    task = _load(config, config.image_size)
    size = task.image_size
    if task.kind == "classification" and config.image_size is None and size and size < _SMALL:
        task = _load(config, _SMALL)
    if task.kind == "denoising" and config.label_smoothing:
        raise ConfigError("label_smoothing: denoising has no labels; set it to 0")
    if task.kind != "classification" and config.mixup:
        raise ConfigError(f"mixup: mixes images with classes, not {task.kind}; set it to 0")
    if task.image_size is None and config.channels_last:
        raise ConfigError("channels_last: points have no channels to lay out; leave it out")
    return task


def new_model(
    config: Config,
    task: Task,
    seed: int,
    pieces: tuple[int, int] = (1, 1),
    change: Callable[[nn.Module], object] | None = None,
) -> tuple[dict[str, Any], nn.Module]:
    """The model with new weights by the seed, and the arguments that :func:`build` it.

    Args:
        config: names the model.
        task: that it must fit.
        seed: of the weights.
        pieces: processes that share a batch, and pieces that each cuts its share into.
        change: is given the model before it is tried.

    Raises:
        ConfigError: it does not fit the task, or a piece is too small for batch normalisation.
    """
    seed_model(seed)
    arguments = model_arguments(config, task)
    module = build(arguments)
    if change is not None:
        change(module)
    freeze_unused(module, check_fits(task, module, config.precision))
    check_norms(task, module, smallest_piece(len(task.train), config.batch_size, pieces))
    return arguments, module


def model_arguments(config: Config, task: Task) -> dict[str, Any]:
    """What :func:`build` takes: the configuration's model, sized for the task."""
    arguments: dict[str, Any] = {"name": config.model, "layer": config.layer}
    if task.num_classes is not None:
        arguments["num_classes"] = task.num_classes
    arguments["in_channels"] = task.in_channels
    if task.image_size is not None:
        arguments["image_size"] = task.image_size
    return {**arguments, **_options(config)}


def build(arguments: dict[str, Any]) -> nn.Module:
    """A model with new weights.

    Args:
        arguments: of :func:`convnn_geo.models.create_model`.

    Raises:
        ConfigError: the model does not take them.
    """
    try:
        return create_model(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model {arguments['name']}: {error}") from error


def check_fits(task: Task, module: nn.Module, precision: str = "32-true") -> Tensor:
    """Raise ``ConfigError`` unless the model takes the task's inputs and gives what is scored.

    Args:
        task: the data, two examples of which are tried.
        module: on the CPU.
        precision: that the model will train in; bfloat16 stands for any half precision.

    Returns:
        What the model gives, with its graph.
    """
    inputs, target = task.collate([task.train[number] for number in range(min(2, len(task.train)))])
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
            output = module.eval()(*inputs)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ConfigError(f"the model can't take {task.name}, {task.kind}: {error}") from error
    wanted = target.shape if task.num_classes is None else (len(target), task.num_classes)
    if output.shape != wanted:
        raise ConfigError(
            f"{task.name}, {task.kind}, needs outputs of shape {tuple(wanted)}; the model gives "
            f"{tuple(output.shape)}: choose another model or other data"
        )
    return output


def freeze_unused(module: nn.Module, output: Tensor) -> None:
    """Take parameters that get no gradient out of training, with a warning.

    They would not learn anyway, and processes that train together would wait for their gradients.

    Args:
        module: the model.
        output: of its forward.
    """
    learning = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not output.requires_grad or not learning:
        return
    found = torch.autograd.grad(output.float().sum(), [*learning.values()], allow_unused=True)
    unused = [name for name, grad in zip(learning, found, strict=True) if grad is None]
    for name in unused:
        learning[name].requires_grad_(False)
    if unused:
        warnings.warn(
            f"{', '.join(unused)}: no gradient comes here, so that nothing is learned: kept as "
            "first set. A learnable lam needs weights of distances: pass weighting='softmax', say",
            UserWarning,
            stacklevel=2,
        )


@torch.no_grad()
def check_norms(task: Task, module: nn.Module, examples: int) -> None:
    """Raise ``ConfigError`` where batch normalisation would get a single value of each channel.

    Args:
        task: the data, whose first example is tried.
        module: on the CPU.
        examples: in the smallest piece that a process trains on.
    """
    if examples > 1:
        return
    inputs, _ = task.collate([task.train[0]])
    single: list[str] = []

    def look(name: str, x: Tensor) -> None:
        if x.numel() == x.shape[1]:
            single.append(name)

    with contextlib.ExitStack() as hooks:
        for name, part in module.named_modules():
            if isinstance(part, _BatchNorm):
                hook = part.register_forward_pre_hook(lambda _, x, name=name: look(name, x[0]))
                hooks.callback(hook.remove)
        module.eval()(*inputs)
    if single:
        raise ConfigError(
            "expected two values of a channel at least for batch normalisation, got one in "
            f"{single[0]} of the model, where an example is one pixel and the smallest piece of a "
            "batch is one example; raise batch_size or image_size, or lower accumulate"
        )


def save_model(path: Path, arguments: dict[str, Any], module: nn.Module) -> None:
    """Write what :func:`load_model` reads: weights, and how to build what they belong to."""
    save_tensors(path, {"model": arguments, "weights": module.state_dict()})


def load_model(path: str | Path) -> nn.Module:
    """A trained model in eval mode, on the CPU: what a run wrote, built anew with its weights.

    Args:
        path: of ``weights.pt`` in a run's folder, ``runs/example/seed-0/weights.pt`` say.

    Raises:
        CheckpointError: there is no such file, or it is corrupt, or another file of a run.

    Example:
        >>> import tempfile
        >>> from convnn_geo.train import Config, load_model, train
        >>> folder = tempfile.mkdtemp()
        >>> small = {"image_size": 8, "model_options": {"width": 0.125}}
        >>> summary = train(Config("all_conv_net", **small, epochs=1, out=folder))
        >>> model = load_model(f"{folder}/seed-0/weights.pt")
        >>> model(torch.zeros(1, 1, 8, 8)).shape, model.training
        (torch.Size([1, 10]), False)
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"expected the weights of a run in {path}, but there is no such file; a run writes "
            f"{WEIGHTS} in its folder when it is done: finish it with resume"
        )
    state = load_tensors(path)
    if not {"model", "weights"} <= state.keys():
        raise CheckpointError(
            f"expected a model and its weights in {path}, got {', '.join(map(str, state))}; "
            f"choose {WEIGHTS} of a run's folder"
        )
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        module = build(state["model"])
    module.load_state_dict(state["weights"])
    return module.eval()


def _load(config: Config, image_size: int | None) -> Task:
    for name, flag in (("seed", "data_seed"), ("root", "data_root"), ("image_size", "image_size")):
        if name in config.data_options:
            raise ConfigError(f"data option {name!r}: say {flag} instead")
    try:
        return load(
            config.data,
            root=config.data_folder,
            seed=config.data_seed,
            image_size=image_size,
            download=config.download,
            **config.data_options,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"data {config.data}: {error}") from error
