"""The examples that need no download run, and show what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def output(name):
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_converted_resnet_gives_the_same_logits_and_moves():
    for package in ("torchvision", "skimage"):
        pytest.importorskip(package)
    text = output("convert_resnet.py")
    (difference,) = re.findall(r"largest difference of logits: (\S+)", text)
    assert float(difference) < 1e-4
    changes = {lam: float(change) for lam, change in re.findall(r"^(\d\S*) +(\S+)$", text, re.M)}
    assert changes["0.0"] < 1e-4 < 1e-2 < changes["1.0"]


def test_attention_over_the_nearest_keys_becomes_attention():
    changes = dict(re.findall(r"k = +(\d+) +(\S+)", output("attention_over_nearest_keys.py")))
    assert float(changes["196"]) < 1e-5 < float(changes[min(changes, key=int)])


def test_one_layer_from_convolution_to_attention():
    assert "refused" in output("from_convolution_to_attention.py")
