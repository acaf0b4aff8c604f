"""A pattern of one's own: x + gate * y, as gated residuals have it, in one pass by torch.addcmul."""

import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.match import Match, op, variables

x, gate, y = variables("x gate y")


def gated_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    return torch.addcmul(x, gate, y)


def tensors_of_one_dtype(match: Match) -> str | None:
    known = [match.view.tensor(match[name]) for name in ("x", "gate", "y")]
    if any(t is None for t in known):
        return "the dtypes are not known before it runs; give example_inputs"
    return None if len({t.dtype for t in known}) == 1 else "the dtypes differ: addcmul would not promote alike"


pattern = fxfuse.register(fxfuse.Pattern(
    name="gated_residual",
    expression=op.add(x, op.mul(gate, y)),
    op=gated_residual,
    guards=(tensors_of_one_dtype,),
    words=fxfuse.Words(why="The product is written to memory and read again.", algebra="x + g·y, rounded once."),
))  # fmt: skip


class GatedResidual(nn.Module):
    def __init__(self, width: int = 512) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.gate * y
