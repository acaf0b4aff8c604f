"""Every spelling in the vocabulary computes what its operation says, in whatever order its parameters come."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxfuse import vocabulary
from fxfuse.vocabulary import OPERATIONS, Spelling, Unreadable

GENERATOR = torch.Generator().manual_seed(0)
X, W, B = (torch.randn(shape, generator=GENERATOR) for shape in ((4, 6), (5, 6), (5,)))
P, T = torch.rand(4, 6, generator=GENERATOR) + 0.1, torch.rand(4, 6, generator=GENERATOR) + 0.1
FLAG = fx.Graph().placeholder("flag")
MEAN, VAR = torch.randn(6, generator=GENERATOR), torch.rand(6, generator=GENERATOR) + 0.5

#: operation -> (what it means in canonical parameters, canonical values that differ from every default)
MEANINGS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "linear": (lambda x, weight, bias: x @ weight.t() + bias, {"x": X, "weight": W, "bias": B}),
    "matmul": (lambda a, b: a @ b, {"a": X, "b": W.t()}),
    "addmm": (
        lambda bias, a, b, beta, alpha: beta * bias + alpha * (a @ b),
        {"bias": B, "a": X, "b": W.t(), "beta": 2, "alpha": 3},
    ),
    "t": (lambda x: x.t(), {"x": X}),
    "mT": (lambda x: x.mT, {"x": torch.randn(2, 4, 6)}),
    "transpose": (lambda x, dim0, dim1: x.transpose(dim0, dim1), {"x": torch.randn(2, 4, 6), "dim0": 0, "dim1": 2}),
    "permute": (lambda x, dims: x.permute(dims), {"x": torch.randn(2, 4, 6), "dims": (2, 0, 1)}),
    "flatten": (
        lambda x, start_dim, end_dim: x.flatten(start_dim, end_dim),
        {"x": torch.randn(2, 3, 4, 5), "start_dim": 1, "end_dim": 2},
    ),
    "reshape": (lambda x, shape: x.reshape(shape), {"x": X, "shape": (3, 8)}),
    "reshape_as": (lambda x, other: x.reshape_as(other), {"x": X, "other": torch.zeros(3, 8)}),
    "detach": (lambda x: x, {"x": X}),
    "mul": (lambda a, b: a * b, {"a": X, "b": P}),
    "div": (lambda a, b: a / b, {"a": X, "b": P}),
    "neg": (lambda x: -x, {"x": X}),
    "add": (lambda a, b: a + b, {"a": X, "b": P}),
    "log": (lambda x: x.log(), {"x": P}),
    "sum": (lambda x, dim, keepdim: x.sum(dim, keepdim), {"x": X, "dim": 1, "keepdim": True}),
    "mean": (lambda x, dim, keepdim: x.mean(dim, keepdim), {"x": X, "dim": 1, "keepdim": True}),
    "sigmoid": (lambda x: 1 / (1 + (-x).exp()), {"x": X}),
    "tanh": (lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()), {"x": X}),
    "relu": (lambda x, inplace: x.clamp(min=0), {"x": X, "inplace": False}),
    "silu": (lambda x, inplace: x / (1 + (-x).exp()), {"x": X, "inplace": False}),
    "gelu": (lambda x, approximate: F.gelu(x, approximate=approximate), {"x": X, "approximate": "tanh"}),
    "leaky_relu": (
        lambda x, negative_slope, inplace: torch.where(x > 0, x, x * negative_slope),
        {"x": X, "negative_slope": 0.3, "inplace": False},
    ),
    "hardtanh": (
        lambda x, min_val, max_val, inplace: x.maximum(torch.tensor(float(min_val))).minimum(
            torch.tensor(float(max_val))
        ),
        {"x": X, "min_val": -0.25, "max_val": 0.75, "inplace": False},
    ),
    "clamp": (
        lambda x, min, max: x.maximum(torch.tensor(float(min))).minimum(torch.tensor(float(max))),
        {"x": X, "min": -0.25, "max": 0.75},
    ),
    "softmax": (lambda x, dim, dtype: x.to(dtype).softmax(dim), {"x": X, "dim": 0, "dtype": torch.float64}),
    "log_softmax": (lambda x, dim, dtype: x.to(dtype).log_softmax(dim), {"x": X, "dim": 0, "dtype": torch.float64}),
    "kl_div": (
        lambda input, target, reduction, log_target: (target.exp() * (target - input)).sum(),
        {"input": X, "target": T, "reduction": "sum", "log_target": True},
    ),
    "batch_norm": (
        lambda x, running_mean, running_var, weight, bias, training, momentum, eps: (
            (x - running_mean) / (running_var + eps).sqrt() * weight + bias
        ),
        {
            "x": X,
            "running_mean": MEAN,
            "running_var": VAR,
            "weight": MEAN + 2,
            "bias": VAR * 3,
            "training": False,
            "momentum": 0.3,
            "eps": 0.01,
        },
    ),
}
#: ATen's own words for a value
ATEN_WORDS = {"sum": 2}


def spellings() -> list[Any]:
    found = [("function", getattr(f, "__name__", str(f)), f, s) for f, s in vocabulary._FUNCTIONS.items()]
    found += [("method", name, name, s) for name, s in vocabulary._METHODS.items()]
    for name, spelling in vocabulary._ATEN.items():
        packet = getattr(torch.ops.aten, name.removeprefix("aten::"))
        found.append(("aten", name, packet, spelling))
    seen: dict[str, int] = {}
    parameters = []
    for kind, name, target, spelling in found:
        label = f"{spelling.operation.name}-{kind}-{name}"
        seen[label] = seen.get(label, 0) + 1
        parameters.append(pytest.param(kind, target, spelling, id=f"{label}-{seen[label]}"))
    return parameters


def arguments(spelling: Spelling, kind: str) -> list[Any]:
    """Positional arguments that say the canonical values, as this spelling takes them."""
    values = MEANINGS[spelling.operation.name][1]
    given = []
    for theirs, ours in zip(spelling.theirs, spelling.ours, strict=True):
        if theirs in ("axis", "keepdims"):
            break  # words that only keywords reach
        if theirs in ("size_average", "reduce"):
            value = None  # deprecated: tested below
        elif ours == "_":
            value = {"_stacklevel": 3, "cudnn_enabled": False}[theirs]
        else:
            value = values["reduction" if ours == "number" else ours]
        given.append(value)
    return [g.clone() if isinstance(g, Tensor) else g for g in given]


@pytest.mark.parametrize(("kind", "target", "spelling"), spellings())
def test_a_spelling_means_its_operation(kind: str, target: Any, spelling: Spelling) -> None:
    """What a call binds to gives the same result canonically; in-place spellings really work in place."""
    name = spelling.operation.name
    meaning, _ = MEANINGS[name]
    given = arguments(spelling, kind)
    if target is torch.kl_div or kind == "aten":
        given = [ATEN_WORDS.get(g, g) if isinstance(g, str) and name == "kl_div" else g for g in given]
    bound = spelling.bind(tuple(given), {})
    bound.setdefault("inplace", False)
    canonical = {p: bound[p] for p in spelling.operation.params}
    canonical = {k: v.clone() if isinstance(v, Tensor) else v for k, v in canonical.items()}
    if name in ("softmax", "log_softmax"):
        canonical["dtype"] = canonical["dtype"] or torch.float32
    expected = meaning(**canonical)
    first = given[0]
    result = call_with_keywords(kind, target, spelling, given)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert (result is first) == spelling.inplace


def call_with_keywords(kind: str, target: Any, spelling: Spelling, given: list[Any]) -> Any:
    """Some callables take trailing parameters by keyword alone."""
    positional = len(given)
    while True:
        named = dict(zip(spelling.theirs[positional:], given[positional:], strict=False))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                if kind == "method":
                    return getattr(given[0], target)(*given[1:positional], **named)
                return target(*given[:positional], **named)
            except (TypeError, RuntimeError):
                if positional <= 1:
                    raise
                positional -= 1


def test_every_operation_has_a_meaning_here() -> None:
    assert set(OPERATIONS) - set(MEANINGS) == {"batch_norm1d_module"}


@pytest.mark.parametrize(
    ("spell", "expected"),
    [
        ((F.kl_div, (P, T), {"size_average": False}), "sum"),
        ((F.kl_div, (P, T), {"size_average": True}), "mean"),
        ((F.kl_div, (P, T), {"reduce": False}), "none"),
        ((F.kl_div, (P, T), {"reduce": False, "size_average": False}), "none"),
        ((F.kl_div, (P, T), {"reduce": True, "reduction": "sum"}), "mean"),
        ((F.kl_div, (P, T), {}), "mean"),
        ((torch.kl_div, (P, T, 1), {}), "mean"),
        ((torch.kl_div, (P, T, 0), {}), "none"),
        ((torch.ops.aten.kl_div.default, (P, T, 2), {}), "sum"),
    ],
)
def test_kl_div_reductions_are_read_as_torch_reads_them(spell: Any, expected: str) -> None:
    function, args, kwargs = spell
    spelling = vocabulary.spelling_of(function, "call_function")
    assert spelling is not None
    bound = spelling.bind(args, kwargs)
    assert bound["reduction"] == expected
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(function(*args, **kwargs), F.kl_div(P, T, reduction=expected))


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "reason"),
    [
        (torch.div, (X, P), {"rounding_mode": "floor"}, "rounding_mode"),
        (torch.sum, (X,), {"dim": 1, "dtype": torch.float64}, "dtype"),
        (torch.mul, (X, P), {"out": X}, "out"),
        (torch.add, (X, P), {"alpha": 2}, "alpha"),
        (F.linear, (X,), {}, "without 'weight'"),
        (F.kl_div, (P, T), {"reduction": "average"}, "the reduction 'average'"),
        (torch.kl_div, (P, T), {}, "torch.kl_div is given no reduction"),  # its default is not what its schema says
        (F.kl_div, (P, T), {"log_target": FLAG}, "not known before it runs"),
        (F.relu, (X, "maybe"), {}, "not known before it runs"),
        (torch.neg, (X, X), {}, "2 positional arguments, 1 are known"),
    ],
)
def test_what_it_has_no_word_for_is_unreadable(function: Any, args: Any, kwargs: Any, reason: str) -> None:
    spelling = vocabulary.spelling_of(function, "call_function")
    assert spelling is not None
    with pytest.raises(Unreadable, match=reason):
        spelling.bind(args, kwargs)


def test_a_method_takes_its_shape_in_one_piece_or_in_several() -> None:
    spelling = vocabulary.spelling_of("view", "call_method")
    assert spelling is not None
    assert spelling.bind((X, 3, 8), {})["shape"] == (3, 8)
    assert spelling.bind((X, (3, 8)), {})["shape"] == (3, 8)


def test_a_packet_and_its_overload_are_one_spelling() -> None:
    packet, overload = torch.ops.aten.mul, torch.ops.aten.mul.Tensor
    assert vocabulary.spelling_of(packet, "call_function") is vocabulary.spelling_of(overload, "call_function")


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(3, 2),
        nn.ReLU(),
        nn.GELU("tanh"),
        nn.LeakyReLU(0.3),
        nn.Hardtanh(-2, 2),
        nn.ReLU6(),
        nn.SiLU(),
        nn.Sigmoid(),
        nn.Tanh(),
        nn.Softmax(1),
        nn.LogSoftmax(0),
        nn.KLDivLoss("sum"),
        nn.BatchNorm1d(2),
    ],
    ids=lambda m: type(m).__name__,
)
def test_modules_are_read_by_their_very_type(module: nn.Module) -> None:
    assert vocabulary.module_reader(type(module)) is not None
    kin = type("Own" + type(module).__name__, (type(module),), {})
    module.__class__ = kin
    assert vocabulary.module_reader(type(module)) is None
    found = vocabulary.module_kin(type(module))
    assert found is not None and "a subclass of" in found[1]


def test_other_batchnorms_are_kin_that_say_so() -> None:
    found = vocabulary.module_kin(nn.SyncBatchNorm)
    assert found is not None and found[1] == "is a SyncBatchNorm, not a BatchNorm1d"
    assert vocabulary.module_kin(nn.Conv2d) is None


def test_an_operation_that_does_not_exist_names_those_that_do() -> None:
    with pytest.raises(KeyError, match=r"no operation 'conv' in the vocabulary; there are: .*linear"):
        vocabulary.operation("conv")
