"""The ops' derivatives: first and second, any subset, arguments that depend on each other, functorch."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from _op_samples import EVERY, Sample, copies, first_of, plain_kl_div
from torch import Tensor

from fxfuse import ops
from fxfuse.ops._op import Op
from fxfuse.ops._road import Road


@EVERY
def test_first_and_second_derivatives(sample: Sample, closed_form: None) -> None:
    args = list(copies(sample.args, sample.differentiable))
    places = sample.differentiable

    def function(*inputs: Tensor) -> Tensor:
        full = list(args)
        for place, value in zip(places, inputs, strict=True):
            full[place] = value
        if sample.op == "linear_scale_batchnorm1d":  # running statistics of its own for every call
            full[8], full[9] = full[8].clone(), full[9].clone()
        return sample.fused(*full)

    inputs = tuple(args[i] for i in places)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, atol=1e-4)


@EVERY
def test_any_subset_of_gradients(sample: Sample, closed_form: None) -> None:
    for count in range(1, len(sample.differentiable) + 1):
        for wanted in itertools.combinations(sample.differentiable, count):
            mine, theirs = copies(sample.args, wanted), copies(sample.args, wanted)
            sample.fused(*mine).sum().backward()  # a stride-0 upstream gradient
            sample.plain(*theirs).sum().backward()
            for i in wanted:
                torch.testing.assert_close(mine[i].grad, theirs[i].grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("sample", [first_of(name) for name in ops.names()], ids=str)
def test_an_argument_computed_from_another(sample: Sample, closed_form: None) -> None:
    """d/da of op(a, f(a)), twice: the path through f is counted once."""
    place = sample.differentiable[1]
    base = sample.args[0]
    shape = sample.args[place].shape

    def run(function: Any, a: Tensor) -> Tensor:
        args = list(copies(sample.args))
        args[0] = a
        args[place] = a.sin().mean() * torch.ones(shape, dtype=a.dtype) + args[place] + 2.0
        (g,) = torch.autograd.grad(function(*args).sum(), a, create_graph=True)
        (gg,) = torch.autograd.grad((g * g).sum(), a)
        return torch.stack([g.detach(), gg])

    a = base.clone().requires_grad_()
    torch.testing.assert_close(run(sample.fused, a), run(sample.plain, a), rtol=1e-7, atol=1e-8)


def test_batchnorm_buffers_may_change_before_backward(closed_form: None) -> None:
    """Evaluate, train, then go back through both: the first uses the statistics it was evaluated with."""
    sample = first_of("linear_scale_batchnorm1d", "full-eval")
    args = list(copies(sample.args, sample.differentiable))
    out = sample.fused(*args)
    expected = torch.autograd.grad(sample.fused(*args).sum(), args[0])[0]
    train = list(args)
    train[10] = True
    second = sample.fused(*train)
    (got,) = torch.autograd.grad(out.sum(), args[0], create_graph=True)
    torch.testing.assert_close(got, expected)
    second.sum().backward()


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_functorch_transforms(transform: str) -> None:
    kl = ops.get("kl_div").call
    x, t = torch.randn(4, 5).log_softmax(-1), torch.randn(4, 5).softmax(-1)

    def run(f: Any) -> Tensor:
        if transform == "grad":
            return torch.func.grad(lambda x: f(x, t, "sum", False, False))(x)
        if transform == "vmap":
            return torch.func.vmap(lambda x, t: f(x, t, "sum", False, False))(x, t)
        return torch.func.jvp(lambda x: f(x, t, "sum", False, False), (x,), (t,))[1]

    torch.testing.assert_close(run(kl), run(plain_kl_div))
    torch.testing.assert_close(run(torch.ops.fxfuse.kl_div), run(plain_kl_div))


@pytest.mark.parametrize("retain", [False, True])
def test_a_backward_may_free_what_it_has_used(retain: bool) -> None:
    """What it drops from `saved` is gone at once, unless the graph is retained and will want it again."""
    alive: list[bool] = []

    def forward(road: Road, x: Tensor, wanted: Sequence[bool] = ()) -> tuple[Tensor, Sequence[Tensor]]:
        kept = x.exp()
        return kept.clone(), (kept,)

    def backward(road: Road, grad: Tensor, saved: list[Tensor], x: Tensor, wanted: Sequence[bool]) -> Sequence[Tensor]:
        kept = saved.pop()
        there, dx = weakref.ref(kept), grad * kept
        del kept
        alive.append(there() is not None)
        return (dx,)

    ways: dict[str, Any] = {"road": lambda x: Road("closed", ""), "forward": forward, "backward": backward}
    op = Op(f"fxfuse_test::freed_{retain}", "(Tensor x) -> Tensor", torch.exp, saves=lambda x, wanted: (x,), **ways)
    x = torch.randn(5, requires_grad=True)
    out = op.call(x)
    for _ in range(1 + retain):
        (dx,) = torch.autograd.grad(out.sum(), x, retain_graph=retain)
        torch.testing.assert_close(dx, x.exp())
    assert alive == [retain] * (1 + retain)
