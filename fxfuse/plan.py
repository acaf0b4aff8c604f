"""How a fused forward runs: which graph for which call, and the module's own Python wherever no graph fits.

A plan belongs to a module type's place in a tree, not to one instance: it reaches parameters through ``self`` by path.
So deepcopy, pickle and replication carry it along, and a loaded copy traces itself again at its first call.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as _hooks

from fxfuse.aside import Aside
from fxfuse.choice import Choice
from fxfuse.ops._op import Direct
from fxfuse.pattern import Pattern, available
from fxfuse.signature import NUMBER, TENSOR, Signature, kind_of
from fxfuse.straight import Straight
from fxfuse.watch import TRACING, derived

__all__ = [
    "Plan",
    "Variant",
    "fused_class",
    "install",
    "original_class",
    "plan_of",
    "uninstall",
]

#: graphs kept per module; a forward called in more ways than this runs its own Python for the rest
MOST_VARIANTS = 16
_ATTRIBUTE = "_fxfuse_plan"
_ONE_TENSOR = (TENSOR,)

_grad_enabled = torch.is_grad_enabled
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
#: hooks of all modules of the process
_forward_hooks, _forward_pre_hooks = _hooks._global_forward_hooks, _hooks._global_forward_pre_hooks
_backward_hooks, _backward_pre_hooks = _hooks._global_backward_hooks, _hooks._global_backward_pre_hooks
_tracing = torch._C._get_tracing_state


def _torchs(name: str) -> Any:
    """A method of nn.Module; None where somebody has put another in its place."""
    method = nn.Module.__dict__[name]
    written = getattr(method, "__code__", None)
    return method if written and written.co_filename == nn.Module.register_buffer.__code__.co_filename else None


_module_call, _module_call_impl = _torchs("__call__"), _torchs("_call_impl")


@dataclass
class Variant:
    """One graph as a function ``run(self, *tensors)``, valid while ``holds(self)``; ``run`` None means plain Python.

    count: fused ops in it. straight: what it was made of, for calls that step aside.
    """

    run: Callable[..., Any] | None
    holds: Callable[[Any], bool]
    count: int = 0
    straight: Straight | None = None


@dataclass
class Plan:
    """The graphs of one module's forward, or of one function, by the kinds of its arguments.

    Attributes:
        patterns: names of the patterns to look for when a new kind of call needs a graph.
        signature: of the original forward.
        freeze: as :func:`fxfuse.optimize` was told.
        chosen: the patterns themselves, which need not be registered; not part of a pickle.
        function: the plain function this plan is of; None for a module's forward.
        choice, where: what verification took back, and the module's path by which it is told apart.
        variants: kinds -> graphs; several where modes differ.
        aside: for which sizes the ops of a graph go by eager's own operations.
        build: makes the graph of a new kind of call: ``build(plan, owner, kinds)``. The compiler, which knows plans; a
            plan knows it by this alone.
    """

    patterns: tuple[str, ...]
    signature: Signature
    freeze: bool = False
    chosen: tuple[Pattern, ...] = ()
    function: Callable[..., Any] | None = None
    variants: dict[tuple[Any, ...], list[Variant]] = field(default_factory=dict)
    choice: Choice | None = None
    where: str = ""
    aside: Aside = field(default_factory=Aside)
    build: Callable[[Plan, Any, tuple[Any, ...]], Variant] = field(kw_only=True)

    def __call__(self, owner: Any, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call: by the graph that fits, else by ``original``: a forward of the owner, or a function."""
        if not kwargs and owner is not None and _grad_enabled() and (known := self.aside.find(args)) is not None:
            if known.run is not None and known.holds(owner) and not hooked_everywhere():
                return known.run(owner, *args)
            return original(owner, *args)
        signature = self.signature
        if not kwargs and len(args) == signature.arity:
            values: list[Any] | tuple[Any, ...] | None = args
        else:
            values = signature.bind(args, kwargs)
        if values is None or hooked_everywhere():
            return _as_written(owner, original, args, kwargs)
        if len(values) == 1 and type(values[0]) is torch.Tensor:  # nearly every call
            kinds: tuple[Any, ...] = _ONE_TENSOR
        else:
            kinds = tuple([TENSOR if isinstance(v, torch.Tensor) else kind_of(v) for v in values])
        for variant in self.variants.get(kinds, ()):
            if variant.holds(owner):
                break
        else:
            found = self._another(owner, kinds, values)
            if found is None:
                return _as_written(owner, original, args, kwargs)
            variant = found
        if variant.run is None:
            return _as_written(owner, original, args, kwargs)
        sizes, before = None if kwargs else self.aside.sizes(args), Direct.calls
        if kinds is _ONE_TENSOR:
            out = variant.run(owner, values[0])
        else:
            out = variant.run(owner, *[v for v, k in zip(values, kinds, strict=False) if k is TENSOR or k is NUMBER])
        if sizes is not None and Direct.calls - before == variant.count:
            plain = owner is not None and all(type(v) is torch.Tensor for v in args) and len(args) == len(kinds)
            straight, call = None, None
            if plain and variant.straight is not None:
                straight, call = variant.straight.function(owner), variant.straight.call
            self.aside.learn(sizes, straight, variant.holds, call)
        return out

    def _another(self, owner: Any, kinds: tuple[Any, ...], values: Sequence[Any]) -> Variant | None:
        """A graph for a call of new kinds or under new circumstances, traced now; None when Python must do."""
        if None in kinds or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None
        if any(issubclass(type(v), fx.Proxy) for v in values):
            return None
        with TRACING:
            for variant in self.variants.get(kinds, ()):  # another thread may have been here first
                if variant.holds(owner):
                    return variant
            if sum(len(v) for v in self.variants.values()) >= MOST_VARIANTS:
                return None
            variant = self.build(self, owner, kinds)
            self.variants.setdefault(kinds, []).append(variant)
            return variant

    def wanted(self) -> tuple[Pattern, ...]:
        """The patterns to look for."""
        return self.chosen or tuple(p for name, p in available().items() if name in self.patterns)

    def __deepcopy__(self, memo: Any) -> Plan:
        return self  # nothing in it belongs to one instance

    def __getstate__(self) -> dict[str, Any]:
        kept = ("patterns", "freeze", "choice", "where", "build")
        return {name: getattr(self, name) for name in kept}

    def revive(self, forward: Callable[..., Any]) -> None:
        """Complete a plan that came out of a pickle."""
        missing = sorted(set(self.patterns) - set(available()))
        if missing:
            warnings.warn(f"fxfuse: the pattern {missing[0]!r} this model was optimized with is not registered here; "
                          "register it before loading to have it fused", stacklevel=3)  # fmt: skip
        self.signature = Signature(forward, skip_first=True)
        self.variants, self.chosen, self.function, self.aside = {}, (), None, Aside()


