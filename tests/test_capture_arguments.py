"""What a forward is called with and gives back: containers of every kind, flags, numbers, wrong calls."""

from __future__ import annotations

import collections
import dataclasses
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from models import assert_same, check, module, ran_fused, reason_of
from torch import nn

import fxfuse

X = torch.randn(5, 8)


class Out(NamedTuple):
    y: torch.Tensor
    n: int


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    scale: float = 2.0


class Features(collections.UserDict):
    pass


def test_dict_in_and_out():
    def forward(self, batch):
        return {"y": self.block(batch["x"]), "n": 3}

    assert ran_fused(check(module(forward), {"x": X}), {"x": X}) == ["block"]


def test_dataclass_in_and_out():
    def forward(self, batch):
        return Batch(self.block(batch.x) * batch.scale)

    assert ran_fused(check(module(forward), Batch(X)), Batch(X)) == ["block"]


def test_namedtuple_and_own_mapping_out():
    def as_tuple(self, x):
        return Out(F.relu(self.block.fc(x)), 3)

    def as_mapping(self, x):
        return Features(y=self.block(x))

    fused = check(module(as_tuple), X)
    assert isinstance(fused(X), Out) and ran_fused(fused, X) == [""]
    model = module(as_mapping)
    fused = fxfuse.optimize(model)
    assert type(fused(X)) is Features
    assert_same(fused(X)["y"], model(X)["y"])


def test_list_of_tensors():
    def forward(self, xs):
        return [self.block(x) for x in xs]

    assert ran_fused(check(module(forward), [X, X + 1]), [X, X + 1]) == ["block", "block"]


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 6)

    def forward(self, x, mask=None, *, scale=1.0, act="relu", twice=False, times=1):
        y = self.fc(x)
        y = F.relu(y) if act == "relu" else F.gelu(y)
        if mask is not None:
            y = y * mask
        if twice:
            y = y * 2
        return y * scale + times


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"mask": torch.rand(6)}, {"scale": 0.5}, {"act": "gelu"}, {"twice": True}, {"times": 3}, {"times": True},
     {"mask": None, "act": "gelu", "twice": True}],
)  # fmt: skip
def test_flags_and_optional_arguments_each_get_their_graph(kwargs):
    fused = check(Optional(), X, **kwargs)
    assert ran_fused(fused, X, **kwargs) == [""]


def test_flags_one_after_the_other_on_the_same_module():
    model = Optional()
    fused = fxfuse.optimize(model)
    for kwargs in ({}, {"twice": True}, {"mask": torch.rand(6)}, {"times": 1}, {"times": True}, {"scale": 3.0}, {}):
        assert_same(fused(X, **kwargs), model(X, **kwargs))
        assert ran_fused(fused, X, **kwargs) == [""]
    for n in range(40):  # more graphs than are kept: the rest runs as written
        assert_same(fused(X, times=n), model(X, times=n))


def test_true_and_one_are_different_calls():
    def forward(self, x, times=1):
        return F.relu(self.block.fc(x)) * (10 if isinstance(times, bool) else times)

    model = module(forward)
    fused = fxfuse.optimize(model)
    for times in (1, True, 1, 0, False):
        assert_same(fused(X, times), model(X, times))
        assert ran_fused(fused, X, times) == [""]


def test_wrong_call_raises_what_the_original_raises():
    fused = fxfuse.optimize(Optional())
    for args, kwargs in (((), {}), ((X,), {"nope": 1}), ((X, None, 1.0), {}), ((X,), {"x": X})):
        with pytest.raises(TypeError, match="argument"):
            fused(*args, **kwargs)


def test_a_float_argument_is_not_frozen():
    def forward(self, x, scale: float):
        return F.relu(self.block.fc(x)) * scale

    fused = check(module(forward), X, 0.5)
    for scale in (1.0, 3.0, -2.0):
        assert_same(fused(X, scale), F.relu(fused.block.fc(X)) * scale)
    assert ran_fused(fused, X, 4.0) == [""]


def test_an_int_argument_needs_an_example():
    def forward(self, x, n: int):
        return F.relu(self.block.fc(x)) * n

    assert "give example_inputs" in reason_of(fxfuse.optimize(module(forward)))
    fused = check(module(forward), X, 3, example=(X, 3))
    assert ran_fused(fused, X, 3) == [""]
    assert_same(fused(X, 5), F.relu(fused.block.fc(X)) * 5)
