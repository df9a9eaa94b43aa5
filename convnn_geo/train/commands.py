"""``convnn-geo train``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from convnn_geo.train.config import OPTIONS, SHORT, Config, ConfigError, read_yaml, unfold

_TYPES = {"int": int, "float": float, "str": str}
_SHORT = {
    "k": (int, "neighbours"),
    "metric": (str, "how near two points are, e.g. cosine"),
    "ratio": (float, "share of ConvNN channels of the layer branching"),
    "lam": (float, "place on the spectrum, 0 position to 1 feature"),
    "drop_path": (float, "probability of leaving out the model's last block"),
}
_EXAMPLES = """\
examples:
  convnn-geo train --model vgg11 --layer branching --ratio 0.5 --metric cosine --k 9 --epochs 30 \\
    --seeds 3
  convnn-geo train --config run.yaml --epochs 5 --set model_options.depth=6
  convnn-geo train --config runs/train/vgg11-branching-digits/config.json --resume
  torchrun --nproc-per-node 2 -m convnn_geo train --model vit_tiny --layer kvt --epochs 1
"""


def add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``train`` to the command line."""
    parser = commands.add_parser(
        "train",
        help="train a model, and score it over seeds",
        description="Train a model once a seed, validate after each epoch, and read the test part "
        "once, at the end. Writes checkpoints, metrics, weights and curves. Flags stand above "
        "what the file of --config says. Ctrl-C or a crash loses at most an epoch: see --resume.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="YAML or JSON with the keys of convnn_geo.train.Config",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue what the folder of --out holds"
    )
    fields = parser.add_argument_group("configuration")
    for field in dataclasses.fields(Config):
        if field.name not in OPTIONS:
            _add_flag(fields, field)
    short = parser.add_argument_group("options of the layer and the model, where they have them")
    for name, (kind, text) in _SHORT.items():
        flag = "--" + name.replace("_", "-")
        short.add_argument(flag, type=kind, default=argparse.SUPPRESS, metavar="VALUE", help=text)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"any other option of {', '.join(OPTIONS)}, e.g. model_options.depth=6; repeatable",
    )
    parser.set_defaults(command=_train)


def _add_flag(group: argparse._ArgumentGroup, field: dataclasses.Field[Any]) -> None:
    flag = "--" + field.name.replace("_", "-")
    text = field.metadata["help"]
    if field.default not in (None, "", False):
        text += f" ({field.default})"
    if str(field.type).removesuffix(" | None") == "bool":
        group.add_argument(
            flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
        )
    else:
        kind = _TYPES[str(field.type).removesuffix(" | None")]
        flags = ("--lr", flag) if field.name == "learning_rate" else (flag,)
        group.add_argument(
            *flags,
            type=kind,
            dest=field.name,
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=text,
        )


def _train(arguments: argparse.Namespace) -> int:
    from convnn_geo.train.seeds import train
    from convnn_geo.train.training import DivergedError
    from convnn_geo.train.watch import Terminal

    first = os.environ.get("RANK", "0") == "0"
    try:
        config = _config(arguments)
        with Terminal() as terminal:
            summary = train(config, resume=arguments.resume, watch=terminal)
    except (ConfigError, DivergedError) as error:
        if first:  # all processes of torchrun meet the same
            told = " ".join(str(error).split())
            print(f"convnn-geo train: error: {told}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        if first:
            print("interrupted; the same command with --resume continues", file=sys.stderr)
        return 130
    if first:
        print(summary)
        print(f"{config.folder} has summary.json, curves.png, and a folder a seed with weights.pt")
    return 0


def _config(arguments: argparse.Namespace) -> Config:
    """What the file says, and what flags say instead."""
    values = {} if arguments.config is None else unfold(read_yaml(arguments.config))
    # Mappings are refused here where they are none; all else may be put right by a flag.
    Config.from_dict({name: values[name] for name in OPTIONS if name in values})
    given = vars(arguments)
    for field in dataclasses.fields(Config):
        if field.name in given:
            values[field.name] = given[field.name]
    options: dict[str, dict[str, Any]] = {name: dict(values.get(name, {})) for name in OPTIONS}
    for name, owner in SHORT.items():
        if name in given:
            options[owner][name] = given[name]
    for text in arguments.set:
        name, key, value = _setting(text)
        options[name][key] = value
    return Config.from_dict({**values, **options})


def _setting(text: str) -> tuple[str, str, Any]:
    """``model_options.depth=6`` in parts."""
    path, equals, value = text.partition("=")
    name, dot, key = path.strip().partition(".")
    if not equals or not dot or not key or name not in OPTIONS:
        raise ConfigError(
            f"--set: expected KEY=VALUE with a key such as {OPTIONS[1]}.depth, of "
            f"{', '.join(OPTIONS)}; got {text!r}"
        )
    try:
        return name, key, json.loads(value)
    except ValueError:
        return name, key, value  # text needs no quotes
