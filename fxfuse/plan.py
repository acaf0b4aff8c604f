"""How a fused forward runs: which graph for which call, and the module's own Python wherever no graph fits.

A plan belongs to a module type's place in a tree, not to one instance: it reaches parameters through ``self`` by path. So
deepcopy, pickle and replication carry it along, and a loaded copy traces itself again at its first call.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import fx, nn

from fxfuse.capture import NUMBER, TENSOR, Captured, Signature, kind_of
from fxfuse.pattern import available

__all__ = [
    "Plan",
    "Variant",
    "compile_graph",
    "condition",
    "fused_class",
    "install",
    "original_class",
    "plan_of",
    "uninstall",
]

#: graphs kept per module; a forward called in more ways than this runs its own Python for the rest
MOST_VARIANTS = 16
_ATTRIBUTE = "_fxfuse_plan"
_tracing = threading.RLock()


@dataclass
class Variant:
    """One graph as a function ``run(self, *tensors)``, valid while ``holds(self)``; ``run`` None means: plain Python."""

    run: Callable[..., Any] | None
    holds: Callable[[Any], bool]
    count: int = 0


@dataclass
class Plan:
    """The graphs of one module's forward, by the kinds of its arguments.

    Attributes:
        patterns: names of the patterns to look for when a new kind of call needs a graph.
        signature: of the original forward.
        variants: kinds -> graphs; several where modes differ.
    """

    patterns: tuple[str, ...]
    signature: Signature
    freeze: bool = False
    variants: dict[tuple[Any, ...], list[Variant]] = field(default_factory=dict)

    def __call__(self, owner: Any, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call: by the graph that fits, else by ``original``."""
        if not kwargs and len(args) == len(self.signature.names):
            values: list[Any] | tuple[Any, ...] | None = args
        else:
            values = self.signature.bind(args, kwargs)
        if values is None:
            return original(*args, **kwargs)
        kinds = tuple([TENSOR if isinstance(v, torch.Tensor) else kind_of(v) for v in values])
        for variant in self.variants.get(kinds, ()):
            if variant.holds(owner):
                break
        else:
            found = self._another(owner, kinds)
            if found is None:
                return original(*args, **kwargs)
            variant = found
        if variant.run is None:
            return original(*args, **kwargs)
        return variant.run(owner, *[v for v, k in zip(values, kinds) if k is TENSOR or k is NUMBER])

    def _another(self, owner: Any, kinds: tuple[Any, ...]) -> Variant | None:
        """A graph for a call of new kinds or under new circumstances, traced now; None when Python must do."""
        if None in kinds or torch.compiler.is_compiling() or not isinstance(owner, nn.Module):
            return None
        with _tracing:
            if sum(len(v) for v in self.variants.values()) >= MOST_VARIANTS:
                return None
            from fxfuse.fuse import build_variant  # the compiler itself is needed only here

            chosen = [p for name, p in available().items() if name in self.patterns]
            variant = build_variant(owner, kinds, self.signature, chosen, self.freeze)
            self.variants.setdefault(kinds, []).append(variant)
            return variant

    def __deepcopy__(self, memo: Any) -> Plan:
        return self  # nothing in it belongs to one instance

    def __getstate__(self) -> dict[str, Any]:
        return {"patterns": self.patterns, "freeze": self.freeze}

    def revive(self, forward: Callable[..., Any]) -> None:
        """Complete a plan that came out of a pickle."""
        missing = sorted(set(self.patterns) - set(available()))
        if missing:
            warnings.warn(f"fxfuse: the pattern {missing[0]!r} this model was optimized with is not registered here; "
                          "register it before loading to have it fused", stacklevel=3)  # fmt: skip
        self.signature = Signature(forward, skip_first=True)
        self.variants = {}


def compile_graph(graph: fx.Graph) -> Callable[..., Any]:
    """The graph as a Python function ``forward(self, *inputs)``; its source is kept for tracebacks."""
    code = graph.python_code("self", verbose=False)
    namespace = dict(code.globals)
    exec(compile(code.src, "<fxfuse forward>", "exec"), namespace)
    function = namespace["forward"]
    function.__fxfuse_source__ = code.src
    return function


def condition(captured: Captured, bypassed: set[str]) -> Callable[[Any], bool]:
    """What the graph took for granted, as a function of the module: attributes read, and modules whose call is bypassed
    (still of the same type, and still without hooks)."""
    lines = ["def holds(self):", "    try:"]
    names: dict[str, Any] = {}
    for number, path in enumerate(sorted(bypassed | {path for path, _ in captured.reads})):
        here = "self" + "".join(f"._modules[{name!r}]" for name in path.split(".") if name)
        lines.append(f"        m = {here}")
        tests = []
        if path in bypassed and path:
            names[f"t{number}"] = type(captured.root.get_submodule(path))
            tests.append(f"type(m) is t{number} and not (m._forward_hooks or m._forward_pre_hooks"
                         " or m._backward_hooks or m._backward_pre_hooks)")  # fmt: skip
        for index, ((owner, attribute), value) in enumerate(captured.reads.items()):
            if owner == path:
                names[f"v{number}_{index}"] = value
                test = "is" if value is None or isinstance(value, bool) else "=="
                tests.append(f"m.__dict__[{attribute!r}] {test} v{number}_{index}")
        lines.append(f"        if not ({' and '.join(tests)}): return False")
    lines += ["        return True", "    except (KeyError, AttributeError):", "        return False"]
    if len(lines) == 5:
        return _always
    exec(compile("\n".join(lines), "<fxfuse condition>", "exec"), names)
    return names["holds"]


def _always(owner: Any) -> bool:
    return True


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


@lru_cache(maxsize=None)
def fused_class(original: type) -> type:
    """The subclass of ``original`` whose forward runs by the instance's plan; same name, pickles as the original."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._fxfuse_plan(self, lambda *a, **k: original.forward(self, *a, **k), args, kwargs)

    def reduce(self: Any, protocol: Any = None) -> Any:
        return _rebuild, (original,), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__

    body = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "__setstate__": _set_state,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_fxfuse_original": original,
    }
    return type(original)(original.__name__, (original,), body)


def _rebuild(original: type) -> Any:
    kind = fused_class(original)
    return kind.__new__(kind)


def _set_state(self: Any, state: dict[str, Any]) -> None:
    original = type(self)._fxfuse_original
    original.__setstate__(self, state)
    plan = self.__dict__.get(_ATTRIBUTE)
    if plan is not None and "signature" not in plan.__dict__:
        plan.revive(original.forward)
