"""The one harness of the test suite: a table of cases, every door into the compiler, float64 as the judge.

A :class:`Case` says what to build and feed, how many matches of which pattern there are and what is left in the graph.
:func:`check` takes it through one door and compares outputs, gradients of every input and parameter, buffers after
several steps, and what became of the arguments, with the original in float64::

    CASES = [Case("functional", kl_div_sum, (logprobs(4, 5), probs(4, 5)), {"kl_div": 1})]

    @pytest.mark.parametrize(("case", "door"), through_every_door(CASES))
    def test_kl_div(case, door):
        check(case, door)

A near miss names the reason it must be refused with (``refused=("kl_div", "the reason")``), and still has to compute
the same.
"""

from __future__ import annotations

import functools
import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import draws
import plain_products
import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse import aside, ops
from fxfuse.bench import rivals
from fxfuse.kernels import gemm
from fxfuse.ops import linear_activation_scale as las_file
from fxfuse.ops import linear_scale_batchnorm1d as bn_file
from fxfuse.ops._road import Road
from fxfuse.rewrite import Fuel

torch.set_num_threads(1)

#: every way into the compiler, and the same way again with shapes known or autocast on
DOORS = ("optimize", "example", "symbolic_trace", "export", "compile_eager", "compile_aot_eager")
#: doors that read the graph of a symbolic trace, where reasons name modules and attributes as the user wrote them
TRACED = ("optimize", "example", "symbolic_trace")

# --- what a case is made of ----------------------------------------------------------------------------------------

Maker = Callable[[torch.Generator], Tensor]


def normal(*shape: int) -> Maker:
    """Standard normal float32 numbers that want a gradient."""
    return lambda generator: torch.randn(shape, generator=generator)


def probs(*shape: int) -> Maker:
    """Rows of probabilities."""
    return lambda generator: torch.randn(shape, generator=generator).softmax(-1)


def logprobs(*shape: int) -> Maker:
    """Rows of log-probabilities."""
    return lambda generator: torch.randn(shape, generator=generator).log_softmax(-1)


def scalar(value: float) -> Maker:
    """A tensor without dimensions."""
    return lambda generator: torch.tensor(value)


