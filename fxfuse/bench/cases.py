"""What to measure: one case per workload, shape, precision and mode; from it, model, inputs and the step to time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxfuse.bench.accuracy import Result, in_float64
from fxfuse.bench.limits import PRECISION_DTYPE
from fxfuse.bench.sweeps import SWEEPS
from fxfuse.bench.workloads import WORKLOADS, Shape, Workload

MODES = ("fwd", "fwdbwd")
MAX_INPUT_SETS = 16
DEFAULT_PRECISIONS = {"cuda": ("fp32", "tf32", "bf16"), "cpu": ("fp32",)}


@dataclass(frozen=True)
class Case:
    """One thing to measure, for every rival alike."""

    workload: Workload
    shape: Shape
    precision: str
    mode: str

    def __str__(self) -> str:
        return f"{self.workload.name} {format_shape(self.shape)} {self.precision} {self.mode}"

    @property
    def dtype(self) -> torch.dtype:
        return PRECISION_DTYPE[self.precision]


def format_shape(shape: Sequence[int]) -> str:
    """(1024, 8192) -> "1024×8192"."""
    return "×".join(map(str, shape))


def parse_shapes(text: str) -> list[Shape]:
    """ "M,N,K;M,N" -> [(M, N, K), (M, N)]; ValueError says what is wrong."""
    shapes = []
    for part in filter(None, (p.strip() for p in text.split(";"))):
        try:
            shape = tuple(int(n) for n in part.split(","))
        except ValueError:
            raise ValueError(f"shape {part!r} is not numbers separated by commas, as in 1024,8192,8192") from None
        if len(shape) not in (2, 3) or min(shape) < 1:
            raise ValueError(f"shape {part!r}: products take M,N,K and divergences M,N, all at least 1")
        shapes.append(shape)
    if not shapes:
        raise ValueError("no shape given")
    return shapes


def plan(
    workloads: Sequence[str],
    shapes: Sequence[Shape] | None,
    precisions: Sequence[str],
    modes: Sequence[str],
    device: torch.device,
    sweep: bool = False,
) -> list[Case]:
    """The cases in the order they are measured.

    `shapes` (None: the workload's own, or with `sweep` those of `sweeps`) go to the workloads with as many dimensions.
    TF32 concerns matrix products alone and is left out elsewhere, as is a mode a workload does not have. ValueError
    when nothing is left.
    """
    cases = [
        Case(workload, shape, precision, mode)
        for workload in (WORKLOADS[name] for name in workloads)
        for shape in shapes or (SWEEPS[workload.name] if sweep else workload.sizes[device.type])
        if len(shape) == len(workload.dims.split(","))
        for precision in precisions
        if precision != "tf32" or workload.has_product
        for mode in modes
        if mode in workload.modes
    ]
    if not cases:
        raise ValueError(
            "nothing to measure: no workload takes these shapes, precisions and modes together "
            "(products take M,N,K and divergences M,N; tf32 is for products; eval has no fwdbwd)"
        )
    return cases


@dataclass
class Setup:
    """The same model, inputs and upstream gradient for every rival of a case, made from one seed."""

    case: Case
    model: nn.Module
    input_sets: list[tuple[Tensor, ...]]
    seed: int
    _upstream: Tensor | None = None

    @classmethod
    def make(cls, case: Case, device: torch.device, seed: int, cache_bytes: int) -> Setup:
        """Random weights and inputs on `device`; as many input sets as it takes to overflow `cache_bytes` twice."""
        torch.manual_seed(seed)
        with torch.device(device):
            model = case.workload.build(case.shape)
        model = model.to(case.dtype).train(case.workload.training)
        generator = torch.Generator(device).manual_seed(seed)

        def inputs() -> tuple[Tensor, ...]:
            return tuple(x.to(case.dtype) for x in case.workload.inputs(case.shape, generator))

        first = inputs()
        size = sum(x.numel() * x.element_size() for x in first)
        count = max(1, min(MAX_INPUT_SETS, math.ceil(2 * cache_bytes / max(size, 1))))
        return cls(case, model, [first, *(inputs() for _ in range(count - 1))], seed)

    def fresh_model(self) -> nn.Module:
        """A copy with the same weights and buffers; rivals must not share running statistics."""
        return copy.deepcopy(self.model)

    def upstream(self, output: Tensor) -> Tensor:
        """The gradient handed to the backward: random (a constant one has stride 0 and is easier), one for a scalar;
        made once in float32 and in the dtype of the case, so that float64 sees the same numbers."""
        if self._upstream is None:
            generator = torch.Generator(output.device).manual_seed(self.seed + 1)
            numbers = torch.randn(output.shape, generator=generator, device=output.device)
            self._upstream = (numbers if output.dim() else torch.ones_like(numbers)).to(self.case.dtype)
        return self._upstream.to(output.device)

    def reference(self) -> Result:
        """What the model computes in float64 on the first input set; on the CPU where the GPU has no room for it."""
        try:
            model, inputs = in_float64(self.model, self.input_sets[0])
            return Runner(self, model, model, [inputs]).result()
        except torch.OutOfMemoryError:
            model, inputs = in_float64(self.fresh_model().cpu(), [x.cpu() for x in self.input_sets[0]])
            return Runner(self, model, model, [inputs]).result()


class Runner:
    """Runs one rival's callable: forward under no_grad, or forward and backward to weights and inputs."""

    def __init__(
        self,
        setup: Setup,
        model: nn.Module,
        callee: Callable[..., Tensor],
        input_sets: list[tuple[Tensor, ...]] | None = None,
        before_call: Callable[[], None] = lambda: None,
    ) -> None:
        """`model` holds the parameters and buffers that `callee` uses; `before_call` runs before every call."""
        case = setup.case
        self.callee, self.model, self.before_call = callee, model, before_call
        self.backward = case.mode == "fwdbwd"
        wanted = case.workload.differentiable_inputs if self.backward else ()
        self.input_sets = [
            tuple(x.detach().requires_grad_(i in wanted) for i, x in enumerate(inputs))
            for inputs in input_sets or setup.input_sets
        ]
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad} if self.backward else {}
        self.leaves = [
            {**parameters, **{f"input {i}": inputs[i] for i in wanted}} for inputs in self.input_sets
        ]
        self.setup = setup
        self.upstream: Tensor | None = None

    def step(self, i: int) -> None:
        """Call number `i`, on input set `i` modulo their number; everything computed is dropped."""
        self._run(i % len(self.input_sets))

    def result(self) -> Result:
        """Output, gradients and buffers of one call on the first input set, copied to float64."""
        output, gradients = self._run(0)
        names = self.leaves[0] if self.backward else ()
        return Result(
            output=output.detach().double(),
            gradients={name: g.double() for name, g in zip(names, gradients, strict=True)},
            buffers={name: b.detach().clone().double() for name, b in self.model.named_buffers()},
        )

    def _run(self, which: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        self.before_call()
        inputs = self.input_sets[which]
        if not self.backward:
            with torch.no_grad():
                return self.callee(*inputs), ()
        output = self.callee(*inputs)
        if self.upstream is None:
            self.upstream = self.setup.upstream(output).to(output.dtype)
        # As a training step has it: a gradient that is an expanded row is written out where it is accumulated.
        output.backward(self.upstream)
        leaves = self.leaves[which].values()
        gradients = tuple(leaf.grad for leaf in leaves)
        for leaf in leaves:
            leaf.grad = None
        return output, gradients  # type: ignore[return-value]
