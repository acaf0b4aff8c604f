"""Expressions, the matcher, its reasons, and how much work it does."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxfuse import Pattern
from fxfuse.expression import heads, names
from fxfuse.match import Chain, Either, Match, Miss, Var, matcher, number, op, variables
from fxfuse.pattern import select
from fxfuse.rewrite import find
from fxfuse.view import View

x, w, b, y = variables("x w b y")


def attempt(expression: Any, function: Callable[..., Any], at: str) -> Match | Miss:
    view = View(fx.Tracer().trace(function), None)
    root = next(n for n in view.graph.nodes if n.name == at)
    return matcher("test", expression, view)(root)


# --- expressions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: op.convolve(x), "no operation 'convolve' in the vocabulary"),
        (lambda: op.linear(x), "op.linear needs 'weight'"),
        (lambda: op.linear(x, w, b, y), "op.linear takes"),
        (lambda: op.linear(x, w, scale=b), "no free parameter 'scale'"),
        (lambda: op.linear(x, w, weight=b), "no free parameter 'weight'"),
        (lambda: heads(x), "starts with an operation"),
        (lambda: heads(Either((op.relu(x), x))), "starts with an operation"),
    ],
)
def test_a_malformed_expression_fails_when_it_is_written(build: Callable[[], Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build()


@pytest.mark.parametrize(
    ("settings", "error", "reason"),
    [
        ({"expression": x}, ValueError, "pattern 'p': a pattern's expression starts with an operation"),
        ({"op": "relu"}, TypeError, "pattern 'p': op must be callable"),
        ({"guards": ("rank",)}, TypeError, "a guard must be callable"),
        ({"name": "my pattern"}, ValueError, "must be an identifier"),
    ],
)
def test_a_malformed_pattern_fails_when_it_is_made(
    settings: dict[str, Any], error: type[Exception], reason: str
) -> None:
    fine: dict[str, Any] = {"name": "p", "expression": op.relu(x), "op": torch.relu}
    Pattern(**fine)
    with pytest.raises(error, match=reason):
        Pattern(**{**fine, **settings})


def test_an_expression_knows_its_heads_and_names() -> None:
    expression = Chain("scales", Either((op.sum(op.matmul(x, w), Var("dim")), op.relu(y))))
    assert heads(expression) == {"sum", "relu", "mul", "div", "neg"}
    assert names(expression) == {"scales", "x", "w", "dim", "y"}


# --- matching ------------------------------------------------------------------------------------------------------


def test_a_match_binds_what_it_found() -> None:
    found = attempt(op.relu(op.linear(x, w, b)), lambda x, w: F.relu(F.linear(x, w)), "relu")
    assert isinstance(found, Match)
    assert found["x"].name == "x" and found["w"].name == "w" and found["b"] is None
    assert [n.name for n in found.nodes] == ["relu", "linear"]
    assert found.get("nothing", 3) == 3


def test_operands_commute_where_the_operation_does() -> None:
    expression = op.mul(op.log(x), y)
    assert isinstance(attempt(expression, lambda x, y: y * x.log(), "mul"), Match)
    assert isinstance(attempt(expression, lambda x, y: x.log() * y, "mul"), Match)
    assert isinstance(attempt(op.div(op.log(x), y), lambda x, y: y / x.log(), "truediv"), Miss)


def test_a_failed_order_leaves_nothing_bound() -> None:
    """The first order binds y before it fails; the second must not see that."""
    expression = op.mul(y, op.log(x))
    found = attempt(expression, lambda x, y: x.log() * y, "mul")
    assert isinstance(found, Match) and found["y"].name == "y" and [n.name for n in found.nodes] == ["mul", "log"]


def test_one_name_is_one_value() -> None:
    expression = op.add(op.log(x), op.neg(x))
    assert isinstance(attempt(expression, lambda x, y: x.log() + -x, "add"), Match)
    miss = attempt(expression, lambda x, y: x.log() + -y, "add")
    assert isinstance(miss, Miss) and "'x' is the input 'x' and also the input 'y'" in miss.reason


def test_a_number_is_a_number() -> None:
    expression = op.leaky_relu(x, number("slope"))
    found = attempt(expression, lambda x: F.leaky_relu(x, 0.3), "leaky_relu")
    assert isinstance(found, Match) and found["slope"] == 0.3
    miss = attempt(op.clamp(x, number("low"), Var("high")), lambda x, y: torch.clamp(x, y), "clamp")
    assert isinstance(miss, Miss) and "'low' must be a number, found the input 'y'" in miss.reason


def test_a_parameter_left_out_must_have_its_default() -> None:
    miss = attempt(op.sum(x, -1), lambda x: x.sum(-1, keepdim=True), "sum_1")
    assert isinstance(miss, Miss) and "sum has keepdim=True" in miss.reason


def test_a_constant_must_be_that_constant() -> None:
    assert isinstance(attempt(op.softmax(x, -1), lambda x: F.softmax(x, -1), "softmax"), Match)
    miss = attempt(op.softmax(x, -1), lambda x: F.softmax(x, 1), "softmax")
    assert isinstance(miss, Miss) and miss.reason == "softmax has dim=1, not -1"


def test_an_inner_value_must_be_private_and_the_root_need_not() -> None:
    def function(x: Tensor) -> Any:
        a = x.log()
        c = F.relu(a)
        return a + c, c * c

    miss = attempt(op.relu(op.log(x)), function, "relu")
    assert isinstance(miss, Miss) and miss.reason == "the value of log is also read by add"
    assert isinstance(attempt(op.relu(x), function, "relu"), Match)
    assert isinstance(attempt(op.relu(op.log(x, shared=True)), function, "relu"), Match)


def test_an_inner_value_read_twice_by_one_node_is_not_private() -> None:
    miss = attempt(op.mul(op.log(x), y), lambda x: (lambda a: a * a)(x.log()), "mul")
    assert isinstance(miss, Miss) and miss.reason == "mul reads the value of log twice"


def test_the_deepest_reason_is_kept() -> None:
    expression = Either((op.relu(op.log(x)), op.relu(op.sigmoid(op.log(x)))))
    miss = attempt(expression, lambda x: F.relu(x.exp().sigmoid()), "relu")
    assert isinstance(miss, Miss) and "expected log, found exp" in miss.reason and miss.node.name == "exp"


# --- chains --------------------------------------------------------------------------------------------------------


def test_a_chain_lists_its_steps_inside_out() -> None:
    found = attempt(Chain("scales", op.log(x)), lambda x, y: -(y * (x.log() / 2)), "neg")
    assert isinstance(found, Match)
    assert [(s.op, getattr(s.factor, "name", s.factor)) for s in found["scales"]] == [
        ("div", 2),
        ("mul", "y"),
        ("neg", None),
    ]


def test_no_step_is_a_chain_too() -> None:
    found = attempt(Chain("scales", op.log(x)), lambda x: x.log(), "log")
    assert isinstance(found, Match) and found["scales"] == []


def test_factors_are_what_the_chain_takes() -> None:
    def run(factors: str, function: Callable[..., Any]) -> Match | Miss:
        return attempt(Chain("scales", op.log(x), factors), function, "mul")

    assert isinstance(run("any", lambda x, y: x.log() * y), Match)
    miss = run("number", lambda x, y: x.log() * y)
    assert isinstance(miss, Miss) and "not known to be a number before it runs" in miss.reason
    miss = run("number", lambda x: x.log() / 0 * 2)  # a reciprocal of it there is not
    assert isinstance(miss, Miss) and "division by the number 0" in miss.reason


def test_a_number_is_not_divided_by_a_chain() -> None:
    assert isinstance(attempt(Chain("scales", op.log(x), "number"), lambda x: 2 / x.log(), "truediv"), Miss)


def test_what_failed_inside_may_still_be_a_root() -> None:
    """The sum has two readers, so neither product of it matches; tried by itself it does."""
    view = View(fx.Tracer().trace(lambda x: (lambda s: s * 2 + s * 3)(x.log())), None)
    tries = matcher("test", Chain("scales", op.log(x)), view)
    results = {n.name: tries(n) for n in reversed(list(view.graph.nodes)) if n in view.operations}
    assert isinstance(results["mul"], Miss) and isinstance(results["mul_1"], Miss)
    assert isinstance(results["log"], Match)


@pytest.mark.parametrize("length", [10, 32, 50])
def test_chains_are_followed_to_a_length(length: int) -> None:
    def function(x: Tensor) -> Tensor:
        x = x.log()
        for _ in range(length):
            x = x * 2
        return x

    view = View(fx.Tracer().trace(function), None)
    tries = matcher("test", Chain("scales", op.log(x)), view)
    scalings = [n for n in view.graph.nodes if n.target is operator.mul]
    longest = max((k for k, n in list(enumerate(scalings, 1))[::-1] if isinstance(tries(n), Match)), default=0)
    assert longest == min(length, 32)


# --- the amount of work --------------------------------------------------------------------------------------------


def network(kind: str, size: int) -> tuple[fx.Graph, nn.Module | None]:
    """A graph of about ``size`` nodes of one kind."""
    graph, root = fx.Graph(), nn.Module()
    root.fc, root.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)
    first = value = graph.placeholder("x")
    count = 0
    while count < size:
        if kind == "scalings":
            value = graph.call_function(operator.mul, (value, 2.0))
        elif kind == "in place":
            value = graph.call_function(F.linear, (value, first)) if count % 40 == 0 else value
            graph.call_method("mul_", (value, 2.0))
        elif kind == "readers":
            value = graph.call_function(torch.log, (first,)) if count == 0 else value
            graph.call_function(F.kl_div, (value, first))
        elif kind == "matches":
            value = graph.call_function(F.relu, (graph.call_module("fc", (value,)),))
            count += 1
        elif kind == "mutations":
            y = graph.call_module("fc", (value,))
            graph.call_method("add_", (first, 1))
            value = graph.call_function(F.relu, (y,))
            count += 2
        elif kind == "near misses":
            y = graph.call_function(operator.mul, (graph.call_module("fc", (value,)), first))
            value = graph.call_function(operator.add, (graph.call_module("bn", (y,)), y))
            count += 3
        count += 1
    graph.output(value)
    return graph, root


KINDS = ["scalings", "in place", "readers", "matches", "mutations", "near misses"]


@pytest.mark.parametrize("kind", KINDS)
def test_matching_takes_steps_in_proportion_to_the_graph(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0
    inner = matcher._match

    def counted(self: matcher, *args: Any) -> Any:
        nonlocal steps
        steps += 1
        return inner(self, *args)

    monkeypatch.setattr(matcher, "_match", counted)
    taken = []
    for size in (1_000, 10_000):
        steps = 0
        find(View(*network(kind, size)), select(None))
        taken.append(steps)
    assert 0 < taken[1] <= 12 * taken[0]


@pytest.mark.parametrize("kind", KINDS)
def test_reading_and_matching_make_calls_in_proportion(kind: str) -> None:
    """Ten times the graph, ten times the calls into Python and C; the bench has the times."""

    def calls(size: int) -> int:
        graph, root = network(kind, size)
        count = 0

        def counted(frame: Any, event: str, argument: Any) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(counted)
        try:
            find(View(graph, root), select(None))
        finally:
            sys.setprofile(None)
        return count

    assert calls(10_000) <= 12 * calls(1_000)
