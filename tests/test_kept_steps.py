"""A kept training step tells the kernels what the ordinary way tells them: with stand-ins that write down what they are
given, on tensors of the CPU that say they are on a GPU."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxfuse.kernels import activation_step, batchnorm_step, gemm, small_gemm
from fxfuse.kernels import linear_activation_scale as las_kernels
from fxfuse.kernels import linear_scale_batchnorm1d as bn_kernels
from fxfuse.ops import _activation_step, _batchnorm_step, _kinds
from fxfuse.ops import linear_activation_scale as las_file
from fxfuse.ops import linear_scale_batchnorm1d as bn_file

pytestmark = pytest.mark.skipif(_kinds.Guards is None, reason="this torch has no guards of tensors")

M, N, K = 24, 16, 8


def _forward(kind: bytes, step: bytes) -> tuple[Any, ...]:
    """The arguments of `train` that linear_scale_batchnorm1d.cu makes of the two structures."""
    sizes, codes, ieee, dtype, _, device = _kind(kind)
    *first, batches, bias, scale, gamma, beta, mean, var, queue, alpha, eps, momentum = (
        batchnorm_step._FORWARD.unpack(step)
    )  # fmt: skip
    bias, scale, gamma, beta, mean, var = zip((bias, scale, gamma, beta, mean, var), codes, strict=True)
    return (
        *first, batches, *sizes, *bias, *scale, 0, 0, alpha, *gamma, *beta, eps, *mean, *var, momentum, ieee, dtype,
        device, queue,
    )  # fmt: skip


def _backward(kind: bytes, step: bytes) -> tuple[Any, ...]:
    """The arguments of `backward`, likewise."""
    (m, n, *_), codes, _, dtype, out_dtype, device = _kind(kind)
    *first, d_scale, bias, scale, gamma, beta, queue, alpha, eps = batchnorm_step._BACKWARD.unpack(step)
    bias, scale, gamma, beta = zip((bias, scale, gamma, beta), codes[:4], strict=True)
    return *first, 0, d_scale, m, n, *bias, *scale, 0, 0, alpha, *gamma, *beta, eps, dtype, out_dtype, device, queue


def _kind(kind: bytes) -> tuple[Any, ...]:
    numbers = batchnorm_step._KIND.unpack(kind)
    return numbers[:5], numbers[5:11], *numbers[11:]


UNPACKED = {"step_forward": _forward, "step_backward": _backward}


class Heard:
    """Calls into the kernels. Addresses are named after the tensors they belong to, others numbered in each call."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*args: Any) -> None:
            if name in UNPACKED:
                return getattr(self, name.removeprefix("step_").replace("forward", "train"))(*UNPACKED[name](*args))
            fresh: dict[int, str] = {}

            def named(a: Any) -> Any:
                a = getattr(a, "value", a)  # as ctypes has it
                if type(a) is float:
                    return ctypes.c_float(a).value
                if type(a) is not int or a < 1 << 20:  # every address is larger, and no size
                    return a
                return self.names.get(a) or fresh.setdefault(a, f"fresh {len(fresh)}")

            self.calls.append((name, *map(named, args)))
            return None

        return call

    def of(self, **tensors: Tensor | None) -> None:
        self.names = {t.data_ptr(): name for name, t in tensors.items() if t is not None}
        self.calls = []


