"""optimize(): capture, rewrite, verify, hand back a module that computes the same thing."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from fxfuse.capture import Captured, Signature, Untraceable, capture
from fxfuse.examples import annotate, kinds_of, normalize
from fxfuse.fuse import Compiler, configure_logging, variant_of
from fxfuse.pattern import Pattern, select
from fxfuse.plan import Plan, Variant, plan_of, uninstall
from fxfuse.report import Report, Untraced
from fxfuse.twin import twin

__all__ = ["optimize", "report", "FusedFunction"]

_REPORT = "_fxfuse_report"
Model = TypeVar("Model", bound=Callable[..., Any])


def optimize(
    model: Any,
    example_inputs: Any = None,
    *,
    patterns: Iterable[str | Pattern] | None = None,
    verify: bool = False,
    freeze: bool = False,
) -> Any:
    """The same computation with every match of a pattern replaced by its fused op.

    Args:
        model: an ``nn.Module``, a plain function, or a ``torch.export.ExportedProgram``.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments. Optional; shapes that are known let
            more guards decide, and arguments that are not tensors are told apart.
        patterns: names or :class:`fxfuse.Pattern` objects to look for; all that exist when None.
        verify: compare with the original in float64 and in the model's own dtype on the example inputs, outputs and
            gradients, train and eval; a replacement that is out of bounds is undone and named.
        freeze: keep what depends on weights alone (the column sums of ``matmul_div_sum_scale``) until they change.

    Returns:
        A module of the same class (or a function) that shares every parameter and buffer with ``model``, which stays as it
        was. What cannot be traced keeps its own Python; ``fxfuse.report(result)`` says what happened.

    Raises:
        TypeError: for a model or example inputs of a wrong type.
        ValueError: for a pattern name that does not exist, or inputs that do not run through the model.
    """
    configure_logging()
    chosen = select(patterns)
    example = normalize(example_inputs)
    if verify and example is None:
        raise ValueError("verify=True compares outputs, so it needs example_inputs")
    if isinstance(model, torch.export.ExportedProgram):
        model = model.module()
    if isinstance(model, nn.Module):
        make: Callable[..., Any] = _optimize_module
    elif isinstance(model, type) or not callable(model):
        given = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"optimize takes an nn.Module, a function or an ExportedProgram, not {given}")
    else:
        make = _optimize_function
    if verify:
        from fxfuse.verify import verified

        return verified(make, model, example, chosen, freeze)
    return make(model, example, chosen, freeze)


def _optimize_module(model: nn.Module, example: Any, patterns: tuple[Pattern, ...], freeze: bool) -> nn.Module:
    result = Report(title=type(model).__name__)
    fused = twin(model)
    for module in fused.modules():
        uninstall(module)
        module.__dict__.pop(_REPORT, None)
    fused = Compiler(patterns, result, freeze, example).tree(fused)
    fused.__dict__[_REPORT] = result.settle()
    return fused


class FusedFunction:
    """A function that runs by its fused graph where the call fits, and as it was written where it does not."""

    def __init__(self, function: Callable[..., Any], plan: Plan | None, owner: nn.Module | None, report: Report) -> None:
        functools.update_wrapper(self, function)
        self.__wrapped__ = function
        self._plan = plan
        self._owner = owner
        self.report = report

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._plan is None:
            return self.__wrapped__(*args, **kwargs)
        return self._plan(self._owner, self.__wrapped__, args, kwargs)

    def __reduce__(self) -> Any:
        names = self._plan.patterns if self._plan is not None else ()
        return _again, (self.__wrapped__, names)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)


def _again(function: Callable[..., Any], names: tuple[str, ...]) -> Any:
    return optimize(function, patterns=names)


def _optimize_function(function: Any, example: Any, patterns: tuple[Pattern, ...], freeze: bool) -> FusedFunction:
    if isinstance(function, FusedFunction):
        function = function.__wrapped__
    result = Report(title=getattr(function, "__name__", type(function).__name__))
    if not isinstance(function, types.FunctionType):
        result.untraceable.append(Untraced("", f"a {type(function).__name__} is not a plain Python function"))
        return FusedFunction(function, None, None, result)
    signature = Signature(function, skip_first=False)
    plan = Plan(tuple(p.name for p in patterns), signature, freeze)
    try:
        kinds, captured = _capture_function(function, signature, example)
    except Untraceable as reason:
        result.untraceable.append(Untraced("", str(reason)))
        return FusedFunction(function, None, None, result)
    variant = variant_of(captured, patterns, result, "", freeze)
    plan.variants[kinds] = [variant if variant.run is not None else Variant(None, variant.holds)]
    return FusedFunction(function, plan, captured.root, result.settle())


def _capture_function(function: Any, signature: Signature, example: Any) -> tuple[tuple[Any, ...], Captured]:
    if example is not None:
        kinds = kinds_of(signature, example)
        captured = capture(function, kinds, signature)
        annotate(captured, signature, example)
        return kinds, captured
    expected = signature.expected()
    if expected is None:
        raise Untraceable("it has an argument that is neither a tensor nor a float; give example_inputs")
    return expected, capture(function, expected, signature)


def report(fused: Any) -> Report:
    """What :func:`optimize` did to this module or function.

    Raises:
        TypeError: for something optimize did not return.
    """
    if isinstance(fused, FusedFunction):
        return fused.report
    if isinstance(fused, nn.Module):
        held = fused.__dict__.get(_REPORT)
        if held is not None:
            return held
        if any(plan_of(m) is not None for m in fused.modules()):
            raise TypeError("this is a part of an optimized model; ask for the report of the module optimize returned")
    raise TypeError(f"fxfuse.optimize did not return this {type(fused).__name__}: it has no report")
