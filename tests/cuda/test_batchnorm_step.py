"""Training steps of linear_scale_batchnorm1d like one before: the bits of the ordinary way, whatever it rests on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from uninitialised import fill_with_nan

from fxfuse.kernels import linear_scale_batchnorm1d as kernels
from fxfuse.kernels import loader
from fxfuse.ops._batchnorm_step import Step
from fxfuse.ops.linear_scale_batchnorm1d import STEPS, linear_scale_batchnorm1d_module

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
SIZES = [(512, 6400, 512), (2100, 768, 640), (70, 136, 200), (5, 33, 64)]


class Block(nn.Module):
    """What comes between the layer and BatchNorm is left out, one number a column, or one number."""

    def __init__(self, k: int, n: int, *, bias: bool = True, scale: str = "columns", **norm: bool) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(k, n, bias=bias), nn.BatchNorm1d(n, **norm)
        self.scale = None if not scale else nn.Parameter(torch.rand(n if "columns" in scale else ()) + 0.5)
        self.divides = "divisor" in scale

    def forward(self, x: Tensor) -> Tensor:
        scale, divisor = (None, self.scale) if self.divides else (self.scale, None)
        return linear_scale_batchnorm1d_module(self.bn, x, self.linear.weight, self.linear.bias, scale, divisor, 0.75)


BLOCKS = {
    "plain": {},
    "no bias": {"bias": False},
    "no scale": {"scale": ""},
    "one scale": {"scale": "one"},
    "divisor": {"scale": "columns divisor"},
    "not affine": {"affine": False},
    "no running statistics": {"track_running_stats": False},
}


KINDS = ("bf16", "fp16", "fp32", "tf32", "mixed")
#: A float32 result of a 16-bit product takes a factor with a dimension.
CASES = [(b, kind) for b in BLOCKS for kind in KINDS if kind != "mixed" or b not in ("no scale", "one scale")]


@pytest.fixture(autouse=True, params=["", "1"], ids=["hopper", "portable"])
def road(request, monkeypatch):
    monkeypatch.setenv("FXFUSE_PORTABLE", request.param)
    assert loader.library() is not None, loader.why_unavailable()
    fill_with_nan(monkeypatch)


@pytest.fixture
def served(monkeypatch) -> list[str]:
    """What served each call since: "step" a `Step`, "ordinary" anything else."""
    taken: list[str] = []
    find, forward = type(STEPS).find, Step.forward

    def found(self, *args):
        taken.append("ordinary")
        return find(self, *args)

    def stepped(self, *args, **kwargs):
        taken[-1] = "step"
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(STEPS), "find", found)
    monkeypatch.setattr(Step, "forward", stepped)
    return taken


def step(model: nn.Module, x: Tensor, grad: Tensor | None) -> list[Tensor]:
    """Everything that a step leaves: result, gradients, buffers."""
    x = x.detach().requires_grad_()
    out = model(x)
    leaves = [x, *model.parameters()]
    found = torch.autograd.grad(out.sum() if grad is None else out, leaves, grad)
    return [out.detach(), *found, *model.buffers()]


def same(model: nn.Module, x: Tensor, grad: Tensor | None) -> None:
    """A step of a copy, whatever is kept, leaves what one leaves with nothing kept."""
    got = step(copy.deepcopy(model), x, grad)
    STEPS.forget()
    want = step(copy.deepcopy(model), x, grad)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("m", "n", "k"), SIZES)
@pytest.mark.parametrize(("block", "kind"), CASES)
def test_the_bits_of_the_ordinary_way(block, m, n, k, kind, served, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", kind == "tf32")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "mixed": torch.bfloat16}.get(kind, torch.float32)
    model = Block(k, n, **BLOCKS[block]).cuda().to(dtype)
    if block == "not affine":  # eager normalises in float32 then, and so do the kernels
        model.bn.float()
    if kind == "mixed":
        model.scale.data, model.bn = model.scale.data.float(), model.bn.float()
    x, grad = torch.randn(m, k, device="cuda", dtype=dtype), torch.randn(m, n, device="cuda")
    grad = grad.to(model(x).dtype)
    served.clear()
    step(copy.deepcopy(model), x, grad)  # kept at the latest now
    same(model, x, grad)
    assert served == ["ordinary", *["ordinary" if block in ("one scale", "divisor") else "step"], "ordinary"]


@pytest.mark.parametrize(("m", "n", "k"), SIZES[:2])
def test_what_a_step_cannot_take(m, n, k, served, monkeypatch):
    """Gradients of other strides, an x that the copy engine cannot read (which is not kept for others), no room."""
    model = Block(k, n).cuda().bfloat16()
    x, grad = torch.randn(2, m, max(n, k) + 8, device="cuda").bfloat16()
    skewed = x.flatten()[1 : 1 + m * k].view(m, k)
    x, one = x[:, :k].contiguous(), grad[:, :n]
    for these in ((x, None), (x, one), (skewed, one.contiguous()), (skewed, grad[:, 1 : 1 + n])):
        step(copy.deepcopy(model), these[0], one.contiguous())
        same(model, *these)
        served.clear()
        same(model, x if these[0] is skewed else skewed, one)
        assert served[0] == "ordinary", "x lies otherwise than before"
    real = kernels.functions()

    def refuse(*args):
        raise loader.KernelError("no room", 720)

    step(copy.deepcopy(model), x, one.contiguous())
    monkeypatch.setattr(kernels, "functions", lambda: real._replace(train=refuse, step_forward=refuse))
    same(model, x, one.contiguous())


def test_second_derivatives_of_a_step(served):
    model = Block(64, 48).cuda()
    x, grad = torch.randn(40, 64, device="cuda"), torch.randn(40, 48, device="cuda")

    def second() -> list[Tensor]:
        this = copy.deepcopy(model)
        leaves = [x.clone().requires_grad_(), this.linear.weight, this.scale]
        first = torch.autograd.grad(this(leaves[0]), leaves, grad, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))

    want, got = second(), second()
    assert served == ["ordinary", "step"]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_retained_graph_gives_the_same_again():
    model = Block(640, 768).cuda().bfloat16()
    x = torch.randn(2100, 640, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):
        out = model(x)
    grad = torch.randn_like(out)
    once, again = (torch.autograd.grad(out, list(model.parameters()), grad, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
