"""kl_div's short road: what is kept of a call fits the next, and is not used where what it rests on has changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from losses import DTYPES, eager_kl, kl_module, road
from torch import Tensor
from torch.autograd import forward_ad

from fxfuse.ops._kinds import Kind
from fxfuse.ops.distillation_kl import OP as DISTILLATION
from fxfuse.ops.distillation_kl import distillation_kl
from fxfuse.ops.kl_div import OP as KL
from fxfuse.ops.kl_div import kl_div

__all__ = ["road"]  # every test's

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x, t = torch.randn(2, *shape, device="cuda").softmax(-1).to(dtype)
    return x, t


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Kind]:
    """What was kept, at every time that it ran."""
    seen: list[Kind] = []
    init = Kind.__init__

    def spied(self: Kind, run: Any, **kwargs: Any) -> None:
        def counted(one: Tensor, two: Tensor) -> Tensor:
            seen.append(self)
            return run(one, two)  # type: ignore[no-any-return]

        init(self, counted, **kwargs)

    monkeypatch.setattr(Kind, "__init__", spied)
    return seen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("log_input", [False, True])
@pytest.mark.parametrize("bound", [-1, 1 << 23])
def test_kept_calls_give_the_same_bits(
    dtype: torch.dtype, reduction: str, log_target: bool, log_input: bool, bound: int, runs: list[Kind],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(kl_module, "HOST_BOUND", bound)
    numbers = reduction, log_target, log_input
    kept = 0
    for shape in ((7, 33), (3, 4, 5), (130,)):
        x, t = pair(*shape, dtype=dtype)
        first = kl_div(x, t, *numbers)
        other = pair(*shape, dtype=dtype)
        again = kl_div(x, t, *numbers)
        kept += 1
        assert len(runs) == kept and not runs[-1].direct
        assert torch.equal(first, again) and first.stride() == again.stride() and first.dtype == again.dtype
        fresh = kl_div(*other, *numbers)  # tensors at other addresses
        KL.kinds.forget()
        assert torch.equal(fresh, kl_div(*other, *numbers))
        kept += 1
        grads = []
        for _ in range(2):
            leaf = x.detach().requires_grad_()
            loss = kl_div(leaf, t, *numbers)
            grads.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaf)))
        assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))
        kept += 1
        assert len(runs) == kept and runs[-1].direct is (bound > 0 and reduction == "none")


@pytest.mark.parametrize("reduction", ["none", "batchmean"])
@pytest.mark.parametrize("grads", [False, True])
def test_kept_calls_of_distillation_give_the_same_bits(reduction: str, grads: bool, runs: list[Kind]) -> None:
    numbers = -1, 2.0, 3.0, 6.0, reduction, False
    s, t = torch.randn(2, 9, 1000, device="cuda")
    DISTILLATION.kinds.forget()
    results = []
    for _ in range(2):
        leaf = s.detach().requires_grad_(grads)
        loss = distillation_kl(leaf, t, *numbers)
        results.append((loss.detach(), *(torch.autograd.grad(loss.sum(), leaf) if grads else ())))
    assert len(runs) == 1
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_what_changed_is_seen(runs: list[Kind]) -> None:
    x, t = pair(40, 50)
    KL.kinds.forget()

    def right(x: Tensor, t: Tensor, taken: int) -> None:
        del runs[:]
        loss = kl_div(x, t, "none", False, True)
        assert len(runs) == taken
        torch.testing.assert_close(loss, eager_kl(x, t, "none", False, True))

    right(x, t, 0)
    right(x, t, 1)
    right(x.t().contiguous().t(), t, 0)
    right(x, t[:1], 0)
    right(x, t.to(torch.bfloat16), 0)
    right(x, x, 0)
    right(x, torch.nn.Parameter(t, requires_grad=False), 0)
    right(x, t.clone().requires_grad_(), 0)
    with torch.autocast("cuda"):
        right(x, t, 0)
    with torch.inference_mode():
        right(x, t, 0)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        assert forward_ad.unpack_dual(kl_div(dual, t, "none", False, True)).tangent is not None
    mapped = torch.vmap(lambda x, t: kl_div(x, t, "none", False, True))(x[None], t[None])
    torch.testing.assert_close(mapped[0], eager_kl(x, t, "none", False, True))
    kl_div(x, t, "none", False, True)
    right(x, t, 1)


@pytest.mark.captures
def test_elementwise_steps_are_not_kept_for_graphs(runs: list[Kind], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kl_module, "HOST_BOUND", 1 << 23)
    x, t = pair(40, 50)
    leaf = x.detach().requires_grad_()
    for _ in range(2):
        kl_div(leaf, t, "none", False, True)
    assert len(runs) == 1 and runs[0].direct
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        loss = kl_div(leaf, t, "none", False, True)
    assert len(runs) == 1
    graph.replay()
    torch.testing.assert_close(loss, eager_kl(leaf, t, "none", False, True))


def test_a_kept_call_on_a_side_stream(runs: list[Kind]) -> None:
    x, t = pair(400, 500)
    want = kl_div(x, t, "sum", False, True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        x.mul_(0.5)
        t.mul_(0.5)
        found = kl_div(x, t, "sum", False, True)
    assert len(runs) == 1
    torch.cuda.current_stream().wait_stream(side)
    torch.testing.assert_close(found, 0.5 * want)


def test_a_traced_call_is_not_a_kept_one(runs: list[Kind]) -> None:
    x, t = pair(40, 50)
    for _ in range(2):
        want = kl_div(x, t, "sum", False, True)
    compiled = torch.compile(lambda x, t: kl_div(x, t, "sum", False, True), fullgraph=True)
    assert torch.equal(compiled(x, t), want) and len(runs) == 1
