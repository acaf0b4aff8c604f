"""The error of a computation against the same model in float64, norm-wise: ‖got - reference‖ / ‖reference‖."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Gradients this small beside the largest are what rounding leaves of zero: BatchNorm takes away what a bias or a scale
# before it does, so their gradients vanish (the scale's but for eps), in every implementation.
NEGLIGIBLE = 1e-4


@dataclass
class Result:
    """What one call computes: the output, gradients by name (none in forward mode), buffers after the call."""

    output: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def relative_error(got: Tensor, reference: Tensor) -> float:
    """‖got - reference‖ / ‖reference‖ in float64; NaN and shape differences give infinity."""
    if got.shape != reference.shape:
        return math.inf
    difference = torch.linalg.vector_norm(got.to(reference.device).double() - reference)
    norm = torch.linalg.vector_norm(reference)
    error = float(difference / norm) if norm else float(difference)
    return error if not math.isnan(error) else math.inf


def errors(got: Result, reference: Result) -> dict[str, float]:
    """`error` of the output, `grad_error` the worst of the gradients, `state_error` the worst of the buffers; the
    last two only where there are any."""
    found = {"error": relative_error(got.output, reference.output)}
    largest = max((float(g.norm()) for g in reference.gradients.values()), default=0.0)
    matter = [name for name, g in reference.gradients.items() if float(g.norm()) > NEGLIGIBLE * largest]
    _worst(found, "grad_error", got.gradients, reference.gradients, matter)
    floating = [name for name, b in reference.buffers.items() if b.is_floating_point()]
    _worst(found, "state_error", got.buffers, reference.buffers, floating)
    return found


def _worst(
    found: dict[str, float], key: str, got: dict[str, Tensor], reference: dict[str, Tensor], names: Iterable[str]
) -> None:
    values = [relative_error(got[name], reference[name]) if name in got else math.inf for name in names]
    if values:
        found[key] = max(values)


def in_float64(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The same model and inputs in float64: rounding of the weights and inputs to their dtype is not an error."""
    return copy.deepcopy(model).double(), tuple(x.detach().double() for x in inputs)