def _as_written(owner: Any, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return original(*args, **kwargs) if owner is None else original(owner, *args, **kwargs)


def hooked_everywhere() -> bool:
    """Whether a hook is registered for every module of the process: a graph would not run it for what it fused."""
    return bool(_forward_hooks or _forward_pre_hooks or _backward_hooks or _backward_pre_hooks)


# --- modules that run by a plan ------------------------------------------------------------------------------------


def original_class(module: nn.Module) -> type:
    """The class the user wrote, whether or not the module runs by a plan."""
    kind = type(module)
    return getattr(kind, "_fxfuse_original", kind)


def plan_of(module: nn.Module) -> Plan | None:
    """The plan a module runs by, or None."""
    return module.__dict__.get(_ATTRIBUTE) if hasattr(type(module), "_fxfuse_original") else None


def install(module: nn.Module, plan: Plan) -> None:
    """Make the module run by a plan: its class becomes a subclass of its own whose forward asks the plan."""
    module.__dict__[_ATTRIBUTE] = plan
    module.__class__ = fused_class(original_class(module))


def uninstall(module: nn.Module) -> None:
    """Give the module back its own class and forward."""
    if plan_of(module) is not None:
        module.__class__ = original_class(module)
        del module.__dict__[_ATTRIBUTE]


@functools.cache
def fused_class(original: Any) -> type:
    """The subclass of ``original`` whose forward runs by the instance's plan; same name, pickles as the original."""

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        plan = self.__dict__.get(_ATTRIBUTE)
        if plan is None:  # made by calling the class
            return original.forward(self, *args, **kwargs)
        return plan(self, original.forward, args, kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        """What nn.Module's comes to where nobody asked for more, in half of its time: much of a small call's."""
        own = self.__dict__
        if (
            _is_dynamo_compiling()
            or type(self) is not fused
            or own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or _forward_hooks
            or _forward_pre_hooks
            or _backward_hooks
            or _backward_pre_hooks
            or "forward" in own
            or "_compiled_call_impl" in own
            or "_call_impl" in own
            or nn.Module.__call__ is not _module_call
            or nn.Module._call_impl is not _module_call_impl
            or _tracing()
            or (plan := own.get(_ATTRIBUTE)) is None
        ):
            return nn.Module.__call__(self, *args, **kwargs)
        if not kwargs and len(args) == 1 and (known := plan.aside.latest) is not None and _grad_enabled():
            (x,) = args
            if (
                type(x) is Tensor
                and x.shape == known.shape
                and x.dtype is known.dtype
                and x.get_device() == known.device
            ):
                out = known.call(self, known, x)
                if out is not NotImplemented:
                    return out
        return plan(self, original.forward, args, kwargs)

    def reduce(self: Any, protocol: Any = None) -> Any:
        return _rebuild, (original,), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__

    body = {"forward": forward, "__reduce_ex__": reduce, "__setstate__": _set_state, "_fxfuse_original": original}
    if original.__call__ is _module_call and original._call_impl is _module_call_impl:
        body["__call__"] = call
    fused = derived(original, body)  # by this name `call` knows it
    return fused


def _rebuild(original: type) -> Any:
    return object.__new__(fused_class(original))


def _set_state(self: Any, state: dict[str, Any]) -> None:
    original = type(self)._fxfuse_original
    original.__setstate__(self, state)
    plan = self.__dict__.get(_ATTRIBUTE)
    if plan is not None and "signature" not in plan.__dict__:
        plan.revive(original.forward)
