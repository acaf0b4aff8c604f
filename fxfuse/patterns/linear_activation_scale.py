"""Linear → activation → scalar, with scalars before, after or not at all."""

from __future__ import annotations

from torch import fx

from fxfuse.emit import Emit
from fxfuse.guards import bias_is_vector, weight_is_matrix
from fxfuse.match import Chain, Either, Match, Var, number, op
from fxfuse.ops.linear_activation_scale import linear_activation_scale
from fxfuse.pattern import Pattern, Words
from fxfuse.patterns._pieces import call_on_product, product

ACTIVATIONS = ("relu", "gelu", "silu", "sigmoid", "tanh", "leaky_relu", "hardtanh", "clamp")

inner = Chain("pre_scales", product, factors="number")
activated = Either((
    op.relu(inner),
    op.gelu(inner, Var("approximate")),
    op.silu(inner),
    op.sigmoid(inner),
    op.tanh(inner),
    op.leaky_relu(inner, number("slope")),
    op.hardtanh(inner, number("low"), number("high")),
    op.clamp(inner, number("low"), number("high")),
))  # fmt: skip


def known_gelu(match: Match) -> str | None:
    """gelu's form is a word when the graph is read."""
    form = match.get("approximate", "none")
    return None if form in ("none", "tanh") else f"gelu's approximate={form!r} is not known"


def lower(match: Match, emit: Emit) -> fx.Node:
    """The activation by name, its one or two parameters as alpha and beta."""
    name = next(o for o in (match.view.operations[n] for n in match.nodes) if o in ACTIVATIONS)
    alpha, beta = match.get("slope", match.get("low", 0.0)), match.get("high", 0.0)
    if name == "gelu" and match["approximate"] == "tanh":
        name = "gelu_tanh"
    return call_on_product(
        match,
        emit,
        linear_activation_scale,
        x=match["x"],
        weight=match["weight"],
        bias=match.get("bias"),
        activation=name,
        alpha=alpha,
        beta=beta,
        pre_scale=emit.number(match["pre_scales"]),
        scale=emit.number(match["post_scales"]),
    )


pattern = Pattern(
    name="linear_activation_scale",
    expression=Chain("post_scales", activated, factors="number"),
    op=linear_activation_scale,
    guards=(weight_is_matrix, bias_is_vector, known_gelu),
    lower=lower,
    words=Words(
        why="Bias, activation and scaling each read and write the product once more.",
        fuses="The product's accumulators pass through bias, activation and scale before they are written, once.",
        algebra="y = s₂ · act(s₁ · (x·Wᵀ + b)).",
        left="The product keeps the precision the user set for matrix products.",
    ),
)
