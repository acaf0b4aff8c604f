"""distillation_kl: temperatures anywhere or nowhere, every spelling of the softmaxes, every reduction."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import Case, builds, check, normal, on_cuda, scalar, through_every_door
from torch import Tensor, nn

ONE = {"distillation_kl": 1}
JUST_KL = {"kl_div": 1}
LOGITS = (normal(4, 6), normal(4, 6))
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")


def usual(T: float, reduction: str = "batchmean", log_target: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss as distillation recipes write it."""
    softmax = F.log_softmax if log_target else F.softmax

    def loss(s: Tensor, t: Tensor) -> Tensor:
        target = softmax(t / T, dim=-1)
        return F.kl_div(F.log_softmax(s / T, dim=-1), target, reduction=reduction, log_target=log_target) * (T * T)

    return loss


class Distillation(nn.Module):
    """Modules for everything, the temperature an attribute."""

    def __init__(self, log_target: bool = False, dim: int = -1) -> None:
        super().__init__()
        self.T = 3.0
        self.student = nn.LogSoftmax(dim=dim)
        self.teacher = nn.LogSoftmax(dim=dim) if log_target else nn.Softmax(dim=dim)
        self.loss = nn.KLDivLoss(reduction="batchmean", log_target=log_target)

    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        return self.loss(self.student(s / self.T), self.teacher(t / self.T)) * self.T**2


