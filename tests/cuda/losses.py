"""What the CUDA tests of losses share: what eager computes, errors against float64, and the roads every test takes."""

from __future__ import annotations

import sys
from collections.abc import Callable

import draws
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from uninitialised import fill_with_nan

from fxfuse.kernels import loader
from fxfuse.ops.distillation_kl import OP as DISTILLATION
from fxfuse.ops.kl_div import OP as KL

kl_module = sys.modules[KL.call.__module__]

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(3, 10), (65, 512), (17, 1000), (4, 5003), (2, 32000), (3, 128256), (1, 1_000_003)]


@pytest.fixture(params=("hopper", "portable"), autouse=True)
def road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test on the device's own road and on that of compute capability 8.0, with poisoned outputs."""
    monkeypatch.setenv("FXFUSE_PORTABLE", str(int(request.param == "portable")))
    assert loader.library() is not None, loader.why_unavailable()
    fill_with_nan(monkeypatch)
    monkeypatch.setattr(kl_module, "HOST_BOUND", -1)  # small calls too take the kernels
    KL.kinds.forget()
    DISTILLATION.kinds.forget()
    torch.manual_seed(0)


def eager_kl(x: Tensor, t: Tensor, reduction: str, log_target: bool, log_input: bool) -> Tensor:
    return F.kl_div(x.log() if log_input else x, t, reduction=reduction, log_target=log_target)


def eager_distillation(s: Tensor, t: Tensor, ts: float, tt: float, reduction: str, log_target: bool) -> Tensor:
    q = F.log_softmax(t / tt, -1) if log_target else F.softmax(t / tt, -1)
    return ts * tt * F.kl_div(F.log_softmax(s / ts, -1), q, reduction=reduction, log_target=log_target)


def with_grads(function: Callable[..., Tensor], *tensors: Tensor, scale: float = 1.0) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad((loss * scale).sum(), leaves)]


Results = list[Tensor]


def check(drawn: list[tuple[Results, Results, Results]]) -> None:
    """(ours, eager's, float64's) of several draws: over all of them, the error against float64 is at most 1.25 times
    eager's (or what storing the results costs), and inf and NaN are where eager has them.

    One draw of a scalar says little: eager's error may be nearly zero by chance.
    """
    columns = zip(*(zip(*column, strict=True) for column in zip(*drawn, strict=True)), strict=True)
    for which, (ours, eager, exact) in enumerate(columns):
        assert all(o.dtype == e.dtype and o.shape == e.shape for o, e in zip(ours, eager, strict=True))
        one, peer, judge = (torch.cat([t.flatten() for t in column]) for column in (ours, eager, exact))
        assert torch.equal(one.isnan(), peer.isnan())
        assert torch.equal(one.isposinf(), peer.isposinf())
        assert torch.equal(one.isneginf(), peer.isneginf())
        info = torch.finfo(one.dtype)
        keep = one.isfinite() & judge.isfinite()
        one, peer, judge = one[keep].double(), peer[keep].double(), judge[keep]
        error, allowed = (one - judge).norm().item(), (peer - judge).norm().item()
        floor = 0.5 * info.eps * judge.norm().item() + info.tiny
        allowed = max(allowed, floor)
        within = draws.under_a_tool or error <= 1.25 * allowed
        assert within, f"result {which}: {error / allowed:.2f} times eager's error"
