"""matmul_div_sum_scale: products with a transposed weight, summed or averaged over the output features."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import Case, builds, check, normal, on_cuda, scalar, through_every_door
from torch import Tensor, nn
from torch.nn.utils import parametrizations

ONE = {"matmul_div_sum_scale": 1}
NAME = "matmul_div_sum_scale"
XW = (normal(5, 8), normal(6, 8))
XWB = (normal(5, 8), normal(6, 8), normal(6))


class Issue(nn.Module):
    """matmul by the transposed weight, halved, summed, scaled: as the pattern's own example writes it."""

    def __init__(self, keepdim: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(6, 8))
        self.scaling_factor = 1.5
        self.keepdim = keepdim

    def forward(self, x: Tensor) -> Tensor:
        x = torch.matmul(x, self.weight.T)
        x = x / 2
        x = torch.sum(x, dim=1, keepdim=self.keepdim)
        return x * self.scaling_factor


class OverLinear(nn.Module):
    """nn.Linear, and what happens to its output."""

    def __init__(
        self, after: Callable[[Tensor], Tensor], bias: bool = True, change: Callable[[nn.Linear], object] | None = None
    ) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 6, bias=bias)
        self.after = after
        if change is not None:
            change(self.fc)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.fc(x))


class Buffered(nn.Module):
    """The factor is a buffer without dimensions."""

    def __init__(self, divide: bool = False) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 6)
        self.register_buffer("factor", torch.tensor(2.0))
        self.divide = divide

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return (-(y / self.factor) if self.divide else self.factor * y).sum(-1) / 3


class PerFeature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 6)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return (self.fc(x) * self.scale).sum(-1)


