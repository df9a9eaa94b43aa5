"""Everything that a training run depends on, checked before any work."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convnn_geo.checks import check_int, check_name, check_number
from convnn_geo.datasets import data_names
from convnn_geo.extras import require
from convnn_geo.models import list_models

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("constant", "cosine", "step")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
ACCELERATORS = ("auto", "cpu", "cuda")
OPTIONS = ("layer_options", "model_options", "data_options")
#: Fields that have an effect at one value of another field alone.
ONLY_WITH = {
    "momentum": ("optimizer", "sgd"),
    "step_epochs": ("schedule", "step"),
    "step_factor": ("schedule", "step"),
}
#: Options that may stand among the fields, as they have a flag of their own, and whose they are.
SHORT = {
    **dict.fromkeys(("ratio", "metric", "k", "lam"), "layer_options"),
    "drop_path": "model_options",
}
#: What others call a field.
_KNOWN_AS = {
    **{"lr": "learning_rate", "wd": "weight_decay", "opt": "optimizer", "sched": "schedule"},
    **{"dataset": "data", "data_dir": "data_root", "amp": "precision", "clip_grad": "clip_norm"},
}
#: What a continued run may change: numbers don't depend on it, or not by intent.
FREE = ("accelerator", "data_root", "download", "out", "seeds", "tensorboard", "workers")


class ConfigError(ValueError):
    """A configuration can't be used; the message says what to change."""


