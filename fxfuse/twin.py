"""A twin of a module tree: new module objects, the same tensors.

Parameters and buffers are the very same objects, so an optimizer built for the original trains the twin. Everything that
refers to a module of the tree (lists, dicts, bound methods) refers to its twin; all other attributes are shared.
"""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

__all__ = ["twin"]

_PLAIN_CONTAINERS = (list, tuple, set, dict, OrderedDict)


def twin(module: nn.Module) -> nn.Module:
    """The twin of ``module``. Scripted and compiled submodules, which cannot be rebuilt, are shared as they are."""
    made: dict[int, nn.Module] = {}
    _allocate(module, made)
    for original, copied in [(m, made[id(m)]) for m in _walk(module, made)]:
        if copied is not original:
            _fill(original, copied, made)
    return made[id(module)]


def _walk(module: nn.Module, made: dict[int, nn.Module]) -> list[nn.Module]:
    return [m for m in module.modules() if id(m) in made]


def _allocate(module: nn.Module, made: dict[int, nn.Module]) -> None:
    for m in module.modules():
        made[id(m)] = m if isinstance(m, torch.jit.ScriptModule) else m.__class__.__new__(m.__class__)


def _fill(original: nn.Module, copied: nn.Module, made: dict[int, nn.Module]) -> None:
    state = {}
    for key, value in original.__dict__.items():
        kind = type(value)
        if kind is bool or kind is int or kind is float or kind is str or value is None:
            state[key] = value
        elif key == "_modules":
            state[key] = {name: made.get(id(child), child) for name, child in value.items()}
        elif key == "_parameters" or key == "_buffers" or key == "_non_persistent_buffers_set" or "_hooks" in key:
            state[key] = copy.copy(value)
        else:
            state[key] = _remap(value, made)
    copied.__dict__.update(state)


def _remap(value: Any, made: dict[int, nn.Module]) -> Any:
    """``value`` with every module of the tree replaced by its twin; the very object where there is none inside."""
    if isinstance(value, nn.Module):
        return made.get(id(value), value)
    kind = type(value)
    if kind is types.MethodType:
        owner = _remap(value.__self__, made)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
    if kind is functools.partial:
        parts = [_remap(p, made) for p in (value.func, value.args, value.keywords)]
        same = parts[0] is value.func and parts[1] is value.args and parts[2] is value.keywords
        return value if same else functools.partial(parts[0], *parts[1], **parts[2])
    if kind not in _PLAIN_CONTAINERS or not value:
        return value
    if kind is dict or kind is OrderedDict:
        items = {key: _remap(item, made) for key, item in value.items()}
        changed = any(items[key] is not item for key, item in value.items())
        return kind(items) if changed else value
    new = [_remap(item, made) for item in value]
    return kind(new) if any(a is not b for a, b in zip(new, value)) else value
