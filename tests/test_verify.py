"""verify=True: wrong replacements are caught, found by bisection, undone and named; nothing of the model changes."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse
from fxfuse.ops.linear_activation_scale import linear_activation_scale
from fxfuse.ops.linear_scale_batchnorm1d import linear_scale_batchnorm1d
from fxfuse.pattern import Pattern, available
from fxfuse.plan import plan_of
from fxfuse.trial import Seen, compare
from fxfuse.verify import _Trial

torch.set_num_threads(1)


# --- wrong ops, planted ----------------------------------------------------------------------------------------------


def planted(name: str, op, like: str = "linear_activation_scale") -> Pattern:
    """A shipped pattern whose replacement calls ``op`` instead."""
    right = available()[like]

    def lower(match, emit):
        new = right.lower(match, emit)
        new.target = op
        return new

    return dataclasses.replace(right, name=name, op=op, lower=lower)


def without_bias(x, weight, bias=None, **others):
    return linear_activation_scale(x, weight, None, **others)


class _SteeperBackward(torch.autograd.Function):
    """The forward is nothing, the gradient a thousandth too large."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return 1.001 * grad


def wrong_gradient(x, weight, bias=None, **others):
    return linear_activation_scale(_SteeperBackward.apply(x), weight, bias, **others)


def raises(x, weight, bias=None, **others):
    raise RuntimeError("no such kernel")


drops_bias = planted("drops_bias", without_bias)


def only_without(pattern: Pattern, features: int) -> Pattern:
    """The pattern, for layers of so many outputs alone."""

    def guard(match):
        return None if match.view.tensor(match["weight"]).shape[0] == features else "another layer"

    return dataclasses.replace(pattern, guards=(*pattern.guards, guard))


