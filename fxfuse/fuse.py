"""The compiler's middle: one graph read, matched, rewritten; a tree of modules fused where its matches live.

A match is made in the smallest module that holds all of it: that module gets a fused forward, everything around it
keeps its own Python, its hooks and its control flow.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxfuse.assume import CALLS
from fxfuse.capture import Captured, called_only, capture
from fxfuse.choice import Choice, owner_of
from fxfuse.codegen import compile_graph
from fxfuse.drawing import Drawing
from fxfuse.known import call_of, steps_of
from fxfuse.match import Match, Miss
from fxfuse.pattern import Pattern
from fxfuse.plan import Plan, Variant, install, original_class
from fxfuse.report import Replacement, Report, Untraced
from fxfuse.rewrite import Found, Fuel, find, replace
from fxfuse.signature import Signature, Untraceable, forward_signature
from fxfuse.straight import Straight
from fxfuse.view import View, why_called_only

__all__ = ["Compiler", "build_variant", "fuse_graph", "logger"]

logger = logging.getLogger("fxfuse")


def configure_logging() -> None:
    """``FXFUSE_LOG=debug|info|warning`` sends what the compiler does to stderr."""
    level = os.environ.get("FXFUSE_LOG", "").upper()
    if level and not logger.handlers:
        if level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            raise ValueError(f"FXFUSE_LOG must be debug, info, warning or error, not {level.lower()!r}")
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("fxfuse: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(level)


def fuse_graph(
    graph: fx.Graph,
    root: nn.Module | None,
    patterns: Sequence[Pattern],
    report: Report,
    where: str = "",
    allow: Callable[[Match, Pattern], str | None] | None = None,
    found: Found | None = None,
) -> list[Match]:
    """Rewrite one graph in place and write down what happened; returns the matches that were replaced.

    Args:
        graph: rewritten in place.
        root: the module its attributes belong to.
        patterns: what to look for.
        report: gets replacements, misses and the drawing.
        where: the path of the module whose forward this is.
        allow: a last word on each match (see :func:`fxfuse.rewrite.find`).
        found: matches already at hand for this very graph.
    """
    found = found or find(View(graph, root), patterns, allow or last_word(None, where))
    by_name = {p.name: p for p in patterns}
    before = snapshot(graph, {n: m.pattern for m in found.matches for n in m.nodes}) if found.matches else ()
    layers = {str(n.target): _class_name(root, str(n.target)) for n in graph.nodes if n.op == "call_module"}
    done: list[Match] = []
    for match in found.matches:
        reason = Fuel.take()
        if reason is not None:
            found.misses.append(Miss(match.pattern, match.root, reason, len(match.nodes) + 3))
            continue
        inside = owner_of(match)
        nodes = sorted(set(match.nodes), key=lambda n: match.view.order[n])
        operations = tuple(match.view.operations[n].replace("_module", "") for n in nodes)
        names = tuple(n.name for n in nodes)
        steps = steps_of(match)
        new = replace(graph, match, by_name[match.pattern])
        place = ".".join(filter(None, (where, inside)))
        op = by_name[match.pattern].op.__name__
        known = (steps, call_of(new, op, match.view), steps[-1].result)
        report.replacements.append(
            Replacement(match.pattern, op, names, place, operations, len(report.drawings), *known)
        )
        logger.info("replaced %s in %s: %s", match.pattern, place or "the model", " → ".join(operations))
        done.append(match)
    if done:
        graph.lint()
        report.drawings.append(Drawing(where, before, snapshot(graph, {}), layers))
    report.add_misses(found.misses, where)
    for miss in found.misses:
        logger.debug("no %s at %s: %s", miss.pattern, miss.node, miss.reason)
    return done


def last_word(choice: Choice | None, where: str) -> Callable[[Match, Pattern], str | None]:
    """What decides about each match in the module at ``where``, after the pattern's own guards."""
    if choice is None:
        return called_as_written
    chosen = choice.at(where)
    return lambda match, pattern: called_as_written(match, pattern) or chosen(match, pattern)


def called_as_written(match: Match, pattern: Pattern) -> str | None:
    """A layer whose forward was replaced on the instance may do anything."""
    for node in match.nodes:
        if node.op == "call_module" and not match.view.module(str(node.target)).__dict__.keys().isdisjoint(CALLS):
            return f"the forward of '{node.target}' was replaced on the instance"
    return None


def snapshot(graph: fx.Graph, marks: dict[fx.Node, str]) -> tuple[tuple[str, str, tuple[str, ...], str], ...]:
    """The graph as plain data for a drawing."""
    rows = []
    for node in graph.nodes:
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        label = f"{node.op}\n{target}" if node.op != "output" else "output"
        mark = marks.get(node, node.meta.get("fxfuse", ""))
        rows.append((node.name, label, tuple(n.name for n in node.all_input_nodes), mark))
    return tuple(rows)