class Tied(nn.Module):
    """Two layers, one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 6)
        self.b = nn.Linear(8, 6)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).sum(-1) + self.b(x * 2).mean(-1)


def over_linear(after: Callable[[Tensor], Tensor], **settings: object) -> Callable[[], nn.Module]:
    return builds(lambda: OverLinear(after, **settings))  # type: ignore[arg-type]


def summed(y: Tensor) -> Tensor:
    return y.sum(-1)


def in_place(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w.t()
    y /= 2
    y.mul_(3)
    return y.sum(-1).neg_()


def read_again(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = x @ w.t()
    return y.sum(-1), y


def sum_read_twice(x: Tensor, w: Tensor) -> Tensor:
    s = (x @ w.t()).sum(-1)
    return s * 2 + s / 3


def weight_changed(x: Tensor, w: Tensor) -> Tensor:
    w = w.detach() * 1
    y = x.detach() @ w.t()
    w.add_(1)
    return y.sum(-1) + w.sum()


def input_changed_through_an_alias(x: Tensor, w: Tensor) -> Tensor:
    x = x.detach() * 1
    row = x[0]
    y = F.linear(x, w.detach())
    row.zero_()
    return y.sum(-1)


def transposed_read_again(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    wt = w.t()
    return (x @ wt).sum(-1), wt * 2


def mode_changes(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w.t()
    with torch.no_grad():
        return y.sum(-1)


POSITIVE = [
    Case("issue", Issue, (normal(5, 8),), ONE),
    Case("issue_keepdim_false", builds(lambda: Issue(False)), (normal(5, 8),), ONE),
    Case("linear_module", over_linear(summed), (normal(5, 8),), ONE),
    Case("linear_without_bias", over_linear(summed, bias=False), (normal(5, 8),), ONE),
    Case("linear_mean", over_linear(lambda y: y.mean(dim=-1, keepdim=True)), (normal(5, 8),), ONE),
    Case("sum_by_axis", over_linear(lambda y: torch.sum(y, axis=-1)), (normal(5, 8),), ONE),
    Case("keepdims", over_linear(lambda y: y.sum(-1, keepdims=True)), (normal(5, 8),), ONE),
    Case("sum_over_a_list", over_linear(lambda y: y.sum([-1])), (normal(5, 8),), ONE),
    Case("sum_over_a_tuple", over_linear(lambda y: torch.mean(y, (1,), True)), (normal(5, 8),), ONE),
    Case("scaled_before", over_linear(lambda y: (y * 2 / 3).sum(-1)), (normal(5, 8),), ONE),
    Case("scaled_after", over_linear(lambda y: 2 * y.sum(-1) / 3), (normal(5, 8),), ONE),
    Case("scaled_both", over_linear(lambda y: -((-y / 4).sum(-1, keepdim=True) * 0.5)), (normal(5, 8),), ONE),
    Case("commuted", over_linear(lambda y: 3 * (2 * y).mean(1)), (normal(5, 8),), ONE),
    Case("methods", over_linear(lambda y: y.div(2).neg().sum(1, True).multiply(3)), (normal(5, 8),), ONE),
    Case(
        "functions",
        over_linear(lambda y: torch.mul(torch.sum(torch.true_divide(torch.negative(y), 2), 1), 3)),
        (normal(5, 8),),
        ONE,
    ),
    Case(
        "keywords",
        lambda x, w: torch.mul(input=torch.sum(input=torch.matmul(input=x, other=w.t()), dim=-1), other=2),
        XW,
        ONE,
    ),
    Case("leading_dimensions", over_linear(lambda y: y.sum(-1) / 2), (normal(2, 3, 8),), ONE),
    Case("one_dimension", over_linear(lambda y: y.sum(-1) / 2), (normal(8),), ONE),
    Case("empty_batch", over_linear(lambda y: y.sum(-1) / 2), (normal(0, 8),), ONE),
    Case("functional_linear", lambda x, w, b: F.linear(x, w, b).sum(-1), XWB, ONE),
    Case("functional_keywords", lambda x, w, b: F.linear(bias=b, weight=w, input=x).sum(dim=-1), XWB, ONE),
    Case("t_method", lambda x, w: (x @ w.t()).sum(-1), XW, ONE),
    Case("T_attribute", lambda x, w: x.matmul(w.T).sum(-1), XW, ONE),
    Case("mm", lambda x, w: torch.mm(x, w.t()).sum(-1), XW, ONE),
    Case("mm_method", lambda x, w: x.mm(torch.t(w)).mean(-1), XW, ONE),
    Case(
        "aten",
        lambda x, w: torch.ops.aten.sum.dim_IntList(torch.ops.aten.mm(x, torch.ops.aten.t(w)), [1], True),
        XW,
        ONE,
    ),
    Case(
        "transposed_weight_of_unknown_rank", lambda x, w: (x @ w.transpose(0, 1)).sum(-1), XW, ONE, needs_example=True
    ),
    Case("swapaxes", lambda x, w: (x @ torch.swapaxes(w, -1, -2)).sum(-1), XW, ONE, needs_example=True),
    Case("permute", lambda x, w: (x @ w.permute(1, 0)).sum(-1), XW, ONE, needs_example=True),
    Case("mT", lambda x, w: (x @ w.mT).sum(-1), XW, ONE, needs_example=True),
    Case("addmm", lambda x, w, b: torch.addmm(b, x, w.t()).sum(-1), XWB, ONE, needs_example=True),
    Case("addmm_method", lambda x, w, b: b.addmm(x, w.t()).sum(-1), XWB, ONE, needs_example=True),
    Case("matmul_plus_bias", lambda x, w, b: (x @ w.t() + b).sum(-1) / 2, XWB, ONE, needs_example=True),
    Case("bias_plus_matmul", lambda x, w, b: torch.add(b, x @ w.t()).mean(-1), XWB, ONE, needs_example=True),
    Case("in_place", in_place, XW, ONE),
    Case("buffer", Buffered, (normal(5, 8),), ONE),
    Case("divided_by_a_buffer", builds(lambda: Buffered(True)), (normal(5, 8),), ONE),
    Case("sum_read_twice", sum_read_twice, XW, ONE, left=("add", "mul", "truediv")),
    Case("transpose_read_again", transposed_read_again, XW, ONE, left=("mul", "t")),
    Case(
        "two_in_a_row",
        lambda x, w: (x @ w.t()).sum(-1, keepdim=True) * (x @ w.t() / 2).mean(-1, keepdim=True),
        XW,
        {NAME: 2},
        left=("mul",),
    ),
    Case("tied", Tied, (normal(5, 8),), {NAME: 2}, left=("add", "mul")),
    Case("activation_after", over_linear(lambda y: y.sum(-1).relu()), (normal(5, 8),), ONE, left=("relu",)),
]


def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output * 2


REFUSED = [
    Case("product_read_again", read_again, XW, left=(), refused=(NAME, "the value of matmul is also read by output")),
    Case(
        "first_dim",
        over_linear(lambda y: y.sum(0)),
        (normal(5, 8),),
        needs_example=True,
        refused=(NAME, "dim=0 is not the last of 2 dimensions"),
        elsewhere={"optimize": ONE, "symbolic_trace": ONE},
    ),
    Case(
        "sum_of_everything",
        over_linear(lambda y: y.sum()),
        (normal(5, 8),),
        refused=(NAME, "the reduction runs over dim=None"),
    ),
    Case(
        "two_dims",
        over_linear(lambda y: y.sum((0, 1))),
        (normal(5, 8),),
        refused=(NAME, "the reduction runs over dim=(0, 1)"),
    ),
    Case("dim_minus_two", over_linear(lambda y: y.sum(-2)), (normal(5, 8),), refused=(NAME, "dim=-2 is not the last")),
    Case(
        "rounded_division",
        over_linear(lambda y: torch.div(y, 2, rounding_mode="floor").sum(-1)),
        (normal(5, 8),),
        refused=(NAME, "keyword 'rounding_mode'"),
    ),
    Case(
        "sum_in_another_dtype",
        over_linear(lambda y: y.sum(-1, dtype=torch.float32)),
        (normal(5, 8),),
        refused=(NAME, "keyword 'dtype'"),
    ),
    Case(
        "product_not_transposed",
        lambda x, w: (x @ w).sum(-1),
        (normal(5, 8), normal(8, 6)),
        refused=(NAME, "expected t, found the input 'w'"),
    ),
    Case(
        "per_feature_scale",
        PerFeature,
        (normal(5, 8),),
        refused=(NAME, "mul by the attribute 'scale', which is not a scalar"),
    ),
    Case(
        "division_by_zero",
        over_linear(lambda y: (y / 0).sum(-1)),
        (normal(5, 8),),
        refused=(NAME, "division by the number 0"),
    ),
    Case(
        "number_divided_by_product",
        over_linear(lambda y: (2 / y).sum(-1)),
        (normal(5, 8),),
        refused=(NAME, "div by linear"),
    ),
    Case("factor_unknown", lambda x, w, f: (x @ w.t() * f).sum(-1), (*XW, normal(6)), refused=(NAME, "which is not")),
    Case("scalar_input", lambda x, w, f: (x @ w.t() * f).sum(-1), (*XW, scalar(2.0)), ONE, needs_example=True),
    Case(
        "added_activation",
        lambda x, w, y: (x @ w.t() + y).sum(-1),
        (*XW, normal(5, 6)),
        needs_example=True,
        refused=(NAME, "what is added to the product has 2 dimensions"),
    ),
    Case(
        "bias_unknown",
        lambda x, w, b: (x @ w.t() + b).sum(-1),
        XWB,
        elsewhere=dict.fromkeys(("example", "export", "compile_eager", "compile_aot_eager"), ONE),
        refused=(NAME, "is not known before it runs; give example_inputs"),
    ),
    Case("added_number", lambda x, w: (x @ w.t() + 1).sum(-1), XW, refused=(NAME, "bias")),
    Case(
        "addmm_with_beta",
        lambda x, w, b: torch.addmm(b, x, w.t(), beta=2).sum(-1),
        XWB,
        refused=(NAME, "addmm has beta=2"),
    ),
    Case(
        "add_with_alpha",
        lambda x, w, b: torch.add(x @ w.t(), b, alpha=2).sum(-1),
        XWB,
        refused=(NAME, "keyword 'alpha'"),
    ),
    Case(
        "batched_weight",
        lambda x, w: (x @ w.mT).sum(-1),
        (normal(3, 5, 8), normal(3, 6, 8)),
        needs_example=True,
        refused=(NAME, "the weight has 3 dimensions"),
    ),
    Case(
        "weight_of_unknown_rank",
        lambda x, w: (x @ w.mT).sum(-1),
        XW,
        refused=(NAME, "give example_inputs"),
        elsewhere=dict.fromkeys(("example", "export", "compile_eager", "compile_aot_eager"), ONE),
    ),
    Case("weight_changed", weight_changed, XW, refused=(NAME, "in place inside the match")),
    Case(
        "input_changed_through_an_alias",
        input_changed_through_an_alias,
        XW,
        refused=(NAME, "in place inside the match"),
    ),
    Case(
        "hooked",
        over_linear(summed, change=lambda fc: fc.register_forward_hook(hook)),
        (normal(5, 8),),
        refused=(NAME, "forward hooks (hook)"),
        elsewhere=dict.fromkeys(("export", "compile_eager", "compile_aot_eager"), ONE),
    ),
    Case(
        "parametrized",
        over_linear(summed, change=parametrizations.weight_norm),
        (normal(5, 8),),
        refused=(NAME, "parametrizations on weight"),
        elsewhere=dict.fromkeys(("export", "compile_eager", "compile_aot_eager"), ONE),
    ),
    Case("mode_changes", mode_changes, XW, lossy=("symbolic_trace",)),
]


@pytest.mark.parametrize(("case", "door"), through_every_door(POSITIVE))
def test_fused(case: Case, door: str) -> None:
    check(case, door)


@pytest.mark.parametrize(("case", "door"), through_every_door(REFUSED))
def test_refused(case: Case, door: str) -> None:
    check(case, door)


@pytest.mark.parametrize("case", POSITIVE, ids=repr)
def test_half_precision(case: Case) -> None:
    check(case, "example", dtype=torch.bfloat16)


@pytest.mark.parametrize("case", POSITIVE, ids=repr)
def test_autocast(case: Case) -> None:
    check(case, "example", autocast=True)


test_cuda = on_cuda(POSITIVE, "example")
