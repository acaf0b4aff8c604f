"""The short road: a call like one made before goes straight to its kernel.

What a kernel is given besides x hardly ever changes between calls: the weights' addresses, shapes and strides, dtype
codes, numbers, which kernel. :class:`Calls` keeps it as a launch that needs x alone, together with what it rests on. A
call finds it by a key and checks that all of it is still so:

- every tensor's type, dtype, device, shape, strides, dispatch keys (with autocast, functorch and inference mode, which
  act through them) and whether it asks for a gradient: one question to the C++ that guards Dynamo's graphs;
- gradients are off, or no tensor asks for one;
- every address but x's, and whether x's is a multiple of 16;
- the numbers, and for float32 the matmul precision settings;
- no dispatch mode, torch function mode or forward-mode AD; and no CUDA graph being captured, where that matters.

Where anything differs the ordinary road decides, and what it did may be kept in turn. The key only finds: two things
that share one are told apart by the checks. Addresses and layouts are kept, never tensors, so nothing that was freed
stays alive; a new tensor in the old one's place, of its kind and layout, is as good as the old one to a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fxfuse.kernels import gemm

Guards: Any
try:
    from torch._C._dynamo.guards import TensorGuards as Guards
except ImportError:  # this torch has none: nothing is kept
    Guards = None

MOST = 1024  # launches kept for an op; past that all are forgotten and made again
MOST_TIMES = 64  # a key whose launch keeps being made anew is left alone

_dispatch_modes = torch._C._len_torch_dispatch_stack
_has_torch_function = torch._C._has_torch_function_unary

_grad_enabled = torch.is_grad_enabled
Tensors = Sequence["Tensor | None"]
Launch = Callable[..., "Tensor | None"]  # None: nothing was done, and the ordinary road has to


class _Kept:
    """A launch and what it rests on."""

    __slots__ = ("addresses", "aligned", "gradient", "in_graphs", "launch", "numbers", "same", "settings")

    def __init__(self, tensors: Tensors, numbers: tuple[Any, ...], launch: Launch) -> None:
        given = [t for t in tensors if t is not None]
        self.same = Guards(*given, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        self.addresses = [t if t is None else t.data_ptr() for t in tensors[1:]]
        self.aligned = given[0].data_ptr() % 16 == 0
        self.gradient = any(t.requires_grad for t in given)
        self.numbers = numbers
        self.settings = gemm.float32_settings() if given[0].dtype is torch.float32 else None
        self.launch = launch
        self.in_graphs = getattr(launch, "in_graphs", True)


class Calls:
    """The launches kept for one op."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, _Kept] = {}
        self._times: dict[Hashable, int] = {}

    def find(self, key: Hashable, tensors: Tensors, numbers: tuple[Any, ...]) -> Launch | None:
        """The launch of a call like this one, None where there is none or anything it rests on has changed.

        tensors: x first, then all others, None where one is not given.
        """
        kept = self._kept.get(key)
        if kept is None or (kept.gradient and _grad_enabled()) or kept.numbers != numbers:
            return None
        x = tensors[0]
        assert x is not None
        if (
            kept.addresses != [t if t is None else t.data_ptr() for t in tensors[1:]]
            or not kept.same(*[t for t in tensors if t is not None])
            or (x.data_ptr() % 16 == 0) is not kept.aligned
            or _dispatch_modes()
            or _has_torch_function(x)  # a mode: the type is known
            or forward_ad._current_level >= 0
            or (not kept.in_graphs and torch.cuda.is_current_stream_capturing())
            or (kept.settings is not None and kept.settings != gemm.float32_settings())
        ):
            return None
        return kept.launch

    def keep(
        self, key: Hashable, tensors: Tensors, numbers: tuple[Any, ...], make: Callable[[], Launch | None]
    ) -> None:
        """Keep ``make()`` for calls like this one, an ordinary one without a gradient, unless it is None."""
        times = self._times.get(key, 0)
        if times >= MOST_TIMES or Guards is None:
            return
        if len(self._times) >= MOST:
            self.forget()
        self._times[key] = times + 1
        launch = make()
        if launch is not None:
            self._kept[key] = _Kept(tensors, numbers, launch)

    def forget(self) -> None:
        """Forget every launch."""
        self._kept.clear()
        self._times.clear()

    def __len__(self) -> int:
        return len(self._kept)
