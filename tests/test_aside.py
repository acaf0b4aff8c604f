"""Stepping aside: when a fused forward runs the module's own Python, with a stand-in for the GPU's sizes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import fxfuse
from fxfuse import aside
from fxfuse.aside import Aside
from fxfuse.ops import linear_activation_scale as op
from fxfuse.plan import plan_of


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x)) / 2


@pytest.fixture
def fused(as_on_a_gpu):
    return fxfuse.optimize(Model())


@pytest.fixture
def asked(monkeypatch):
    """The calls that reached the op."""
    calls = []
    real = op.OP.direct

    def direct(*args):
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(op.OP, "direct", direct)
    return calls


def test_a_call_whose_ops_are_all_direct_steps_aside(fused, asked):
    x = torch.randn(2, 8)
    want = fused(x)
    for _ in range(5):
        torch.testing.assert_close(fused(x), want)
    assert len(asked) == 1, "asked once"
    fused(torch.randn(3, 8))
    assert len(asked) == 2, "another size is asked again"
    with torch.no_grad():
        fused(x)
    assert len(asked) == 3, "and so is a call without gradients"


def test_a_size_like_the_last_is_not_looked_up(fused, monkeypatch):
    looked_up, real = [], Aside.find

    def find(self, values):
        looked_up.append(values)
        return real(self, values)

    monkeypatch.setattr(Aside, "find", find)
    small, large = torch.randn(2, 8), torch.randn(3, 8)
    for x in (small, large):
        fused(x)  # learns
    looked_up.clear()
    want = {x: Model.forward(fused, x) for x in (small, large)}
    for x, count in ((large, 0), (small, 1), (small, 1), (large, 2), (large, 2)):
        assert torch.equal(fused(x), want[x]) and len(looked_up) == count


@pytest.mark.parametrize("what", ["dtype", "mode", "tracing", "no gradients", "keyword"])
def test_another_kind_of_call_of_the_same_size_does_not_step_aside(fused, what):
    x = torch.randn(2, 8)
    fused(x), fused(x)
    known = plan_of(fused).aside.latest
    left = known.left
    assert left == aside.EVERY - 1
    if what == "dtype":
        fused.double()(x.double())
    elif what == "mode":
        with FlopCounterMode(display=False):
            fused(x)
    elif what == "tracing":
        make_fx(fused)(x)
    elif what == "keyword":
        fused(x=x)
    else:
        with torch.no_grad():
            fused(x)
    assert known.left == left
    fused.float()(x)
    assert known.left == left - 1


def test_dynamo_does_not_see_what_was_learnt(fused):
    counter = CompileCounter()
    compiled = torch.compile(fused, backend=counter, fullgraph=True)
    x = torch.randn(2, 8)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), fused(x))
    plan_of(fused).aside.latest = None
    compiled(x)
    assert counter.frame_count == 1


def test_what_was_learnt_is_asked_again(fused, asked, monkeypatch):
    monkeypatch.setattr(aside, "EVERY", 3)
    x = torch.randn(2, 8)
    for _ in range(9):
        fused(x)
    assert len(asked) == 3


def test_ops_that_are_not_direct_are_asked_every_time(fused, monkeypatch):
    calls = []
    monkeypatch.setattr(op.OP, "direct", lambda *args: calls.append(args) or "")
    for _ in range(4):
        fused(torch.randn(2, 8))
    assert len(calls) == 4


def test_a_graph_that_is_captured_gets_the_fused_op(as_on_a_gpu, monkeypatch, asked):
    captured = []
    monkeypatch.setattr(aside, "_stream", lambda device: 7)
    monkeypatch.setattr(aside, "_capturing", lambda: bool(captured))
    fused, x = fxfuse.optimize(Model()), torch.randn(2, 8)
    fused(x), fused(x)
    assert len(asked) == 1
    captured.append(True)
    fused(x)
    assert len(asked) == 2


def test_sizes_are_bounded_and_of_ordinary_calls_alone(monkeypatch):
    found = Aside()
    x = torch.randn(2, 8)
    assert found.sizes([x]) is None, "not on a GPU"
    monkeypatch.setattr(aside, "_on_a_gpu", lambda x: True)
    assert found.sizes([x]) == ((2, 8), torch.float32, -1) != found.sizes([x, x])
    assert found.sizes([]) is None
    for number in range(3 * aside.MOST):
        found.learn(number, None, lambda owner: True)
        assert len(found._known) <= aside.MOST
    assert found.sizes([nn.Parameter(x)]) is None
    with torch.no_grad():
        assert found.sizes([x]) is None


def test_threads_that_count_down_at_once_do_not_count_past_the_end(monkeypatch):
    found, x = Aside(), torch.randn(2, 8)
    found.learn((x.shape, x.dtype, -1), None, lambda owner: True)
    (known,) = found._known.values()
    known.left = 1
    monkeypatch.setattr(aside, "_capturing", lambda: setattr(known, "left", 0) or False)  # another one's turn
    assert found.find((x,)) is known and known.left == -1
    assert found.find((x,)) is None


def test_copies_and_pickles_go_on(fused):
    x = torch.randn(2, 8)
    want = fused(x)
    fused(x)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        torch.testing.assert_close(other(x), want)
        assert plan_of(other) is not None
