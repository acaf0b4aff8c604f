"""Training steps of linear_activation_scale like one before: the bits of the ordinary way, whatever it rests on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from uninitialised import fill_with_nan

from fxfuse.kernels import loader
from fxfuse.ops._activation_step import Step
from fxfuse.ops.linear_activation_scale import STEPS, linear_activation_scale

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
ACTS = {
    "relu": ("relu", 0.0, 0.0, 1.0, 0.5),
    "gelu": ("gelu", 0.0, 0.0, 0.7, 2.0),
    "sigmoid": ("sigmoid", 0.0, 0.0, -1.5, 1.0),
    "leaky": ("leaky_relu", 0.1, 0.0, 1.0, -0.5),
}


@pytest.fixture(autouse=True, params=["", "1"], ids=["hopper", "portable"])
def road(request, monkeypatch):
    monkeypatch.setenv("FXFUSE_PORTABLE", request.param)
    assert loader.library() is not None, loader.why_unavailable()
    fill_with_nan(monkeypatch)
    STEPS.forget()


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """An entry for each forward of a `Step`."""
    taken: list[int] = []
    forward = Step.forward

    def counted(self, *args, **kwargs):
        taken.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Step, "forward", counted)
    return taken


def step(x: Tensor, w: Tensor, b: Tensor | None, act: str, grad: Tensor | None) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, w, b) if t is not None]
    out = linear_activation_scale(*leaves, *([None] if b is None else []), *ACTS[act])
    return [out.detach(), *torch.autograd.grad(out.sum() if grad is None else out, leaves, grad)]


@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32", "tf32"])
@pytest.mark.parametrize(("m", "n", "k"), [(512, 6400, 512), (700, 776, 640), (301, 1025, 1300)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("act", ACTS)
def test_the_bits_of_the_ordinary_way(act, bias, m, n, k, kind, steps, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", kind == "tf32")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind, torch.float32)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    b = randn(n) if bias else None
    off = randn(m * k + 1)[1:].view(m, k)
    for x in (randn(m, k), off):
        for grad in (randn(m, n), randn(m, n + 3)[:, 1 : n + 1], None):
            w = randn(n, k)
            step(x, w, b, act, grad)
            steps.clear()
            got = step(x.clone() if x is not off else x, w, b, act, grad)
            taken = len(steps)
            STEPS.forget()
            want = step(x, w, b, act, grad)
            assert (taken, len(steps)) == (1, 1), "the second was to be found, the third not"
            assert all(torch.equal(p, q) and p.dtype == q.dtype for p, q in zip(got, want, strict=True))


def test_a_device_that_may_no_longer_act_as_a_hopper(steps, monkeypatch):
    x, w = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((512, 512), (6400, 512)))
    grad = torch.randn(512, 6400, device="cuda", dtype=torch.bfloat16)
    step(x, w, None, "relu", grad)
    monkeypatch.setenv("FXFUSE_PORTABLE", "1")
    got = step(x, w, None, "relu", grad)
    assert len(steps) == 1
    STEPS.forget()
    assert all(torch.equal(p, q) for p, q in zip(got, step(x, w, None, "relu", grad), strict=True))
