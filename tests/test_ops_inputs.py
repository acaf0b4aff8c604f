"""What the ops are given: dtypes, autocast, layouts, empty and ill-fitting arguments, each as eager takes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _op_samples import EVERY, NAMES, SMALL, Sample, copies, first_of, plain_activation
from torch import Tensor

from fxfuse import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@EVERY
def test_cpu_autocast(sample: Sample, dtype: torch.dtype, closed_form: None) -> None:
    mine, theirs = (copies(sample.to(dtype), sample.differentiable) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        a, b = sample.fused(*mine), sample.plain(*theirs)
    assert (a.dtype, a.stride()) == (b.dtype, b.stride())
    torch.testing.assert_close(a, b, rtol=0.03, atol=0.06)
    a.sum().backward()
    b.sum().backward()
    for i in sample.differentiable:
        assert mine[i].grad.dtype == theirs[i].grad.dtype
    with torch.autocast("cpu", torch.bfloat16):
        call = ops.get(sample.op).call
        traced = torch.compile(lambda *args: call(*args), backend="eager")(*copies(sample.to(dtype)))
    assert (traced.dtype, traced.stride()) == (b.dtype, b.stride())


def test_cuda_autocast_rules() -> None:
    """The casts CUDA's lists ask for, read off the rules themselves: no GPU is needed for that."""
    half, single = torch.bfloat16, torch.float32
    x = torch.randn(2, 2)
    for name, rest in (("kl_div", ("sum", False, False)), ("distillation_kl", (-1, 1.0, 1.0, 1.0, "sum", False))):
        first, second, *others = ops.get(name).autocast("cuda", half, x.half(), x, *rest)
        assert first.dtype is second.dtype is single and tuple(others) == rest
    rule = ops.get("matmul_div_sum_scale").autocast
    assert rule("cuda", half, x, x, None, 1.0, -1, False, False, None)[-1] is single  # sum is a float32 op
    assert rule("cuda", half, x, x, None, 1.0, -1, False, True, None)[-1] is None  # mean is not
    assert rule("cuda", half, x, x, None, 1.0, -1, False, False, half)[-1] is half
    assert rule("cuda", half, x.double(), x.double(), None, 1.0, -1, False, False, None)[-1] is None
    assert rule("cuda", half, x, x, None, 1.0, -1, False, False, None)[0].dtype is half


MIXED = [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float64, torch.float32)]


@pytest.mark.parametrize("pair", MIXED, ids=str)
@pytest.mark.parametrize("name", ["kl_div", "distillation_kl"])
def test_mixed_dtypes(name: str, pair: tuple[torch.dtype, torch.dtype], closed_form: None) -> None:
    for sample in (s for s in SMALL if s.op == name):
        args = (sample.args[0].to(pair[0]), sample.args[1].to(pair[1]), *sample.args[2:])
        mine, theirs = copies(args, (0, 1)), copies(args, (0, 1))
        a, b = sample.fused(*mine), sample.plain(*theirs)
        assert (a.dtype, a.stride()) == (b.dtype, b.stride())
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
        a.sum().backward()
        b.sum().backward()
        for i in (0, 1):
            assert mine[i].grad.dtype == theirs[i].grad.dtype
            torch.testing.assert_close(mine[i].grad, theirs[i].grad, rtol=0.06, atol=0.06)


def test_batchnorm_half_product_with_float32_scale(closed_form: None) -> None:
    sample = first_of("linear_scale_batchnorm1d", "full")
    low = [torch.bfloat16] * 3 + [torch.float32] * 10
    args = tuple(a.to(d) if isinstance(a, Tensor) else a for a, d in zip(sample.args, low, strict=True))
    for training in (True, False):
        full = (*args[:10], training, *args[11:])
        mine, theirs = copies(full, sample.differentiable), copies(full, sample.differentiable)
        a, b = sample.fused(*mine), sample.plain(*theirs)
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
        a.sum().backward()


