"""Any module means any: what cannot be traced runs as it was written, says why, and its children are tried."""

from __future__ import annotations

import re

import pytest
import torch
from models import check, module, patterns_in, ran_fused, reason_of
from torch import nn

import fxfuse

X = torch.randn(5, 8)


def branch(self, x):
    return self.block(x) if x.sum() > 0 else self.block(-x)


def length(self, x):
    return self.block(x) * len(x)


def slice_by_value(self, x):
    return self.block(x[: int(x.abs().max().ceil())])


def loop_over_rows(self, x):
    return torch.stack([self.block(row) for row in x])


def loop_over_size(self, x):
    return sum(self.block(x + i) for i in range(x.size(0)))


def variadic(self, *xs, **more):
    return self.block(xs[0])


def shape_check(self, x):
    assert x.dim() == 2
    return self.block(x)


def swallowed_branch(self, x):
    try:
        if x.sum() > 1e9:
            return x
    except Exception:
        return self.block(x) * 100
    return self.block(x)


def assigns_part(self, x):
    y = self.block(x)
    y[0] = 0
    return y


def type_of_intermediate(self, x):
    y = self.pair(x)
    if isinstance(y, tuple):
        y = y[0]
    return self.block(y)


def hasattr_of_intermediate(self, x):
    y = self.pair(x)
    return self.block(y.last if hasattr(y, "last") else y[0])


def list_of_rows(self, x):
    a, *_ = x.unbind(0)
    return self.block(a)


class Pair(nn.Module):
    def forward(self, x):
        return x, x + 1


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (branch, "branches on the value of gt"),
        (length, "takes len()"),
        (slice_by_value, "makes a Python number of"),
        (loop_over_rows, "iterates over x"),
        (loop_over_size, "integer"),
        (variadic, r"\*args"),
        (shape_check, "branches on the value of eq"),
        (swallowed_branch, "branches on the value of gt"),
        (assigns_part, "assigns to a part of"),
        (list_of_rows, "iterates over unbind"),
    ],
)
def test_untraceable_forward_keeps_its_python_and_its_children_are_fused(forward, why):
    fused = check(module(forward), X)
    assert_reason(fused, why)
    assert patterns_in(fused) == ["linear_activation_scale"]
    assert ran_fused(fused, X)
    assert 'torch.compile(model, backend="fxfuse")' in str(fxfuse.report(fused))


def assert_reason(fused, why):
    assert re.search(why if "\\" in why else re.escape(why), reason_of(fused)), reason_of(fused)


@pytest.mark.parametrize("forward", [type_of_intermediate, hasattr_of_intermediate])
def test_a_question_about_an_unknown_type_is_not_answered_wrongly(forward):
    class Opaque(Pair):
        """Called as a whole, so that its output is unknown to the trace."""

    pair = Opaque()
    pair.register_forward_hook(lambda m, args, out: None)
    fused = check(module(forward, pair=pair), X)
    assert "type" in reason_of(fused)


def test_isinstance_of_arguments_and_known_results():
    def forward(self, x):
        y = self.fc(x)
        assert isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
        assert not isinstance(x, (list, tuple)) and not hasattr(x, "tensors")
        return self.block(y * 2)

    fused = check(module(forward, fc=nn.Linear(8, 8)), X)
    assert not fxfuse.report(fused).untraceable and ran_fused(fused, X) == ["block"]
