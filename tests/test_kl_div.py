"""kl_div: every spelling, the logarithm in front of it, every reduction, and what is left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import Case, builds, check, logprobs, normal, on_cuda, probs, through_every_door
from torch import Tensor, nn

ONE = {"kl_div": 1}
MEAN_WARNS = pytest.mark.filterwarnings(
    "ignore:reduction. 'mean' divides:UserWarning", "ignore:size_average and reduce args:UserWarning"
)
pytestmark = MEAN_WARNS


class Loss(nn.Module):
    """nn.KLDivLoss as a submodule, called by position or by keyword."""

    def __init__(self, keywords: tuple[str, ...] = (), **settings: object) -> None:
        super().__init__()
        self.loss = nn.KLDivLoss(**settings)  # type: ignore[arg-type]
        self.keywords = keywords

    def forward(self, p: Tensor, t: Tensor) -> Tensor:
        if self.keywords == ("target", "input"):
            return self.loss(target=t, input=p)
        return self.loss(p, target=t) if self.keywords else self.loss(p, t)


def loss(*keywords: str, **settings: object) -> object:
    return builds(lambda: Loss(keywords, **settings))


def reduced(reduction: str, **settings: bool) -> object:
    return lambda p, t: F.kl_div(p, t, reduction=reduction, **settings)


class HookedLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.KLDivLoss(reduction="sum")
        self.loss.register_forward_hook(doubled)

    def forward(self, p: Tensor, t: Tensor) -> Tensor:
        return self.loss(p, t)


def doubled(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output * 2


def in_place_log(p: Tensor, t: Tensor) -> Tensor:
    q = p * 1.5
    q.log_()
    return F.kl_div(q, t, reduction="sum")


def log_read_again(p: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log(p)
    return F.kl_div(log_p, t, reduction="sum"), log_p.exp()


def probability_changed(p: Tensor, t: Tensor) -> Tensor:
    p = p.detach() * 1
    log_p = p.log()
    p.mul_(2)
    return F.kl_div(log_p, t, reduction="sum") + p.sum()


def target_changed_before(p: Tensor, t: Tensor) -> Tensor:
    t.mul_(0.5)
    return F.kl_div(p, t, reduction="sum")


def target_changed_after(p: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    value = F.kl_div(p.detach(), t.detach() * 1, reduction="none")
    t.mul_(0.5)
    return value, t


def target_changed_through_a_view(p: Tensor, t: Tensor) -> Tensor:
    view = t.view(-1)
    log_p = p.log()
    view.mul_(0.5)
    return F.kl_div(log_p, t, reduction="sum")


def log_is_target_too(p: Tensor) -> Tensor:
    log_p = p.log()
    return F.kl_div(log_p, log_p, reduction="sum", log_target=True)


def log_with_out(p: Tensor, t: Tensor) -> Tensor:
    p = p.detach()
    return F.kl_div(torch.log(p, out=torch.empty_like(p)), t, reduction="sum")


def loss_without_gradient(p: Tensor, t: Tensor) -> Tensor:
    log_p = p.log()
    with torch.no_grad():
        return F.kl_div(log_p, t, reduction="sum")


def odd_entries(reduction: str, log_target: bool) -> object:
    return lambda p, t: F.kl_div(p.log(), t, reduction=reduction, log_target=log_target)


LOG, PLAIN = (logprobs(4, 5), probs(4, 5)), (probs(4, 5), probs(4, 5))
BOTH_LOG = (logprobs(4, 5), logprobs(4, 5))

POSITIVE = [
    *(Case(f"functional_{r}", reduced(r), LOG, ONE) for r in ("none", "sum", "mean", "batchmean")),
    *(Case(f"module_{r}", loss(reduction=r), LOG, ONE) for r in ("none", "sum", "mean", "batchmean")),
    *(
        Case(f"log_target_{r}", reduced(r, log_target=True), BOTH_LOG, ONE)
        for r in ("none", "sum", "mean", "batchmean")
    ),
    Case("module_log_target", loss(reduction="sum", log_target=True), BOTH_LOG, ONE),
    Case("module_keyword_target", loss("target", reduction="sum"), LOG, ONE),
    Case("module_keywords_swapped", loss("target", "input", reduction="sum"), LOG, ONE),
    Case("keywords", lambda p, t: F.kl_div(target=t, input=p, reduction="sum"), LOG, ONE),
    Case("size_average_false", lambda p, t: F.kl_div(p, t, size_average=False), LOG, ONE),
    Case("reduce_false", lambda p, t: F.kl_div(p, t, reduce=False), LOG, ONE),
    Case("reduce_true", lambda p, t: F.kl_div(p, t, reduce=True), LOG, ONE),
    Case("size_average_by_position", lambda p, t: F.kl_div(p, t, False), LOG, ONE),
    Case("module_size_average_false", loss(size_average=False), LOG, ONE),
    Case("torch_kl_div", lambda p, t: torch.kl_div(p, t, 2), LOG, ONE),
    Case("torch_kl_div_keywords", lambda p, t: torch.kl_div(p, t, reduction=1, log_target=True), BOTH_LOG, ONE),
    Case("aten", lambda p, t: torch.ops.aten.kl_div.default(p, t, 0), LOG, ONE),
    Case("log_function", lambda p, t: F.kl_div(torch.log(p), t, reduction="sum"), PLAIN, ONE),
    Case("log_method", lambda p, t: F.kl_div(p.log(), t, reduction="batchmean"), PLAIN, ONE),
    Case("log_in_place", in_place_log, PLAIN, ONE, left=("mul",)),
    Case("log_none", lambda p, t: F.kl_div(p.log(), t, reduction="none"), PLAIN, ONE),
    Case(
        "log_log_target",
        lambda p, t: F.kl_div(p.log(), t, reduction="sum", log_target=True),
        (probs(4, 5), logprobs(4, 5)),
        ONE,
    ),
    Case(
        "log_of_both",
        lambda p, t: F.kl_div(p.log(), t.log(), reduction="sum", log_target=True),
        PLAIN,
        ONE,
        left=("log",),
    ),
    Case(
        "log_softmax_without_softmax",
        lambda s, t: F.kl_div(F.log_softmax(s, -1), t, reduction="sum"),
        (normal(4, 5), probs(4, 5)),
        ONE,
        left=("log_softmax",),
    ),
    Case("broadcast_target", lambda p, t: F.kl_div(p, t, reduction="sum"), (logprobs(4, 5), probs(5)), ONE),
    Case(
        "three_dimensions", lambda p, t: F.kl_div(p, t, reduction="batchmean"), (logprobs(2, 3, 5), probs(2, 3, 5)), ONE
    ),
    Case("transposed", lambda p, t: F.kl_div(p.t(), t.t(), reduction="mean"), LOG, ONE, left=("t", "t")),
    Case("scaled_after", lambda p, t: F.kl_div(p, t, reduction="sum") * 3 / 2, LOG, ONE, left=("mul", "truediv")),
    Case(
        "two_losses",
        lambda p, t: F.kl_div(p, t, reduction="sum") + F.kl_div(p, t * 1, reduction="none").sum(),
        LOG,
        {"kl_div": 2},
        left=("add", "mul", "sum"),
    ),
    Case("target_changed_before", target_changed_before, LOG, ONE, left=("mul_",)),
    Case("target_changed_after", target_changed_after, LOG, ONE, left=("detach", "detach", "mul", "mul_")),
    Case("one_tensor_for_both", lambda p: F.kl_div(p, p, reduction="sum", log_target=True), (logprobs(4, 5),), ONE),
]

REFUSED = [
    # the loss is fused, the log in front of it stays
    Case("log_read_again", log_read_again, PLAIN, ONE, left=("exp", "log")),
    Case("log_is_target_too", log_is_target_too, (probs(4, 5),), ONE, left=("log",)),
    Case("log_with_out", log_with_out, PLAIN, ONE, left=("detach", "empty_like", "log")),
    Case("log_of_a_half", lambda p, t: F.kl_div(torch.log2(p), t, reduction="sum"), PLAIN, ONE, left=("log2",)),
    # nothing is fused
    Case(
        "probability_changed",
        probability_changed,
        PLAIN,
        refused=("kl_div", "mul_ changes mul in place inside the match"),
    ),
    Case(
        "target_changed_through_a_view",
        target_changed_through_a_view,
        PLAIN,
        refused=("kl_div", "mul_ changes reshape in place inside the match"),
    ),
    Case(
        "hooked_module",
        builds(HookedLoss),
        LOG,
        refused=("kl_div", "forward hooks (doubled)"),
        elsewhere={"export": ONE, "compile_eager": ONE, "compile_aot_eager": ONE},
    ),
    Case(
        "grad_mode_changes_inside", loss_without_gradient, PLAIN, lossy=("symbolic_trace",), elsewhere={"export": ONE}
    ),  # export makes a graph of its own of what runs without gradients
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


def test_zero_infinite_and_nan_entries_are_eagers() -> None:
    p = torch.tensor([[0.0, 0.5, 0.5], [1.0, 0.0, 0.0], [0.2, float("nan"), 0.8]])
    t = torch.tensor([[0.0, 0.5, 0.5], [0.5, 0.5, 0.0], [-1.0, 0.5, 0.5]])
    for reduction in ("none", "sum", "mean", "batchmean"):
        for log_target in (False, True):
            case = Case("odd", odd_entries(reduction, log_target), (lambda g: p.clone(), lambda g: t.clone()), ONE)
            check(case, "optimize")
