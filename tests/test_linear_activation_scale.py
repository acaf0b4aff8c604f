"""linear_activation_scale: Linear, one of seven activations, and numbers before and after it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import Case, builds, check, normal, on_cuda, sequential, through_every_door
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

NAME = "linear_activation_scale"
ONE = {NAME: 1}
X = (normal(5, 8),)
DYNAMO = ("export", "compile_eager", "compile_aot_eager")


def linear(bias: bool = True) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(8, 6, bias=bias)


class Issue(nn.Module):
    """Linear, ReLU, divide: as the pattern's own example writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 6)
        self.divisor = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x)) / self.divisor


class Then(nn.Module):
    """nn.Linear, and what happens to its output."""

    def __init__(self, after: Callable[[Tensor], object], change: Callable[[nn.Linear], object] | None = None) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 6)
        self.after = after
        if change is not None:
            change(self.fc)

    def forward(self, x: Tensor) -> object:
        return self.after(self.fc(x))


def then(
    after: Callable[[Tensor], object], change: Callable[[nn.Linear], object] | None = None
) -> Callable[[], nn.Module]:
    return builds(lambda: Then(after, change))


class Dropped(nn.Module):
    """Dropout behind the activation: the mode is the model's own business."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 6)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(F.relu(self.fc(x))) * 2


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(F.relu(self.first(x))))


class Shared(nn.Module):
    """One layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc(F.relu(self.fc(x)) * 0.5))


class HookedActivation(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 6)
        self.act = nn.ReLU()
        getattr(self.act, how)(lambda module, *args: None)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x))


def in_place(y: Tensor) -> Tensor:
    y *= 0.5
    y.mul_(3)
    y.relu_()
    return y / 3


def in_place_read_under_the_old_name(y: Tensor) -> Tensor:
    y.mul_(2)
    F.relu(y, inplace=True)
    return y * 3


def looked_at_before(y: Tensor) -> tuple[Tensor, Tensor]:
    before = y + 1
    y.relu_()
    return y * 2, before


def read_again(y: Tensor) -> tuple[Tensor, Tensor]:
    return F.relu(y), y


def activation_read_again(y: Tensor) -> Tensor:
    a = F.relu(y)
    return a * 2 + a


def input_changed(x: Tensor, w: Tensor) -> Tensor:
    x = x.detach() * 1
    y = F.linear(x, w.detach())
    x.add_(1)
    return F.relu(y) + x.sum()


def input_scaled_before(x: Tensor, w: Tensor) -> Tensor:
    x *= 2
    return F.relu(F.linear(x, w))


def dropped_in_place(x: Tensor, w: Tensor) -> Tensor:
    x = x.detach() * 1
    y = F.linear(x, w.detach())
    F.dropout(x, 1.0, True, True)
    return F.relu(y)


def written_with_out(x: Tensor, w: Tensor) -> Tensor:
    x = x.detach() * 1
    y = F.linear(x, w.detach())
    torch.mul(x, 2, out=x)
    return F.relu(y) + x.sum()


def weight_row_set(x: Tensor, w: Tensor) -> Tensor:
    w = w.detach() * 1
    y = F.linear(x.detach(), w)
    w[0] = 0.0
    return F.relu(y)


