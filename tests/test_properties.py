"""Random programs around and through the patterns: whatever is written, the fused program computes the same.

A program is Python source over two inputs, a weight and a bias, made of the operations the patterns know, their
in-place forms and a few they do not know. Values are read again, changed in place and returned at random.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, fx

import fxfuse
from fxfuse.pattern import available

ROWS, FEATURES = 3, 4

#: {0} and {1} are values of shape [ROWS, FEATURES], {n} a number
SAME_SHAPE = (
    "F.linear({0}, w, b)",
    "F.linear({0}, w)",
    "{0} @ w.t()",
    "torch.matmul({0}, w.T) + b",
    "b + {0}.mm(w.t())",
    "torch.addmm(b, {0}, w.t())",
    "{0} @ w",
    "{0} * {n}",
    "{n} * {0}",
    "{0} / {n}",
    "-{0}",
    "{0} * {1}",
    "{0} / ({1} * {1} + 1)",
    "{0} + {1}",
    "{0} * b",
    "F.relu({0})",
    "{0}.sigmoid()",
    "F.gelu({0}, approximate='tanh')",
    "torch.tanh({0})",
    "F.silu({0})",
    "F.leaky_relu({0}, {n})",
    "{0}.clamp(min=0.1)",
    "F.hardtanh({0})",
    "{0}.exp().clamp(max=9.0)",
    "F.softmax({0}, -1)",
    "F.log_softmax({0}, -1)",
    "torch.log_softmax({0} / {n}, dim=1)",
    "{0}.softmax(0)",
    "torch.log({0}.abs() + 0.5)",
    "F.batch_norm({0}, None, None, b, b, True)",
    "F.batch_norm({0} * b, None, None, training=True)",
    "{0}.t().t()",
    "{0}.view(-1).view(3, 4)",
    "{0}.detach()",
)
IN_PLACE = (
    "{0}.mul_({n})",
    "{0}.div_({n})",
    "{0}.neg_()",
    "{0}.relu_()",
    "{0}.add_({1})",
    "{0}.mul_(b)",
    "F.relu({0}, inplace=True)",
    "{0}.tanh_()",
    "F.dropout({0}, 0.0, True, True)",
    "{0}[0].zero_()",
    "{0}.view(-1).mul_({n})",
)
REDUCING = (
    "{0}.sum(-1, keepdim=True).expand(3, 4)",
    "{0}.mean(1, keepdim=True) * {1}",
    "{0}.sum(dim=(1,), keepdim=True) / {n} + {1}",
    "{0}.sum(0, keepdim=True) + {1}",
    "F.kl_div({0}, {1}, reduction='none')",
    "F.kl_div({0}, {1}.exp(), reduction='sum') + {0}",
    "F.kl_div(torch.log({0}.abs() + 0.1), {1}.abs(), reduction='batchmean') * {1}",
    "F.kl_div(F.log_softmax({0} / {n}, -1), F.softmax({1} / {n}, -1), reduction='batchmean') * {n} + {0}",
    "F.kl_div(F.log_softmax({0}, -1), F.log_softmax({1}, -1), reduction='mean', log_target=True) * {0}",
)

WHOLE = (
    "F.batch_norm(F.linear({0}, w) * b / {n}, None, None, b, None, True)",
    "F.batch_norm({0} @ w.t() + b, b * 1, b * b + 1)",
    "F.relu(F.linear({0}, w, b)) / {n}",
    "F.gelu(-torch.addmm(b, {0}, w.t()))",
    "F.linear({0}, w).mul_({n}).tanh_() * {n}",
    "(F.linear({0}, w, b) / {n}).sum(-1, keepdim=True) + {1}",
    "-({0}.mm(w.t()) * {n}).mean(-1, True) * {1}",
)

numbers = st.sampled_from(["0.5", "2", "-3", "1.5", "4.0"])


@st.composite
def programs(draw: st.DrawFn) -> str:
    """The source of ``def program(x, y, w, b)``."""
    lines, values = ["x = x * 1", "y = y * 1"], ["x", "y"]
    for number in range(draw(st.integers(2, 9))):
        recent = st.sampled_from(
            [*values, *values[-2:], values[-1], values[-1]]
        )  # mostly what was just made: long chains
        template = draw(
            st.one_of(*map(st.sampled_from, (SAME_SHAPE, SAME_SHAPE, SAME_SHAPE, IN_PLACE, REDUCING, WHOLE)))
        )
        line = template.format(draw(recent), draw(recent), n=draw(numbers))
        if template in IN_PLACE and draw(st.booleans()):
            lines.append(line)
        else:
            lines.append(f"v{number} = {line}" if template not in IN_PLACE[-2:] else line)
            if template not in IN_PLACE[-2:]:
                values.append(f"v{number}")
    returned = draw(st.lists(st.sampled_from(values), min_size=0, max_size=2))
    lines.append(f"return {', '.join([values[-1], *returned])},")
    return "def program(x, y, w, b):\n    " + "\n    ".join(lines) + "\n"


def compiled(source: str) -> Callable[..., Any]:
    namespace: dict[str, Any] = {"torch": torch, "F": torch.nn.functional}
    exec(source, namespace)
    return namespace["program"]


def arguments() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (ROWS, FEATURES), (ROWS, FEATURES), (FEATURES, FEATURES), (FEATURES,)
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def outcome(program: Callable[..., Any], needs_gradient: bool) -> list[Tensor | None]:
    """Outputs, and gradients of everything where wanted."""
    given = arguments()
    with torch.set_grad_enabled(needs_gradient):
        outputs = program(*given)
    if needs_gradient:
        generator = torch.Generator().manual_seed(1)
        wanted = [o for o in outputs if o.requires_grad]
        if wanted:
            weights = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in wanted]
            torch.autograd.backward(wanted, weights)
    return [*(o.detach() for o in outputs), *(g.grad for g in given)]


def assert_same(fused: list[Tensor | None], eager: list[Tensor | None]) -> None:
    assert len(fused) == len(eager)
    for one, other in zip(fused, eager, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8, equal_nan=True)


def expected(program: Callable[..., Any], needs_gradient: bool) -> list[Tensor | None]:
    """What eager gives; programs it refuses (a value changed that the backward needs) are not asked."""
    try:
        result = outcome(program, needs_gradient)
    except RuntimeError:
        assume(False)
        raise
    assume(all(t is None or float(t.nan_to_num(1e9).abs().max()) < 1e8 for t in result))
    return result


slowly = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.mark.filterwarnings("ignore")
@slowly
@given(programs(), st.booleans())
def test_a_fused_function_is_the_function(source: str, needs_gradient: bool) -> None:
    note(source)
    program = compiled(source)
    eager = expected(program, needs_gradient)
    assert_same(outcome(fxfuse.optimize(program), needs_gradient), eager)
    with_shapes = fxfuse.optimize(program, tuple(a.detach() for a in arguments()))
    assert_same(outcome(with_shapes, needs_gradient), eager)


@pytest.mark.filterwarnings("ignore")
@slowly
@given(programs())
def test_a_fused_graph_is_the_graph(source: str) -> None:
    note(source)
    graph = fx.symbolic_trace(compiled(source))
    eager = expected(graph, True)
    before = str(graph.graph)
    fused = fxfuse.optimize(graph)
    fused.graph.lint()
    assert str(graph.graph) == before
    assert_same(outcome(fused, True), eager)
    again = fxfuse.optimize(fused)
    assert fxfuse.report(again).replacements == []
    assert_same(outcome(again, True), eager)


@pytest.mark.filterwarnings("ignore")
@settings(slowly, max_examples=12)
@given(programs())
def test_a_compiled_program_is_the_program(source: str) -> None:
    note(source)
    program = compiled(source)
    eager = expected(program, True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for inner in ("eager", "aot_eager"):
            torch._dynamo.reset()
            assert_same(outcome(torch.compile(program, backend=fxfuse.backend, options={"inner": inner}), True), eager)


def test_random_programs_do_reach_the_patterns() -> None:
    """The strategies above would prove nothing if nothing matched."""
    reached: set[str] = set()

    @settings(slowly, max_examples=80)
    @given(programs())
    def count(source: str) -> None:
        reached.update(r.pattern for r in fxfuse.report(fxfuse.optimize(compiled(source))).replacements)

    count()
    assert reached == set(available())
