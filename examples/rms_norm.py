"""A pattern over operations fxfuse has no word for: RMSNorm written out, as F.rms_norm where that is one kernel."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse
from fxfuse.match import number, op, variables
from fxfuse.vocabulary import define, spell

spell(define("rsqrt", "x"), "input", functions=(torch.rsqrt,), methods="rsqrt", aten="rsqrt")
spell(define("pow", "x exponent"), "input exponent", functions=(torch.pow,), methods="pow", aten="pow")
x, weight = variables("x weight")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.is_cuda and weight.shape == x.shape[-1:] and weight.dtype == x.dtype:  # decided at each call
        return F.rms_norm(x, weight.shape, weight, eps)
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


mean = op.mean(op.pow(x, 2), -1, True)
pattern = fxfuse.register(fxfuse.Pattern(
    name="rms_norm",
    expression=op.mul(weight, op.mul(x, op.rsqrt(op.add(mean, number("eps"))))),
    op=rms_norm,
    words=fxfuse.Words(why="Six operations read and write the activations; F.rms_norm reads them once."),
))  # fmt: skip


class RMSNorm(nn.Module):
    def __init__(self, width: int = 512) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
