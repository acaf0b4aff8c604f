"""A product with a transposed weight, scalars, and one sum or mean over the output features."""

from __future__ import annotations

from torch import fx

from fxfuse.cost import collapsed
from fxfuse.emit import Emit
from fxfuse.guards import bias_is_vector, last_dim, single_dim, weight_is_matrix
from fxfuse.match import Chain, Either, Match, op, variables
from fxfuse.ops.matmul_div_sum_scale import matmul_div_sum_scale
from fxfuse.pattern import Pattern, Words
from fxfuse.patterns._pieces import call_on_product, product

dim, keepdim = variables("dim keepdim")
terms = Chain("pre_scales", product, factors="scalar")


def lower(match: Match, emit: Emit) -> fx.Node:
    """Numbers become the op's scale; 0-d tensors, being constant over the sum, multiply its result."""
    tensors = [s for s in match["pre_scales"] if s.factor is not None and not match.view.is_number(s.factor)]
    numbers = [s for s in match["pre_scales"] if s not in tensors]
    result = call_on_product(
        match,
        emit,
        matmul_div_sum_scale,
        x=match["x"],
        weight=match["weight"],
        bias=match.get("bias"),
        scale=emit.number(numbers + match["post_scales"]),
        dim=single_dim(match["dim"]),
        keepdim=match["keepdim"],
        mean=any(match.view.operations[node] == "mean" for node in match.nodes),
    )
    return emit.apply(tensors, result)


def one_dim(match: Match) -> str | None:
    """keepdim is a plain truth value."""
    return None if isinstance(match["keepdim"], bool) else "keepdim is not known before it runs"


pattern = Pattern(
    name="matmul_div_sum_scale",
    expression=Chain(
        "post_scales", Either((op.sum(terms, dim, keepdim), op.mean(terms, dim, keepdim))), factors="number"
    ),
    op=matmul_div_sum_scale,
    guards=(weight_is_matrix, bias_is_vector, last_dim("dim", "x"), one_dim),
    lower=lower,
    pays_always=True,
    cost=collapsed,
    words=Words(
        why="The sum over the output features turns the matrix product into a matrix-vector product.",
        fuses="No product is formed: the weight's column sums are taken once, then one dot product per row.",
        algebra="Σⱼ (x·Wᵀ + b)ᵢⱼ = x·(Σⱼ Wⱼ) + Σⱼ bⱼ, recomputed from the live weight at every call.",
        left="The order of the sums differs; inf − inf may appear where the unfused sum met it later or not at all.",
    ),
)
