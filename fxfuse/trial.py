"""Running a model once for a comparison: outputs, gradients and buffers by name, with the model left as it was.

Nothing of the caller's changes: gradients are asked for and not accumulated, random draws come from a seed inside
``fork_rng``, and the model is a copy.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = ["Excess", "Seen", "compare", "run"]

_SEED = 20240229
Example = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Seen:
    """What a run gave: name -> tensor, or any other value an output holds."""

    values: dict[str, Any]


def run(model: Callable[..., Any], example: Example, training: bool | None, double: bool = False) -> Seen:
    """Forward and backward.

    Args:
        model: a module (its mode is set) or a function.
        example: arguments; floating-point tensors are copied and get a gradient.
        training: the mode; None for a function.
        double: in float64. A module must be in float64 already; tensors a function closes over are converted as they
            are read.

    Raises: whatever the model raises.
    """
    leaves: list[torch.Tensor] = []

    def fresh(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        copied = value.detach().clone()
        if not copied.is_floating_point():
            return copied
        leaves.append((copied.double() if double else copied).requires_grad_())
        return leaves[-1].view_as(leaves[-1])  # not a leaf: the model may work on it in place

    devices = _gpus(model, example)
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), _in_double(double):
        torch.random.default_generator.manual_seed(_SEED)
        for index in devices:  # torch.manual_seed would seed the other GPUs, too
            torch.cuda.default_generators[index].manual_seed(_SEED)
        if isinstance(model, nn.Module) and training is not None:
            model.train(training)
        args, kwargs = pytree.tree_map(fresh, example)
        output = model(*args, **kwargs)
    values = dict(_named("output", output))
    parameters = dict(model.named_parameters()) if isinstance(model, nn.Module) else {}
    values.update(_gradients(values, leaves, parameters))
    if isinstance(model, nn.Module):
        values.update({f"buffer {name}": buffer for name, buffer in model.named_buffers()})
    return Seen({k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in values.items()})


def _gpus(model: Any, example: Example) -> list[int]:
    """The GPUs a run may draw random numbers on."""
    tensors = [t for t in pytree.tree_leaves(example) if isinstance(t, torch.Tensor)]
    if isinstance(model, nn.Module):
        tensors += [*model.parameters(), *model.buffers()]
    return sorted({t.device.index for t in tensors if t.device.type == "cuda"})


def _named(name: str, output: Any) -> Iterator[tuple[str, Any]]:
    leaves = pytree.tree_leaves(output)
    for number, leaf in enumerate(leaves):
        yield (name if len(leaves) == 1 else f"{name} {number}"), leaf


def _gradients(
    outputs: Mapping[str, Any], leaves: list[torch.Tensor], parameters: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, Any]]:
    """Of a weighted sum of all outputs. The weights are eighths, which every dtype holds exactly."""
    roots = [t for t in outputs.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    wanted = {f"gradient of input {i}": t for i, t in enumerate(leaves)}
    wanted |= {f"gradient of {name}": p for name, p in parameters.items() if p.requires_grad}
    if not roots or not wanted:
        return
    generator = torch.Generator().manual_seed(_SEED)
    weights = []
    for root in roots:
        eighths = torch.randint(1, 9, root.shape, generator=generator) / 8
        signs = torch.randint(0, 2, root.shape, generator=generator) * 2 - 1
        weights.append((eighths * (signs if root.dim() else 1)).to(root.device, root.dtype))
    found = torch.autograd.grad(roots, list(wanted.values()), weights, allow_unused=True)
    yield from zip(wanted, found, strict=True)


@contextlib.contextmanager
def _in_double(double: bool) -> Iterator[None]:
    if not double:
        yield
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.autocast(device, enabled=False), torch.autocast("cpu", enabled=False), _Widen():
        yield


class _Widen(TorchFunctionMode):
    """Floating-point tensors that meet a float64 tensor in a call become float64: a function's own weights, say."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        dtypes = {t.dtype for t in given if t.is_floating_point()}
        if torch.float64 in dtypes and len(dtypes) > 1:
            args, kwargs = pytree.tree_map_only(torch.Tensor, _wide, (args, kwargs))
        return func(*args, **kwargs)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