def _class_name(root: nn.Module | None, path: str) -> str:
    return original_class(root.get_submodule(path)).__name__ if root is not None else ""


def build_variant(plan: Plan, owner: Any, kinds: tuple[Any, ...]) -> Variant:
    """A graph for one more kind of call of what runs by a plan; ``run`` is None when Python must do."""
    if plan.function is not None:
        return _built(plan, plan.function, kinds)
    plan_class = type(owner)
    object.__setattr__(owner, "__class__", original_class(owner))
    try:
        return _built(plan, owner, kinds)
    finally:
        object.__setattr__(owner, "__class__", plan_class)


def _built(plan: Plan, target: Any, kinds: tuple[Any, ...]) -> Variant:
    try:
        captured = capture(target, kinds, plan.signature)
        return variant_of(captured, plan.wanted(), Report(), plan.where, plan.freeze, choice=plan.choice)
    except Untraceable as reason:
        logger.info("a call of %s keeps its Python: %s", getattr(target, "__name__", type(target).__name__), reason)
        return Variant(None, lambda owner: True)


def variant_of(
    captured: Captured,
    patterns: Sequence[Pattern],
    report: Report,
    where: str,
    freeze: bool = False,
    found: Found | None = None,
    choice: Choice | None = None,
) -> Variant:
    """Fuse a captured graph and make it callable."""
    allow = last_word(choice, where)
    found = found or find(View(captured.graph, captured.root), patterns, allow)
    straight = Straight(captured.graph) if found.matches and not freeze and not captured.is_function else None
    done = fuse_graph(captured.graph, captured.root, patterns, report, where, allow, found)
    layers = {str(n.target) for match in done for n in match.nodes if n.op == "call_module"}
    for path in layers:
        module = captured.root.get_submodule(path)
        captured.assumed.bypass(path, module)
        captured.assumed.read_settings(path, module)
    if not done:
        return Variant(None, captured.assumed.check())
    if freeze:
        from fxfuse.freeze import freeze_graph

        freeze_graph(captured.graph)
    run = compile_graph(captured.graph, captured.root)
    if captured.is_function:  # the tensors it closes over live in the root made for it
        run = functools.partial(_run_function, run, captured.root)
    if straight is not None:
        straight.may_open(layers, captured.assumed.source())
    return Variant(run, captured.assumed.check(), len(done), straight)


def _run_function(run: Callable[..., Any], root: nn.Module, owner: None, *tensors: Any) -> Any:
    return run(root, *tensors)


def _in_mode(training: bool, owner: nn.Module) -> bool:
    return owner.training == training


