"""Finding and replacing: which match wins, what is touched, what a mutation forbids, fuel and switches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxfuse
from fxfuse import Pattern
from fxfuse.emit import Emit
from fxfuse.match import Chain, op, variables
from fxfuse.pattern import select
from fxfuse.rewrite import Fuel, find, replace
from fxfuse.view import View

x, y, w = variables("x y w")


def log_relu(x: Tensor) -> Tensor:
    return torch.relu(torch.log(x))


def fused_add(x: Tensor, y: Tensor) -> Tensor:
    return torch.add(x, y)


LOG_RELU = Pattern("log_relu", op.relu(op.log(x)), log_relu)
ADD = Pattern("add", op.add(x, y), fused_add)


def rewritten(function: Callable[..., Any], *patterns: Pattern) -> tuple[fx.GraphModule, Any]:
    traced = fx.symbolic_trace(function)
    found = find(View(traced.graph, traced), patterns)
    for match in found.matches:
        replace(traced.graph, match, next(p for p in patterns if p.name == match.pattern))
    traced.graph.lint()
    traced.recompile()
    return traced, found


def targets(traced: fx.GraphModule) -> list[str]:
    return [getattr(n.target, "__name__", n.target) for n in traced.graph.nodes if n.op.startswith("call")]


def test_only_what_matches_is_replaced_and_nothing_else_is_touched() -> None:
    def function(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(F.relu(torch.log(a)) * b)

    traced = fx.symbolic_trace(function)
    kept = [n for n in traced.graph.nodes if n.name in ("a", "b", "mul", "exp", "output")]
    traced.graph.find_nodes(op="call_function", target=torch.exp)[0].meta["mine"] = 1
    found = find(View(traced.graph, traced), (LOG_RELU,))
    new = replace(traced.graph, found.matches[0], LOG_RELU)
    assert [n for n in traced.graph.nodes if n is not new] == kept
    assert targets(traced) == ["log_relu", "mul", "exp"]
    assert traced.graph.find_nodes(op="call_function", target=torch.exp)[0].meta["mine"] == 1
    assert new.meta["fxfuse"] == "log_relu"


def test_matches_that_feed_one_another_are_all_replaced() -> None:
    def function(a: Tensor) -> Tensor:
        for _ in range(3):
            a = F.relu(torch.log(a))
        return a

    traced, found = rewritten(function, LOG_RELU)
    assert len(found.matches) == 3 and targets(traced) == ["log_relu"] * 3
    value = torch.rand(5) * 1e30
    torch.testing.assert_close(traced(value), function(value))


def test_in_place_matches_that_feed_one_another_are_all_replaced() -> None:
    def function(a: Tensor) -> Tensor:
        a = a * 1
        for _ in range(3):
            a.log_()
            F.relu(a, inplace=True)
        return a

    traced, found = rewritten(function, LOG_RELU)
    assert len(found.matches) == 3 and targets(traced) == ["mul"] + ["log_relu"] * 3
    value = torch.rand(5) * 1e30
    torch.testing.assert_close(traced(value), function(value))


@pytest.mark.parametrize(
    "function",
    [
        lambda a: (lambda r: (r.mul_(2), r))(F.relu(torch.log(a))),
        lambda a: (lambda r: (r.mul_(2), r.add_(1), r + 1, r))(F.relu(torch.log(a))),
        lambda a: (lambda r: (r.log_(), F.relu(r, inplace=True), r.mul_(2), r * 3, r)[3:])(a * 1),
    ],
)
def test_what_changes_the_new_value_in_place_changes_it_under_every_name(function: Callable[..., Any]) -> None:
    traced, found = rewritten(function, LOG_RELU)
    assert len(found.matches) == 1 and "relu" not in targets(traced)
    value = torch.rand(5) + 1
    torch.testing.assert_close(traced(value.clone()), function(value.clone()))


def test_the_outermost_match_wins_and_then_the_larger() -> None:
    inner = Pattern("inner", op.log(x), torch.log)
    larger = Pattern("larger", op.relu(op.log(x)), log_relu)
    smaller = Pattern("smaller", op.relu(x), torch.relu)
    _, found = rewritten(lambda a: F.relu(torch.log(a)), inner, smaller, larger)
    assert [m.pattern for m in found.matches] == ["larger"]


def test_a_match_does_not_overlap_another() -> None:
    triple = Pattern("triple", op.add(op.add(x, y), w), lambda x, y, w: x + y + w)
    _, found = rewritten(lambda a, b: ((a + b) + a) + b, triple)
    covered = [n for m in found.matches for n in m.nodes]
    assert len(covered) == len(set(covered)) == 2


def test_a_guard_may_refuse_and_says_why() -> None:
    picky = Pattern("picky", op.relu(op.log(x)), log_relu, guards=(lambda match: "not on a weekday",))
    traced, found = rewritten(lambda a: F.relu(torch.log(a)), picky)
    assert not found.matches and targets(traced) == ["log", "relu"]
    assert [m.reason for m in found.misses] == ["not on a weekday"]


def test_the_caller_has_the_last_word() -> None:
    traced = fx.symbolic_trace(lambda a: F.relu(torch.log(a)))
    found = find(View(traced.graph, traced), (LOG_RELU,), allow=lambda match, pattern: f"{pattern.name} is not wanted")
    assert not found.matches and found.misses[0].reason == "log_relu is not wanted"


# --- memory --------------------------------------------------------------------------------------------------------


def changed_between(a: Tensor) -> Tensor:
    y = torch.log(a)
    a.add_(1)
    return F.relu(y) + a


def changed_through_a_view(a: Tensor) -> Tensor:
    part = a[0]
    y = torch.log(a)
    part.zero_()
    return F.relu(y)


def changed_by_a_function(a: Tensor) -> Tensor:
    y = torch.log(a)
    F.threshold(a, 0.5, 0.0, inplace=True)
    return F.relu(y)


@pytest.mark.parametrize("function", [changed_between, changed_through_a_view, changed_by_a_function])
def test_an_input_that_changes_inside_forbids_the_match(function: Callable[..., Any]) -> None:
    traced, found = rewritten(function, LOG_RELU)
    assert not found.matches and any("in place inside the match" in m.reason for m in found.misses)
    value = torch.rand(3, 3) + 0.5
    torch.testing.assert_close(traced(value.clone()), function(value.clone()))


def test_a_change_of_something_else_does_not() -> None:
    def function(a: Tensor, b: Tensor) -> Tensor:
        y = torch.log(a)
        b.add_(1)
        return F.relu(y) + b

    traced, found = rewritten(function, LOG_RELU)
    assert len(found.matches) == 1
    a, b = torch.rand(3), torch.rand(3)
    torch.testing.assert_close(traced(a, b.clone()), function(a, b.clone()))


@pytest.mark.parametrize(
    "function",
    [
        lambda a: (a.add_(1), F.relu(torch.log(a)))[1],
        lambda a: (F.relu(torch.log(a)), a.add_(1))[0],
    ],
)
def test_changes_before_and_behind_do_not(function: Callable[..., Any]) -> None:
    traced, found = rewritten(function, LOG_RELU)
    assert len(found.matches) == 1
    value = torch.rand(3)
    torch.testing.assert_close(traced(value.clone()), function(value.clone()))


def test_a_change_of_mode_inside_forbids_the_match() -> None:
    graph = fx.Graph()
    a = graph.placeholder("a")
    log = graph.call_function(torch.log, (a,))
    graph.call_function(torch._C._set_grad_enabled, (False,))
    graph.output(graph.call_function(torch.relu, (log,)))
    found = find(View(graph, None), (LOG_RELU,))
    assert not found.matches
    assert "changes the grad or autocast mode inside the match" in found.misses[0].reason


# --- writing -------------------------------------------------------------------------------------------------------


def test_numbers_of_a_chain_become_one() -> None:
    scaled = Pattern(
        "scaled",
        Chain("scales", op.log(x), "number"),
        torch.log,
        lower=lambda match, emit: emit.call(
            torch.mul, input=emit.call(torch.log, input=match["x"]), other=emit.number(match["scales"])
        ),
    )
    traced, _ = rewritten(lambda a: -(torch.log(a) * 3 / 2) / 4, scaled)
    value = torch.rand(5)
    torch.testing.assert_close(traced(value), -(torch.log(value) * 3 / 2) / 4)
    assert traced.graph.find_nodes(op="call_function", target=torch.mul)[0].kwargs["other"] == -0.375


def test_the_reciprocal_of_a_chain() -> None:
    match = find(
        View(fx.symbolic_trace(lambda a: torch.log(a) * 4 / 2).graph, None),
        (Pattern("p", Chain("scales", op.log(x), "number"), torch.log),),
    ).matches[0]
    emit = Emit(match.root.graph, {})
    assert emit.number(match["scales"]) == 2.0 and emit.number(match["scales"], inverse=True) == 0.5


# --- switches ------------------------------------------------------------------------------------------------------


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.BatchNorm1d(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 9])
def test_fuel_makes_so_many_replacements_and_no_more(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSE_LIMIT", str(limit))
    model = Three().eval()
    fused = fxfuse.optimize(model)
    report = fxfuse.report(fused)
    assert len(report.replacements) == min(limit, 3)
    if limit < 3:
        assert any(f"FXFUSE_LIMIT={limit} replacements are used up" in m.reason for m in report.near_misses)
    value = torch.randn(2, 4)
    torch.testing.assert_close(fused(value), model(value))
    assert len(fxfuse.report(fxfuse.optimize(Three())).replacements) == max(0, min(limit - 3, 3))


def test_fuel_must_be_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSE_LIMIT", "all")
    with pytest.raises(ValueError, match="FXFUSE_LIMIT must be a whole number, not 'all'"):
        Fuel.take()


@pytest.mark.parametrize(
    ("off", "left"),
    [
        ("linear_activation_scale", {"linear_scale_batchnorm1d"}),
        ("linear_scale_batchnorm1d", {"linear_activation_scale"}),
        (" linear_scale_batchnorm1d , linear_activation_scale,", set()),
        ("", {"linear_activation_scale", "linear_scale_batchnorm1d"}),
    ],
)
def test_patterns_can_be_turned_off(off: str, left: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSE_DISABLE", off)
    assert {r.pattern for r in fxfuse.report(fxfuse.optimize(Three())).replacements} == left


def test_patterns_can_be_chosen() -> None:
    chosen = fxfuse.report(fxfuse.optimize(Three(), patterns=["linear_activation_scale"])).replacements
    assert {r.pattern for r in chosen} == {"linear_activation_scale"}
    with pytest.raises(ValueError, match=r"no pattern is named 'linear'; there are: .*kl_div"):
        select(["linear"])
    with pytest.raises(TypeError, match=r"patterns are names or fxfuse\.Pattern objects, not int"):
        select([3])


def test_the_transpose_of_a_weight_of_unknown_rank() -> None:
    """`.T` is matched before the rank is known; the op means what `.T` means for every rank."""

    def summed(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (torch.matmul(x, w.T) / 2).sum(-1)

    fused = fxfuse.optimize(summed)
    assert [r.pattern for r in fused.report.replacements] == ["matmul_div_sum_scale"]
    for shape in ((4, 5), (4, 5, 3)):
        w = torch.randn(shape)
        x = torch.randn(2, w.T.shape[-2])
        torch.testing.assert_close(fused(x, w), summed(x, w))