# --- comparing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Excess:
    """The value that is out of bounds by most; both numbers are NaN where it differs in more than numbers."""

    what: str
    error: float
    bound: float


def compare(fused: Seen, eager: Seen, exact: Seen | None) -> tuple[Excess | None, float]:
    """The worst value out of bounds, if any, and the largest error as a share of what was allowed.

    A value may be 1.25 times as far from float64 as eager is, norm-wise, and a few units in the last place more: for
    scalars, which eager may hit by chance, and for values that cancel, measured by the largest gradient.
    """
    worst: Excess | None = None
    share = 0.0
    if fused.values.keys() != eager.values.keys():
        name = min(fused.values.keys() ^ eager.values.keys())
        return Excess(name, math.nan, math.nan), math.inf
    scale = {kind: _largest(eager, kind) for kind in ("gradient", "output", "buffer")}
    for name, value in eager.values.items():
        reference = exact.values.get(name) if exact is not None else None
        error, bound = _measure(fused.values[name], value, reference, scale[name.split()[0]])
        if bound != bound:
            return Excess(name, error, bound), math.inf
        here = error / bound if bound else (math.inf if error else 0.0)
        share = max(share, here)
        if here > 1 and (worst is None or here > worst.error / max(worst.bound, 1e-300)):
            worst = Excess(name, error, bound)
    return worst, share


def _largest(seen: Seen, kind: str) -> float:
    """The largest root mean square among the finite values of a kind."""
    found = [0.0]
    for name, value in seen.values.items():
        if name.startswith(kind) and isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
            finite = value.double()[value.isfinite()]
            found.append(float(finite.norm()) / max(finite.numel(), 1) ** 0.5)
    return max(found)


def _measure(fused: Any, eager: Any, exact: Any, scale: float) -> tuple[float, float]:
    """(error, bound); NaN for both where the values differ in kind."""
    other = (math.nan, math.nan)
    if not isinstance(eager, torch.Tensor):
        return (0.0, 0.0) if type(fused) is type(eager) and _equal(fused, eager) else other
    if fused is None and eager.is_floating_point():
        fused = torch.zeros_like(eager)  # a gradient that is missing
    if not isinstance(fused, torch.Tensor) or fused.dtype != eager.dtype or fused.shape != eager.shape:
        return other
    if not eager.is_floating_point():
        return (0.0, 0.0) if torch.equal(fused, eager) else other
    finite = eager.isfinite()
    if not torch.equal(fused[~finite].nan_to_num(7.0), eager[~finite].nan_to_num(7.0)):
        return other
    if not finite.any():
        return 0.0, 0.0
    unit, count = torch.finfo(eager.dtype).eps, int(finite.sum())
    ours, theirs = fused.double()[finite], eager.double()[finite]
    size = float(theirs.norm()) + scale * count**0.5
    floor = unit * size * (1 + 4 / count**0.5)
    if isinstance(exact, torch.Tensor) and exact.shape == eager.shape and exact.is_floating_point():
        truth = exact.double()[finite]
        theirs_off = float((theirs - truth).norm())
        if theirs_off <= 0.1 * float(truth.norm()) + floor:
            return _number((ours - truth).norm()), 1.25 * theirs_off + floor
    # no float64 to judge by (other random draws, say): the two are compared with each other
    return _number((ours - theirs).norm()), min(64 * unit, 0.1) * size


def _number(norm: torch.Tensor) -> float:
    return float(norm) if math.isfinite(float(norm)) else math.inf


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b) or (a != a and b != b)
    except Exception:  # objects that cannot be compared are taken as given
        return True
