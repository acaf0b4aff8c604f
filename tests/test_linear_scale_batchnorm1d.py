"""linear_scale_batchnorm1d: every way to a BatchNorm1d behind a Linear, over steps of training and evaluation."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import Case, builds, check, normal, on_cuda, sequential, through_every_door
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fxfuse

NAME = "linear_scale_batchnorm1d"
ONE = {NAME: 1}
X = (normal(7, 8),)
# Inputs for which no value before a relu behind the match comes near 0, where rounding alone would choose the gradient.
OFF_THE_KINK = (lambda generator: torch.randn(7, 8, generator=generator.manual_seed(509)),)
STEPS = (True, True, False, True)
DYNAMO = ("export", "compile_eager", "compile_aot_eager")


class Net(nn.Module):
    """Linear, something, BatchNorm1d, something."""

    def __init__(
        self,
        between: Callable[..., Tensor] | None = None,
        behind: Callable[[Tensor], object] | None = None,
        bias: bool = True,
        change: Callable[[Net], object] | None = None,
        **settings: object,
    ) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 6, bias=bias)
        self.scale = nn.Parameter(torch.ones(6))
        self.register_buffer("divisor", torch.ones(6))
        self.register_buffer("gain", torch.tensor(1.0))
        self.bn = nn.BatchNorm1d(6, **settings)  # type: ignore[arg-type]
        self.between, self.behind = between, behind
        if change is not None:
            change(self)

    def forward(self, x: Tensor) -> object:
        y = self.fc(x)
        if self.between is not None:
            y = self.between(self, y)
        y = self.bn(y)
        return self.behind(y) if self.behind is not None else y


def net(between: Callable[..., Tensor] | None = None, **settings: object) -> Callable[[], nn.Module]:
    return builds(lambda: Net(between, **settings))  # type: ignore[arg-type]


class LeViT(nn.Module):
    """A Linear over tokens, BatchNorm over the flattened batch, and the shape given back."""

    def __init__(self, restore: bool = True, how: str = "flatten") -> None:
        super().__init__()
        self.linear = nn.Linear(8, 6, bias=False)
        self.bn = nn.BatchNorm1d(6)
        self.restore, self.how = restore, how

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        flat = {
            "flatten": lambda: x.flatten(0, 1),
            "function": lambda: torch.flatten(x, 0, 1),
            "view": lambda: x.view(-1, 6),
            "reshape": lambda: x.reshape(-1, 6),
            "minus_two": lambda: x.flatten(end_dim=-2),
        }[self.how]()
        return self.bn(flat).reshape_as(x) if self.restore else self.bn(flat)


class Functional(nn.Module):
    """F.batch_norm over parameters and buffers of the model's own."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(6, 8)), nn.Parameter(torch.ones(6))
        self.gamma, self.beta = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("var", torch.ones(6))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def functional(function: Callable[..., Tensor]) -> Callable[[], nn.Module]:
    return builds(lambda: Functional(function))


class Two(nn.Module):
    """Two in a row with an activation between; the second Linear shares the first one's weight if asked."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.bn_a, self.bn_b = nn.BatchNorm1d(8), nn.BatchNorm1d(8)
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.bn_b(self.b(F.relu(self.bn_a(self.a(x)))))


class OneNormTwice(nn.Module):
    """One BatchNorm behind two layers: its statistics move twice a step, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(8, 6)
        self.bn = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.a(x)) + self.bn(self.b(x)) * 2


def scaled_in_place(self: Net, y: Tensor) -> Tensor:
    y *= self.scale
    y.div_(2)
    return y