class TwoHeads(nn.Module):
    """Student and teacher inside the model, the teacher without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(8, 6)
        self.teacher = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        teacher = self.teacher(x).detach()
        return F.kl_div(F.log_softmax(self.student(x) / 2, 1), F.softmax(teacher / 2, 1), reduction="batchmean") * 4


class LearnedTemperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.T = nn.Parameter(torch.tensor(2.0))

    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(s / self.T, -1), F.softmax(t / self.T, -1), reduction="sum") * self.T * self.T


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.softmax = nn.Softmax(dim=-1)
        self.softmax.register_forward_hook(lambda module, args, output: output * 0.5)

    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(s, -1), self.softmax(t), reduction="sum")


def targets_read_again(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    q = F.softmax(t, -1)
    return F.kl_div(F.log_softmax(s, -1), q, reduction="sum"), q


def student_read_again(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    log_p = F.log_softmax(s / 2, -1)
    return F.kl_div(log_p, F.softmax(t / 2, -1), reduction="sum"), log_p.mean()


def student_changed(s: Tensor, t: Tensor) -> Tensor:
    log_p = F.log_softmax(s, -1)
    s.mul_(2)
    return F.kl_div(log_p, F.softmax(t, -1), reduction="sum") + s.sum()


def teacher_without_gradient(s: Tensor, t: Tensor) -> Tensor:
    with torch.no_grad():
        q = F.softmax(t / 2, -1)
    return F.kl_div(F.log_softmax(s / 2, -1), q, reduction="batchmean") * 4


def in_place_temperatures(s: Tensor, t: Tensor) -> Tensor:
    s, t = s + 0, t + 0
    s /= 2
    t.div_(2)
    return F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="sum").mul_(4)


def plain(s: Tensor, t: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction="sum")


POSITIVE = [
    *(Case(f"usual_{r}", usual(2.0, r), LOGITS, ONE) for r in ("none", "sum", "mean", "batchmean")),
    *(Case(f"usual_log_target_{r}", usual(3.0, r, True), LOGITS, ONE) for r in ("none", "sum", "mean", "batchmean")),
    Case("modules", Distillation, LOGITS, ONE),
    Case("modules_log_target", builds(lambda: Distillation(True)), LOGITS, ONE),
    Case("modules_dim_1", builds(lambda: Distillation(dim=1)), LOGITS, ONE),
    Case("no_temperature", plain, LOGITS, ONE),
    Case(
        "student_temperature_alone",
        lambda s, t: F.kl_div(F.log_softmax(s / 2, -1), F.softmax(t, -1), reduction="sum"),
        LOGITS,
        ONE,
    ),
    Case(
        "teacher_temperature_alone",
        lambda s, t: F.kl_div(F.log_softmax(s, -1), F.softmax(t / 2, -1), reduction="sum"),
        LOGITS,
        ONE,
    ),
    Case(
        "two_temperatures",
        lambda s, t: F.kl_div(F.log_softmax(s / 2, -1), F.softmax(t / 4, -1), reduction="mean"),
        LOGITS,
        ONE,
    ),
    Case(
        "factor_alone", lambda s, t: 4 * F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction="sum"), LOGITS, ONE
    ),
    Case(
        "temperature_by_mul",
        lambda s, t: F.kl_div(F.log_softmax(s * 0.5, -1), F.softmax(0.25 * t, -1), reduction="sum"),
        LOGITS,
        ONE,
    ),
    Case("factor_in_steps", lambda s, t: -(plain(s, t) * 2 * 3 / 4), LOGITS, ONE),
    Case(
        "negative_temperature",
        lambda s, t: F.kl_div(F.log_softmax(-s / 2, -1), F.softmax(-t, -1), reduction="sum"),
        LOGITS,
        ONE,
    ),
    Case(
        "methods",
        lambda s, t: F.kl_div(s.div(2).log_softmax(-1), t.div(2).softmax(-1), reduction="sum").mul(4),
        LOGITS,
        ONE,
    ),
    Case(
        "methods_by_keyword",
        lambda s, t: F.kl_div(s.log_softmax(dim=1), t.softmax(dim=1), reduction="sum"),
        LOGITS,
        ONE,
    ),
    Case(
        "torch_functions",
        lambda s, t: F.kl_div(
            torch.log_softmax(torch.div(s, 2), 1), torch.softmax(torch.true_divide(t, 2), 1), reduction="batchmean"
        ),
        LOGITS,
        ONE,
    ),
    Case(
        "special",
        lambda s, t: F.kl_div(torch.special.log_softmax(s, -1), torch.special.softmax(t, -1), reduction="sum"),
        LOGITS,
        ONE,
    ),
    Case(
        "aten",
        lambda s, t: torch.ops.aten.kl_div(torch.ops.aten.log_softmax.int(s, -1), torch.ops.aten.softmax.int(t, -1), 2),
        LOGITS,
        ONE,
    ),
    Case("in_place", in_place_temperatures, LOGITS, ONE, left=("add", "add")),
    Case(
        "detached_softmax",
        lambda s, t: F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1).detach(), reduction="sum"),
        LOGITS,
        ONE,
        left=("detach",),
    ),
    Case(
        "detached_log_softmax",
        lambda s, t: F.kl_div(
            F.log_softmax(s, -1), F.log_softmax(t / 2, -1).detach(), reduction="sum", log_target=True
        ),
        LOGITS,
        ONE,
        left=("detach",),
    ),
    Case("detached_teacher", lambda s, t: plain(s, t.detach()), LOGITS, ONE, left=("detach",)),
    Case("three_dimensions", usual(2.0), (normal(2, 3, 6), normal(2, 3, 6)), ONE),
    Case("self_distillation", lambda s: plain(s, s), (normal(4, 6),), ONE),
    Case("two_losses", lambda s, t: plain(s, t) + plain(t, s), LOGITS, {"distillation_kl": 2}, left=("add",)),
    Case("two_heads", TwoHeads, (normal(4, 8),), ONE, left=("detach", "student", "teacher")),
    Case(
        "not_the_last_dim_unknown_rank",
        lambda s, t: F.kl_div(F.log_softmax(s, 1), F.softmax(t, 1), reduction="sum"),
        (normal(2, 6, 3), normal(2, 6, 3)),
        ONE,
        elsewhere={"example": JUST_KL, "compile_eager": JUST_KL, "export": JUST_KL, "compile_aot_eager": JUST_KL},
    ),
]

REFUSED = [
    Case(
        "targets_read_again",
        targets_read_again,
        LOGITS,
        JUST_KL,
        left=("log_softmax", "softmax"),
        refused=("distillation_kl", "the value of softmax is also read by output"),
    ),
    Case(
        "student_read_again",
        student_read_again,
        LOGITS,
        JUST_KL,
        left=("log_softmax", "mean", "softmax", "truediv", "truediv"),
        refused=("distillation_kl", "the value of log_softmax is also read by mean"),
    ),
    Case(
        "softmax_of_student",
        lambda s, t: F.kl_div(F.softmax(s, -1), F.softmax(t, -1), reduction="sum"),
        LOGITS,
        JUST_KL,
        left=("softmax", "softmax"),
        refused=("distillation_kl", "expected log_softmax, found softmax"),
    ),
    Case(
        "log_target_missing",
        lambda s, t: F.kl_div(F.log_softmax(s, -1), F.log_softmax(t, -1), reduction="sum"),
        LOGITS,
        JUST_KL,
        left=("log_softmax", "log_softmax"),
        refused=("distillation_kl", "kl_div has log_target=False, not True"),
    ),
    Case(
        "other_dims",
        lambda s, t: F.kl_div(F.log_softmax(s, 0), F.softmax(t, 1), reduction="sum"),
        LOGITS,
        JUST_KL,
        left=("log_softmax", "softmax"),
        refused=("distillation_kl", "dim=0 for one side and dim=1 for the other"),
    ),
    Case(
        "first_dim",
        lambda s, t: F.kl_div(F.log_softmax(s, 0), F.softmax(t, 0), reduction="sum"),
        LOGITS,
        JUST_KL,
        left=("log_softmax", "softmax"),
        refused=("distillation_kl", "dim=0 is not the last of 2 dimensions"),
        needs_example=True,
        elsewhere={"optimize": ONE, "symbolic_trace": ONE},
    ),
    Case(
        "softmax_in_another_dtype",
        lambda s, t: F.kl_div(F.log_softmax(s, -1, dtype=torch.float32), F.softmax(t, -1), reduction="sum"),
        LOGITS,
        JUST_KL,
        left=("log_softmax", "softmax"),
        refused=("distillation_kl", "log_softmax has dtype=torch.float32"),
    ),
    Case(
        "temperature_zero",
        lambda s, t: plain(s * 0, t),
        LOGITS,
        JUST_KL,
        left=("log_softmax", "mul", "softmax"),
        refused=("distillation_kl", "the student's logits are scaled by 0.0"),
    ),
    Case("learned_temperature", LearnedTemperature, LOGITS, ONE, left=("mul", "mul", "truediv", "truediv")),
    Case(
        "temperature_is_an_input",
        lambda s, t, T: plain(s / T, t / T),
        (*LOGITS, scalar(2.0)),
        ONE,
        left=("truediv", "truediv"),
    ),
    Case(
        "hooked_softmax",
        Hooked,
        LOGITS,
        JUST_KL,
        left=("log_softmax", "softmax"),
        refused=("distillation_kl", "forward hooks"),
    ),
    Case(
        "student_changed",
        student_changed,
        LOGITS,
        refused=("distillation_kl", "changes the input 's' in place"),
        matches=JUST_KL,
        left=("add", "log_softmax", "mul_", "softmax", "sum"),
    ),
    Case(
        "teacher_without_gradient",
        teacher_without_gradient,
        LOGITS,
        JUST_KL,
        lossy=("symbolic_trace",),
        elsewhere={"optimize": {}, "example": {}},
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


test_cuda = on_cuda(POSITIVE, "optimize")


@pytest.mark.parametrize("log_target", [False, True])
def test_the_kernel_road_hands_temperatures_below_zero_to_the_reference(log_target: bool) -> None:
    """Which road a call takes is settled before its temperatures are known, so forward and backward ask again."""
    from fxfuse.ops import distillation_kl as op

    student, teacher = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    args = (student, teacher, -1, -2.0, -1.5, 0.7, "sum", log_target)
    want = op.reference(*args)
    loss, saved = op.forward(op.KERNEL, *args, wanted=(True, True))
    grads = op.backward(op.KERNEL, torch.tensor(2.0, dtype=torch.float64), saved, *args, wanted=(True, True))
    torch.testing.assert_close(loss, want)
    for got, best in zip(grads, torch.autograd.grad(2 * want, (student, teacher)), strict=True):
        torch.testing.assert_close(got, best)