class Body(nn.Module):
    """Four replacements; the one of ``c`` is the third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 9), nn.Linear(9, 7), nn.Linear(7, 5)
        self.bn = nn.BatchNorm1d(9)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.b(torch.relu(self.a(x))) * 2)
        return torch.tanh(self.d(F.silu(self.c(y)) / 2))


def seeded(module: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.2, 0.5)
    return module


X = torch.linspace(-2, 2, 48).reshape(8, 6).sin()


def replaced(fused) -> list[str]:
    return [r.pattern for r in fxfuse.report(fused).replacements]


# --- caught, found, named --------------------------------------------------------------------------------------------


def test_a_wrong_replacement_among_good_ones_is_found_undone_and_named():
    model = seeded(Body())
    wrong = only_without(drops_bias, 7)
    right = dataclasses.replace(available()["linear_activation_scale"], guards=(
        *available()["linear_activation_scale"].guards,
        lambda match: "left to the wrong one" if match.view.tensor(match["weight"]).shape[0] == 7 else None,
    ))  # fmt: skip
    patterns = [wrong, right, "linear_scale_batchnorm1d"]
    without = fxfuse.optimize(model, X, patterns=patterns)
    assert len(replaced(without)) == 4 and not torch.allclose(without(X), model(X), atol=1e-2)

    fused = fxfuse.optimize(model, X, patterns=patterns, verify=True)
    report = fxfuse.report(fused)
    (undone,) = report.undone
    assert (undone.pattern, undone.where, undone.operations) == ("drops_bias", "", ("linear", "silu", "div"))
    assert undone.nodes[0] == "c" and undone.error > 1000 * undone.bound > 0
    assert sorted(replaced(fused)) == ["linear_activation_scale"] * 2 + ["linear_scale_batchnorm1d"]
    text = str(report)
    assert "Undone by verification" in text and "drops_bias" in text and f"{undone.error:.3g}" in text
    assert not any(n.pattern == "drops_bias" and "verification" in n.reason for n in report.near_misses)
    for mode in (True, False):
        torch.testing.assert_close(copy.deepcopy(fused).train(mode)(X), copy.deepcopy(model).train(mode)(X))


def test_every_wrong_one_of_several_is_undone():
    fused = fxfuse.optimize(seeded(Body()), X, patterns=[drops_bias, "linear_scale_batchnorm1d"], verify=True)
    report = fxfuse.report(fused)
    assert sorted(u.nodes[0] for u in report.undone) == ["a", "c", "d"]
    assert [r.pattern for r in report.replacements] == ["linear_scale_batchnorm1d"]
    assert report.verified.startswith("Verified on the example inputs in train and eval")


def test_bisection_takes_few_comparisons(monkeypatch):
    def twisted(x, weight, bias=None, **others):
        return linear_activation_scale(x, weight, None if float(weight[0, 0].detach()) == 0.125 else bias, **others)

    model = nn.Sequential(*(m for _ in range(16) for m in (nn.Linear(6, 6), nn.Tanh())))
    with torch.no_grad():
        model[20].weight[0, 0] = 0.125
        for layer in model[::2]:
            layer.bias.fill_(0.3)
    calls, excess = [], _Trial.excess
    monkeypatch.setattr(_Trial, "excess", lambda self, choice: calls.append(choice) or excess(self, choice))
    report = fxfuse.report(fxfuse.optimize(model, X, patterns=[planted("twisted", twisted)], verify=True))
    assert [u.operations for u in report.undone] == [("linear", "tanh")] and len(report.replacements) == 15
    assert "20" in report.undone[0].nodes[0]
    assert len(calls) <= 7  # all of them, none, four halves, all but the guilty one


def test_a_gradient_alone_is_enough():
    model = seeded(nn.Sequential(nn.Linear(6, 5), nn.ReLU()))
    (undone,) = fxfuse.report(fxfuse.optimize(model, X, patterns=[planted("grad", wrong_gradient)], verify=True)).undone
    assert undone.what == "gradient of input 0 (train)" and undone.error > undone.bound


def test_one_mode_is_enough():
    def only_right_in_training(bn, x, weight, bias=None, scale=None, divisor=None, alpha=1.0):
        buffers = bn.running_mean.clone(), bn.running_var.clone()
        affine = bn.weight, bn.bias
        return linear_scale_batchnorm1d(x, weight, bias, scale, divisor, alpha, *affine, *buffers, True, 0.1, bn.eps)

    wrong = planted("batch_statistics", only_right_in_training, "linear_scale_batchnorm1d")
    model = seeded(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)))
    (undone,) = fxfuse.report(fxfuse.optimize(model, X, patterns=[wrong], verify=True)).undone
    assert undone.what.endswith("(train)") and undone.what.startswith("buffer")  # running statistics do not move


def test_an_op_that_raises_is_undone():
    model = seeded(nn.Sequential(nn.Linear(6, 5), nn.ReLU()))
    fused = fxfuse.optimize(model, X, patterns=[planted("broken", raises)], verify=True)
    (undone,) = fxfuse.report(fused).undone
    assert "RuntimeError: no such kernel" in undone.what and math.isnan(undone.bound)
    assert torch.equal(fused(X), model(X))
    assert "not what the original gives" in " ".join(str(fxfuse.report(fused)).split())


def test_functions():
    weight, bias = torch.randn(4, 6), torch.ones(4)

    def function(x):
        return F.relu(F.linear(x, weight, bias))

    fused = fxfuse.optimize(function, X, patterns=[drops_bias], verify=True)
    assert [u.pattern for u in fused.report.undone] == ["drops_bias"] and torch.equal(fused(X), function(X))
    good = fxfuse.optimize(function, X, verify=True)
    assert len(good.report.replacements) == 1 and not good.report.undone
    assert good.report.verified.startswith("Verified on the example inputs: ")


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_graph_modules():
    patterns = [drops_bias, "linear_scale_batchnorm1d"]
    for model in (torch.fx.symbolic_trace(seeded(Body())), torch.export.export(seeded(Body()).eval(), (X,))):
        report = fxfuse.report(fxfuse.optimize(model, X, patterns=patterns, verify=True))
        assert len(report.undone) == 3 and len(report.replacements) == 1


# --- it stays undone -------------------------------------------------------------------------------------------------


class Switched(nn.Module):
    """Its second argument makes another graph."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        y = torch.relu(self.fc(x))
        return y * y if twice else y + 1


def test_it_stays_undone_in_later_graphs_copies_and_pickles():
    fxfuse.register(drops_bias)
    try:
        model = seeded(Switched())
        fused = fxfuse.optimize(model, X, patterns=["drops_bias", "kl_div"], verify=True)
        assert [u.pattern for u in fxfuse.report(fused).undone] == ["drops_bias"] and plan_of(fused) is None
        outer = nn.Sequential(model, nn.Linear(5, 5, bias=False), nn.ReLU())
        fused = fxfuse.optimize(outer, X, patterns=["drops_bias"], verify=True)  # the bias-free one is right
        assert len(fxfuse.report(fused).undone) == 1 and len(fxfuse.report(fused).replacements) == 1
        for again in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            torch.testing.assert_close(again(X), outer(X))
        both = seeded(Two())
        fused = fxfuse.optimize(both, X, patterns=["drops_bias"], verify=True)
        assert len(fxfuse.report(fused).undone) == 1 and plan_of(fused) is not None
        for again in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            for twice in (False, True):
                torch.testing.assert_close(again(X, twice), both(X, twice))
            assert plan_of(again) is not None and any(v.run for vs in plan_of(again).variants.values() for v in vs)
    finally:
        fxfuse.unregister("drops_bias")


