"""Linear · scale → BatchNorm1d, in train and eval mode, with a flatten(0, 1) in between as LeViT has it."""

from __future__ import annotations

from torch import fx

from fxfuse.emit import Emit
from fxfuse.guards import bias_is_vector, per_channel, weight_is_matrix
from fxfuse.match import Chain, Either, Match, Var, op, variables
from fxfuse.ops.linear_scale_batchnorm1d import linear_scale_batchnorm1d, linear_scale_batchnorm1d_module
from fxfuse.pattern import Pattern, Words
from fxfuse.patterns._pieces import as_the_product, call_on_product, product, restore_leading
from fxfuse.view import Call, ModuleRef

start_dim, end_dim, shape, unflattened = variables("start_dim end_dim shape unflattened")
FUNCTIONAL = ("running_mean", "running_var", "bn_weight", "bn_bias", "training", "momentum", "eps")
functional = tuple(Var(name) for name in FUNCTIONAL)

scaled = Chain("scales", product, factors="any")
rows = Either((op.flatten(scaled, start_dim, end_dim), op.reshape(scaled, shape), scaled))
normalized = Either((op.batch_norm1d_module(rows, Var("bn")), op.batch_norm(rows, *functional)))


def _flattens(match: Match) -> bool:
    return "start_dim" in match.bindings or "shape" in match.bindings


def rows_by_features(match: Match) -> str | None:
    """What BatchNorm1d reads is [rows, features], as far as is known."""
    known = match.view.rank(match["x"])
    if not _flattens(match):
        return None if known in (None, 2) else f"BatchNorm1d reads {known} dimensions here (N×C×L), not 2"
    if "shape" in match.bindings:
        features = match.view.tensor(match["weight"])
        wanted = tuple(match["shape"]) if isinstance(match["shape"], (tuple, list)) else ()
        if features is None or wanted != (-1, features.shape[0]):
            return f"the view to {list(wanted)} is not known to be [-1, features]"
    elif (match["start_dim"], match["end_dim"]) not in ((0, 1), (0, -2)):
        return f"flatten({match['start_dim']}, {match['end_dim']}) does not keep the features apart"
    if known is not None and known < 3 and "start_dim" in match.bindings:
        return f"flatten takes the features of a tensor with {known} dimensions along"
    if known is not None and known > 3 and match.get("end_dim") == 1:
        return f"BatchNorm1d reads {known - 1} dimensions here (N×C×L), not 2"
    for step in match["scales"]:
        factor = match.view.tensor(step.factor)
        if step.factor is not None and not match.view.is_number(step.factor) and (factor is None or factor.dim() > 1):
            return f"whether {match.view.describe(step.factor)} is per channel behind the flatten is not known"
    return None


def shape_from_match(match: Match) -> str | None:
    """reshape_as gives back the shape the product had."""
    other = match.get("unflattened")
    if other is None or (other in match.nodes and _flattens(match)):
        return None
    return f"reshape_as takes its shape from {match.view.describe(other)}, not from the product"


def _call(match: Match, node: fx.Node) -> Call:
    call = match.view.call(node)
    assert call is not None
    return call


def lower(match: Match, emit: Emit) -> fx.Node:
    """Scales become one factor and one divisor per channel; a flatten moves in front of the product."""
    x = match["x"]
    if "shape" in match.bindings:
        x = emit.method("flatten", emit.value(x), 0, -2)
    elif "start_dim" in match.bindings:
        x = emit.method("flatten", emit.value(x), match["start_dim"], match["end_dim"])
    tensors = [s for s in match["scales"] if s.factor is not None and not match.view.is_number(s.factor)]
    given = {
        "x": x,
        "weight": match["weight"],
        "bias": match.get("bias"),
        "scale": emit.product([s.factor for s in tensors if s.op == "mul"]),
        "divisor": emit.product([s.factor for s in tensors if s.op == "div"]),
        "alpha": emit.number([s for s in match["scales"] if s not in tensors]),
    }
    module = match.get("bn")
    if isinstance(module, ModuleRef):
        out = call_on_product(match, emit, linear_scale_batchnorm1d_module, bn=module, **given)
    else:
        settings = {name: match[name] for name in FUNCTIONAL}
        out = call_on_product(match, emit, linear_scale_batchnorm1d, **given, **settings)
    if any(_call(match, step.node).inplace for step in tensors):
        out = emit.call(as_the_product, out=out, x=match["x"], weight=match["weight"])
    if "unflattened" in match.bindings:
        out = emit.call(restore_leading, out=out, like=match["x"])
    return out


pattern = Pattern(
    name="linear_scale_batchnorm1d",
    expression=Either((op.reshape_as(normalized, unflattened), normalized)),
    op=linear_scale_batchnorm1d,
    guards=(weight_is_matrix, bias_is_vector, rows_by_features, per_channel("scales"), shape_from_match),
    lower=lower,
    words=Words(
        why="Scale and BatchNorm read and write the product five times, and training keeps three tensors of its size.",
        fuses="Statistics are taken from the product while it is at hand, and the result is written once; training "
        "keeps one tensor of the product's size.",
        algebra="eval: γ·(s·(x·Wᵀ + b) − μ)/σ + β = acc·α + δ per channel. train: bias and mean cancel, "
        "out = γ·s·(acc − mean)·rstd + β.",
        left="Running statistics follow torch's rules; the bias gets a gradient of exactly zero in training, where "
        "eager has rounding noise.",
    ),
)