@dataclass(frozen=True, eq=False)
class Case:
    """One model, its inputs, and what the compiler has to make of it.

    Attributes:
        name: the test's id.
        model: a function, or a call that builds a module (its parameters are filled from a seed).
        inputs: makers of tensors, or plain values.
        matches: pattern -> number of replacements, exactly; nothing else may be replaced.
        left: operations left beside the fused ops in the graph of the optimize door, sorted.
        refused: (pattern, text) of a near miss the report must hold.
        modes: train (True) or eval (False), one per step.
        needs_example: whether the matches and the reason show only with example inputs.
        elsewhere: door -> matches, for doors whose graph says something else (Dynamo looks into a hook, say).
        cannot: door -> an exception torch itself raises there.
        lossy: doors where torch itself loses part of the model before we see it.
    """

    name: str
    model: Callable[..., Any]
    inputs: tuple[Any, ...]
    matches: Mapping[str, int] = field(default_factory=dict)
    left: tuple[str, ...] = ()
    refused: tuple[str, str] | None = None
    modes: tuple[bool, ...] = (True,)
    needs_example: bool = False
    elsewhere: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    cannot: Mapping[str, type[Exception]] = field(default_factory=dict)
    lossy: tuple[str, ...] = ()

    def build(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
        """The function, or a new module with the same values every time."""
        if not isinstance(self.model, type) and not getattr(self.model, "builds", False):
            return self.model
        return seeded(self.model()).to(device, dtype)

    def values(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Any]:
        """The inputs, the same every time."""
        generator = torch.Generator().manual_seed(1)
        made = [make(generator) if callable(make) else make for make in self.inputs]
        return [v.to(device, dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for v in made]

    def __repr__(self) -> str:
        return self.name


def builds(function: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Marks what returns a module when it is called without arguments, in a case's ``model``."""
    function.builds = True  # type: ignore[attr-defined]
    return function


def sequential(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """``sequential(lambda: nn.Linear(8, 6), nn.ReLU)``: builds an nn.Sequential anew."""
    return builds(lambda: nn.Sequential(*(layer() for layer in layers)))


def seeded(module: nn.Module) -> nn.Module:
    """Fill parameters and float buffers with numbers that hide nothing: no bias is 0, no scale is 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5 + 0.3)
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return module


def through_every_door(cases: Sequence[Case], doors: Sequence[str] = DOORS) -> list[Any]:
    """The parameters of a test over (case, door)."""
    names = [case.name for case in cases]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"two cases are named {twice[0]!r}")
    return [
        pytest.param(case, door, id=f"{door}-{case.name}") for door in doors for case in cases if door not in case.lossy
    ]


# --- running -------------------------------------------------------------------------------------------------------


def run(model: Any, values: Sequence[Any], modes: Sequence[bool]) -> dict[str, Tensor | None]:
    """Forward and backward once per mode; everything a user could look at afterwards, by name."""
    seen: dict[str, Tensor | None] = {}
    leaves = [v.clone().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]
    generator = torch.Generator().manual_seed(2)
    for step, training in enumerate(modes):
        if isinstance(model, nn.Module) and model.training != training:
            model.train(training)
        arguments = [
            v * 1 if isinstance(v, Tensor) and v.requires_grad else v for v in leaves
        ]  # may be changed in place
        outputs = model(*arguments)
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        loss: Any = 0.0
        for number, output in enumerate(outputs):
            seen[f"output {number} of step {step}"] = output
            if output.requires_grad:
                weights = torch.randn(output.shape, generator=generator).to(output.device, torch.float64)
                loss = loss + (output.double() * weights).sum()
        if isinstance(loss, Tensor):
            loss.backward()
        for number, argument in enumerate(arguments):
            seen[f"argument {number} after step {step}"] = argument if isinstance(argument, Tensor) else None
    for number, leaf in enumerate(leaves):
        seen[f"gradient of argument {number}"] = leaf.grad if isinstance(leaf, Tensor) else None
    if isinstance(model, nn.Module):
        for name, parameter in model.named_parameters():
            seen[f"gradient of {name}"] = parameter.grad
        for name, buffer in model.named_buffers():
            seen[f"buffer {name}"] = buffer
    return {name: None if t is None else t.detach().clone() for name, t in seen.items()}


@functools.cache
def expected(case: Case, modes: tuple[bool, ...], dtype: torch.dtype, device: str, autocast: bool) -> tuple[Any, Any]:
    """What eager gives, in float64 and in ``dtype`` (under autocast if asked)."""
    model, values = case.build(dtype, device), case.values(dtype, device)
    model = model.double() if isinstance(model, nn.Module) else model
    exact = run(model, [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values], modes)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        eager = run(case.build(dtype, device), case.values(dtype, device), modes)
    return exact, eager


def judge(what: str, fused: Tensor | None, eager: Tensor | None, exact: Tensor | None, unit: float) -> None:
    """error(fused) <= 1.25 * error(eager), norm-wise against float64, and the same kind of tensor in every other way.

    The floor, two units in the last place of the result and of one, is for results that eager happens to hit exactly.
    """
    assert (fused is None) == (eager is None), f"{what}: fused {describe(fused)}, eager {describe(eager)}"
    if fused is None or eager is None or exact is None:
        return
    assert fused.dtype == eager.dtype, f"{what}: dtype {fused.dtype}, eager has {eager.dtype}"
    assert fused.shape == eager.shape, f"{what}: shape {list(fused.shape)}, eager has {list(eager.shape)}"
    if what.startswith("output"):
        assert fused.stride() == eager.stride(), f"{what}: strides {fused.stride()}, eager has {eager.stride()}"
    if not fused.is_floating_point():
        assert torch.equal(fused, eager), f"{what}: {fused} where eager has {eager}"
        return
    odd = ~eager.isfinite()
    assert torch.equal(fused[odd].nan_to_num(7.0), eager[odd].nan_to_num(7.0)), (
        f"{what}: inf or NaN not where eager's are"
    )
    fused, eager, exact = (t.double()[~odd] for t in (fused, eager, exact))
    error, eagers = float((fused - exact).norm()), float((eager - exact).norm())
    floor = 2 * unit * float(exact.norm() + exact.numel() ** 0.5)
    assert error <= 1.25 * eagers + floor, f"{what}: error {error:.3g} against float64, eager's is {eagers:.3g}"


def describe(tensor: Tensor | None) -> str:
    return "has none" if tensor is None else f"has {list(tensor.shape)}"


# --- the doors -----------------------------------------------------------------------------------------------------


class AsModule(nn.Module):
    """A function as a module, for torch.export, which takes nothing else."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def detached(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(v.detach().clone() if isinstance(v, Tensor) else v for v in values)


def walk_through(door: str, model: Any, values: Sequence[Any]) -> tuple[Any, Callable[[], list[Any]]]:
    """The fused model behind a door, and the reports about it once it has run."""
    if door == "optimize":
        fused = fxfuse.optimize(model)
    elif door == "example":
        fused = fxfuse.optimize(model, detached(values))
    elif door == "symbolic_trace":
        fused = fxfuse.optimize(torch.fx.symbolic_trace(model))
    elif door == "export":
        module = model if isinstance(model, nn.Module) else AsModule(model)
        fused = fxfuse.optimize(torch.export.export(module, detached(values)))
    elif door.startswith("compile_"):
        before = fxfuse.reports()
        options = {"inner": door.removeprefix("compile_")}
        fused = torch.compile(model, backend=fxfuse.backend, options=options, fullgraph=True)
        return fused, lambda: [r for r in fxfuse.reports() if all(r is not old for old in before)]
    else:
        raise ValueError(f"no door {door!r}; there are {', '.join(DOORS)}")
    return fused, lambda: [fxfuse.report(fused)]


def check(
    case: Case, door: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", autocast: bool = False
) -> None:
    """Take a case through a door and compare everything with the original."""
    if door == "export":  # an exported program knows one mode
        for training in dict.fromkeys(case.modes):
            _check(case, door, (training,) * min(len(case.modes), 2), dtype, device, autocast)
    else:
        _check(case, door, case.modes, dtype, device, autocast)


def on_cuda(cases: Sequence[Case], door: str) -> Callable[..., None]:
    """A test of every case on a GPU, in the dtypes that have kernels: ``test_cuda = on_cuda(POSITIVE, "optimize")``."""

    @pytest.mark.cuda
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("case", cases, ids=repr)
    def test(case: Case, dtype: torch.dtype) -> None:
        check(case, door, dtype=dtype, device="cuda")

    return test


def _check(case: Case, door: str, modes: tuple[bool, ...], dtype: torch.dtype, device: str, autocast: bool) -> None:
    exact, eager = expected(case, modes, dtype, device, autocast)
    model, values = case.build(dtype, device), case.values(dtype, device)
    if isinstance(model, nn.Module):
        model.train(modes[0])
    if door in case.cannot:
        with pytest.raises(case.cannot[door]):
            walk_through(door, model, values)[0](*values)
        return
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        fused, reports = walk_through(door, model, values)
        seen = run_exported(fused, values, modes) if door == "export" else run(fused, values, modes)
    assert_replaced(case, door, reports(), graphs=len(set(modes)) if door.startswith("compile_") else 1)
    unit = torch.finfo(torch.bfloat16 if autocast else dtype).eps
    seen = {what.replace("_orig_mod.", ""): value for what, value in seen.items()}  # torch.compile's wrapper
    for what in eager:
        if what.startswith("buffer") and what not in seen and door in ("symbolic_trace", "export"):
            continue  # torch drops the ones nothing reads
        judge(what, seen.get(what), eager[what], exact[what], unit)


def run_exported(fused: Any, values: Sequence[Any], modes: Sequence[bool]) -> dict[str, Tensor | None]:
    """Like :func:`run`, for a program whose mode cannot be changed."""
    fused.train = fused.eval = lambda mode=True: fused
    return run(fused, values, modes)


def assert_replaced(case: Case, door: str, reports: list[Any], graphs: int) -> None:
    """Exactly the matches the case names in every graph, nothing of them left behind, and the reason of a near miss."""
    blind = case.needs_example and door in ("optimize", "symbolic_trace")
    wanted = dict(case.elsewhere.get(door, {} if blind else case.matches))
    assert len(reports) >= graphs, f"{len(reports)} graphs were read, not {graphs}"  # Dynamo may compile one anew
    for report in reports:
        found = dict(Counter(r.pattern for r in report.replacements))
        assert found == wanted, f"replaced {found}, not {wanted}\n{report}"
        gone = {name for r in report.replacements for name in r.nodes}
        for drawing in report.drawings:
            read = {name for _, _, inputs, _ in drawing.after for name in inputs}
            for name, _, _, mark in drawing.after:
                assert mark or name not in gone or name in read, f"{name} was replaced and still stands there, unread"
        if door == "optimize" and wanted and door not in case.elsewhere:
            assert operations_left(report) == tuple(sorted(case.left)), f"left in the graph: {operations_left(report)}"
        if case.refused is not None and door in TRACED and not blind and door not in case.elsewhere:
            pattern, text = case.refused
            reasons = [m.reason for m in report.near_misses if m.pattern == pattern]
            assert any(text in reason for reason in reasons), f"no near miss of {pattern} says {text!r}\n{report}"


def operations_left(report: Any) -> tuple[str, ...]:
    """What still stands in the graphs beside the fused ops: names of functions and methods, paths of modules."""
    left = []
    for drawing in report.drawings:
        for _, label, _, mark in drawing.after:
            kind, _, target = label.partition("\n")
            if kind.startswith("call_") and not mark and target.removesuffix("_module") not in ops.names():
                left.append(target)
    return tuple(sorted(left))


# --- around every test ---------------------------------------------------------------------------------------------


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls with gradients step aside on a CPU, too, as small ones do on a GPU."""
    monkeypatch.setattr(aside, "_on_a_gpu", lambda x: True)
    monkeypatch.setattr(aside, "_capturing", lambda: False)


@pytest.fixture(autouse=True)
def _clean_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No switch of the environment, no fuel spent, no graph compiled before."""
    for name in [n for n in os.environ if n in ("FXFUSE_LIMIT", "FXFUSE_DISABLE", "FXFUSE_LOG")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(Fuel, "used", 0)
    torch.manual_seed(0)
    last = fxfuse.reports()[-1:]
    yield
    if any(a is not b for a, b in zip(fxfuse.reports()[-1:], last or [None], strict=False)):  # something was compiled
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _small_steps_take_the_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a small training step goes by eager's own operations; the tests are small and want the kernels."""
    if "cuda" in request.keywords and "launches_count" not in request.keywords:
        monkeypatch.setattr(gemm, "_LAUNCH_US", 0.0)
    for kept in (bn_file.STEPS, las_file.STEPS):  # what rests on it
        kept.forget()


# --- fixtures of several files -------------------------------------------------------------------------------------


@pytest.fixture
def plant_rival(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], None]:
    """Adds a rival to the bench for one test: plant_rival(name, prepare)."""

    def plant(name: str, prepare: Any) -> None:
        monkeypatch.setitem(rivals.RIVALS, name, rivals.Rival(name, name, prepare))

    return plant


@pytest.fixture
def closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call that may takes the closed form: no shortcut for small tensors, none for training on the CPU."""
    for name in ops.names():
        monkeypatch.setattr(ops.get(name), "direct", None)
    batchnorm, own = bn_file.OP, bn_file.OP._road

    def road(*args: Any) -> Road:
        found = own(*args)
        return bn_file.CLOSED if found.why.startswith("no kernel") else found

    monkeypatch.setattr(batchnorm, "_road", road)


# --- tests on a GPU ------------------------------------------------------------------------------------------------


def why_no_cuda() -> str | None:
    """Why CUDA tests cannot run here, or None."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    return None if torch.cuda.is_available() else "no NVIDIA GPU is visible"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default="0/1", help="I/N: the I-th of N parts, from 0 on (tests/sanitize.py)")
    parser.addoption("--plain-products", action="store_true", help="the library's products on a GPU go by float64")
    parser.addoption("--under-a-tool", action="store_true", help="few draws, of which errors are not judged (draws.py)")


PLAIN_PRODUCTS = pytest.StashKey[torch.library.Library]()


def pytest_configure(config: pytest.Config) -> None:
    draws.under_a_tool = config.getoption("under_a_tool")
    if config.getoption("plain_products"):
        config.stash[PLAIN_PRODUCTS] = plain_products.in_force()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reason = why_no_cuda()
    for item in items if reason is not None else ():
        if item.get_closest_marker("cuda") is not None:  # keywords hold the ids of parameters, too
            item.add_marker(pytest.mark.skip(reason=f"CUDA: {reason}"))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Keeps the part that was asked for of what is left to run."""
    part, parts = map(int, session.config.getoption("part").split("/"))
    session.items[:] = part_of(session.items, part, parts)


def part_of(items: list[pytest.Item], part: int, parts: int) -> list[pytest.Item]:
    """Every test is in one part. Neighbours stay together, a dozen where there are enough for that: they share kernels,
    which a tool prepares in each process that launches them. A part's dozens come from all over the suite, so that
    parts take about as long; each starts at another place, as they run side by side."""
    size = max(1, min(12, len(items) // parts))
    dozens = [items[i : i + size] for i in range(size * part, len(items), size * parts)]
    first = len(dozens) * part // parts
    return [item for dozen in dozens[first:] + dozens[:first] for item in dozen]


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Processes side by side share a GPU: what a test has left there goes back, what only the collector frees, too."""
    if "cuda" in item.keywords and torch.cuda.is_initialized():
        if torch.cuda.memory_allocated() > 1 << 30:
            gc.collect()
        if torch.cuda.memory_reserved() > 2 << 30:
            torch.cuda.empty_cache()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One loud line about the tests that need a GPU."""
    skipped = [r for r in terminalreporter.stats.get("skipped", ()) if "cuda" in r.keywords]
    if skipped:
        why = why_no_cuda() or "skipped"
        line = f"{len(skipped)} CUDA TESTS WERE NOT RUN: {why}. `make cuda-test` runs them on a GPU."
        terminalreporter.section("CUDA", yellow=True, bold=True)
        terminalreporter.line(line, yellow=True, bold=True)