class Two(nn.Module):
    """One layer with a bias and one without, in one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 5, bias=False)

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        y = torch.relu(self.b(torch.relu(self.a(x))))
        return y * y if twice else y + 1


def test_a_part_of_what_was_undone_does_not_come_back_in_its_place():
    def function(x):
        return F.linear(x, weight, bias).relu() * 2 * 3 * 4

    weight, bias = torch.randn(4, 6), torch.ones(4)
    report = fxfuse.optimize(function, X, patterns=[drops_bias], verify=True).report
    assert len(report.undone) == 1 and not report.replacements


def test_another_pattern_may_take_its_place():
    wrong = planted("wrong_loss", lambda **arguments: arguments["student"].sum() * 0, "distillation_kl")

    def loss(s, t):
        return F.kl_div(F.log_softmax(s / 2, -1), F.softmax(t / 2, -1), reduction="sum")

    report = fxfuse.optimize(loss, (X, X.flip(0)), patterns=[wrong, "kl_div"], verify=True).report
    assert [u.pattern for u in report.undone] == ["wrong_loss"]
    assert [r.pattern for r in report.replacements] == ["kl_div"]


# --- nothing else changes --------------------------------------------------------------------------------------------


def test_the_model_and_the_process_stay_as_they_were():
    model = seeded(Body())
    model.bn.eval()
    model.a.weight.grad = torch.ones_like(model.a.weight)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    drawn, given = torch.get_rng_state(), X.clone()
    example = given.requires_grad_()
    fused = fxfuse.optimize(model, example, patterns=[drops_bias, "linear_scale_batchnorm1d"], verify=True)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training and not model.bn.training and fused.training and not fused.bn.training
    assert torch.equal(torch.get_rng_state(), drawn) and example.grad is None and torch.equal(example, X)
    assert torch.equal(model.a.weight.grad, torch.ones_like(model.a.weight)) and model.b.weight.grad is None
    assert all(a is b for a, b in zip(model.parameters(), fused.parameters(), strict=True))
    assert all(a is b for a, b in zip(model.buffers(), fused.buffers(), strict=True))


class Odd(nn.Module):
    """Dropout, and outputs that are no floating-point tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(6, 64), nn.Dropout(0.4)

    def forward(self, x: Tensor) -> dict:
        y = self.drop(torch.relu(self.fc(x)))
        return {"logits": y, "best": y.argmax(-1), "name": "odd", "none": None}


def test_dropout_and_other_outputs():
    report = fxfuse.report(fxfuse.optimize(seeded(Odd()), X, verify=True))
    assert len(report.replacements) == 1 and not report.undone and report.verified


class Counting(nn.Module):
    """Integer outputs; the planted op gives other ones."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x)).argmax(-1)


def test_integers_must_be_equal():
    flipped = planted("flipped", lambda x, weight, bias=None, **o: -linear_activation_scale(x, weight, bias, **o))
    (undone,) = fxfuse.report(fxfuse.optimize(seeded(Counting()), X, patterns=[flipped], verify=True)).undone
    assert undone.what == "output (train)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_right_replacements_stay(dtype):
    report = fxfuse.report(fxfuse.optimize(seeded(Body()).to(dtype), X.to(dtype), verify=True))
    assert len(report.replacements) == 4 and not report.undone and report.verified


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype):
    model, x = seeded(nn.Sequential(Odd(), nn.Identity())[:1]).to("cuda", dtype), X.to("cuda", dtype)
    drawn = torch.cuda.get_rng_state()
    report = fxfuse.report(fxfuse.optimize(model, x, verify=True))
    assert len(report.replacements) == 1 and not report.undone and report.verified
    report = fxfuse.report(fxfuse.optimize(seeded(Body()).to("cuda", dtype), x, patterns=[drops_bias], verify=True))
    assert len(report.undone) == 3 and not report.replacements
    assert torch.equal(torch.cuda.get_rng_state(), drawn)


@pytest.mark.parametrize("freeze", [False, True])
def test_right_losses_stay(freeze):
    def losses(s, t, w):
        collapsed = torch.matmul(s, w.t()).div(2).sum(1, keepdim=True) * 3
        loss = F.kl_div(F.log_softmax(s / 4, -1), F.softmax(t / 4, -1), reduction="batchmean") * 16
        return collapsed, loss

    s, t, w = torch.randn(64, 300), torch.randn(64, 300), torch.randn(200, 300)
    report = fxfuse.optimize(losses, (s, t, w), verify=True, freeze=freeze).report
    assert {r.pattern for r in report.replacements} == {"matmul_div_sum_scale", "distillation_kl"} and not report.undone


# --- what cannot be decided ------------------------------------------------------------------------------------------


def test_one_row_is_compared_in_eval_alone():
    report = fxfuse.report(fxfuse.optimize(seeded(Body()).eval(), X[:1], verify=True))
    assert any(n.startswith("Train was not compared: the original raises ValueError") for n in report.notes)
    assert "in eval:" in report.verified


class Written(nn.Module):
    """A dtype in the code, where a trace can follow: no float64."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.fc(x))
        bits = y.detach().view(torch.int32).view(8, 5)
        return y, bits.sign()


