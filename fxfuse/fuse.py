"""The compiler's middle: one graph read, matched, rewritten; a tree of modules fused where its matches live.

A match is made in the smallest module that holds all of it: that module gets a fused forward, everything around it keeps
its own Python, its hooks and its control flow.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxfuse.capture import Captured, Signature, Untraceable, called_only, capture
from fxfuse.match import Match, Miss
from fxfuse.pattern import Pattern
from fxfuse.plan import Plan, Variant, compile_graph, condition, install, original_class
from fxfuse.report import Drawing, Replacement, Report, Untraced
from fxfuse.rewrite import Found, Fuel, find, replace
from fxfuse.view import View

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
    found = found or find(View(graph, root), patterns, allow)
    by_name = {p.name: p for p in patterns}
    before = snapshot(graph, {n: m.pattern for m in found.matches for n in m.nodes}) if found.matches else ()
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
        replace(graph, match, by_name[match.pattern])
        place = ".".join(filter(None, (where, inside)))
        report.replacements.append(
            Replacement(match.pattern, by_name[match.pattern].op.__name__, names, place, operations, len(report.drawings))
        )
        logger.info("replaced %s in %s: %s", match.pattern, place or "the model", " → ".join(operations))
        done.append(match)
    if done:
        graph.lint()
        report.drawings.append(Drawing(where, before, snapshot(graph, {})))
    report.add_misses(found.misses, where)
    for miss in found.misses:
        logger.debug("no %s at %s: %s", miss.pattern, miss.node, miss.reason)
    return done


def snapshot(graph: fx.Graph, marks: dict[fx.Node, str]) -> tuple[tuple[str, str, tuple[str, ...], str], ...]:
    """The graph as plain data for a drawing."""
    rows = []
    for node in graph.nodes:
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        label = f"{node.op}\n{target}" if node.op != "output" else "output"
        mark = marks.get(node, node.meta.get("fxfuse", ""))
        rows.append((node.name, label, tuple(n.name for n in node.all_input_nodes), mark))
    return tuple(rows)


def owner_of(match: Match) -> str:
    """The path of the smallest module whose forward computes all of a match ('' is the root)."""
    paths = [stack_path(node) for node in match.nodes]
    common = paths[0]
    for path in paths[1:]:
        common = tuple(a for a, b in zip(common, path) if a == b)[: _shared_length(common, path)]
    return common[-1] if common else ""


def _shared_length(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    length = 0
    for x, y in zip(a, b):
        if x != y:
            break
        length += 1
    return length


def stack_path(node: fx.Node) -> tuple[str, ...]:
    """Paths of the modules whose forwards are running at a node, outermost first; a called leaf does not count."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ()
    paths = [str(entry[0]) for entry in stack.values()]
    if node.op == "call_module" and paths and paths[-1] == node.target:
        paths.pop()
    return tuple(p for p in paths if p)


def build_variant(
    owner: nn.Module, kinds: tuple[Any, ...], signature: Signature, patterns: Sequence[Pattern], freeze: bool = False
) -> Variant:
    """A graph for one more kind of call of a module that runs by a plan; ``run`` is None when Python must do."""
    kind, plan_class = original_class(owner), type(owner)
    owner.__class__ = kind
    try:
        captured = capture(owner, kinds, signature)
        return variant_of(captured, patterns, Report(), "", freeze)
    except Untraceable as reason:
        logger.info("a call of %s keeps its Python: %s", kind.__name__, reason)
        return Variant(None, lambda owner: True)
    finally:
        owner.__class__ = plan_class


def variant_of(
    captured: Captured,
    patterns: Sequence[Pattern],
    report: Report,
    where: str,
    freeze: bool = False,
    found: Found | None = None,
) -> Variant:
    """Fuse a captured graph and make it callable."""
    bypassed = set(captured.inlined)
    done = fuse_graph(captured.graph, captured.root, patterns, report, where, found=found)
    for match in done:
        bypassed.update(str(n.target) for n in match.nodes if n.op == "call_module")
    if not done:
        return Variant(None, condition(captured, bypassed))
    if freeze:
        from fxfuse.freeze import freeze_graph

        freeze_graph(captured.graph)
    return Variant(compile_graph(captured.graph), condition(captured, bypassed), len(done))