@EVERY
def test_layouts(sample: Sample, closed_form: None) -> None:
    """Transposed storage, expanded rows, sliced storage: values and strides as eager's."""

    def layouts(tensor: Tensor) -> list[Tensor]:
        sliced = torch.stack([tensor, tensor], -1)[..., 0]
        if tensor.dim() < 2:
            return [sliced]
        return [sliced, tensor.mT.contiguous().mT, tensor[:1].expand_as(tensor)]

    for place in sample.differentiable:
        for other in layouts(sample.args[place]):
            args = tuple(other if i == place else a for i, a in enumerate(sample.args))
            fresh = tuple(a.clone() if i in (8, 9) and isinstance(a, Tensor) else a for i, a in enumerate(args))
            theirs = tuple(a.clone() if i in (8, 9) and isinstance(a, Tensor) else a for i, a in enumerate(args))
            a, b = sample.fused(*fresh), sample.plain(*theirs)
            assert a.stride() == b.stride()
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def outcome(function: Any) -> Any:
    """The result, or the type and first line of what was raised."""
    try:
        return function()
    except Exception as problem:
        return type(problem), str(problem).splitlines()[0]


def raises_the_same(fused: Any, plain: Any) -> None:
    expected = outcome(plain)
    if isinstance(expected, Tensor):
        torch.testing.assert_close(fused(), expected, equal_nan=True)
    else:
        assert outcome(fused) == expected


@NAMES
def test_empty_and_ill_fitting_arguments_as_eager(name: str, closed_form: None) -> None:
    sample = first_of(name)
    x, y, rest = sample.args[0], sample.args[1], sample.args[2:]
    variants = [
        (x[:0], y if name.startswith(("mat", "lin")) else y[:0], *rest),
        (x[:1], y if name.startswith(("mat", "lin")) else y[:1], *rest),
        (x[..., :0], y[..., :0], *rest),
        (x[..., :-1], y, *rest),
        (x.long(), y.long(), *rest),
        (x, y[0], *rest),
        (x[0, ..., 0], y, *rest),
    ]
    for args in variants:
        raises_the_same(lambda a=args: sample.fused(*copies(a)), lambda a=args: sample.plain(*copies(a)))


def test_zero_output_features_and_bad_words() -> None:
    x, w = torch.full((3, 4), float("inf")), torch.empty(0, 4)
    for mean in (False, True):
        out = ops.get("matmul_div_sum_scale").call(x, w, mean=mean)
        torch.testing.assert_close(out, (x @ w.t()).mean(-1) if mean else (x @ w.t()).sum(-1), equal_nan=True)
    with pytest.raises(ValueError, match="is not a valid value for reduction"):
        ops.get("kl_div").call(x, x, reduction="average")
    with pytest.raises(ValueError, match="unknown activation 'mish'"):
        ops.get("linear_activation_scale").call(x, x, activation="mish")
    with pytest.raises(KeyError, match="kl_div"):
        ops.get("no_such_op")
    with pytest.raises(TypeError):
        ops.get("kl_div").call(x, x, mode="sum")


@pytest.mark.parametrize("training", [True, False])
def test_one_row_in_batchnorm(training: bool) -> None:
    sample = first_of("linear_scale_batchnorm1d")
    args = (sample.args[0][:1], *sample.args[1:10], training, *sample.args[11:])
    raises_the_same(lambda: sample.fused(*copies(args)), lambda: sample.plain(*copies(args)))


def test_clamp_and_hardtanh_differ_at_their_bounds(closed_form: None) -> None:
    one = torch.eye(5)
    z = torch.tensor([[-1.0, 1.0, 0.0, float("nan"), 2.0]])
    for activation in ("clamp", "hardtanh"):
        args = (z, one, None, activation, -1.0, 1.0, 1.0, 1.0)
        grads = []
        for function in (ops.get("linear_activation_scale").call, plain_activation):
            bias = z.clone().squeeze(0).requires_grad_()
            full = (torch.zeros(1, 5), one, bias, *args[3:])
            function(*full).sum().backward()
            grads.append(bias.grad)
        torch.testing.assert_close(grads[0], grads[1])