def test_a_model_that_does_not_run_in_float64_is_compared_in_its_own_dtype():
    model = seeded(Written())
    report = fxfuse.report(fxfuse.optimize(model, X, verify=True))
    assert sum("does not run in float64" in n for n in report.notes) == 1, "once, not once a mode"
    assert len(report.replacements) == 1 and not report.undone
    report = fxfuse.report(fxfuse.optimize(nn.Sequential(model), X, patterns=[drops_bias], verify=True))
    assert [u.pattern for u in report.undone] == ["drops_bias"] and not report.replacements


class Restless(nn.Module):
    """Never the same result twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.calls = nn.Linear(6, 5), [0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        return torch.relu(self.fc(x))


def test_a_model_that_differs_from_itself_is_said_to():
    class Never(Restless):
        def __deepcopy__(self, memo):
            copied = Never()
            copied.load_state_dict(self.state_dict())
            with torch.no_grad():
                copied.fc.bias += torch.rand(()) + 1
            return copied

    report = fxfuse.report(fxfuse.optimize(seeded(Never()), X, verify=True))
    assert any("Verification could not decide" in n for n in report.notes) and not report.verified


def test_inputs_that_do_not_run_are_said_so():
    with pytest.raises(ValueError, match="do not run through the model"):
        fxfuse.optimize(seeded(Body()), torch.randn(8, 5), verify=True)


# --- the bound -------------------------------------------------------------------------------------------------------


def seen(**values: Tensor) -> Seen:
    return Seen({name.replace("_", " "): value for name, value in values.items()})


def judged(error: float, eagers: float, dtype: torch.dtype = torch.float32) -> bool:
    """Whether an error passes where eager has another, on a large tensor of ones."""
    exact = torch.ones(10_000, dtype=torch.float64)
    noise = torch.randn(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fused, eager = ((exact + e * noise).to(dtype) for e in (error, eagers))
    return compare(seen(output=fused), seen(output=eager), seen(output=exact))[0] is None


def test_the_bound_is_a_quarter_more_than_eagers_error():
    assert judged(1e-4, 1e-4) and judged(1.2e-4, 1e-4) and not judged(1.4e-4, 1e-4)
    assert judged(1e-3, 1e-3) and not judged(2e-3, 1e-3)
    assert judged(0.02, 0.02, torch.bfloat16) and not judged(0.05, 0.02, torch.bfloat16)


def test_small_gradients_are_measured_by_their_own_size():
    exact = torch.full((1000,), 1e-9, dtype=torch.float64)
    right, wrong = exact.float(), exact.float() * 1.01
    assert compare(seen(gradient_a=right), seen(gradient_a=right), seen(gradient_a=exact))[0] is None
    assert compare(seen(gradient_a=wrong), seen(gradient_a=right), seen(gradient_a=exact))[0].what == "gradient a"


def test_a_value_that_cancels_is_measured_by_the_others():
    large, none, rounding = torch.ones(100), torch.zeros(5), torch.full((5,), 1e-8)
    exact = seen(gradient_a=large.double(), gradient_b=none.double())
    eager = seen(gradient_a=large, gradient_b=none)
    assert compare(seen(gradient_a=large, gradient_b=rounding), eager, exact)[0] is None
    assert compare(seen(gradient_a=large, gradient_b=rounding * 1e3), eager, exact)[0].what == "gradient b"


@pytest.mark.parametrize("other", [
    torch.ones(3, dtype=torch.float64), torch.ones(1, 3), torch.tensor([1.0, float("nan"), 1.0]), "text",
])  # fmt: skip
def test_other_kinds_of_values_are_out_of_bounds(other):
    ones = torch.ones(3)
    worst, _ = compare(Seen({"output": other}), seen(output=ones), seen(output=ones.double()))
    assert worst is not None and (math.isnan(worst.bound) or math.isinf(worst.error))


def test_infinities_must_be_where_eagers_are():
    eager = torch.tensor([1.0, float("inf"), float("nan")])
    assert compare(seen(output=eager.clone()), seen(output=eager), seen(output=eager.double()))[0] is None
    other = torch.tensor([1.0, float("-inf"), float("nan")])
    assert compare(seen(output=other), seen(output=eager), seen(output=eager.double()))[0] is not None
