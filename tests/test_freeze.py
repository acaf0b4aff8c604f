"""freeze=True: the weight's sums are kept, and dropped as soon as a weight changes."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.ops import matmul_div_sum_scale as op


class Summed(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.fc = nn.Linear(512, 256, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.fc(x) / 2).sum(dim=1, keepdim=True) * 1.5


@pytest.fixture
def sums_taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often column sums were computed from a weight."""
    counted: list[int] = []
    original = op.column_sums

    def counting(weight: torch.Tensor) -> torch.Tensor:
        counted.append(1)
        return original(weight)

    monkeypatch.setattr(op, "column_sums", counting)
    return counted


@pytest.mark.parametrize("bias", [True, False])
def test_sums_are_kept_until_the_weight_changes(sums_taken: list[int], bias: bool) -> None:
    model = Summed(bias)
    frozen = fxfuse.optimize(model, freeze=True)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(256, 512)
            torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-3)
        assert len(sums_taken) == 1
        model.fc.weight.mul_(2)  # in place: the version counter moves
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-3)
        assert len(sums_taken) == 2
        if bias:
            model.fc.bias.add_(1)
            torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-3)
            assert len(sums_taken) == 3


def test_not_frozen_unless_asked(sums_taken: list[int]) -> None:
    fused = fxfuse.optimize(Summed())
    with torch.no_grad():
        fused(torch.randn(256, 512))
        fused(torch.randn(256, 512))
    assert len(sums_taken) == 2


def test_an_optimizer_step_is_seen(sums_taken: list[int]) -> None:
    model = Summed()
    frozen = fxfuse.optimize(model, freeze=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x = torch.randn(256, 512)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-3)
        frozen(x).sum().backward()  # a call that wants gradients does not use what is kept
        expected = torch.autograd.grad(model(x).sum(), model.fc.weight)[0]
        torch.testing.assert_close(model.fc.weight.grad, expected)
        optimizer.step()
        optimizer.zero_grad()


def test_a_new_dtype_and_a_new_tensor_are_seen() -> None:
    frozen = fxfuse.optimize(Summed(), freeze=True)
    with torch.no_grad():
        frozen(torch.randn(256, 512))
        frozen.double()
        x = torch.randn(256, 512, dtype=torch.float64)
        torch.testing.assert_close(frozen(x), Summed.forward(frozen, x), rtol=1e-4, atol=1e-3)
        frozen.fc.weight = nn.Parameter(torch.randn(256, 512, dtype=torch.float64))
        torch.testing.assert_close(frozen(x), Summed.forward(frozen, x), rtol=1e-4, atol=1e-3)


def test_what_is_kept_goes_with_the_weight() -> None:
    gc.collect()
    before = len(op._kept._values)
    frozen = fxfuse.optimize(Summed(), freeze=True)
    with torch.no_grad():
        frozen(torch.randn(256, 512))
    assert len(op._kept._values) == before + 1
    del frozen
    gc.collect()
    assert len(op._kept._values) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_stay_frozen(sums_taken: list[int], copied) -> None:
    frozen = copied(fxfuse.optimize(Summed(), freeze=True))
    x = torch.randn(256, 512)
    with torch.no_grad():
        frozen(x)
        torch.testing.assert_close(frozen(x), Summed.forward(frozen, x), rtol=1e-4, atol=1e-3)
    assert len(sums_taken) == 1


def test_functions_and_graphs(sums_taken: list[int]) -> None:
    def summed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x, weight.t()).sum(-1)

    x, weight = torch.randn(256, 512), torch.randn(256, 512)
    frozen = fxfuse.optimize(summed, freeze=True)
    graph = fxfuse.optimize(torch.fx.symbolic_trace(Summed()), freeze=True)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(frozen(x, weight), summed(x, weight), rtol=1e-4, atol=1e-3)
        assert len(sums_taken) == 1
        graph(x)
        graph(x)
    assert len(sums_taken) == 2


def test_inference_mode_weights_are_never_kept(sums_taken: list[int]) -> None:
    with torch.inference_mode():
        frozen = fxfuse.optimize(Summed(), freeze=True)
        x = torch.randn(256, 512)
        frozen(x)
        frozen(x)
    assert len(sums_taken) == 2
