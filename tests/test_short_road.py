"""The short road's memory: what a kept call rests on, with a stand-in for the kernel."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fxfuse.kernels import gemm, small_rule
from fxfuse.ops import _short
from fxfuse.ops._short import Calls


def launch(x: Tensor) -> Tensor:
    return x


class Layer:
    """A call's tensors, as an op has them."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.x = torch.randn(4, 8, dtype=dtype)
        self.weight = nn.Parameter(torch.randn(8, 8, dtype=dtype))
        self.bias: Tensor | None = nn.Parameter(torch.randn(8, dtype=dtype))
        self.numbers: tuple[object, ...] = ("relu", 0.5)
        self.calls = Calls()

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.x, self.weight, self.bias

    def keep(self) -> Layer:
        self.calls.keep("key", self.tensors(), self.numbers, lambda: launch)
        return self

    def found(self) -> bool:
        return self.calls.find("key", self.tensors(), self.numbers) is launch


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def test_the_same_call_is_found_and_another_key_is_not():
    layer = Layer().keep()
    assert layer.found() and layer.found()
    assert layer.calls.find("another", layer.tensors(), layer.numbers) is None
    layer.x = torch.randn(4, 8, dtype=torch.bfloat16)  # x's address is handed over at every call
    assert layer.found()
    layer.weight.add_(1)  # its values are read by the kernel
    assert layer.found()


def changes():
    def swapped(layer):
        layer.weight.data = torch.randn_like(layer.weight)

    def transposed(layer):
        layer.weight.data = layer.weight.data.t()

    def another_dtype_in_the_same_memory(layer):
        layer.weight.data = layer.weight.data.view(torch.float16)

    def no_bias(layer):
        layer.bias = None

    def converted(layer):
        layer.weight.data = layer.weight.data.double()

    def moved(layer):
        layer.weight = nn.Parameter(layer.weight.to("meta"))

    def numbers(layer):
        layer.numbers = ("relu", 0.25)

    def word(layer):
        layer.numbers = ("gelu", 0.5)

    def resized(layer):
        layer.x = torch.randn(5, 8, dtype=torch.bfloat16)

    def strided(layer):
        layer.x = torch.randn(8, 4, dtype=torch.bfloat16).t()

    def misaligned(layer):
        layer.x = torch.randn(33, dtype=torch.bfloat16)[1:].view(4, 8)

    def negated(layer):
        layer.x = torch._neg_view(layer.x)

    def a_parameter(layer):
        layer.x = nn.Parameter(layer.x)

    def a_subclass(layer):
        class Sub(Tensor):
            pass

        layer.x = layer.x.as_subclass(Sub)

    def sparse(layer):
        layer.x = layer.x.to_sparse()

    return [f for f in locals().values() if callable(f)]


@pytest.mark.parametrize("change", changes(), ids=lambda f: f.__name__)
def test_a_change_is_seen(change):
    layer = Layer().keep()
    assert layer.found()
    change(layer)
    assert not layer.found()


def test_a_bias_that_comes_is_seen():
    layer = Layer()
    bias, layer.bias = layer.bias, None
    layer.keep()
    assert layer.found()
    layer.bias = bias
    assert not layer.found()


