"""A cost model: bytes and operations of what was replaced and of what stands there now. Estimates, never measurements.

Before: every operation reads its tensors from memory once and writes its result, one after the other. After: the inputs
of the whole are read once, the result is written once, and the matrix products that no algebra removes remain. Time is
the larger of bytes over bandwidth and operations over rate, plus what a call costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fxfuse import vocabulary
from fxfuse.rates import Rates, rates_of
from fxfuse.report import Replacement, Step, Tensor

__all__ = ["Cost", "Estimate", "Unknown", "collapsed", "estimate", "fused_once"]


class Unknown(Exception):
    """Why nothing can be said: a shape was not known when the graph was read."""


@dataclass(frozen=True)
class Cost:
    """What a forward does.

    Attributes:
        bytes: read from and written to memory.
        matrix: operations in matrix products, two for each multiply-add.
        vector: other operations.
        between: bytes of the tensors written on the way, which are neither inputs nor the result.
        calls: operations that run one after the other.
    """

    bytes: int = 0
    matrix: int = 0
    vector: int = 0
    between: int = 0
    calls: int = 1

    def __add__(self, other: Cost) -> Cost:
        return Cost(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def seconds(self, rates: Rates, dtype: str) -> float:
        """The time on a device, products in ``dtype``."""
        work = self.matrix / rates.product(dtype) + self.vector / rates.vector
        return self.calls * rates.call + max(self.bytes / rates.bandwidth, work)


@dataclass(frozen=True)
class Estimate:
    """The cost of a replacement, before and after, on one device. One forward call."""

    before: Cost
    after: Cost
    seconds_before: float
    seconds_after: float
    rates: Rates

    @property
    def speedup(self) -> float:
        """How many times faster."""
        return self.seconds_before / self.seconds_after

    @property
    def pays(self) -> bool:
        """Whether it is worth it here, by the model."""
        return self.seconds_after < self.seconds_before


def estimate(replacement: Replacement, after: Callable[[Replacement], Cost] | None = None) -> Estimate:
    """What a replacement costs before and after.

    Args:
        replacement: as the report has it.
        after: what the op costs, where it is not :func:`fused_once`.

    Raises:
        Unknown: when shapes are not known.
    """
    if not replacement.steps or replacement.result is None:
        raise Unknown("the shapes were not known when the graph was read; give example_inputs to optimize()")
    last = replacement.steps[-1]
    rates, dtype = rates_of(replacement.result.device), _product_dtype(replacement)
    costs = [step_cost(step, last=step is last) for step in replacement.steps]
    # one after the other: each is bound by its own bytes or its own operations
    seconds = sum(c.seconds(rates, dtype) for c in costs)
    fused = (after or fused_once)(replacement)
    return Estimate(sum(costs, Cost(calls=0)), fused, seconds, fused.seconds(rates, dtype), rates)


# --- before ----------------------------------------------------------------------------------------------------------


def step_cost(step: Step, last: bool = False) -> Cost:
    """The cost of one operation as PyTorch runs it; ``last`` says that its result is the result of the whole."""
    operation = vocabulary.OPERATIONS.get(step.operation)
    if operation is not None and operation.aliases:
        return Cost(calls=0)
    if step.result is None:
        raise Unknown(f"the shape of {step.operation} was not known; give example_inputs to optimize()")
    tensors = [v for v in step.arguments.values() if isinstance(v, Tensor)]
    moved = sum(map(_bytes, tensors)) + _bytes(step.result)
    widest = max(map(_count, [*tensors, step.result]))
    between = 0 if last else _bytes(step.result)
    if step.operation in _PRODUCTS:
        depth = _tensor(step, _PRODUCTS[step.operation]).shape[-1:]
        return Cost(moved, 2 * _count(step.result) * math.prod(depth), 0, between)
    special = _SPECIAL.get(step.operation)
    if special is None:
        return Cost(moved, 0, widest, between)
    more, operations, inside, calls = special(step)
    return Cost(moved + more, 0, operations, between + inside, calls)


#: products -> the argument whose last dimension is summed over
_PRODUCTS = {"linear": "x", "matmul": "a", "addmm": "a"}


def _batch_norm(step: Step) -> tuple[int, int, int, int]:
    """In training the statistics are a pass of their own over x."""
    x = _tensor(step, "x")
    training = step.arguments.get("training", step.arguments.get("module.training")) is True
    return _bytes(x) if training else 0, (7 if training else 4) * _count(x), 0, 1


def _softmax(step: Step) -> tuple[int, int, int, int]:
    return 0, 5 * _count(_tensor(step, "x")), 0, 1


def _kl_div(step: Step) -> tuple[int, int, int, int]:
    """ATen: xlogy(t, t), t · x, their difference, the reduction; with log_target as many passes."""
    widest = max(_tensor(step, "input"), _tensor(step, "target"), key=_bytes)
    whole = _bytes(widest)
    reduced = step.arguments.get("reduction") != "none"
    # beyond both inputs read once and the result written once: t again, three tensors written, all three read again
    return whole * (7 if reduced else 5), 12 * _count(widest), whole * (3 if reduced else 2), 4 if reduced else 3


#: operation -> (bytes beyond arguments and result, operations, bytes written inside, calls)
_SPECIAL: Mapping[str, Callable[[Step], tuple[int, int, int, int]]] = {
    "batch_norm": _batch_norm,
    "batch_norm1d_module": _batch_norm,
    "softmax": _softmax,
    "log_softmax": _softmax,
    "kl_div": _kl_div,
}


# --- after -----------------------------------------------------------------------------------------------------------


def fused_once(replacement: Replacement) -> Cost:
    """The inputs read once, the result written once, the products as before: what one pass can reach."""
    costs = [step_cost(step) for step in replacement.steps]
    moved = sum(map(_bytes, _read(replacement))) + _written(replacement)
    return Cost(moved, sum(c.matrix for c in costs), sum(c.vector for c in costs))


def collapsed(replacement: Replacement) -> Cost:
    """Sums taken before the product: two operations an element of the inputs, and no matrix product."""
    read = _read(replacement)
    return Cost(sum(map(_bytes, read)) + _written(replacement), 0, 2 * sum(map(_count, read)), calls=2)


def _read(replacement: Replacement) -> list[Tensor]:
    """The tensors the op is called with."""
    if UNKNOWN_VALUES.intersection(v for v in replacement.call.values() if isinstance(v, str)):
        raise Unknown("an input's shape was not known when the graph was read; give example_inputs to optimize()")
    return [v for v in replacement.call.values() if isinstance(v, Tensor)]


def _written(replacement: Replacement) -> int:
    assert replacement.result is not None  # asked by estimate
    return _bytes(replacement.result)


UNKNOWN_VALUES = frozenset({"?"})


# --- tensors ---------------------------------------------------------------------------------------------------------


def _tensor(step: Step, name: str) -> Tensor:
    found: Any = step.arguments.get(name)
    if not isinstance(found, Tensor):
        raise Unknown(f"the shape of {step.operation}'s {name} was not known; give example_inputs to optimize()")
    return found


def _count(tensor: Tensor) -> int:
    return math.prod(tensor.shape)


def _bytes(tensor: Tensor) -> int:
    return _count(tensor) * int(getattr(torch, tensor.dtype).itemsize)


def _product_dtype(replacement: Replacement) -> str:
    dtypes: Iterable[str] = (s.result.dtype for s in replacement.steps if s.operation in _PRODUCTS and s.result)
    return next(iter(dtypes), replacement.result.dtype if replacement.result else "float32")
