"""Who is compared: each rival turns the same model into the callable it would run.

Adding one is a function here decorated with `@rival`; `fxfuse bench --vs` knows it by its name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.bench.workloads import DISTILLATION_TEMPERATURE, MatmulDivSumScale, Workload

Callee = Callable[..., Tensor]
Prepare = Callable[[nn.Module, Workload], Callee]


class Unavailable(Exception):
    """A rival that can't run here: `status` "missing" (not installed) or "n/a" (has nothing for this workload)."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Rival:
    """One competitor: its name on the command line, its heading, how it prepares a model; whether what it makes replays
    CUDA graphs (then every call has to be told apart from the last); and whether it is a yardstick: a module of its own
    that computes less than the workload, so that its result is not compared."""

    name: str
    title: str
    prepare: Prepare
    cuda_graphs: bool = False
    yardstick: bool = False


RIVALS: dict[str, Rival] = {}


def rival(name: str, title: str, **how: bool) -> Callable[[Prepare], None]:
    """Register the decorated function as a rival."""

    def register(prepare: Prepare) -> None:
        RIVALS[name] = Rival(name, title, prepare, **how)

    return register


@rival("eager", "PyTorch eager")
def _eager(model: nn.Module, workload: Workload) -> Callee:
    return model


@rival("compile", "torch.compile")
def _compile(model: nn.Module, workload: Workload) -> Callee:
    return torch.compile(model, dynamic=False)


@rival("max-autotune", "torch.compile max-autotune", cuda_graphs=True)
def _max_autotune(model: nn.Module, workload: Workload) -> Callee:
    return torch.compile(model, dynamic=False, mode="max-autotune")


@rival("liger", "Liger-Kernel")
def _liger(model: nn.Module, workload: Workload) -> Callee:
    """Liger has a KL divergence taking log-probabilities; what comes before it is PyTorch's."""
    if workload.has_product:
        raise Unavailable("n/a", "Liger-Kernel has no kernel for it")
    try:
        from liger_kernel.transformers import LigerKLDIVLoss
    except ImportError as error:
        raise Unavailable("missing", f"liger_kernel is not installed ({error})") from error
    if not next(iter(model.parameters()), torch.empty(0)).is_cuda and not torch.cuda.is_available():
        raise Unavailable("n/a", "Liger-Kernel needs a GPU")
    divergence = LigerKLDIVLoss(reduction="batchmean", log_target=False)
    if workload.name == "kl_div":
        return lambda p, t: divergence(torch.log(p), t)
    temperature = DISTILLATION_TEMPERATURE

    def distillation(student: Tensor, teacher: Tensor) -> Tensor:
        log_q = torch.log_softmax(student / temperature, dim=-1)
        return divergence(log_q, torch.softmax(teacher / temperature, dim=-1)) * temperature**2

    return distillation


class BareProduct(nn.Module):
    """x[M, K] -> x Wᵀ as [M, N], W of a workload's Linear."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight)


@rival("product", "the bare product", yardstick=True)
def _product(model: nn.Module, workload: Workload) -> Callee:
    """The library's product alone, three of them with the backward: what a fused epilogue should cost."""
    linear = getattr(model, "linear", None)
    if linear is None:
        raise Unavailable("n/a", "the workload has no product of its own shape")
    return BareProduct(linear.weight)


class TwoStep(nn.Module):
    """The collapse x · ΣⱼWⱼ in PyTorch's own operations: what the algebra alone gains."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.sum(0, keepdim=True).T) * 0.75


@rival("two-step", "collapsed in eager")
def _two_step(model: nn.Module, workload: Workload) -> Callee:
    if not isinstance(model, MatmulDivSumScale):
        raise Unavailable("n/a", "nothing collapses")
    return TwoStep(model.weight)


class Handed(torch.autograd.Function):
    """Hands on a result that is there already, and in the backward gradients that are allocated and no more."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *[torch.empty_like(t) for t in ctx.saved_tensors]


class AutogradAlone(nn.Module):
    """A model's result without its work: one node of autograd written in Python, between the same leaves."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.result: Tensor | None = None

    def forward(self, *inputs: Tensor) -> Tensor:
        if inputs[0].is_cuda and torch.cuda.is_current_stream_capturing():
            raise Unavailable("n/a", "nothing runs on the GPU")
        if self.result is None:
            with torch.no_grad():
                self.result = self.model(*inputs)
        out: Tensor = Handed.apply(self.result, *inputs, *self.model.parameters())
        return out


@rival("autograd", "PyTorch's autograd alone", yardstick=True)
def _autograd(model: nn.Module, workload: Workload) -> Callee:
    """What a call costs the host before any work: where the GPU takes less, this is what is measured."""
    return AutogradAlone(model)


@rival("frozen", "fxfuse, freeze=True")
def _frozen(model: nn.Module, workload: Workload) -> Callee:
    if not isinstance(model, MatmulDivSumScale):
        raise Unavailable("n/a", "nothing of it depends on weights alone")
    return fxfuse.optimize(model, freeze=True)


@rival("fxfuse", "fxfuse")
def _fxfuse(model: nn.Module, workload: Workload) -> Callee:
    return fxfuse.optimize(model)


@rival("fxfuse-compile", 'torch.compile(backend="fxfuse")')
def _fxfuse_compile(model: nn.Module, workload: Workload) -> Callee:
    from fxfuse.backend import backend

    return torch.compile(model, dynamic=False, backend=backend)


def replaced_patterns(callee: Callee) -> list[str]:
    """The patterns replaced in a callable made by the rival fxfuse, in order."""
    return [replacement.pattern for replacement in fxfuse.report(callee).replacements]


def reset() -> None:
    """Forget compiled code and its CUDA graphs, so that one case's shapes don't make the next compile dynamic."""
    torch.compiler.reset()
