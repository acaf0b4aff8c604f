"""The canonical operations and every spelling of each: module, function, method, operator, ATen.

A spelling names the parameters in the order the spelled callable takes them. A parameter a spelling does not name
(``rounding_mode``, ``dtype``, ``out``) makes the node opaque when it is given: a keyword is never dropped.
``theirs:ours`` renames a parameter, ``theirs:_`` marks one that cannot change the result.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

__all__ = [
    "OPERATIONS",
    "Operation",
    "Spelling",
    "Unreadable",
    "define",
    "module_reader",
    "operation",
    "spell",
    "spelling_of",
]


class Unreadable(Exception):
    """A call whose target is known but whose arguments say something the vocabulary has no word for."""


@dataclass(frozen=True)
class Operation:
    """A canonical operation: its parameters in order, their defaults, and how it behaves towards memory."""

    name: str
    params: tuple[str, ...]
    defaults: Mapping[str, Any]
    commutes: bool = False
    aliases: bool = False  # the result may share memory with the first argument


@dataclass(frozen=True)
class Spelling:
    """One way to write an operation: parameter names as the callable has them, mapped to the canonical ones."""

    operation: Operation
    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    inplace: bool = False
    adapt: Callable[[dict[str, Any]], dict[str, Any]] | None = field(default=None, compare=False)
    gathers: bool = False  # the last parameter may be written as separate arguments: x.permute(1, 0)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Canonical parameter -> value, defaults filled in; raises :class:`Unreadable` with the reason."""
        name = self.operation.name
        last = len(self.theirs) - 1
        if self.gathers and len(args) > last and not isinstance(args[last], (tuple, list)):
            args = (*args[:last], args[last:])
        if len(args) > len(self.theirs):
            raise Unreadable(f"{name} is given {len(args)} positional arguments, {len(self.theirs)} are known")
        bound = dict(self.operation.defaults)
        for ours, value in zip(self.ours, args, strict=False):
            bound[ours] = value
        for key, value in kwargs.items():
            try:
                bound[self.ours[self.theirs.index(key)]] = value
            except ValueError:
                raise Unreadable(f"{name} is given the keyword '{key}', which the vocabulary does not know") from None
        bound.pop("_", None)
        if self.adapt is not None:
            bound = self.adapt(bound)
        missing = [p for p in self.operation.params if p not in bound]
        if missing:
            raise Unreadable(f"{name} is called without '{missing[0]}'")
        return bound


OPERATIONS: dict[str, Operation] = {}
_FUNCTIONS: dict[Any, Spelling] = {}
_METHODS: dict[str, Spelling] = {}
_ATEN: dict[str, Spelling] = {}
_ATTRIBUTES: dict[str, Spelling] = {}
_MODULES: dict[type, tuple[Operation, Callable[[Any], dict[str, Any]]]] = {}


def operation(name: str) -> Operation:
    """The operation of that name; a KeyError names what exists."""
    try:
        return OPERATIONS[name]
    except KeyError:
        raise KeyError(f"no operation '{name}' in the vocabulary; there are: {', '.join(sorted(OPERATIONS))}") from None


def spelling_of(target: Any, kind: str) -> Spelling | None:
    """The spelling of an fx node's target; ``kind`` is the node's op (call_function or call_method)."""
    if kind == "call_method":
        return _METHODS.get(target)
    found = _FUNCTIONS.get(target)
    if found is None and isinstance(target, torch._ops.OpOverload):
        found = _ATEN.get(target._schema.name)
    elif found is None and isinstance(target, torch._ops.OpOverloadPacket):
        found = _ATEN.get(target._qualified_op_name)
    return found


def attribute_spelling(name: str) -> Spelling | None:
    """The spelling behind an attribute such as ``.T``."""
    return _ATTRIBUTES.get(name)


def module_reader(kind: type[nn.Module]) -> tuple[Operation, Callable[[Any], dict[str, Any]]] | None:
    """How to read a call of a module of this very type (subclasses may do anything, so they are not read)."""
    return _MODULES.get(kind)


def module_kin(kind: type[nn.Module]) -> tuple[Operation, str] | None:
    """The operation a type of modules looks like without being it, and why it is not read: for near misses."""
    if kind in _MODULES:
        return None
    for known, (op, _) in _MODULES.items():
        if issubclass(kind, known):
            return op, f"is a {kind.__name__}, a subclass of {known.__name__} that may compute something else"
    if issubclass(kind, nn.modules.batchnorm._BatchNorm):
        return OPERATIONS["batch_norm1d_module"], f"is a {kind.__name__}, not a BatchNorm1d"
    return None


