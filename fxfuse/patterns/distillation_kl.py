"""kl_div(log_softmax(student / T), softmax(teacher / T)) · T², and every subset of its temperatures."""

from __future__ import annotations

import math

from torch import fx

from fxfuse.emit import Emit
from fxfuse.guards import last_dim, same_dim
from fxfuse.match import Chain, Either, Match, Var, op, variables
from fxfuse.ops.distillation_kl import distillation_kl
from fxfuse.pattern import Pattern, Words

student, teacher, dim, teacher_dim, reduction = variables("student teacher dim teacher_dim reduction")

student_logits = Chain("student_scales", student, factors="number")
teacher_logits = Chain("teacher_scales", teacher, factors="number")
teacher_softmax = op.softmax(teacher_logits, teacher_dim)
teacher_log_softmax = op.log_softmax(teacher_logits, teacher_dim)
student_log_softmax = op.log_softmax(student_logits, dim)


def temperatures(match: Match) -> str | None:
    """What scales the logits has a reciprocal, which is a temperature."""
    for side in ("student", "teacher"):
        scale = 1.0
        for step in match[f"{side}_scales"]:
            if isinstance(step.factor, (int, float)):
                scale = scale / step.factor if step.op == "div" else scale * step.factor
        if scale == 0 or not math.isfinite(scale):
            return f"the {side}'s logits are scaled by {scale}, which no temperature does"
    return None


def lower(match: Match, emit: Emit) -> fx.Node:
    """Temperatures and the factor behind the loss become numbers of one call."""
    operations = [match.view.operations[node] for node in match.nodes]
    teacher_value = emit.value(match["teacher"])
    if "detach" in operations:
        teacher_value = emit.method("detach", teacher_value)
    return emit.call(
        distillation_kl,
        student=match["student"],
        teacher=teacher_value,
        dim=match["dim"],
        student_temperature=emit.number(match["student_scales"], inverse=True),
        teacher_temperature=emit.number(match["teacher_scales"], inverse=True),
        scale=emit.number(match["scales"]),
        reduction=match["reduction"],
        log_target=operations.count("log_softmax") == 2,
    )


def _loss(target: object, log_target: bool) -> Chain:
    return Chain("scales", op.kl_div(student_log_softmax, target, Var("reduction"), log_target), factors="number")


pattern = Pattern(
    name="distillation_kl",
    expression=Either((
        _loss(teacher_softmax, False),
        _loss(op.detach(teacher_softmax), False),
        _loss(teacher_log_softmax, True),
        _loss(op.detach(teacher_log_softmax), True),
    )),
    op=distillation_kl,
    guards=(same_dim("dim", "teacher_dim", "student"), last_dim("dim", "student"), temperatures),
    lower=lower,
    words=Words(
        why="Two softmaxes and a divergence over a vocabulary read and write the logits about ten times.",
        fuses="Both normalisers, the cross term and the loss come from one online pass over the two sets of logits; no "
        "probabilities are written.",
        algebra="Σ q·(log q − log p) = Σ q·(t − s)/T − (lse(t/T) − lse(s/T)), q = softmax(t/T), rescaled as maxima "
        "move.",
        left="A temperature that is a tensor stays outside. Sums run in float32 in a fixed order.",
    ),
)  # fmt: skip
