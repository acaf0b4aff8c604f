"""Losses that are not reduced, on a GPU: every element's loss and gradient against float64, inf and NaN as eager's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from draws import times
from losses import DTYPES, INF, NAN, SHAPES, check, eager_distillation, eager_kl, kl_module, road
from torch import Tensor

from fxfuse.ops.distillation_kl import OP as DISTILLATION
from fxfuse.ops.distillation_kl import distillation_kl, reference
from fxfuse.ops.kl_div import OP as KL
from fxfuse.ops.kl_div import kl_div

__all__ = ["road"]  # every test's

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (300, 8191), (140, 40000), (3, 100_003)], ids=str)
@pytest.mark.parametrize("log_target", [False, True])
def test_every_element_has_its_own_gradient(dtype: torch.dtype, shape: tuple[int, int], log_target: bool) -> None:
    """No reduction, an incoming gradient that differs from element to element, and teachers of any certainty."""
    draws = []
    for draw in range(times(48 if shape[0] * shape[1] < 10**5 else 12 if shape[0] * shape[1] < 10**6 else 3)):
        s, t = torch.randn(2, *shape, device="cuda").mul(2).to(dtype)
        if draw % 3 == 1:  # one class stands out
            t[:, draw % shape[1]] = t.float().logsumexp(-1).add(draw % 7).to(dtype)
        grad = torch.randn(shape, device="cuda").to(dtype)
        ts, tt = ((2.0, 3.0), (1.0, 1.0), (4.0, 0.7))[draw // 3 % 3 if draw > 3 else draw % 3]
        results = []
        for pair in ((s, t), (s, t), (s.double(), t.double())):
            leaves = [x.detach().requires_grad_() for x in pair]
            if not results:
                assert DISTILLATION.road(s, t, -1, ts, tt, ts * tt, "none", log_target).name == "kernel"
                loss = distillation_kl(*leaves, -1, ts, tt, ts * tt, "none", log_target)
            else:
                loss = eager_distillation(*leaves, ts, tt, "none", log_target)
            grads = torch.autograd.grad(loss, leaves, grad.to(loss.dtype))
            results.append([loss.detach(), *grads])
        draws.append(tuple(results))
    check(draws)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocab"), [(9, 10), (9, 1000), (9, 5003), (200, 5003), (140, 32000), (9, 128256)])
@pytest.mark.parametrize("log_target", [False, True])
def test_every_element_has_eagers_inf_and_nan(dtype: torch.dtype, rows: int, vocab: int, log_target: bool) -> None:
    s, t, grad = torch.randn(3, rows, vocab, device="cuda").to(dtype)
    s[0, vocab // 2], t[1, 0], s[2, -1], s[3, 1] = -INF, INF, NAN, INF
    t[4], t[5, ::2] = -INF, -INF
    grad[6, 3], grad[7, vocab - 1] = INF, NAN
    if dtype == torch.float16:  # sums and products that it cannot hold
        s[8, 0], grad[8] = 60000.0, 60000.0
    for scale in (1.0, 4.0, 0.25):
        results = []
        for ours in (True, False):
            for leaves in ([s.detach().requires_grad_(), t], [x.detach().requires_grad_() for x in (s, t)]):
                wanted = [x for x in leaves if x.requires_grad]
                if ours:
                    loss = distillation_kl(*leaves, -1, 2.0, 2.0, scale, "none", log_target)
                else:
                    loss = reference(*leaves, -1, 2.0, 2.0, scale, "none", log_target)
                results += [loss.detach(), *torch.autograd.grad(loss, wanted, grad)]
        half = len(results) // 2
        for one, peer in zip(results[:half], results[half:], strict=True):
            for row in range(9):
                same = torch.equal(one[row].isnan(), peer[row].isnan())
                assert same and torch.equal(one[row].isinf(), peer[row].isinf()), (scale, row)


@pytest.fixture
def small_is_brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kl_module, "HOST_BOUND", 1 << 23)
    KL.kinds.forget()


@pytest.mark.captures
def test_small_elementwise_calls_go_by_atens_operations(small_is_brief: None) -> None:
    x = torch.rand(64, 100, device="cuda", requires_grad=True)
    t = torch.rand(64, 100, device="cuda")
    args = "none", False, True
    assert KL.road(x, t, *args).name == "composed" and "host" in KL.road(x, t, *args).why
    assert KL.road(x, t, "sum", *args[1:]).name == "kernel"
    middling = torch.rand(2000, 700, device="cuda", requires_grad=True)
    large = torch.rand(3000, 3000, device="cuda", requires_grad=True)
    assert KL.road(middling, middling, *args).name == "composed"
    assert KL.road(large, large, *args).name == "kernel"
    with torch.no_grad():
        assert KL.road(x, t, *args).name == "kernel"
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # replayed without the host
        assert KL.road(x, t, *args).name == "kernel"
        x * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("log_input", [False, True])
@pytest.mark.parametrize("both", [False, True])
def test_small_elementwise_calls_are_as_near_as_eagers(
    small_is_brief: None, dtype: torch.dtype, log_target: bool, log_input: bool, both: bool
) -> None:
    def results(loss: Callable[..., Tensor], x: Tensor, t: Tensor, grad: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_(), t.detach().requires_grad_(both)]
        out = loss(*leaves, "none", log_target, log_input)
        return [out.detach(), *torch.autograd.grad(out, leaves[: 1 + both], grad.to(out.dtype))]

    draws = []
    for _ in range(times(12)):
        x, t = (torch.randn(64, 100, device="cuda").log_softmax(-1) for _ in range(2))
        x, t = (x.exp() if log_input else x).to(dtype), (t if log_target else t.exp()).to(dtype)
        grad = torch.randn(64, 100, device="cuda").to(dtype)
        wide = x.double(), t.double(), grad
        draws.append((results(kl_div, x, t, grad), results(eager_kl, x, t, grad), results(eager_kl, *wide)))
    check(draws)
    most = torch.finfo(dtype).max
    edges = torch.tensor(
        [0.0, -0.0, 1, -1, INF, -INF, NAN, most, most / 8, most**0.5 * 2, 100, -100, 1e-7], device="cuda"
    )
    x, t = (v.flatten().to(dtype) for v in torch.meshgrid(edges, edges, indexing="ij"))
    for grad in (torch.ones_like(x), torch.full_like(x, INF)):
        for ours, peer in zip(results(kl_div, x, t, grad), results(eager_kl, x, t, grad), strict=True):
            assert torch.equal(ours.isnan(), peer.isnan())
            assert torch.equal(ours.isposinf(), peer.isposinf()) and torch.equal(ours.isneginf(), peer.isneginf())


def test_small_elementwise_calls_are_differentiable_twice_and_vmapped(small_is_brief: None) -> None:
    x, t = (torch.rand(5, 6, device="cuda", dtype=torch.float16) + 0.1 for _ in range(2))
    leaf = x.float().requires_grad_()
    (grad,) = torch.autograd.grad(kl_div(leaf, t.float(), "none", False, True).sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), leaf)
    torch.testing.assert_close(second, t.float() / x.float() ** 2)
    each = torch.vmap(lambda row: kl_div(row, t[0], "none"))(x)
    torch.testing.assert_close(each, torch.stack([eager_kl(row, t[0], "none", False, False) for row in x]))