class Silent(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Listening(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def fake_mode():
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


@pytest.mark.parametrize(
    "context",
    [
        torch.enable_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        Silent,
        Listening,
        fake_mode,
        forward_ad.dual_level,
    ],
    ids=["grad", "inference", "autocast", "dispatch mode", "function mode", "fake", "forward AD"],
)
def test_a_context_is_seen_and_forgotten_behind_it(context):
    layer = Layer().keep()
    with context():
        assert not layer.found()
    assert layer.found()


def test_transforms_and_traces_are_seen():
    layer, seen = Layer().keep(), []

    def inside(x):
        seen.append(layer.found())
        return x * 1

    torch.func.vmap(inside)(layer.x)
    torch.func.functionalize(inside)(layer.x)
    torch.func.jvp(inside, (layer.x,), (layer.x,))
    torch.jit.trace(inside, (layer.x,), check_trace=False)
    assert seen and not any(seen)
    assert layer.found()


def test_gradients_that_nobody_wants_do_not_matter():
    layer = Layer()
    with torch.enable_grad():
        layer.weight.requires_grad_(False)
        layer.bias.requires_grad_(False)
        layer.keep()
        assert layer.found()
        layer.weight.requires_grad_(True)
        assert not layer.found()


def test_inference_mode_has_launches_of_its_own():
    layer = Layer()
    with torch.inference_mode():
        layer.keep()
        assert layer.found()
    assert not layer.found()


@pytest.fixture
def matmul():
    """torch's precision settings, put back afterwards."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision, torch.backends.fp32_precision
    yield settings
    settings.fp32_precision, torch.backends.fp32_precision = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_settings_matter_to_float32_alone(dtype, matmul, monkeypatch):
    layer = Layer(dtype).keep()
    matmul.fp32_precision = "tf32"
    assert layer.found() is (dtype is torch.bfloat16)
    matmul.fp32_precision = "ieee"
    layer.keep()
    assert layer.found()
    monkeypatch.setenv("FXFUSE_FLOAT32", "library")
    assert layer.found() is (dtype is torch.bfloat16)


def test_the_settings_read_fast_are_the_settings(matmul, monkeypatch):
    for everywhere in ("none", "ieee", "tf32"):
        for here in ("none", "ieee", "tf32"):
            torch.backends.fp32_precision, matmul.fp32_precision = everywhere, here
            wanted = everywhere if matmul.fp32_precision == "none" else matmul.fp32_precision
            assert gemm.tf32_allowed() is (wanted == "tf32")
    assert not gemm.float32_off()
    monkeypatch.setenv("FXFUSE_FLOAT32", "library")
    assert gemm.float32_off()
    monkeypatch.delenv("FXFUSE_FLOAT32")
    assert not gemm.float32_off()


def test_nothing_freed_stays_alive():
    layer = Layer().keep()
    refs = [weakref.ref(t) for t in layer.tensors()]
    calls = layer.calls
    del layer
    gc.collect()
    assert len(calls) == 1 and all(ref() is None for ref in refs)


def test_no_more_than_so_many_are_kept(monkeypatch):
    monkeypatch.setattr(_short, "MOST", 5)
    layer = Layer()
    for number in range(23):
        layer.calls.keep(number, layer.tensors(), layer.numbers, lambda: launch)
        assert len(layer.calls) <= 5
    layer.calls.forget()
    assert len(layer.calls) == 0


def test_what_is_never_the_same_is_left_alone():
    layer, made = Layer(), []
    for number in range(200):
        layer.numbers = ("relu", number)
        layer.calls.keep("key", layer.tensors(), layer.numbers, lambda: made.append(1) or launch)
    assert len(made) == _short.MOST_TIMES


def test_a_call_that_has_no_launch_is_not_kept():
    layer = Layer()
    layer.calls.keep("key", layer.tensors(), layer.numbers, lambda: None)
    assert len(layer.calls) == 0 and not layer.found()


def test_without_torchs_guards_nothing_is_kept(monkeypatch):
    monkeypatch.setattr(_short, "Guards", None)
    layer = Layer().keep()
    assert len(layer.calls) == 0 and not layer.found()


def test_a_launch_that_is_not_for_graphs_is_not_found_while_one_is_captured(monkeypatch):
    class Hasty:
        in_graphs = False

        def __call__(self, x, *others):
            return x

    layer, capturing = Layer(), []
    layer.calls.keep("key", layer.tensors(), layer.numbers, Hasty)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    assert layer.calls.find("key", layer.tensors(), layer.numbers) is not None
    capturing.append(1)
    assert layer.calls.find("key", layer.tensors(), layer.numbers) is None


OPS = ["activation", "evaluation", "training"]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("size", "exact"), [(2, False), (4, False), (4, True)])
def test_the_rule_for_small_products(op, size, exact):
    def pays(m, n, k, captured):
        return small_rule.pays(m, n, k, size, exact, op, 132, captured)

    for m, n, k in ((1, 64, 64), (16, 256, 256), (32, 512, 512)):
        assert pays(m, n, k, captured=False), (m, n, k)
    for m, n, k in ((257, 64, 64), (256, 8192, 8192), (256, 4096, 4096)):
        assert not pays(m, n, k, captured=False), (m, n, k)
    for m in (1, 2, 16, 17, 64, 65, 128, 200, 256):
        for n in (1, 64, 500, 2048):
            for k in (1, 64, 500, 2048):
                assert pays(m, n, k, captured=False) or not pays(m, n, k, captured=True)


def test_evaluation_stays_one_launch_where_several_would_cost_the_host_more():
    size = 256, 64, 2048, 4, True
    assert small_rule.pays(*size, "evaluation", 132, captured=False)
    assert not small_rule.pays(*size, "evaluation", 132, captured=True), "two launches of the library's are quicker"


@pytest.mark.parametrize("op", OPS)
def test_small_products_give_way_to_narrow_tiles_where_these_are_quicker(op):
    def pays(m, n, k, narrow, captured):
        return small_rule.pays(m, n, k, 2, False, op, 132, captured, narrow)

    assert pays(64, 512, 512, math.inf, True) and not pays(64, 512, 512, 1.0, True)
    assert pays(64, 512, 512, 1.0, False) is (op == "training")  # whose launch there costs the host more
    assert not pays(256, 2048, 2048, 7.4, False)


def test_what_a_product_takes_grows_with_it():
    for all_rows in (False, True):
        for size, exact in ((2, False), (4, False), (4, True)):
            rows = (1, 8, 32, 64, 128, 256)
            times = [small_rule._small_us(m, m * 8, m * 8, size, exact, all_rows, 132) for m in rows]
            assert times == sorted(times)
