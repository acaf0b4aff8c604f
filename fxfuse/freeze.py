"""freeze=True: what depends on weights alone is computed once and kept until a weight changes.

A kept value belongs to the weight tensor itself (weakly, so it goes when the weight goes) and is dropped as soon as the
weight's version counter, memory, dtype or shape is another. PyTorch's version counter does not see writes through
``weight.data``; whoever writes that way must not freeze.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Kept", "freeze_graph"]


class Kept:
    """Values derived from weights, by the first weight."""

    def __init__(self) -> None:
        self._values: Any = WeakTensorKeyDictionary()

    def get(self, weights: tuple[Tensor | None, ...], extra: Any, make: Callable[[], Any]) -> Any:
        """The value kept for these very weights, made anew when one of them has changed.

        Weights without a version counter (made in inference mode) are never kept.
        """
        first = weights[0]
        assert first is not None
        if any(w is not None and w.is_inference() for w in weights):
            return make()
        state = (extra, *[None if w is None else (w._version, w.data_ptr(), w.dtype, w.shape, id(w)) for w in weights])
        held = self._values.get(first)
        if held is None or held[0] != state:
            held = (state, make())
            self._values[first] = held
        return held[1]


def freeze_graph(graph: fx.Graph) -> int:
    """Point calls of ops that have a frozen form to it, in place; returns how many."""
    count = 0
    for node in graph.nodes:
        frozen = getattr(node.target, "frozen", None) if node.op == "call_function" else None
        if frozen is not None:
            node.target = frozen
            count += 1
    return count