def autocast_inside(x: Tensor, w: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = F.linear(x, w)
    return F.relu(y)


def slope_by_value(x: Tensor, w: Tensor, slope: float) -> Tensor:
    return F.leaky_relu(F.linear(x, w), slope)


def changed_behind(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A residual added in place: eager allows it behind activations that do not keep their output for the backward."""
    return lambda y: function(y).add_(1)


FUNCTIONS = {
    "relu": F.relu,
    "torch_relu": torch.relu,
    "relu_method": lambda y: y.relu(),
    "relu_keyword": lambda y: F.relu(input=y),
    "relu_inplace": lambda y: F.relu(y, inplace=True),
    "relu_": lambda y: y.relu_(),
    "torch_relu_": torch.relu_,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
    "silu_inplace": lambda y: F.silu(y, True),
    "sigmoid": torch.sigmoid,
    "sigmoid_method": lambda y: y.sigmoid(),
    "sigmoid_": lambda y: y.sigmoid_(),
    "functional_sigmoid": F.sigmoid,
    "expit": torch.special.expit,
    "tanh": torch.tanh,
    "tanh_method": lambda y: y.tanh(),
    "tanh_": torch.tanh_,
    "functional_tanh": F.tanh,
    "leaky_relu": F.leaky_relu,
    "leaky_relu_slope": lambda y: F.leaky_relu(y, negative_slope=0.2),
    "leaky_relu_inplace": lambda y: F.leaky_relu(y, 0.3, True),
    "leaky_relu_": lambda y: F.leaky_relu_(y, 0.3),
    "hardtanh": F.hardtanh,
    "hardtanh_bounds": lambda y: F.hardtanh(y, -0.5, max_val=2.0),
    "hardtanh_": lambda y: F.hardtanh_(y, -0.5, 0.5),
    "relu6": F.relu6,
    "clamp": lambda y: torch.clamp(y, -1, 1),
    "clamp_min": lambda y: y.clamp(min=0.0),
    "clamp_max": lambda y: y.clip(max=0.5),
    "clamp_min_function": lambda y: torch.clamp_min(y, 0.1),
    "clamp_max_method": lambda y: y.clamp_max(0.1),
    "clamp_": lambda y: y.clamp_(-1.0, 2.0),
    "aten_relu": lambda y: torch.ops.aten.relu.default(y),
    "aten_gelu": lambda y: torch.ops.aten.gelu(y, approximate="tanh"),
    "aten_hardtanh": lambda y: torch.ops.aten.hardtanh.default(y, -2.0, 2.0),
}
MODULES = {
    "ReLU": nn.ReLU,
    "ReLU_inplace": lambda: nn.ReLU(True),
    "GELU": nn.GELU,
    "GELU_tanh": lambda: nn.GELU("tanh"),
    "SiLU": nn.SiLU,
    "SiLU_inplace": lambda: nn.SiLU(inplace=True),
    "Sigmoid": nn.Sigmoid,
    "Tanh": nn.Tanh,
    "LeakyReLU": lambda: nn.LeakyReLU(0.2),
    "LeakyReLU_inplace": lambda: nn.LeakyReLU(0.2, True),
    "Hardtanh": nn.Hardtanh,
    "Hardtanh_bounds": lambda: nn.Hardtanh(-0.5, 1.5),
    "ReLU6": nn.ReLU6,
}

POSITIVE = [
    Case("issue", Issue, X, ONE),
    *(Case(name, then(function), X, ONE) for name, function in FUNCTIONS.items()),
    *(Case(name, sequential(linear(), module), X, ONE) for name, module in MODULES.items()),
    Case("without_bias", sequential(linear(bias=False), nn.ReLU), X, ONE),
    Case("leading_dimensions", sequential(linear(), nn.GELU), (normal(2, 3, 8),), ONE),
    Case("one_dimension", sequential(linear(), nn.SiLU), (normal(8),), ONE),
    Case("scaled_before", then(lambda y: torch.tanh(y * 0.5)), X, ONE),
    Case("scaled_after", then(lambda y: 3 * F.gelu(y)), X, ONE),
    Case("scaled_both", then(lambda y: -(F.silu(-y / 2) * 3)), X, ONE),
    Case("in_place", then(in_place), X, ONE),
    Case("in_place_read_under_the_old_name", then(in_place_read_under_the_old_name), X, ONE),
    Case("functional_linear", lambda x, w, b: F.relu(F.linear(x, w, b)) / 2, (*X, normal(6, 8), normal(6)), ONE),
    Case("matmul", lambda x, w: F.relu(x @ w.t()), (*X, normal(6, 8)), ONE),
    Case(
        "addmm", lambda x, w, b: F.relu(torch.addmm(b, x, w.T)), (*X, normal(6, 8), normal(6)), ONE, needs_example=True
    ),
    Case(
        "matmul_plus_bias",
        lambda x, w, b: F.relu(b + x @ w.t()),
        (*X, normal(6, 8), normal(6)),
        ONE,
        needs_example=True,
    ),
    Case("activation_read_again", then(activation_read_again), X, ONE, left=("add", "mul")),
    *(
        Case(f"{name}_changed_in_place_behind", then(changed_behind(function)), X, ONE, left=("add_",))
        for name, function in (
            ("gelu", F.gelu),
            ("silu", F.silu),
            ("clamp", FUNCTIONS["clamp"]),
            ("hardtanh", F.hardtanh),
        )
    ),
    Case(
        "input_scaled_in_place_before",
        input_scaled_before,
        (*X, normal(6, 8)),
        ONE,
        left=("imul",),
        lossy=("symbolic_trace",),
    ),
    Case("two_in_a_row", sequential(linear(), nn.ReLU, lambda: nn.Linear(6, 4), nn.GELU), X, {NAME: 2}),
    Case(
        "three_in_a_row_in_place",
        sequential(
            linear(),
            lambda: nn.ReLU(True),
            lambda: nn.Linear(6, 6),
            lambda: nn.ReLU(True),
            lambda: nn.Linear(6, 4),
            lambda: nn.ReLU(True),
        ),
        X,
        {NAME: 3},
    ),
    Case("dropout_behind", Dropped, X, ONE, left=("drop", "mul"), modes=(True, False)),
    Case("tied", Tied, X, {NAME: 2}),
    Case("called_twice", Shared, X, {NAME: 2}),
    Case("slope_by_value", slope_by_value, (*X, normal(6, 8), 0.2), ONE, elsewhere={"symbolic_trace": {}}),
    Case(
        "unmatched_neighbours",
        sequential(linear(), nn.ReLU, nn.Softplus, lambda: nn.Linear(6, 3)),
        X,
        ONE,
        left=("2", "3"),
    ),
]


def hooked(how: str) -> Callable[[nn.Linear], object]:
    return lambda fc: getattr(fc, how)(lambda module, *args: None)


REFUSED = [
    Case("read_again", then(read_again), X, refused=(NAME, "the value of fc is also read by output")),
    Case("squared", then(lambda y: F.relu(y * y)), X, refused=(NAME, "mul by")),
    Case(
        "looked_at_before",
        then(looked_at_before),
        X,
        refused=(NAME, "works in place on a value that is also read elsewhere"),
    ),
    Case("other_activation", sequential(linear(), nn.Softplus), X),
    Case("prelu", sequential(linear(), nn.PReLU), X),
    Case(
        "per_feature_scale",
        lambda x, w, s: F.relu(F.linear(x, w) * s),
        (*X, normal(6, 8), normal(6)),
        refused=(NAME, "mul by"),
    ),
    Case(
        "clamp_by_tensor",
        lambda x, w, low: F.linear(x, w).clamp(min=low),
        (*X, normal(6, 8), normal(6)),
        refused=(NAME, "'low' must be a number"),
    ),
    Case(
        "rounded_division",
        then(lambda y: F.relu(torch.div(y, 2, rounding_mode="trunc"))),
        X,
        refused=(NAME, "keyword 'rounding_mode'"),
    ),
    Case(
        "forward_hook",
        then(F.relu, hooked("register_forward_hook")),
        X,
        refused=(NAME, "'fc' has forward hooks"),
        elsewhere=dict.fromkeys(DYNAMO, ONE),
    ),
    Case(
        "forward_pre_hook",
        then(F.relu, hooked("register_forward_pre_hook")),
        X,
        refused=(NAME, "'fc' has forward hooks"),
        elsewhere=dict.fromkeys(DYNAMO, ONE),
    ),
    Case(
        "backward_hook",
        then(F.relu, hooked("register_full_backward_hook")),
        X,
        refused=(NAME, "'fc' has backward hooks"),
        lossy=DYNAMO,
    ),
    Case(
        "hooked_activation",
        builds(lambda: HookedActivation("register_forward_hook")),
        X,
        refused=(NAME, "'act' has forward hooks"),
        elsewhere=dict.fromkeys(DYNAMO, ONE),
    ),
    Case("weight_norm", then(F.relu, weight_norm), X, refused=(NAME, "hooks"), elsewhere=dict.fromkeys(DYNAMO, ONE)),
    Case(
        "parametrized",
        then(F.relu, parametrizations.orthogonal),
        X,
        refused=(NAME, "has parametrizations on weight"),
        lossy=DYNAMO,
    ),
    Case(
        "subclass",
        sequential(lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(8, 6), nn.ReLU),
        X,
        refused=(NAME, "a subclass of Linear that may compute something else"),
        elsewhere=dict.fromkeys(DYNAMO, ONE),
    ),
    Case("bilinear", lambda x, w: F.relu(x @ w), (normal(5, 8), normal(8, 6)), refused=(NAME, "expected t")),
    Case(
        "input_changed", input_changed, (*X, normal(6, 8)), refused=(NAME, "add_ changes mul in place inside the match")
    ),
    Case("dropped_in_place", dropped_in_place, (*X, normal(6, 8)), refused=(NAME, "dropout changes mul in place")),
    Case("written_with_out", written_with_out, (*X, normal(6, 8)), refused=(NAME, "mul_1 changes mul in place")),
    Case("weight_row_set", weight_row_set, (*X, normal(6, 8)), cannot={"symbolic_trace": TypeError}),
    Case("autocast_inside", autocast_inside, (*X, normal(6, 8)), lossy=("symbolic_trace",)),
]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(("case", "door"), through_every_door(POSITIVE))
def test_fused(case: Case, door: str) -> None:
    check(case, door)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(("case", "door"), through_every_door(REFUSED))
def test_refused(case: Case, door: str) -> None:
    check(case, door)


@pytest.mark.parametrize("case", POSITIVE, ids=repr)
def test_half_precision(case: Case) -> None:
    check(case, "example", dtype=torch.bfloat16)


@pytest.mark.parametrize("case", POSITIVE, ids=repr)
def test_autocast(case: Case) -> None:
    check(case, "optimize", autocast=True)


test_cuda = on_cuda(POSITIVE, "example")
