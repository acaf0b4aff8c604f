"""F.kl_div and nn.KLDivLoss, with the logarithm in front of the input taken in where there is one."""

from __future__ import annotations

from torch import fx

from fxfuse.emit import Emit
from fxfuse.match import Either, Match, op, variables
from fxfuse.ops.kl_div import kl_div
from fxfuse.pattern import Pattern, Words

probability, input, target, reduction, log_target = variables("probability input target reduction log_target")


def lower(match: Match, emit: Emit) -> fx.Node:
    """One call of the op; ``log_input`` says that the logarithm is the op's own."""
    takes_log = "probability" in match.bindings
    return emit.call(
        kl_div,
        input=match["probability" if takes_log else "input"],
        target=match["target"],
        reduction=match["reduction"],
        log_target=match["log_target"],
        log_input=takes_log,
    )


pattern = Pattern(
    name="kl_div",
    expression=Either((
        op.kl_div(op.log(probability), target, reduction, log_target),
        op.kl_div(input, target, reduction, log_target),
    )),
    op=kl_div,
    lower=lower,
    words=Words(
        why="ATen computes the loss in five passes over memory, each writing a tensor of the input's size.",
        fuses="log, xlogy, product, difference and reduction run in one pass; nothing of the input's size is written.",
        algebra="Σ t·(log t − x) with x = input or log p, summed in float32 in a fixed order.",
        left="Zeros, infinities and NaN come out where ATen has them. The order of the sum differs from ATen's.",
    ),
)  # fmt: skip
