"""The short road by kind: what a kept call rests on, with tensors of the CPU that say they are on a GPU."""

from __future__ import annotations

import contextlib
import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fxfuse.kernels import gemm
from fxfuse.kernels import matmul_div_sum_scale as mm_kernel
from fxfuse.ops import _kinds
from fxfuse.ops import linear_activation_scale as las_file
from fxfuse.ops import linear_scale_batchnorm1d as bn_file
from fxfuse.ops import matmul_div_sum_scale as mm_file
from fxfuse.ops._kinds import Kind, Kinds
from fxfuse.ops._op import Direct
from fxfuse.ops.kl_div import OP

pytestmark = pytest.mark.skipif(_kinds.Guards is None, reason="this torch has no guards of tensors")


@pytest.fixture(autouse=True)
def capturing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Every tensor is on a GPU; what is put into the list is being captured."""
    now: list[bool] = []
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
    monkeypatch.setattr(_kinds, "_capturing", lambda: bool(now))
    return now


def run(x: Tensor, t: Tensor) -> Tensor:
    return x


def pair(*shape: int, grad: bool = False) -> tuple[Tensor, Tensor]:
    return torch.randn(shape or (4, 8)).requires_grad_(grad), torch.randn(shape or (4, 8))


def keep(
    kinds: Kinds, x: Tensor, t: Tensor, numbers: Any = ("sum", 2.0), what: Any = run, direct: bool = False
) -> None:
    kinds.keep(OP, (x, t, *numbers), numbers, x, t, make=lambda: Kind(what, direct=direct))


def found(kinds: Kinds, x: Any, t: Any, numbers: Any = ("sum", 2.0)) -> bool:
    return kinds.find(numbers, x, t) is not None


@pytest.mark.parametrize("grad", [False, True])
def test_calls_like_a_kept_one_are_found(grad):
    kinds = Kinds()
    x, t = pair(grad=grad)
    assert not found(kinds, x, t)
    keep(kinds, x, t)
    assert kinds.find(("sum", 2.0), x, t) is run
    assert found(kinds, *pair(grad=grad))  # by other tensors of the kind
    assert not found(kinds, x, t, ("sum", 3.0)) and not found(kinds, x, t, ("mean", 2.0))
    kinds.forget()
    assert not found(kinds, x, t)


OTHERS: dict[str, Callable[[Tensor, Tensor], tuple[Any, Any]]] = {
    "dtype": lambda x, t: (x.double(), t),
    "shape": lambda x, t: (x[:2], t[:2]),
    "the second's shape": lambda x, t: (x, t[:1]),
    "strides": lambda x, t: (x.t().contiguous().t(), t),
    "a gradient": lambda x, t: (x, t.clone().requires_grad_()),
    "type": lambda x, t: (nn.Parameter(x, requires_grad=False), t),
    "device": lambda x, t: (x, t.to("meta")),
    "negation": lambda x, t: (torch._neg_view(x), t),
    "one tensor twice": lambda x, t: (x, x),
    "no tensor": lambda x, t: (x, None),
    "a proxy": lambda x, t: (torch.fx.Proxy(torch.fx.Graph().placeholder("x")), t),
}


@pytest.mark.parametrize("what", OTHERS)
def test_tensors_of_another_kind_are_not(what):
    kinds = Kinds()
    x, t = pair()
    keep(kinds, x, t)
    assert not found(kinds, *OTHERS[what](x, t))
    assert found(kinds, x, t)


class _Function(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


AROUND = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "a torch function mode": _Function,
    "a dispatch mode": _Dispatch,
    "fake tensors": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "forward-mode AD": forward_ad.dual_level,
}


@pytest.mark.parametrize("what", AROUND)
def test_nothing_is_found_within(what):
    kinds = Kinds()
    x, t = pair()
    keep(kinds, x, t)
    with AROUND[what]():
        assert not found(kinds, x, t)
    assert found(kinds, x, t)


# A torch function mode sees the call itself, and hands it on without being there.
@pytest.mark.parametrize("what", [*[name for name in AROUND if name != "a torch function mode"], "capture"])
def test_nothing_is_kept_within(what, capturing):
    kinds = Kinds()
    x, t = pair()
    if what == "capture":
        capturing.append(True)
    with AROUND.get(what, contextlib.nullcontext)():
        keep(kinds, x, t)
    capturing.clear()
    assert not found(kinds, x, t)


def test_nothing_is_found_in_a_transform():
    kinds = Kinds()
    x, t = pair()
    keep(kinds, x, t)
    seen = []
    torch.vmap(lambda x, t: seen.append(found(kinds, x, t)) or x)(*pair(3, 4, 8))
    torch.func.grad(lambda x: (seen.append(found(kinds, x, t)), x.sum())[1])(x)
    assert seen == [False, False]


@pytest.mark.parametrize("enabled", [False, True])
def test_gradients_are_wanted_or_not_as_they_were(enabled):
    kinds = Kinds()
    x, t = pair(grad=True)
    with torch.set_grad_enabled(enabled):
        keep(kinds, x, t)
        assert found(kinds, x, t)
    with torch.set_grad_enabled(not enabled):
        assert not found(kinds, x, t)
        keep(kinds, x, t)
        assert found(kinds, x, t)
    with torch.set_grad_enabled(enabled):
        assert found(kinds, x, t)  # both are kept


def test_without_gradients_it_does_not_matter_whether_they_are_enabled():
    kinds = Kinds()
    x, t = pair()
    keep(kinds, x, t)
    with torch.no_grad():
        assert found(kinds, x, t)


def test_direct_calls_are_counted_and_not_for_graphs(capturing):
    kinds = Kinds()
    x, t = pair()
    keep(kinds, x, t, direct=True)
    before = Direct.calls
    assert found(kinds, x, t) and Direct.calls == before + 1
    capturing.append(True)
    assert not found(kinds, x, t) and Direct.calls == before + 1


def test_other_calls_are_found_in_a_capture(capturing):
    kinds = Kinds()
    x, t = pair()
    keep(kinds, x, t)
    capturing.append(True)
    assert found(kinds, x, t)


def test_the_last_to_come_is_asked_first_and_the_first_is_forgotten():
    kinds = Kinds()
    pairs = [pair(n + 1, 8) for n in range(_kinds.MOST + 1)]
    for x, t in pairs:
        keep(kinds, x, t)
    assert [found(kinds, x, t) for x, t in pairs] == [False] + [True] * _kinds.MOST
    x, t = pairs[-1]
    keep(kinds, x, t, what=lambda x, t: t)
    assert kinds.find(("sum", 2.0), x, t)(x, t) is t


def test_no_more_is_kept_than_so_many_numbers(monkeypatch):
    monkeypatch.setattr(_kinds, "MOST_NUMBERS", 3)
    kinds = Kinds()
    x, t = pair()
    for number in range(4):  # the fourth is one too many: all are forgotten but it
        keep(kinds, x, t, ("sum", number))
        keep(kinds, x, t, ("sum", number))
    assert [found(kinds, x, t, ("sum", number)) for number in range(4)] == [False, False, False, True]


def test_nothing_is_kept_of_a_call_off_the_gpu(monkeypatch):
    monkeypatch.undo()
    kinds = Kinds()
    x, t = pair()
    keep(kinds, x, t)
    assert not found(kinds, x, t)


def test_a_kept_call_holds_no_tensor():
    kinds = Kinds()
    x, t = pair()
    keep(kinds, x, t)
    gone = weakref.ref(x), weakref.ref(t)
    del x, t
    gc.collect()
    assert [one() for one in gone] == [None, None]
    assert found(kinds, *pair())


STEPS = {
    las_file: lambda x, w, b: las_file.linear_activation_scale(x, w, b, "gelu", pre_scale=0.5),
    bn_file: lambda x, w, b: bn_file.linear_scale_batchnorm1d(x, w, b, b + 2, training=True),
    mm_file: lambda x, w, b: mm_file.matmul_div_sum_scale(x, w, b, 0.5),
}


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("file", STEPS, ids=lambda file: file.OP.name)
def test_a_step_of_a_product_is_what_the_first_came_to(file, small, monkeypatch):
    monkeypatch.setattr(gemm, "_LAUNCH_US", math.inf if small else 0.0)
    monkeypatch.setattr(gemm, "library", lambda: None)
    monkeypatch.setattr(mm_kernel, "library", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    steps = file.STEPS
    steps.forget()
    served = []
    find = steps.find.__func__

    def counted(self, *args):
        served.append(find(self, *args))
        return served[-1]

    monkeypatch.setattr(Kinds, "find", counted)

    def step(x: Tensor, w: Tensor, b: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, w, b)]
        out = STEPS[file](*leaves)
        return [out.detach(), *torch.autograd.grad(out.sum(), leaves)]

    def tensors() -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(6, 8), torch.randn(4, 8), torch.randn(4)

    step(*tensors())
    for _ in range(3):
        these = tensors()
        got = step(*these)
        assert served[-1] is not None
        steps.forget()
        want = step(*these)
        assert served[-1] is None
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