class ReadAgain(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.fc(x)
        return self.bn(y * self.scale), y


def scale_changed(self: Functional, x: Tensor) -> Tensor:
    y = F.linear(x.detach(), self.weight.detach()) * self.var
    self.var.add_(0.5)
    return F.batch_norm(y, None, None, training=True)


class SpatialNorm(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(8, 6), norm()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.fc(x))


POSITIVE = [
    Case("issue", net(lambda m, y: y * m.scale), X, ONE, modes=STEPS),
    Case("nothing_between", net(), X, ONE, modes=STEPS),
    Case("sequence", sequential(lambda: nn.Linear(8, 6), lambda: nn.BatchNorm1d(6)), X, ONE, modes=STEPS),
    Case("without_bias", net(lambda m, y: y * m.scale, bias=False), X, ONE, modes=STEPS),
    Case("not_affine", net(affine=False), X, ONE, modes=STEPS),
    Case("no_running_stats", net(track_running_stats=False), X, ONE, modes=STEPS),
    Case(
        "cumulative_average",
        net(momentum=None),
        X,
        ONE,
        modes=STEPS,
        cannot=dict.fromkeys(DYNAMO[1:], torch._dynamo.exc.UserError),
        lossy=("export",),
    ),
    Case("other_momentum_and_eps", net(momentum=0.3, eps=1e-2), X, ONE, modes=STEPS),
    Case("divided", net(lambda m, y: y / m.divisor), X, ONE, modes=STEPS),
    Case("commuted", net(lambda m, y: m.scale * y), X, ONE),
    Case("number", net(lambda m, y: y * 0.5), X, ONE, modes=(True, False)),
    Case("negative_number", net(lambda m, y: -y / 3), X, ONE, modes=(True, False)),
    Case("scalar_buffer", net(lambda m, y: y * m.gain), X, ONE, modes=(True, False)),
    Case(
        "several",
        net(lambda m, y: m.scale * (y * 2) / m.divisor * m.divisor / m.gain),
        X,
        ONE,
        left=("mul", "mul"),
        modes=STEPS,
    ),
    Case("row_shaped", net(lambda m, y: y * m.scale.view(1, -1)), X, ONE, left=("view",)),
    Case("scaled_in_place", net(scaled_in_place), X, ONE, modes=(True, False)),
    Case("methods", net(lambda m, y: y.mul(m.scale).div(other=m.divisor).neg()), X, ONE),
    Case("functions", net(lambda m, y: torch.multiply(torch.true_divide(y, m.divisor), other=m.scale)), X, ONE),
    Case("relu_behind", net(behind=F.relu), OFF_THE_KINK, ONE, left=("relu",), modes=STEPS),
    Case("relu_in_place_behind", net(behind=lambda y: F.relu(y, inplace=True)), OFF_THE_KINK, ONE, left=("relu",),
         modes=STEPS),
    Case("residual_in_place_behind", net(behind=lambda y: y.add_(1)), X, ONE, left=("add_",), modes=(True, False)),
    Case("output_read_twice", net(behind=lambda y: y * 2 + y), X, ONE, left=("add", "mul")),
    Case("two_in_a_row", Two, X, {NAME: 2}, left=("relu",), modes=STEPS),
    Case("tied", builds(lambda: Two(tied=True)), X, {NAME: 2}, left=("relu",), modes=(True, False)),
    Case("one_norm_twice", OneNormTwice, X, {NAME: 2}, left=("add", "mul"), modes=STEPS),
    *(
        Case(
            f"levit_{how}",
            builds(functools.partial(LeViT, how=how)),
            (normal(2, 5, 8),),
            ONE,
            modes=(True, False),
            left=("flatten",),
        )
        for how in ("flatten", "function", "view", "reshape", "minus_two")
    ),
    Case("levit_not_restored", builds(lambda: LeViT(restore=False)), (normal(2, 5, 8),), ONE, left=("flatten",)),
    Case(
        "functional_eval",
        functional(lambda m, x: F.batch_norm(F.linear(x, m.weight, m.bias), m.mean, m.var, m.gamma, m.beta)),
        X,
        ONE,
    ),
    Case(
        "functional_training",
        functional(
            lambda m, x: F.batch_norm(
                F.linear(x, m.weight), m.mean, m.var, m.gamma, m.beta, training=True, momentum=0.2, eps=1e-3
            )
        ),
        X,
        ONE,
        modes=(True, True),
    ),
    Case(
        "functional_no_stats",
        functional(lambda m, x: F.batch_norm(F.linear(x, m.weight), None, None, training=True)),
        X,
        ONE,
    ),
    Case(
        "functional_mode_of_the_module",
        functional(
            lambda m, x: F.batch_norm(
                F.linear(x, m.weight) * m.beta, m.mean, m.var, weight=m.gamma, training=m.training
            )
        ),
        X,
        ONE,
        modes=(True, False, True),
        lossy=("symbolic_trace",),
    ),
    Case(
        "torch_batch_norm",
        functional(
            lambda m, x: torch.batch_norm(x @ m.weight.t(), m.gamma, m.beta, m.mean, m.var, True, 0.1, 1e-5, False)
        ),
        X,
        ONE,
        modes=(True, True),
    ),
    Case("addmm", functional(lambda m, x: F.batch_norm(torch.addmm(m.bias, x, m.weight.t()), m.mean, m.var)), X, ONE),
    Case(
        "matmul_plus_bias",
        functional(lambda m, x: F.batch_norm(m.bias + torch.matmul(x, m.weight.t()), m.mean, m.var)),
        X,
        ONE,
    ),
    Case(
        "not_two_dimensions_unknown",
        net(),
        (normal(3, 6, 8),),
        ONE,
        modes=(True, False),
        elsewhere={d: {} for d in ("example", *DYNAMO)},
    ),
]

REFUSED = [
    Case("read_again", builds(ReadAgain), X, refused=(NAME, "the value of fc is also read by output")),
    Case("squared", net(lambda m, y: y * y), X, refused=(NAME, "mul reads the value of fc twice")),
    Case(
        "scale_changed",
        functional(scale_changed),
        X,
        lossy=("symbolic_trace",),
        refused=(NAME, "add_ changes the attribute 'var' in place"),
    ),
    Case(
        "three_dimensions",
        net(),
        (normal(3, 6, 8),),
        needs_example=True,
        modes=(True, False),
        refused=(NAME, "BatchNorm1d reads 3 dimensions here (N×C×L), not 2"),
        elsewhere=dict.fromkeys(("optimize", "symbolic_trace"), ONE),
    ),
    Case(
        "view_to_other_features",
        net(lambda m, y: y.view(-1, 2, 3).reshape(-1, 6)),
        X,
        left=(),
        refused=(NAME, "found reshape"),
    ),
    Case("added_behind", net(lambda m, y: y + m.scale), X, refused=(NAME, "expected")),
    Case(
        "rounded_division",
        net(lambda m, y: torch.div(y, m.divisor, rounding_mode="floor")),
        X,
        refused=(NAME, "keyword 'rounding_mode'"),
    ),
    Case(
        "activation_between",
        net(lambda m, y: F.relu(y)),
        X,
        {"linear_activation_scale": 1},
        left=("bn",),
        refused=(NAME, "found relu"),
    ),
    Case(
        "scale_per_row",
        functional(lambda m, x: F.batch_norm(F.linear(x, m.weight) * x[:, :1], m.mean, m.var)),
        X,
        needs_example=True,
        refused=(NAME, "it is not per channel"),
        elsewhere=dict.fromkeys(("optimize", "symbolic_trace"), ONE),
    ),
    Case(
        "hooked_linear",
        net(change=lambda m: m.fc.register_forward_hook(lambda *a: None)),
        X,
        refused=(NAME, "'fc' has forward hooks"),
        elsewhere=dict.fromkeys(DYNAMO, ONE),
    ),
    Case(
        "hooked_norm",
        net(change=lambda m: m.bn.register_forward_pre_hook(lambda *a: None)),
        X,
        refused=(NAME, "'bn' has forward hooks"),
        elsewhere=dict.fromkeys(DYNAMO, ONE),
    ),
    Case(
        "backward_hook",
        net(change=lambda m: m.bn.register_full_backward_hook(lambda *a: None)),
        X,
        refused=(NAME, "'bn' has backward hooks"),
        lossy=DYNAMO,
    ),
    Case(
        "parametrized",
        net(change=lambda m: parametrizations.weight_norm(m.fc)),
        X,
        refused=(NAME, "parametrizations"),
        elsewhere=dict.fromkeys(DYNAMO, ONE),
    ),
    Case(
        "sync_batchnorm",
        builds(lambda: SpatialNorm(lambda: nn.SyncBatchNorm(6))),
        X,
        modes=(False,),
        refused=(NAME, "is a SyncBatchNorm, not a BatchNorm1d"),
        elsewhere=dict.fromkeys(DYNAMO, ONE),
    ),
    Case("layer_norm", builds(lambda: SpatialNorm(lambda: nn.LayerNorm(6))), X),
    Case("instance_norm", builds(lambda: SpatialNorm(lambda: nn.InstanceNorm1d(5, affine=True))), (normal(3, 5, 8),)),
    Case(
        "added_activation",
        functional(lambda m, x: F.batch_norm(x @ m.weight.t() + F.linear(x, m.weight), m.mean, m.var)),
        X,
        needs_example=True,
        refused=(NAME, "what is added to the product has 2 dimensions"),
    ),
]


@pytest.mark.parametrize(("case", "door"), through_every_door(POSITIVE))
def test_fused(case: Case, door: str) -> None:
    check(case, door)


@pytest.mark.parametrize(("case", "door"), through_every_door(REFUSED))
def test_refused(case: Case, door: str) -> None:
    check(case, door)


@pytest.mark.parametrize("case", POSITIVE, ids=repr)
def test_half_precision(case: Case) -> None:
    check(case, "optimize", dtype=torch.bfloat16)


@pytest.mark.parametrize("case", POSITIVE, ids=repr)
def test_autocast(case: Case) -> None:
    check(case, "optimize", autocast=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_relu_cases_stay_off_the_kink(dtype: torch.dtype) -> None:
    """Twenty units of bfloat16 away, so that a gradient of the wrong side is a wrong gradient."""
    case = Case("without relu", net(), OFF_THE_KINK)
    model = case.build(dtype).double()
    for training in STEPS:
        before_relu = model.train(training)(*[v.double() for v in case.values(dtype)])
        assert before_relu.abs().min() > 20 * 2**-9


test_cuda = on_cuda(POSITIVE, "optimize")


def test_columns_whose_mean_dwarfs_their_spread() -> None:
    """The variance is not taken as the mean of squares less the square of the mean."""
    far = Case(
        "far",
        sequential(lambda: nn.Linear(8, 6), lambda: nn.BatchNorm1d(6)),
        (lambda g: torch.randn(64, 8, generator=g) * 1e-2 + 1e3,),
        ONE,
        modes=(True, True),
    )
    check(far, "optimize")


def test_one_row_in_training_raises_what_eager_raises() -> None:
    model = Net().train()
    with pytest.raises(ValueError, match="more than 1 value per channel") as eager:
        model(torch.randn(1, 8))
    with pytest.raises(ValueError, match="more than 1 value per channel") as fused:
        fxfuse.optimize(model)(torch.randn(1, 8))
    assert str(fused.value) == str(eager.value)


def test_the_mode_is_read_when_it_runs_and_only_there() -> None:
    """train() and eval() of the result, of one of its parts, and of the original do not touch one another."""
    model = Net().train()
    fused = fxfuse.optimize(model)
    fused.eval()
    assert model.bn.training and not fused.bn.training
    x = torch.randn(7, 8)
    tracked = int(model.bn.num_batches_tracked)
    fused(x)
    assert int(fused.bn.num_batches_tracked) == tracked
    fused.bn.train()
    fused(x)
    assert int(fused.bn.num_batches_tracked) == tracked + 1
    assert fused.bn.running_mean is model.bn.running_mean