@dataclass
class Compiler:
    """Fuses a tree of modules (a twin of the user's, so it may be changed) and reports on it."""

    patterns: Sequence[Pattern]
    report: Report
    freeze: bool = False
    example: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    _visited: set[int] = field(default_factory=set)

    def tree(self, module: nn.Module, path: str = "") -> nn.Module:
        """Fuse a module and everything below it; returns the module to use in its place (another only for a graph)."""
        if id(module) in self._visited:
            return module
        self._visited.add(id(module))
        if isinstance(module, fx.GraphModule):
            return self.graph_module(module, path)
        if path and called_only(module) and not _has_own_children(module):
            return module
        if type(module).forward is nn.Module.forward:  # a container without a forward: nothing of its own to trace
            return self._children(module, path)
        try:
            captured = self._capture(module, path)
        except Untraceable as reason:
            if not (path and type(module).__module__.startswith("torch.")):
                self.report.untraceable.append(Untraced(path, str(reason)))
            return self._children(module, path)
        found = find(View(captured.graph, captured.root), self.patterns)
        if not found.matches:
            self.report.add_misses(found.misses, path)
            return module
        owners = {owner_of(m) for m in found.matches}
        if "" in owners or path == "" and self.example is not None or not self._below(module, path, found, owners):
            self._fuse(module, path, captured, found)
        return module

    def _children(self, module: nn.Module, path: str) -> nn.Module:
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = self.tree(child, f"{path}.{name}" if path else name)
        return module

    def _capture(self, module: nn.Module, path: str) -> Captured:
        if "forward" in module.__dict__:
            raise Untraceable("its forward was replaced on the instance")
        signature = Signature(type(module).forward, skip_first=True)
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
        """Fuse in the submodules that hold the matches; False (and nothing done) where one of them alone cannot be read."""
        outermost = [o for o in sorted(owners) if not any(o != p and o.startswith(p + ".") for p in owners)]
        prepared: list[tuple[nn.Module, str, Captured, Found]] = []
        for owner in outermost:
            child = module.get_submodule(owner)
            place = f"{path}.{owner}" if path else owner
            try:
                captured = self._capture(child, place)
            except Untraceable as reason:
                logger.debug("%s alone cannot be traced (%s); fusing in the module around it", place, reason)
                return False
            inside = find(View(captured.graph, captured.root), self.patterns)
            wanted = {m.pattern for m in found.matches if (owner_of(m) + ".").startswith(owner + ".")}
            if not wanted <= {m.pattern for m in inside.matches}:
                return False
            prepared.append((child, place, captured, inside))
        misses = [m for m in found.misses]
        for child, place, captured, inside in prepared:
            if id(child) not in self._visited:
                self._visited.add(id(child))
                self._fuse(child, place, captured, inside)
        self.report.add_misses(misses, path)
        return True

    def _fuse(self, module: nn.Module, path: str, captured: Captured, found: Found) -> None:
        """Give a module a plan with the graph just made, and with the other mode's where the mode was read."""
        signature = Signature(type(module).forward, skip_first=True)
        kinds = self._kinds(signature, path)
        plan = Plan(tuple(p.name for p in self.patterns), signature, self.freeze)
        first = variant_of(captured, self.patterns, self.report, path, self.freeze, found)
        if first.run is None:
            return
        plan.variants[kinds] = [first]
        if any(attribute == "training" for _, attribute in captured.reads):
            plan.variants[kinds].append(self._other_mode(module, kinds, signature))
        install(module, plan)

    def _other_mode(self, module: nn.Module, kinds: tuple[Any, ...], signature: Signature) -> Variant:
        modes = [(m, m.training) for m in module.modules()]
        try:
            for m, training in modes:
                m.training = not training
            return variant_of(capture(module, kinds, signature), self.patterns, Report(), "", self.freeze)
        except Untraceable:
            return Variant(None, lambda owner, training=not module.training: owner.training == training)
        finally:
            for m, training in modes:
                m.training = training

    def graph_module(self, module: fx.GraphModule, path: str) -> fx.GraphModule:
        """Fuse a graph that already is one (symbolic_trace, torch.export); graph in, graph out."""
        import copy

        graph = copy.deepcopy(module.graph)
        done = fuse_graph(graph, module, self.patterns, self.report, path)
        if self.freeze and done:
            from fxfuse.freeze import freeze_graph

            freeze_graph(graph)
        fused = fx.GraphModule(module, graph, type(module).__name__) if done else module
        if fused is not module:
            for table in ("_parameters", "_buffers", "_modules"):
                setattr(fused, table, dict(getattr(module, table)))
            for key, value in module.__dict__.items():
                if key not in fused.__dict__:
                    fused.__dict__[key] = value
            fused.training = module.training
            for table in [k for k in module.__dict__ if "_hooks" in k]:
                fused.__dict__[table] = module.__dict__[table]
        self._children(fused, path)
        return fused


def _has_own_children(module: nn.Module) -> bool:
    """A called module is still worth a look below when children of it may be the user's own."""
    return any(True for _ in module.children()) and not isinstance(module, torch.jit.ScriptModule)