# --- how the tables are written ------------------------------------------------------------------------------------


def _define(name: str, params: str, *, commutes: bool = False, aliases: bool = False, **defaults: Any) -> Operation:
    op = Operation(name, tuple(params.split()), defaults, commutes, aliases)
    OPERATIONS[name] = op
    return op


def _spell(op: Operation, signature: str, *, functions: tuple[Any, ...] = (), methods: str = "", aten: str = "",
           inplace: bool = False, gathers: bool = False,
           adapt: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> None:  # fmt: skip
    theirs, ours = [], []
    for position, word in enumerate(signature.split()):
        name, _, canonical = word.partition(":")
        theirs.append(name)
        ours.append(canonical or (op.params[position] if position < len(op.params) else name))
    spelling = Spelling(op, tuple(theirs), tuple(ours), inplace, adapt, gathers)
    for function in functions:
        _FUNCTIONS[function] = spelling
    for method in methods.split():
        _METHODS[method] = spelling
    for overload in aten.split():
        _ATEN[f"aten::{overload}"] = spelling


def _read(op: Operation, *modules: type, **attributes: str | Callable[[Any], Any]) -> None:
    def reader(module: Any) -> dict[str, Any]:
        values = dict(op.defaults)
        for ours, source in attributes.items():
            values[ours] = source(module) if callable(source) else getattr(module, source)
        return values

    for module_type in modules:
        _MODULES[module_type] = (op, reader)


def _inplace_flag(values: dict[str, Any]) -> dict[str, Any]:
    # the view turns this key into the in-place marking of the call
    if values.get("inplace") not in (False, True):
        raise Unreadable("whether the call works in place is not known before it runs")
    return values


# --- products ------------------------------------------------------------------------------------------------------

_linear = _define("linear", "x weight bias", bias=None)
_spell(_linear, "input weight bias", functions=(F.linear, torch._C._nn.linear), aten="linear")
_read(_linear, nn.Linear)  # weight and bias of a module are attributes: the view puts their paths in

_matmul = _define("matmul", "a b")
_spell(_matmul, "input other", functions=(torch.matmul,))
_spell(_matmul, "input mat2", functions=(torch.mm,))
_spell(_matmul, "a b", functions=(operator.matmul,))
_spell(_matmul, "self other", methods="matmul __matmul__", aten="matmul")
_spell(_matmul, "self mat2", methods="mm", aten="mm")

_addmm = _define("addmm", "bias a b beta alpha", beta=1, alpha=1)
_spell(_addmm, "input mat1 mat2 beta alpha", functions=(torch.addmm,))
_spell(_addmm, "self mat1 mat2 beta alpha", methods="addmm", aten="addmm")

_t = _define("t", "x", aliases=True)
_spell(_t, "input", functions=(torch.t,))
_spell(_t, "self", methods="t", aten="t numpy_T")
_ATTRIBUTES["T"] = Spelling(_t, ("x",), ("x",))
_ATTRIBUTES["mT"] = Spelling(_define("mT", "x", aliases=True), ("x",), ("x",))
_spell(OPERATIONS["mT"], "self", aten="mT")

_transpose = _define("transpose", "x dim0 dim1", aliases=True)
_spell(_transpose, "input dim0 dim1", functions=(torch.transpose, torch.swapaxes, torch.swapdims))
_spell(_transpose, "self dim0 dim1", methods="transpose swapaxes swapdims", aten="transpose swapaxes swapdims")

_permute = _define("permute", "x dims", aliases=True)
_spell(_permute, "input dims", functions=(torch.permute,))
_spell(_permute, "self dims", methods="permute", aten="permute", gathers=True)

# --- views between a product and what reads it ---------------------------------------------------------------------

_flatten = _define("flatten", "x start_dim end_dim", aliases=True, start_dim=0, end_dim=-1)
_spell(_flatten, "input start_dim end_dim", functions=(torch.flatten,))
_spell(_flatten, "self start_dim end_dim", methods="flatten", aten="flatten")

_reshape = _define("reshape", "x shape", aliases=True)
_spell(_reshape, "input shape", functions=(torch.reshape,))
_spell(_reshape, "self shape", methods="view reshape", aten="view reshape _unsafe_view", gathers=True)

_reshape_as = _define("reshape_as", "x other", aliases=True)
_spell(_reshape_as, "self other", methods="reshape_as view_as", aten="reshape_as view_as")

_detach = _define("detach", "x", aliases=True)
_spell(_detach, "self", functions=(torch.detach,), methods="detach", aten="detach")

# --- element by element --------------------------------------------------------------------------------------------

_mul = _define("mul", "a b", commutes=True)
_spell(_mul, "input other", functions=(torch.mul, torch.multiply))
_spell(_mul, "a b", functions=(operator.mul,))
_spell(_mul, "self other", methods="mul multiply __mul__ __rmul__", aten="mul multiply")
_spell(_mul, "self other", methods="mul_ multiply_", aten="mul_ multiply_", inplace=True)
_spell(_mul, "a b", functions=(operator.imul,), inplace=True)

_div = _define("div", "a b")
_spell(_div, "input other", functions=(torch.div, torch.divide, torch.true_divide))
_spell(_div, "a b", functions=(operator.truediv,))
_spell(_div, "self other", methods="div divide true_divide __truediv__", aten="div divide true_divide")
_spell(_div, "self other", methods="div_ divide_ true_divide_", aten="div_ divide_ true_divide_", inplace=True)
_spell(_div, "a b", functions=(operator.itruediv,), inplace=True)

_neg = _define("neg", "x")
_spell(_neg, "input", functions=(torch.neg, torch.negative, operator.neg))
_spell(_neg, "self", methods="neg negative __neg__", aten="neg negative")
_spell(_neg, "self", methods="neg_ negative_", aten="neg_", inplace=True)

_add = _define("add", "a b", commutes=True)
_spell(_add, "input other", functions=(torch.add,))
_spell(_add, "a b", functions=(operator.add,))
_spell(_add, "self other", methods="add __add__ __radd__", aten="add")
_spell(_add, "self other", methods="add_", aten="add_", inplace=True)
_spell(_add, "a b", functions=(operator.iadd,), inplace=True)

_log = _define("log", "x")
_spell(_log, "input", functions=(torch.log,))
_spell(_log, "self", methods="log", aten="log")
_spell(_log, "self", methods="log_", aten="log_", inplace=True)
_FUNCTIONS[torch.log_] = _METHODS["log_"]

# --- reductions ----------------------------------------------------------------------------------------------------

for _name, _fn in (("sum", torch.sum), ("mean", torch.mean)):
    _reduce = _define(_name, "x dim keepdim", dim=None, keepdim=False)
    _spell(_reduce, "input dim keepdim axis:dim keepdims:keepdim", functions=(_fn,))
    _spell(_reduce, "self dim keepdim axis:dim keepdims:keepdim", methods=_name, aten=_name)

# --- activations ---------------------------------------------------------------------------------------------------

for _name, _module, _targets in (
    ("sigmoid", nn.Sigmoid, (torch.sigmoid, F.sigmoid, torch.special.expit)),
    ("tanh", nn.Tanh, (torch.tanh, F.tanh)),
):
    _plain = _define(_name, "x")
    _spell(_plain, "input", functions=_targets)
    _spell(_plain, "self", methods=_name, aten=_name + (" special_expit" if _name == "sigmoid" else ""))
    _spell(_plain, "self", methods=_name + "_", aten=_name + "_", inplace=True)
    _FUNCTIONS[getattr(torch, _name + "_")] = _METHODS[_name + "_"]
    _read(_plain, _module)

for _name, _gate, _functional in (("relu", nn.ReLU, F.relu), ("silu", nn.SiLU, F.silu)):
    _plain = _define(_name, "x inplace", inplace=False)
    _spell(_plain, "input inplace", functions=(_functional,), adapt=_inplace_flag)
    _read(_plain, _gate, inplace="inplace")
_spell(OPERATIONS["relu"], "input", functions=(torch.relu,))
_spell(OPERATIONS["relu"], "self", methods="relu", aten="relu")
_spell(OPERATIONS["relu"], "self", methods="relu_", aten="relu_", inplace=True)
_FUNCTIONS[torch.relu_] = _FUNCTIONS[F.relu_] = _METHODS["relu_"]
_spell(OPERATIONS["silu"], "self", aten="silu")
_spell(OPERATIONS["silu"], "self", aten="silu_", inplace=True)

_gelu = _define("gelu", "x approximate", approximate="none")
_spell(_gelu, "input approximate", functions=(F.gelu, torch._C._nn.gelu))
_spell(_gelu, "self approximate", aten="gelu")
_read(_gelu, nn.GELU, approximate="approximate")

_leaky = _define("leaky_relu", "x negative_slope inplace", negative_slope=0.01, inplace=False)
_spell(_leaky, "input negative_slope inplace", functions=(F.leaky_relu,), adapt=_inplace_flag)
_spell(_leaky, "self negative_slope", functions=(torch._C._nn.leaky_relu,), aten="leaky_relu")
_spell(_leaky, "self negative_slope", functions=(torch._C._nn.leaky_relu_, F.leaky_relu_), aten="leaky_relu_",
       inplace=True)  # fmt: skip
_read(_leaky, nn.LeakyReLU, negative_slope="negative_slope", inplace="inplace")


def _six(values: dict[str, Any]) -> dict[str, Any]:
    return {"inplace": False, **values, "min_val": 0.0, "max_val": 6.0}


_hardtanh = _define("hardtanh", "x min_val max_val inplace", min_val=-1.0, max_val=1.0, inplace=False)
_spell(_hardtanh, "input min_val max_val inplace", functions=(F.hardtanh,), adapt=_inplace_flag)
_spell(_hardtanh, "self min_val max_val", functions=(torch._C._nn.hardtanh,), aten="hardtanh")
_spell(_hardtanh, "self min_val max_val", functions=(torch._C._nn.hardtanh_, F.hardtanh_), aten="hardtanh_",
       inplace=True)  # fmt: skip
_spell(_hardtanh, "input inplace:inplace", functions=(F.relu6,), adapt=_six)
_spell(_hardtanh, "self", functions=(torch._C._nn.relu6,), aten="relu6", adapt=_six)
_read(_hardtanh, nn.Hardtanh, min_val="min_val", max_val="max_val", inplace="inplace")
_read(_hardtanh, nn.ReLU6, min_val=lambda m: 0.0, max_val=lambda m: 6.0, inplace="inplace")


def _clamped(values: dict[str, Any]) -> dict[str, Any]:
    # clamp(min=None) has no lower bound; canonically that bound is minus infinity
    low, high = values["min"], values["max"]
    return {**values, "min": -math.inf if low is None else low, "max": math.inf if high is None else high}


# not hardtanh: the gradient passes at the bounds themselves
_clamp = _define("clamp", "x min max", min=None, max=None)
_spell(_clamp, "input min max", functions=(torch.clamp, torch.clip), adapt=_clamped)
_spell(_clamp, "self min max", methods="clamp clip", aten="clamp clip", adapt=_clamped)
_spell(_clamp, "self min max", methods="clamp_ clip_", aten="clamp_ clip_", inplace=True, adapt=_clamped)
_spell(_clamp, "input min", functions=(torch.clamp_min,), adapt=_clamped)
_spell(_clamp, "self min", methods="clamp_min", aten="clamp_min", adapt=_clamped)
_spell(_clamp, "self min", methods="clamp_min_", aten="clamp_min_", inplace=True, adapt=_clamped)
_spell(_clamp, "input max:max", functions=(torch.clamp_max,), adapt=_clamped)
_spell(_clamp, "self max:max", methods="clamp_max", aten="clamp_max", adapt=_clamped)
_spell(_clamp, "self max:max", methods="clamp_max_", aten="clamp_max_", inplace=True, adapt=_clamped)
for _clamp_name in ("clamp", "clamp_min", "clamp_max"):
    _FUNCTIONS[getattr(torch, _clamp_name + "_")] = _METHODS[_clamp_name + "_"]
_FUNCTIONS[torch.clip_] = _METHODS["clamp_"]

# --- softmax and its losses ----------------------------------------------------------------------------------------

for _name, _layer, _softmax, _private in (
    ("softmax", nn.Softmax, F.softmax, torch.softmax),
    ("log_softmax", nn.LogSoftmax, F.log_softmax, torch.log_softmax),
):
    _soft = _define(_name, "x dim dtype", dim=None, dtype=None)
    _spell(_soft, "input dim _stacklevel:_ dtype:dtype", functions=(_softmax,))
    _spell(_soft, "input dim dtype", functions=(_private, getattr(torch.special, _name)))
    _spell(_soft, "self dim dtype", methods=_name, aten=f"{_name} special_{_name}")
    _read(_soft, _layer, dim="dim")


def _reduction(values: dict[str, Any]) -> dict[str, Any]:
    """Deprecated ``size_average``/``reduce`` and ATen's numbers, as F.kl_div itself reads them."""
    average, reduce = values.pop("size_average", None), values.pop("reduce", None)
    if average is not None or reduce is not None:
        values["reduction"] = "none" if reduce is False else ("sum" if average is False else "mean")
    numbered = {0: "none", 1: "mean", 2: "sum"}
    if isinstance(values["reduction"], int):
        values["reduction"] = numbered.get(values["reduction"], "unknown")
    if values["reduction"] not in ("none", "mean", "batchmean", "sum"):
        raise Unreadable(f"kl_div is given the reduction {values['reduction']!r}")
    if values["log_target"] not in (False, True):
        raise Unreadable("whether kl_div's target is a logarithm is not known before it runs")
    return values


def _numbered(values: dict[str, Any]) -> dict[str, Any]:
    if "number" not in values:  # torch.kl_div's own default is none, its schema says mean
        raise Unreadable("torch.kl_div is given no reduction")
    return _reduction({**values, "reduction": values.pop("number")})


_kl = _define("kl_div", "input target reduction log_target", reduction="mean", log_target=False)
_spell(_kl, "input target size_average:size_average reduce:reduce reduction:reduction log_target:log_target",
       functions=(F.kl_div,), adapt=_reduction)  # fmt: skip
_spell(_kl, "input target reduction:number log_target", functions=(torch.kl_div,), adapt=_numbered)
_spell(_kl, "self target reduction log_target", aten="kl_div", adapt=_reduction)
_read(_kl, nn.KLDivLoss, reduction="reduction", log_target="log_target")

# --- BatchNorm -----------------------------------------------------------------------------------------------------

_batch_norm = _define(
    "batch_norm", "x running_mean running_var weight bias training momentum eps",
    running_mean=None, running_var=None, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5,
)  # fmt: skip
_spell(_batch_norm, "input running_mean running_var weight bias training momentum eps", functions=(F.batch_norm,))
_BATCH_NORM_ATEN = (
    "input weight:weight bias:bias running_mean:running_mean running_var:running_var training:training "
    "momentum:momentum eps:eps cudnn_enabled:_"
)
_spell(_batch_norm, _BATCH_NORM_ATEN, functions=(torch.batch_norm,), aten="batch_norm")

_bn_module = _define("batch_norm1d_module", "x module")
_MODULES[nn.BatchNorm1d] = (_bn_module, lambda module: {})

#: targets that read an attribute by name, such as ``getattr(w, "T")``
ATTRIBUTE_READS = (builtins.getattr,)
#: operations a chain of scalings may be made of
SCALINGS = ("mul", "div", "neg")

# --- words of one's own --------------------------------------------------------------------------------------------


def define(name: str, params: str, *, commutes: bool = False, aliases: bool = False, **defaults: Any) -> Operation:
    """A new operation for patterns: ``rsqrt = define("rsqrt", "x")``, then ``op.rsqrt(...)`` in an expression.

    Args:
        name: of the operation.
        params: its parameters in order, separated by spaces.
        commutes: whether the first two may change places.
        aliases: whether the result may share memory with the first argument (a view).
        defaults: of parameters a call may leave out.

    Raises:
        ValueError: when the name means something else already.
    """
    made = Operation(name, tuple(params.split()), defaults, commutes, aliases)
    if OPERATIONS.setdefault(name, made) != made:
        raise ValueError(f"the vocabulary has another operation named '{name}': {OPERATIONS[name]}")
    return OPERATIONS[name]


def spell(op: Operation, signature: str, *, functions: tuple[Any, ...] = (), methods: str = "",
          aten: str = "") -> None:  # fmt: skip
    """Ways to write an operation: ``spell(rsqrt, "input", functions=(torch.rsqrt,), methods="rsqrt", aten="rsqrt")``.

    Args:
        op: what :func:`define` or :func:`operation` returned.
        signature: the callable's own parameter names in order; ``theirs:ours`` where they differ from the operation's
            and do not stand at the same place. A call that gives any other keyword is not read.
        functions: callables, or operators of ``torch.ops``.
        methods: names of tensor methods, separated by spaces.
        aten: names of ATen operators, separated by spaces.

    Raises:
        ValueError: when one of them is a spelling of another operation.
    """
    held = [_FUNCTIONS.get(f) for f in functions] + [_METHODS.get(m) for m in methods.split()]
    held += [_ATEN.get(f"aten::{overload}") for overload in aten.split()]
    taken = next((s for s in held if s is not None and s.operation != op), None)
    if taken is not None:
        raise ValueError(f"a spelling of '{op.name}' is one of '{taken.operation.name}' already")
    _spell(op, signature, functions=functions, methods=methods, aten=aten)