@dataclass
class Compiler:
    """Fuses a tree of modules (a twin of the user's, so it may be changed) and reports on it."""

    patterns: Sequence[Pattern]
    report: Report
    freeze: bool = False
    example: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    choice: Choice | None = None
    _visited: set[int] = field(default_factory=set)

    def tree(self, module: nn.Module, path: str = "") -> None:
        """Fuse a module and everything below it, in place."""
        if id(module) in self._visited:
            return
        self._visited.add(id(module))
        if isinstance(module, fx.GraphModule):
            self.graph_module(module, path)
        elif isinstance(module, torch.jit.ScriptModule):
            self.report.untraceable.append(Untraced(path, "it is TorchScript"))
        elif type(module).forward is nn.Module.forward:  # a container without a forward: nothing of its own to trace
            self._children(module, path)
        elif not path or module._modules or not called_only(module):
            self._python(module, path)

    def _python(self, module: nn.Module, path: str) -> None:
        try:
            captured = self._capture(module, path)
        except Untraceable as reason:
            if not (path and type(module).__module__.startswith("torch.")):
                self.report.untraceable.append(Untraced(path, str(reason)))
            self._children(module, path)
            return
        view = View(captured.graph, captured.root)
        self._note_refused(view, path)
        found = find(view, self.patterns, last_word(self.choice, path))
        if found.matches:
            owners = {owner_of(m) for m in found.matches}
            here = "" in owners or (path == "" and self.example is not None)
            if here or not self._below(module, path, found, owners):
                self._fuse(module, path, captured, found)
        else:
            self.report.add_misses(found.misses, path)
        self._leaves(module, path, captured.inlined, "")

    def _note_refused(self, view: View, path: str) -> None:
        """Say which layers a pattern could have read, were it not for their hooks or parametrizations."""
        for node in view.operations:  # a layer a pattern could have read has a word of the vocabulary
            layer = view.module(str(node.target)) if node.op == "call_module" else None
            if layer is not None:
                reason = why_called_only(layer)
                if reason is not None:
                    note = f"'{path + '.' if path else ''}{node.target}' {reason}."
                    if note not in self.report.notes:
                        self.report.notes.append(note)

    def _children(self, module: nn.Module, path: str) -> None:
        for name, child in module._modules.items():
            if child is not None:
                self.tree(child, f"{path}.{name}" if path else name)

    def _leaves(self, module: nn.Module, path: str, inlined: set[str], inside: str) -> None:
        """Try what a trace of ``module`` called without looking into it: modules with hooks, graphs, torch's blocks."""
        for name, child in module._modules.items():
            if child is None or isinstance(child, torch.jit.ScriptModule):
                continue
            if not child._modules and not isinstance(child, fx.GraphModule):
                continue
            here = f"{inside}.{name}" if inside else name
            place = f"{path}.{name}" if path else name
            if here in inlined or type(child).forward is nn.Module.forward:
                self._leaves(child, place, inlined, here)
            else:
                self.tree(child, place)

    def _capture(self, module: nn.Module, path: str) -> Captured:
        if "forward" in module.__dict__:
            raise Untraceable("its forward was replaced on the instance")
        signature = forward_signature(type(module))
        kinds = self._kinds(signature, path)
        captured = capture(module, kinds, signature)
        if path == "" and self.example is not None:
            from fxfuse.examples import annotate

            annotate(captured, signature, self.example)
        return captured

    def _kinds(self, signature: Signature, path: str) -> tuple[Any, ...]:
        if signature.variadic:
            raise Untraceable("it takes *args or **kwargs")
        if path == "" and self.example is not None:
            from fxfuse.examples import kinds_of

            return kinds_of(signature, self.example)
        kinds = signature.expected()
        if kinds is None:
            raise Untraceable("it has an argument that is neither a tensor nor a float; give example_inputs")
        return kinds

    def _below(self, module: nn.Module, path: str, found: Found, owners: set[str]) -> bool:
        """Fuse in the submodules that hold the matches; False, and nothing done, where one alone cannot be read."""
        outermost = [o for o in sorted(owners) if not any(o != p and o.startswith(p + ".") for p in owners)]
        owned = [(owner_of(m) + ".", m.pattern) for m in found.matches]
        prepared: list[tuple[nn.Module, str, Captured, Found]] = []
        for owner in outermost:
            child = module.get_submodule(owner)
            place = f"{path}.{owner}" if path else owner
            try:
                captured = self._capture(child, place)
            except Untraceable as reason:
                logger.debug("%s alone cannot be traced (%s); fusing in the module around it", place, reason)
                return False
            inside = find(View(captured.graph, captured.root), self.patterns, last_word(self.choice, place))
            wanted = {pattern for inner, pattern in owned if inner.startswith(owner + ".")}
            if not wanted <= {m.pattern for m in inside.matches}:
                return False
            prepared.append((child, place, captured, inside))
        misses = list(found.misses)
        for child, place, captured, inside in prepared:
            if id(child) not in self._visited:
                self._visited.add(id(child))
                self._fuse(child, place, captured, inside)
        self.report.add_misses(misses, path)
        return True

    def _fuse(self, module: nn.Module, path: str, captured: Captured, found: Found) -> None:
        """Give a module a plan with the graph just made, and with the other mode's where the mode was read."""
        signature = forward_signature(type(module))
        kinds = self._kinds(signature, path)
        names = tuple(p.name for p in self.patterns)
        plan = Plan(names, signature, self.freeze, tuple(self.patterns), build=build_variant)
        plan.choice, plan.where = self.choice, path
        first = variant_of(captured, self.patterns, self.report, path, self.freeze, found)
        if first.run is None:
            return
        plan.variants[kinds] = [first]
        if captured.reads_mode:
            plan.variants[kinds].append(self._other_mode(module, path, kinds, signature))
        install(module, plan)

    def _other_mode(self, module: nn.Module, path: str, kinds: tuple[Any, ...], signature: Signature) -> Variant:
        modes = [(m, m.training) for m in module.modules()]
        try:
            for m, training in modes:
                m.training = not training
            captured = capture(module, kinds, signature)
            return variant_of(captured, self.patterns, Report(), path, self.freeze, choice=self.choice)
        except Untraceable:
            return Variant(None, functools.partial(_in_mode, not module.training))
        finally:
            for m, training in modes:
                m.training = training

    def graph_module(self, module: fx.GraphModule, path: str) -> None:
        """Fuse a graph that already is one (symbolic_trace, torch.export); graph in, graph out."""
        if path == "" and self.example is not None and not any("val" in n.meta for n in module.graph.nodes):
            _annotate_graph_module(module, self.example)
        done = fuse_graph(module.graph, module, self.patterns, self.report, path, last_word(self.choice, path))
        if done:
            if self.freeze:
                from fxfuse.freeze import freeze_graph

                freeze_graph(module.graph)
            module.recompile()
        self._children(module, path)


def _annotate_graph_module(module: fx.GraphModule, example: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    """Shapes for a graph whose arguments are all tensors or floats; others may stand anywhere in it."""
    from fxfuse.examples import annotate, kinds_of

    signature = forward_signature(type(module))
    if not signature.variadic and all(isinstance(kind, str) for kind in kinds_of(signature, example)):
        annotate(Captured(module.graph, module), signature, example)
