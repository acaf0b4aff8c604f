"""Conditions a match must meet, by name. A guard returns None, or the reason why it refuses.

Shapes are often unknown when a graph is read. A guard that cannot know lets the op decide at call time, since an op
means the same for every rank; it refuses only what is known to be wrong, or what could not be undone later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from fxfuse.match import Match
from fxfuse.view import Attr

__all__ = ["Guard", "bias_is_vector", "last_dim", "per_channel", "rank", "same_dim", "single_dim", "weight_is_matrix"]

Guard = Callable[[Match], "str | None"]


def weight_is_matrix(match: Match) -> str | None:
    """The weight has two dimensions, as far as is known."""
    known = match.view.rank(match["weight"])
    if known is not None and known != 2:
        return f"the weight has {known} dimensions, not 2"
    if known is None and any(match.view.operations.get(n) in ("mT", "transpose", "permute") for n in match.nodes):
        return "the rank of the transposed weight is not known before it runs; give example_inputs"
    return None


def bias_is_vector(match: Match) -> str | None:
    """What is added to a product is a bias with one dimension, not another activation."""
    bias = match.get("bias")
    if bias is None or not any(match.view.operations.get(n) in ("add", "addmm") for n in match.nodes):
        return None
    known = match.view.tensor(bias)
    if known is None:
        return f"whether {match.view.describe(bias)} is a bias vector is not known before it runs; give example_inputs"
    if known.dim() != 1:
        return f"what is added to the product has {known.dim()} dimensions, a bias has 1"
    weight = match.view.tensor(match["weight"])
    if weight is not None and weight.dtype != known.dtype:
        return f"what is added to the product is {known.dtype}, the weight is {weight.dtype}"
    return None


def rank(name: str, wanted: int, words: str) -> Guard:
    """The value bound to ``name`` has ``wanted`` dimensions where its rank is known."""

    def check(match: Match) -> str | None:
        known = match.view.rank(match[name])
        return None if known is None or known == wanted else f"{words}: {known} dimensions, not {wanted}"

    return check


def last_dim(name: str, of: str) -> Guard:
    """A dim argument is one number that means the last dimension of ``of``, as far as is known."""

    def check(match: Match) -> str | None:
        dim = single_dim(match[name])
        if dim is None:
            return f"the reduction runs over dim={match[name]!r}, not over the last dimension alone"
        known = match.view.rank(match[of])
        if dim == -1 or known is None or dim == known - 1:
            return None if dim >= -1 else f"dim={dim} is not the last dimension"
        return f"dim={dim} is not the last of {known} dimensions"

    return check


def same_dim(first: str, second: str, of: str) -> Guard:
    """Two dim arguments mean the same dimension."""

    def check(match: Match) -> str | None:
        a, b = match[first], match[second]
        known = match.view.rank(match[of])
        if a == b or (known is not None and isinstance(a, int) and isinstance(b, int) and a % known == b % known):
            return None
        return f"the softmax runs over dim={a!r} for one side and dim={b!r} for the other"

    return check


def per_channel(chain: str, weight: str = "weight") -> Guard:
    """Tensor factors of a chain vary over the output features only, as far as is known."""

    def check(match: Match) -> str | None:
        features = match.view.tensor(match[weight])
        for step in match[chain]:
            known = match.view.tensor(step.factor) if isinstance(step.factor, (fx.Node, Attr)) else None
            if known is None or known.dim() == 0:
                continue
            rows = known.numel() // max(int(known.shape[-1]), 1)
            if rows != 1 or (features is not None and known.shape[-1] not in (1, features.shape[0])):
                what = match.view.describe(step.factor)
                return f"the factor {what} has the shape {list(known.shape)}: it is not per channel"
        return None

    return check


def single_dim(value: Any) -> int | None:
    """A dim argument as one integer, or None where it is none, several or unknown."""
    if isinstance(value, (tuple, list)) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, int) and not isinstance(value, bool) else None
