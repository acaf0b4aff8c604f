"""A model named on the command line: "package.module:name", and example inputs given by their shapes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class TargetError(ValueError):
    """What was named can't be had; the message says why."""


def load_model(target: str) -> nn.Module:
    """The nn.Module that "module:name" names, or that calling it without arguments returns.

    The current folder is searched first, as `python -m` does. TargetError when there is none.
    """
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise TargetError(f"{target!r} is not of the form package.module:name")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise TargetError(f"{target}: {error}") from error
    if not isinstance(found, nn.Module) and callable(found):
        try:
            found = found()
        except Exception as error:
            raise TargetError(f"{target}() raised {type(error).__name__}: {error}") from error
    if not isinstance(found, nn.Module):
        raise TargetError(f"{target} is a {type(found).__name__}, neither an nn.Module nor something that makes one")
    return found


def example_inputs(shapes: Sequence[str]) -> tuple[Tensor, ...]:
    """ ["32,512", ...] -> random float32 tensors of these shapes; TargetError says which is malformed."""
    tensors = []
    for text in shapes:
        try:
            shape = [int(n) for n in text.split(",")]
            tensors.append(torch.randn(shape))
        except (ValueError, RuntimeError) as error:
            raise TargetError(f"--input {text}: not a shape, as in 32,512") from error
    return tuple(tensors)