def _empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: int) -> Tensor:
    assert type(shape) is tuple and type(strides) is tuple, "Inductor's allocation takes nothing else"
    return torch.empty_strided(shape, strides, dtype=dtype).zero_()


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Heard:
    heard, zeros = Heard(), torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False), raising=False)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_kinds, "_capturing", lambda: False)
    for name, stand_in in (
        ("library", lambda: heard), ("is_hopper", lambda device: True), ("launches_dominate", lambda *args: ""),
        ("processors", lambda device: 132),
    ):  # fmt: skip
        monkeypatch.setattr(gemm, name, stand_in)
    monkeypatch.setattr(small_gemm, "why_not", lambda *args: "past the small products")
    monkeypatch.setattr(bn_kernels, "functions", lambda: heard)
    monkeypatch.setattr(las_kernels, "functions", lambda: heard)
    monkeypatch.setattr(bn_kernels, "backward_scratch", lambda *args: 3)
    monkeypatch.setattr(las_kernels, "backward_scratch", lambda *args: (3, 5))
    monkeypatch.setattr(bn_kernels, "block_rows", lambda rows: 128)
    for place in (bn_kernels, las_kernels, activation_step, batchnorm_step, _batchnorm_step):
        for name, what in (
            ("stream", lambda device: 0), ("counters_of", lambda *args: zeros), ("allocate", _empty),
            ("allocator", lambda device: lambda *args: _empty(*args, device)),
        ):  # fmt: skip
            if hasattr(place, name):
                monkeypatch.setattr(place, name, what)
    for file in (bn_file, las_file):
        file.STEPS.forget()
    return heard


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """The kept steps whose forward ran."""
    taken: list[type] = []
    for step in (_batchnorm_step.Step, _activation_step.Step):

        def forward(self: Any, *args: Any, real: Any = step.forward, **kwargs: Any) -> Any:
            taken.append(type(self))
            return real(self, *args, **kwargs)

        monkeypatch.setattr(step, "forward", forward)
    return taken


BLOCKS = {
    "plain": {},
    "no bias": {"bias": False},
    "no scale": {"scale": False},
    "not affine": {"affine": False},
    "no running statistics": {"track_running_stats": False},
    "frozen weight": {"frozen": ("weight",)},
    "frozen gamma": {"frozen": ("gamma",)},
    "frozen scale and beta": {"frozen": ("scale", "beta", "bias")},
}


@pytest.mark.parametrize("product", ["one kernel", "product and passes", "the library's"])
@pytest.mark.parametrize("block", BLOCKS)
def test_batchnorm(block, product, heard, stepped, monkeypatch):
    options: dict[str, Any] = {"bias": True, "scale": True, "frozen": (), **BLOCKS[block]}
    norm = {k: v for k, v in options.items() if k in ("affine", "track_running_stats")}
    monkeypatch.setattr(gemm, "why_not_product", lambda *args: "no" if product == "the library's" else None)
    monkeypatch.setattr(bn_kernels, "behind", lambda *args: "training" if product == "one kernel" else "statistics")
    linear, bn = nn.Linear(K, N, bias=options["bias"]), nn.BatchNorm1d(N, momentum=0.3, eps=1e-3, **norm)
    scale = nn.Parameter(torch.rand(N)) if options["scale"] else None
    vectors = {"weight": linear.weight, "bias": linear.bias, "scale": scale, "gamma": bn.weight, "beta": bn.bias}
    for name in options["frozen"]:
        vectors[name].requires_grad_(False)

    def step() -> list[tuple[Any, ...]]:
        x, grad = torch.randn(M, K, requires_grad=True), torch.randn(M, N)
        leaves = [x, *[t for t in vectors.values() if t is not None and t.requires_grad]]
        heard.of(
            x=x, grad=grad, **vectors, mean=bn.running_mean, var=bn.running_var, batches=bn.num_batches_tracked
        )  # fmt: skip
        out = bn_file.linear_scale_batchnorm1d_module(bn, x, linear.weight, linear.bias, scale, None, 0.5)
        found = torch.autograd.grad(out, leaves, grad)
        assert all(g.shape == t.shape and g.dtype == t.dtype for g, t in zip(found, leaves, strict=True))
        return heard.calls

    ordinary = step()
    assert not stepped
    kept = step()
    assert stepped == [_batchnorm_step.Step]
    counted = bn.num_batches_tracked
    if product == "one kernel" and counted is not None:
        (name, *rest), *others = kept
        assert name == "train" and rest.count("batches") == 1 and int(counted) == 1, "the kernel is to count"
        rest[rest.index("batches")] = 0
        kept = [(name, *rest), *others]
    elif counted is not None:
        assert int(counted) == 2
    assert kept == ordinary and len(kept) >= 2


