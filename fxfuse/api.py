"""optimize(): capture, rewrite, verify, hand back a module that computes the same thing."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from fxfuse.capture import capture
from fxfuse.choice import Choice
from fxfuse.fuse import Compiler, build_variant, configure_logging, variant_of
from fxfuse.pattern import Pattern, available, select
from fxfuse.plan import Plan, plan_of, uninstall
from fxfuse.report import Report, Untraced
from fxfuse.signature import Signature, Untraceable
from fxfuse.twin import twin

__all__ = ["FusedFunction", "optimize", "report"]

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
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments. Optional; shapes that are known
            let more guards decide, and arguments that are not tensors are told apart.
        patterns: names or :class:`fxfuse.Pattern` objects to look for; all that exist when None.
        verify: compare with the original in float64 and in the model's own dtype on the example inputs, outputs and
            gradients, train and eval; a replacement that is out of bounds is undone and named.
        freeze: keep what depends on weights alone (the column sums of ``matmul_div_sum_scale``) until they change.

    Returns:
        A module of the same class (or a function) that shares every parameter and buffer with ``model``, which stays as
        it was. What cannot be traced keeps its own Python; ``fxfuse.report(result)`` says what happened.

    Parameters are shared as objects, so torch's own conversions reach both: ``result.half()`` or ``result.to(device)``
    converts each ``Parameter`` in place, and the original's change with it, while buffers are replaced in the result
    alone. Convert ``copy.deepcopy(result)`` to keep the original as it is. Modes, hooks, lists and dicts are the
    result's own. What a forward does beside its tensors (a ``print``) happens once, when it is traced.

    Raises:
        TypeError: for a model or example inputs of a wrong type.
        ValueError: for a pattern name that does not exist, or inputs that do not run through the model.
    """
    configure_logging()
    chosen = select(patterns)
    example = None
    if example_inputs is not None:
        from fxfuse.examples import normalize

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
    if verify and example is not None:
        from fxfuse.verify import verified

        fused, verdict = verified(make, model, example, chosen, freeze)
        verdict.enter(report(fused))
        return fused
    return make(model, example, chosen, freeze)


def _optimize_module(
    model: nn.Module, example: Any, patterns: tuple[Pattern, ...], freeze: bool, choice: Choice | None = None
) -> nn.Module:
    result = Report(title=type(model).__name__)
    tree = list(model.named_modules())
    twins = twin([module for _, module in tree])
    for module in twins:
        uninstall(module)
        module.__dict__.pop(_REPORT, None)
    for path, module in tree:
        if module._compiled_call_impl is not None:
            result.notes.append(f"{path or 'The model'} was compiled in place; the result runs it uncompiled. "
                                "Compile the result instead.")  # fmt: skip
    fused = twins[0]
    Compiler(patterns, result, freeze, example, choice).tree(fused)
    fused.__dict__[_REPORT] = result.settle()
    return fused


class FusedFunction:
    """A function that runs by its fused graph where the call fits, and as it was written where it does not."""

    def __init__(self, function: Callable[..., Any], plan: Plan | None, report: Report) -> None:
        functools.update_wrapper(self, function)
        self.__wrapped__ = function
        self._plan = plan
        self.report = report

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._plan is None:
            return self.__wrapped__(*args, **kwargs)
        return self._plan(None, self.__wrapped__, args, kwargs)

    def __reduce__(self) -> Any:
        module, name = sys.modules.get(self.__module__), getattr(self, "__qualname__", "")
        if getattr(module, name, None) is self:  # it took the place of the function it was made from
            return name
        plan = self._plan
        return _again, (self.__wrapped__, plan and plan.patterns, plan and plan.choice)

    def __deepcopy__(self, memo: Any) -> FusedFunction:
        return self  # as a function is its own deep copy

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)


def _again(function: Callable[..., Any], names: tuple[str, ...] | None, choice: Choice | None) -> Any:
    wanted = select(names and [name for name in names if name in available()])
    return _optimize_function(function, None, wanted, False, choice)


def _optimize_function(
    function: Any, example: Any, patterns: tuple[Pattern, ...], freeze: bool, choice: Choice | None = None
) -> FusedFunction:
    if isinstance(function, FusedFunction):
        function = function.__wrapped__
    result = Report(title=getattr(function, "__name__", type(function).__name__))
    if not isinstance(function, types.FunctionType):
        result.untraceable.append(Untraced("", f"a {type(function).__name__} is not a plain Python function"))
        return FusedFunction(function, None, result)
    plan = None
    try:
        signature = Signature(function, skip_first=False)
        kinds = _kinds_of_call(signature, example)
        captured = capture(function, kinds, signature)
        if example is not None:
            from fxfuse.examples import annotate

            annotate(captured, signature, example)
        names = tuple(p.name for p in patterns)
        plan = Plan(names, signature, freeze, patterns, function, choice=choice, build=build_variant)
        plan.variants[kinds] = [variant_of(captured, patterns, result, "", freeze, choice=choice)]
    except Untraceable as reason:
        result.untraceable.append(Untraced("", str(reason)))
    return FusedFunction(function, plan, result.settle())


def _kinds_of_call(signature: Signature, example: Any) -> tuple[Any, ...]:
    if example is not None:
        from fxfuse.examples import kinds_of

        return kinds_of(signature, example)
    expected = signature.expected()
    if expected is None:
        raise Untraceable("it has an argument that is neither a tensor nor a float; give example_inputs")
    return expected


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