def _field(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


def _options(text: str) -> Any:
    return dataclasses.field(default_factory=dict, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """A training run in one value. The command line has a flag for each field.

    Args:
        model: one of :func:`convnn_geo.models.list_models`.
        layer: that replaces the model's own; None keeps it.
        data: one of :func:`convnn_geo.datasets.data_names`.
        layer_options: of ``create_model``, for the layer: k, metric, ratio, lam and others.
        model_options: of ``create_model``, for the model: depth, width, drop_path and others.
        data_options: of ``load``.
        image_size: in pixels; None for the data's own, or 32 where small images are classified.
        data_root: folder of data that don't ship with packages.
        data_seed: of the split into train, validation and test.
        download: whether to download what is not there.
        epochs: passes over the training part.
        batch_size: examples of an optimizer step, over all processes and pieces, at most.
        accumulate: pieces that each process cuts its share of a batch into, to save memory.
        optimizer: ``"adamw"`` or ``"sgd"``.
        learning_rate: at its highest.
        weight_decay: of weights with two axes or more; biases and scalars don't decay.
        momentum: of ``"sgd"``.
        schedule: ``"constant"``, ``"cosine"`` or ``"step"``, see :mod:`convnn_geo.train.schedule`.
        warmup_epochs: over which the learning rate grows linearly; ``epochs`` at most.
        step_epochs: of ``"step"``, between drops of the learning rate; fewer than ``epochs``. None
            for a third of them.
        step_factor: of ``"step"``, what each drop multiplies by.
        clip_norm: gradients are scaled down to this norm; None leaves them.
        label_smoothing: share of the target spread over all classes.
        mixup: both parameters of the Beta distribution of mixing shares; 0 mixes nothing.
        ema: decay of an exponential moving average of the weights, which is then what is scored
            and saved; None for none.
        precision: ``"32-true"``, ``"bf16-mixed"`` or ``"16-mixed"``; inputs and losses are float32.
        channels_last: keep images and their weights with channels last in memory.
        compile: train by ``torch.compile``.
        accelerator: ``"auto"``, ``"cpu"`` or ``"cuda"``; a process takes one GPU.
        workers: processes that load data, of each process that trains.
        seeds: runs, with seeds 0, 1, ...
        tensorboard: whether to write TensorBoard's files, too; None for where it is installed.
        out: folder for what is written; empty for runs/train/MODEL-LAYER-DATA.

    Raises:
        ConfigError: a value that can't be, or that would have no effect.

    Example:
        >>> config = Config(model="vgg11", layer="branching", layer_options={"k": 9}, epochs=2)
        >>> config.folder.name
        'vgg11-branching-digits'
    """

    model: str = _field("vgg11", "see convnn_geo.models.list_models()")
    layer: str | None = _field(None, "replaces the model's own; none by default")
    data: str = _field("digits", "see convnn_geo.datasets.data_names()")
    layer_options: Mapping[str, Any] = _options("of the layer")
    model_options: Mapping[str, Any] = _options("of the model")
    data_options: Mapping[str, Any] = _options("of the data set")
    image_size: int | None = _field(None, "pixels; the data's own, at least 32 for classification")
    data_root: str = _field("data", "folder of data that don't ship with packages")
    data_seed: int = _field(0, "of the split into train, validation and test")
    download: bool = _field(False, "download data that are not there")
    epochs: int = _field(30, "passes over the training part")
    batch_size: int = _field(64, "examples of an optimizer step, over all processes")
    accumulate: int = _field(1, "pieces that a process cuts its share of a batch into")
    optimizer: str = _field("adamw", " or ".join(OPTIMIZERS))
    learning_rate: float = _field(1e-3, "at its highest")
    weight_decay: float = _field(0.01, "of weights with two axes or more")
    momentum: float = _field(0.9, "of SGD")
    schedule: str = _field("cosine", ", ".join(SCHEDULES))
    warmup_epochs: float = _field(0.0, "of linear growth of the learning rate")
    step_epochs: float | None = _field(None, "between drops of step; a third of epochs by default")
    step_factor: float = _field(0.1, "that a drop multiplies by")
    clip_norm: float | None = _field(None, "norm that gradients are scaled down to")
    label_smoothing: float = _field(0.0, "share of the target spread over all classes")
    mixup: float = _field(0.0, "strength: parameter of the Beta distribution")
    ema: float | None = _field(None, "decay of averaged weights, e.g. 0.999")
    precision: str = _field("32-true", ", ".join(PRECISIONS))
    channels_last: bool = _field(False, "channels last in memory")
    compile: bool = _field(False, "train by torch.compile")
    accelerator: str = _field("auto", ", ".join(ACCELERATORS))
    workers: int = _field(0, "processes that load data")
    seeds: int = _field(1, "runs, with seeds 0, 1, ...")
    tensorboard: bool | None = _field(None, "write TensorBoard's files; if installed by default")
    out: str = _field("", "folder to write to; runs/train/MODEL-LAYER-DATA")

    def __post_init__(self) -> None:
        try:
            _check(self)
        except (TypeError, ValueError) as error:
            raise ConfigError(str(error)) from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """A configuration from a mapping, as a file holds it.

        Args:
            values: fields by name; those left out keep their defaults. ``ratio``, ``metric``, ``k``
                and ``lam`` are the layer's options, ``drop_path`` is the model's.

        Raises:
            ConfigError: an unknown key, or a value that can't be.

        Example:
            >>> Config.from_dict({"epoch": 3})
            Traceback (most recent call last):
                ...
            convnn_geo.train.config.ConfigError: unknown key 'epoch'; did you mean 'epochs'?
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"expected a mapping of keys to values, got {values!r}")
        values = unfold(values)
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, 1)
                close = [_KNOWN_AS[key]] if key in _KNOWN_AS else close
                hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
                raise ConfigError(f"unknown key {key!r}; {hint}")
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Config:
        """A configuration from a file of YAML, or of JSON such as ``config.json`` of a run.

        Args:
            path: of the file.

        Raises:
            ConfigError: the file is no YAML, or :meth:`from_dict` refuses what it holds.
            FileNotFoundError: there is no such file.
        """
        return cls.from_dict(read_yaml(path))

    def to_dict(self) -> dict[str, Any]:
        """The fields, such as :meth:`from_dict` takes them."""
        return dataclasses.asdict(self)

    @property
    def folder(self) -> Path:
        """Where files are written; a ``~`` of ``out`` is the user's home."""
        name = "-".join(part for part in (self.model, self.layer, self.data) if part)
        return _expanded(self.out) if self.out else Path("runs", "train", name)

    @property
    def data_folder(self) -> Path:
        """Where data are looked for; a ``~`` of ``data_root`` is the user's home."""
        return _expanded(self.data_root)

    def check_same(self, other: Mapping[str, Any], where: str) -> None:
        """Raise ``ConfigError`` where a run was begun otherwise and so can't be continued.

        Args:
            other: :meth:`to_dict` of the run that was begun.
            where: it is, for the message.
        """
        # As JSON has them, where tuples are lists; a checkpoint keeps tuples.
        mine, other = (json.loads(json.dumps(each)) for each in (self.to_dict(), dict(other)))
        names = [name for name in mine if name not in FREE and mine[name] != other.get(name)]
        if names:
            told = ", ".join(
                f"{name}: {other.get(name)!r} there, {mine[name]!r} now" for name in names
            )
            raise ConfigError(
                f"{where} was begun with another configuration ({told}); continue with that one, "
                "or choose another folder by out"
            )


def unfold(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields, with the options that stand among them put where they belong.

    Raises:
        ConfigError: an option is there and among those of its owner, too.

    Example:
        >>> unfold({"epochs": 3, "k": 9, "layer_options": {"ratio": 0.25}})
        {'epochs': 3, 'layer_options': {'ratio': 0.25, 'k': 9}}
    """
    found = {key: value for key, value in values.items() if key not in SHORT}
    for key in values:
        if key not in SHORT:
            continue
        owner = SHORT[key]
        options = found.get(owner, {})
        if not isinstance(options, Mapping):
            continue  # which is refused with all that is no mapping
        if key in options:
            raise ConfigError(f"{key!r} is there twice, alone and in {owner}; leave one")
        found[owner] = {**options, key: values[key]}
    return found


def read_yaml(path: str | Path) -> dict[str, Any]:
    """What a file of YAML holds, with numbers such as 1e-3, which PyYAML takes for text.

    Args:
        path: of the file.

    Raises:
        ConfigError: the file is no YAML or holds no mapping.
        FileNotFoundError: there is no such file.
    """
    yaml = require("yaml", extra="train")

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined]
        """With the numbers of YAML 1.2."""

        def compose_mapping_node(self, anchor: Any) -> Any:
            """A mapping as it is written, whose keys stand there once each."""
            node = super().compose_mapping_node(anchor)
            keys = [(key.tag, key.value) for key, _ in node.value]
            for tag, key in keys:
                if keys.count((tag, key)) > 1:
                    raise ConfigError(f"{path}: {key!r} is there twice; leave one")
            return node

        def flatten_mapping(self, node: Any) -> None:
            """Merge what ``<<`` names; of equal keys the last counts, also where it is merged on.

            PyYAML 6.0.4 takes the first of those that happen to be one object.
            """
            super().flatten_mapping(node)
            last = {(key.tag, str(key.value)): (key, value) for key, value in node.value}
            node.value = list(last.values())

    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys with values, got {type(values).__name__}")
    return values


def _expanded(path: str) -> Path:
    return Path(os.path.expanduser(path))  # Path.expanduser raises where there is no such user


def _check(config: Config) -> None:
    check_name("model", config.model, list_models())
    check_name("data", config.data, data_names())
    for name, known in (
        ("optimizer", OPTIMIZERS),
        ("schedule", SCHEDULES),
        ("precision", PRECISIONS),
        ("accelerator", ACCELERATORS),
    ):
        check_name(name, getattr(config, name), known)
    for name, minimum in (
        *(("epochs", 1), ("batch_size", 1), ("accumulate", 1), ("seeds", 1)),
        *(("data_seed", 0), ("workers", 0)),
    ):
        check_int(name, getattr(config, name), minimum)
    if config.image_size is not None:
        check_int("image_size", config.image_size)
    for name in ("weight_decay", "momentum", "warmup_epochs", "label_smoothing", "mixup"):
        check_number(name, getattr(config, name))
    for name in ("learning_rate", "step_factor", "step_epochs", "clip_norm", "ema"):
        value = getattr(config, name)
        if value is not None or name in ("learning_rate", "step_factor"):
            check_number(name, value, exclusive=True)
    if config.step_factor > 1:
        raise ValueError(f"step_factor: expected at most 1, got {config.step_factor}")
    for name in ("label_smoothing", "momentum", "ema"):
        if (getattr(config, name) or 0) >= 1:
            raise ValueError(f"{name}: expected less than 1, got {getattr(config, name)}")
    for name in ("download", "channels_last", "compile", "tensorboard"):
        value = getattr(config, name)
        if not isinstance(value, bool) and (name != "tensorboard" or value is not None):
            raise TypeError(f"{name}: expected true or false, got {getattr(config, name)!r}")
    for name in ("data_root", "out"):
        if not isinstance(getattr(config, name), str):
            raise TypeError(f"{name}: expected a path as text, got {getattr(config, name)!r}")
    if config.layer is not None and not isinstance(config.layer, str):
        raise TypeError(f"layer: expected a name, got {config.layer!r}")
    for name in OPTIONS:
        _check_options(name, getattr(config, name))
    _check_effects(config)
    twice = set(config.layer_options) & set(config.model_options)
    if twice:
        raise ValueError(f"{', '.join(sorted(twice))}: in layer_options and in model_options")


def _check_effects(config: Config) -> None:
    """Raise for what was set and would change nothing."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, (owner, needed) in ONLY_WITH.items():
        value, chosen = getattr(config, name), getattr(config, owner)
        if value != defaults[name] and chosen != needed:
            raise ValueError(
                f"{name}: expected {owner} {needed!r} with it, got {name} {value} with {owner} "
                f"{chosen!r}, where it has no effect; leave {name} out or set {owner} to {needed!r}"
            )
    if config.warmup_epochs > config.epochs:
        raise ValueError(
            f"warmup_epochs: expected at most epochs, {config.epochs}, got {config.warmup_epochs}, "
            "which would never reach learning_rate; lower warmup_epochs or raise epochs"
        )
    if config.step_epochs is not None and config.step_epochs >= config.epochs:
        raise ValueError(
            f"step_epochs: expected less than epochs, {config.epochs}, got {config.step_epochs}, "
            "so that schedule 'step' would never drop; lower step_epochs or leave schedule out"
        )


def _check_options(name: str, options: Any) -> None:
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        raise TypeError(f"{name}: expected a mapping of names to values, got {options!r}")
    try:
        json.dumps(dict(options))
    except TypeError:
        raise TypeError(
            f"{name}: expected numbers, text, lists and mappings, which can be saved with the "
            f"run, got {options!r}"
        ) from None
