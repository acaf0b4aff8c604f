"""The view reads a graph without touching it: canonical calls, names of values changed in place, shared memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxfuse.view import Attr, ModuleRef, View, why_called_only


class Net(nn.Module):
    def __init__(self, function: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.bn = nn.BatchNorm1d(3)
        self.act = nn.LeakyReLU(0.2, inplace=True)
        self.loss = nn.KLDivLoss(reduction="sum")
        self.inner = nn.Sequential(nn.Linear(3, 3))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def view_of(function: Callable[..., Any], root: nn.Module | None = None) -> View:
    """The view of a traced function of (module, x), or of one of tensors."""
    if function.__code__.co_varnames[:1] == ("m",):
        root = Net(function)
        return View(fx.Tracer().trace(root), root)
    return View(fx.Tracer().trace(function), None)


def node(view: View, name: str) -> fx.Node:
    return next(n for n in view.graph.nodes if n.name == name)


def test_reading_leaves_the_graph_as_it_was() -> None:
    graph = fx.Tracer().trace(Net(lambda m, x: m.bn(m.fc(x) * 2).relu_()))
    before = str(graph), [(n.op, n.target, n.args, n.kwargs, dict(n.meta)) for n in graph.nodes]
    view = View(graph, Net())
    for n in graph.nodes:
        view.call(n)
        view.describe(n)
    assert (str(graph), [(n.op, n.target, n.args, n.kwargs, dict(n.meta)) for n in graph.nodes]) == before


def test_modules_become_operations_over_their_attributes() -> None:
    view = view_of(lambda m, x: m.bn(m.inner[0](m.act(m.fc(x)))))
    linear = view.call(node(view, "fc"))
    assert linear is not None and linear.op == "linear"
    assert linear.args == {"x": node(view, "x"), "weight": Attr("fc.weight"), "bias": Attr("fc.bias")}
    leaky = view.call(node(view, "act"))
    assert leaky is not None and leaky.inplace and leaky.args == {"x": node(view, "fc"), "negative_slope": 0.2}
    assert view.call(node(view, "inner_0")).args["weight"] == Attr("inner.0.weight")
    norm = view.call(node(view, "bn"))
    assert norm is not None and norm.args == {"x": node(view, "inner_0"), "module": ModuleRef("bn")}
    assert view.tensor(Attr("inner.0.weight")) is view.root.inner[0].weight


def test_arguments_of_a_module_go_by_their_names() -> None:
    view = view_of(lambda m, x: m.loss(target=x * 2, input=x))
    call = view.call(node(view, "loss"))
    assert call.args["input"] is node(view, "x") and call.args["target"] is node(view, "mul")
    assert call.args["reduction"] == "sum"


def test_a_call_with_other_arguments_is_not_read() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    call = graph.call_module("fc", (x,), {"scale": 2})
    graph.output(call)
    view = View(graph, Net())
    assert view.call(call) is None
    assert "called with 2 arguments" in view.describe(call)


def test_a_bias_that_is_not_there_is_none() -> None:
    root = Net()
    root.fc = nn.Linear(4, 3, bias=False)
    graph = fx.Graph()
    call = graph.call_module("fc", (graph.placeholder("x"),))
    assert View(graph, root).call(call).args["bias"] is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: m.register_forward_hook(lambda *a: None), "forward hooks"),
        (lambda m: m.register_forward_pre_hook(lambda *a: None), "forward hooks"),
        (lambda m: m.register_full_backward_hook(lambda *a: None), "backward hooks"),
        (lambda m: m.register_full_backward_pre_hook(lambda *a: None), "backward hooks"),
        (lambda m: nn.utils.parametrizations.spectral_norm(m), "parametrizations on weight"),
        (lambda m: nn.utils.spectral_norm(m), "hooks"),
    ],
)
def test_what_a_fusion_would_drop_keeps_the_call(change: Callable[[nn.Module], Any], why: str) -> None:
    root = Net()
    assert why_called_only(root.fc) is None
    change(root.fc)
    assert why in str(why_called_only(root.fc))
    graph = fx.Graph()
    call = graph.call_module("fc", (graph.placeholder("x"),))
    view = View(graph, root)
    assert view.call(call) is None and why in view.describe(call)


def test_subclasses_are_not_what_they_derive_from() -> None:
    root = Net()
    root.fc = nn.modules.linear.NonDynamicallyQuantizableLinear(4, 3)
    graph = fx.Graph()
    call = graph.call_module("fc", (graph.placeholder("x"),))
    view = View(graph, root)
    assert view.call(call) is None
    assert "NonDynamicallyQuantizableLinear, a subclass of Linear" in view.describe(call)


# --- in place ------------------------------------------------------------------------------------------------------


def test_in_place_results_go_by_their_old_name_too() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        y = x @ w
        y.mul_(2)
        F.relu(y, inplace=True)
        y.neg_()
        return y * 3

    view = view_of(function)
    matmul, mul_, relu, neg = (node(view, n) for n in ("matmul", "mul_", "relu", "neg_"))
    assert view.call(mul_).args["a"] is matmul
    assert view.call(relu).args["x"] is mul_ and view.call(relu).inplace
    assert view.call(neg).args["x"] is relu
    assert view.call(node(view, "mul")).args["a"] is neg
    assert view.readers(matmul) == [(mul_, matmul)]
    assert view.readers(neg) == [(node(view, "mul"), matmul)]


def test_in_place_by_either_name() -> None:
    def function(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ w
        z = y.mul_(2)
        return y + 1, z + 2

    view = view_of(function)
    assert {reader.name for reader, _ in view.readers(node(view, "mul_"))} == {"add", "add_1"}
    assert view.call(node(view, "add")).args["a"] is node(view, "mul_")


def test_in_place_on_what_was_looked_at_before_is_not_read() -> None:
    def function(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ w
        before = y + 1
        y.mul_(2)
        return y, before

    view = view_of(function)
    assert view.call(node(view, "mul_")) is None
    assert "also read elsewhere" in view.describe(node(view, "mul_"))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.mul_(2) + x,
        lambda x: x.t().mul_(2),
        lambda x: F.relu(x, inplace=True),
    ],
)
def test_in_place_on_memory_that_was_there_before_is_not_read(function: Callable[..., Any]) -> None:
    view = view_of(function)
    changing, _ = view.mutations[0]
    assert view.call(changing) is None


def test_only_so_many_versions_of_one_value_are_followed() -> None:
    def function(x: Tensor) -> Tensor:
        y = x + 1
        for _ in range(200):
            y.mul_(2)
        return y

    view = view_of(function)
    read = [n for n in view.graph.nodes if n.target == "mul_" and view.call(n) is not None]
    assert len(read) == 32
    assert "in-place call on one value" in view.describe(node(view, "mul__32"))


@pytest.mark.parametrize(
    ("function", "changed"),
    [
        (lambda x: x.add_(1), "x"),
        (lambda x: torch.relu_(input=x), "x"),
        (lambda x: F.dropout(x, 0.5, True, True), "x"),
        (lambda x: F.elu(x, inplace=True), "x"),
        (lambda x: F.dropout(input=x, inplace=True), "x"),
        (lambda x: torch.mul(x, 2, out=x), "x"),
        (lambda x: torch.frexp(x, out=(x, x)), "x"),
        (lambda x: torch.ops.aten.copy_.default(x, x), "x"),
        (lambda x: torch.sub(x + 1, 2, out=x), "x"),
        (lambda x: (x + 1).sub_(2), "add"),
    ],
)
def test_changes_are_noticed(function: Callable[..., Any], changed: str) -> None:
    view = view_of(function)
    assert {base.name for _, base in view.mutations} == {changed}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.dropout(x, 0.5, True),
        lambda x: F.relu(x, inplace=False),
        lambda x: x.__add__(1),
        lambda x: F.elu(x, 1.0, False),
        lambda x: torch.mul(x, 2),
    ],
)
def test_nothing_is_changed_where_nothing_is(function: Callable[..., Any]) -> None:
    assert view_of(function).mutations == []


def test_mutations_between_two_places() -> None:
    def function(x: Tensor) -> Tensor:
        a = x + 1
        x.add_(1)
        b = x * 2
        x.sub_(3)
        return a + b

    view = view_of(function)
    first, last = view.order[node(view, "add")], view.order[node(view, "mul")]
    assert [n.name for n, _ in view.mutations_between(first, last)] == ["add_"]
    assert [n.name for n, _ in view.mutations_between(first, last + 1)] == ["add_", "sub_"]
    assert [n.name for n, _ in view.mutations_between(last + 1, last + 5)] == []


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "shares"),
    [
        (lambda x: x.view(-1), True),
        (lambda x: x.t(), True),
        (lambda x: x[0], True),
        (lambda x: x.chunk(2)[0], True),
        (lambda x: x.T, True),
        (lambda x: x.detach(), True),
        (lambda x: x.to(torch.float32), True),
        (lambda x: x.ravel(), True),
        (lambda x: x.cpu(), True),
        (lambda x: x.flatten().unsqueeze(0), True),
        (lambda x: torch.squeeze(x), True),
        (lambda x: x.relu_(), True),
        (lambda x: x.expand(3, 4), True),
        (lambda x: x.moveaxis(0, 1), True),
        (lambda x: x + 1, False),
        (lambda x: F.relu(x), False),
        (lambda x: x.clone(), False),
        (lambda x: x.exp(), False),
        (lambda x: x @ x, False),
        (lambda x: x.sum(0), False),
    ],
)
def test_what_may_share_memory(function: Callable[..., Any], shares: bool) -> None:
    view = view_of(function)
    output = next(n for n in view.graph.nodes if n.op == "output").args[0]
    assert (node(view, "x") in view.storage(output)) == shares


def test_a_module_attribute_has_one_name_however_it_is_reached() -> None:
    view = view_of(lambda m, x: F.linear(x, m.fc.weight.view(3, 4)))
    assert "fc.weight" in view.storage(node(view, "view"))
    assert view.storage(Attr("fc.weight")) == {"fc.weight"}


# --- what is known -------------------------------------------------------------------------------------------------


def test_numbers_ranks_and_words() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        return F.relu(F.linear(x, w)) * x.sum().item()

    view = view_of(function)
    assert view.is_number(2) and view.is_number(0.5) and view.is_number(node(view, "item"))
    assert view.is_number(True) is False and view.is_number(node(view, "relu")) is False
    assert view.is_number(node(view, "x")) is None
    assert view.rank(node(view, "relu")) is None
    node(view, "x").meta["val"] = torch.empty(2, 3, 4)
    assert view.rank(node(view, "relu")) == 3
    assert view.describe(node(view, "x")) == "the input 'x'"
    assert view.describe(Attr("fc.weight")) == "fc.weight"
    assert view.describe(node(view, "relu")) == "relu"


def test_changes_of_mode_are_noticed() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    off = graph.call_function(torch._C._set_grad_enabled, (False,))
    graph.output(x)
    assert View(graph, None).mode_changes == [off]