@pytest.mark.parametrize("product", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_activation(act, bias, product, heard, stepped, monkeypatch):
    monkeypatch.setattr(gemm, "why_not_product", lambda *args: None if product else "no")
    linear = nn.Linear(K, N, bias=bias)

    def step() -> list[tuple[Any, ...]]:
        x, grad = torch.randn(M, K, requires_grad=True), torch.randn(M, N)
        leaves = [t for t in (x, linear.weight, linear.bias) if t is not None]
        heard.of(x=x, grad=grad, weight=linear.weight, bias=linear.bias)
        out = las_file.linear_activation_scale(x, linear.weight, linear.bias, act, 0.0, 0.0, 0.7, 0.5)
        found = torch.autograd.grad(out, leaves, grad)
        assert all(g.shape == t.shape for g, t in zip(found, leaves, strict=True))
        return heard.calls

    ordinary = step()
    assert not stepped
    kept = step()
    assert stepped == [_activation_step.Step]
    assert kept == ordinary and [name for name, *_ in kept][-1] == "backward"


def test_what_steps_rest_on(heard, stepped, monkeypatch):
    """Where a vector is no contiguous [N] of its own, or the gradient lies otherwise, a step goes the ordinary way."""
    monkeypatch.setattr(gemm, "why_not_product", lambda *args: None)
    weight, norm = torch.randn(N, K), (torch.ones(N), torch.zeros(N), torch.zeros(N), torch.ones(N))

    def call(scale: Tensor) -> Tensor:
        x = torch.randn(M, K, requires_grad=True)
        return bn_file.linear_scale_batchnorm1d(x, weight, None, scale, None, 1.0, *norm, training=True)

    for scale in (torch.tensor(2.0), torch.randn(2 * N)[::2], torch.randn(1, N)):
        for _ in range(3):
            call(scale)
    assert not stepped
    for grad in (torch.randn(N, M).t(), torch.ones(()).expand(M, N)):
        outs = [call(torch.rand(N)) for _ in range(2)]
        heard.of(grad=grad)
        outs[-1].backward(grad)
        assert [name for name, *_ in heard.calls] == ["backward"] and "grad" not in heard.calls[0], "a copy of it"
    assert stepped


def test_gradients_of_an_activation_that_lie_otherwise(heard, stepped, monkeypatch):
    monkeypatch.setattr(gemm, "why_not_product", lambda *args: None)
    weight, bias = torch.randn(N, K), torch.randn(N, requires_grad=True)

    def call() -> Tensor:
        x = torch.randn(M, K, requires_grad=True)
        return las_file.linear_activation_scale(x, weight, bias, "relu", 0.0, 0.0, 0.7, 0.5)

    for grad in (torch.randn(N, M).t(), torch.ones(()).expand(M, N), torch.randn(M * N + 1)[1:].view(M, N)):
        outs = [call() for _ in range(2)]
        heard.of(grad=grad)
        outs[-1].backward(grad)
        assert [name for name, *_ in heard.calls] == ["backward"] and "grad" not in heard.calls[0], "a copy of it"
    assert stepped


@pytest.mark.parametrize(
    ("name", "packed"),
    [("StepKind", batchnorm_step._KIND), ("StepForward", batchnorm_step._FORWARD),
     ("StepBackward", batchnorm_step._BACKWARD)],
)  # fmt: skip
def test_structures_are_those_of_the_source(name, packed):
    source = Path(bn_kernels.__file__).with_suffix(".cu").read_text()
    body = re.sub(r"//.*", "", re.search(rf"struct {name} {{(.*?)}};", source, re.DOTALL)[1])
    letter = {"int64_t": "q", "int": "i", "double": "d"}
    fields = ""
    for kind, names in re.findall(r"(?:const )?(\w+)[ *]+([^;]+);", body):
        fields += ("P" if kind == "void" else letter[kind]) * len(names.split(","))
    assert "".join(n * int(k or 1) for k, n in re.findall(r"(\d*)(\w)", packed.format)) == fields
