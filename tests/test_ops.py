"""The ops: values, derivatives, dispatcher, autocast, layouts and errors, each against the unfused code."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from _op_samples import Sample, plain_activation, plain_kl_div, samples
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fxfuse import ops
from fxfuse.ops import linear_scale_batchnorm1d as bn_file
from fxfuse.ops._op import Op
from fxfuse.ops._road import Road

SMALL = list(samples())
DRAWS = 24
DRAWN = [list(samples(size=11, seed=seed)) for seed in range(DRAWS)]
EVERY = pytest.mark.parametrize("sample", SMALL, ids=str)
NAMES = pytest.mark.parametrize("name", ops.names())


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call that may takes the closed form: no shortcut for small tensors, none for training on the CPU."""
    for name in ops.names():
        monkeypatch.setattr(ops.get(name), "direct", None)
    batchnorm, own = bn_file.OP, bn_file.OP._road

    def road(*args: Any) -> Road:
        found = own(*args)
        return bn_file.CLOSED if found.why.startswith("no kernel") else found

    monkeypatch.setattr(batchnorm, "_road", road)


def copies(args: tuple[Any, ...], grads: tuple[int, ...] = ()) -> tuple[Any, ...]:
    return tuple(a.clone().requires_grad_(i in grads) if isinstance(a, Tensor) else a for i, a in enumerate(args))


def error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm())


def first_of(op: str, label: str = "") -> Sample:
    return next(s for s in SMALL if s.op == op and s.label.startswith(label))


# Meaning


@EVERY
def test_values_and_buffers(sample: Sample, closed: None) -> None:
    mine, theirs = copies(sample.args), copies(sample.args)
    out, expected = sample.fused(*mine), sample.plain(*theirs)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    assert out.stride() == expected.stride()
    for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if isinstance(a, Tensor):  # the running statistics follow eager's; nothing else moves
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=f"argument {i} changed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("place", range(len(SMALL)), ids=lambda place: str(SMALL[place]))
def test_error_is_no_larger_than_eagers(place: int, dtype: torch.dtype, closed: None) -> None:
    """The result's and each gradient's error against float64, norm-wise over several draws: 1.25 times eager's at most.

    Over several draws, because one number is often exact by luck. An error within half an ulp is no error.
    """
    mine_sq: dict[str, float] = {}
    eager_sq: dict[str, float] = {}
    exact_sq: dict[str, float] = {}
    for seed in range(DRAWS):
        sample = DRAWN[seed][place]
        low = sample.to(dtype)
        exact = tuple(a.double() if isinstance(a, Tensor) else a for a in low)
        runs = []
        for function, base in ((sample.fused, low), (sample.plain, low), (sample.plain, exact)):
            args = copies(base, sample.differentiable)
            out = function(*args)
            up = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
            out.backward(up.to(out.dtype))
            grads = {f"gradient {i}": args[i].grad for i in sample.differentiable}
            runs.append({"result": out.detach(), **grads})
        for what, got in runs[0].items():
            eager, truth = runs[1][what], runs[2][what]
            assert (got.dtype, got.stride()) == (eager.dtype, eager.stride()), what
            mine_sq[what] = mine_sq.get(what, 0.0) + error(got, truth) ** 2
            eager_sq[what] = eager_sq.get(what, 0.0) + error(eager, truth) ** 2
            floor = 0.5 * torch.finfo(got.dtype).eps * float(truth.norm())
            exact_sq[what] = exact_sq.get(what, 0.0) + floor**2
    for what, square in mine_sq.items():
        assert square <= max(1.25**2 * eager_sq[what], 0.3 * exact_sq[what]), (
            f"{what}: error {square**0.5:.3e}, eager's {eager_sq[what] ** 0.5:.3e}"
        )


@pytest.mark.parametrize("kind", ["positive", "signs", "cancelling"])
def test_collapsed_float32_error(kind: str) -> None:
    gen = torch.Generator().manual_seed(5)
    x, w = torch.randn(64, 2048, generator=gen), torch.randn(512, 2048, generator=gen)
    if kind == "positive":
        x, w = x.abs(), w.abs()
    if kind == "cancelling":
        w -= w.mean(0)
    exact = (x.double() @ w.double().t()).sum(-1)
    eager = (x @ w.t()).sum(-1)
    mine = ops.get("matmul_div_sum_scale").call(x, w)
    assert error(mine, exact) <= 1.25 * error(eager, exact)


def test_batchnorm_of_columns_far_from_zero(closed: None) -> None:
    gen = torch.Generator().manual_seed(7)
    x, w = torch.randn(256, 8, generator=gen), torch.randn(16, 8, generator=gen)
    bias = torch.full((16,), 1e4)
    w[3] = 0  # a constant column
    args = (x, w, bias, torch.rand(16, generator=gen) + 0.5, None, 1.0, None, None)
    args += (torch.zeros(16), torch.ones(16), True, 0.1, 1e-5)
    exact = tuple(a.double() if isinstance(a, Tensor) else a for a in args)
    plain = first_of("linear_scale_batchnorm1d").plain
    truth, eager = plain(*copies(exact)), plain(*copies(args))
    assert error(bn_file.linear_scale_batchnorm1d(*copies(args)), truth) <= 1.25 * error(eager, truth)


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("log_input", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_kl_div_is_finite_where_eager_is(log_target: bool, log_input: bool, reduction: str, closed: None) -> None:
    special = torch.tensor([0.0, -0.5, 0.3, 1.0, float("inf"), -float("inf"), float("nan"), 1e-42, -0.0])
    p, t = (v.reshape(-1).contiguous() for v in torch.meshgrid(special, special, indexing="ij"))
    for p_one, t_one in zip(p.split(1), t.split(1), strict=True) if reduction == "sum" else [(p, t)]:
        mine, theirs = copies((p_one, t_one), (0, 1)), copies((p_one, t_one), (0, 1))
        a = ops.get("kl_div").call(*mine, reduction, log_target, log_input)
        b = plain_kl_div(*theirs, reduction, log_target, log_input)
        torch.testing.assert_close(a, b, equal_nan=True)
        a.sum().backward()
        b.sum().backward()
        for i in (0, 1):
            torch.testing.assert_close(mine[i].grad, theirs[i].grad, equal_nan=True)


@pytest.mark.parametrize("log_target", [False, True])
def test_distillation_with_masked_logits(log_target: bool, closed: None) -> None:
    s, t = torch.randn(4, 6), torch.randn(4, 6)
    s[0, 1] = t[0, 1] = t[1, 2] = s[2, 3] = -float("inf")
    t[3] *= 400  # probabilities that underflow
    sample = first_of("distillation_kl", "none")
    rest = (-1, 2.0, 1.0, 1.0, "none", log_target)
    mine, theirs = copies((s, t), (0, 1)), copies((s, t), (0, 1))
    a, b = sample.fused(*mine, *rest), sample.plain(*theirs, *rest)
    torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-5)
    a.sum().backward()
    b.sum().backward()
    for i in (0, 1):
        torch.testing.assert_close(mine[i].grad, theirs[i].grad, equal_nan=True, rtol=1e-4, atol=1e-5)


# Derivatives


@EVERY
def test_first_and_second_derivatives(sample: Sample, closed: None) -> None:
    args = list(copies(sample.args, sample.differentiable))
    places = sample.differentiable

    def function(*inputs: Tensor) -> Tensor:
        full = list(args)
        for place, value in zip(places, inputs, strict=True):
            full[place] = value
        if sample.op == "linear_scale_batchnorm1d":  # running statistics of its own for every call
            full[8], full[9] = full[8].clone(), full[9].clone()
        return sample.fused(*full)

    inputs = tuple(args[i] for i in places)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, atol=1e-4)


@EVERY
def test_any_subset_of_gradients(sample: Sample, closed: None) -> None:
    for count in range(1, len(sample.differentiable) + 1):
        for wanted in itertools.combinations(sample.differentiable, count):
            mine, theirs = copies(sample.args, wanted), copies(sample.args, wanted)
            sample.fused(*mine).sum().backward()  # a stride-0 upstream gradient
            sample.plain(*theirs).sum().backward()
            for i in wanted:
                torch.testing.assert_close(mine[i].grad, theirs[i].grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("sample", [first_of(name) for name in ops.names()], ids=str)
def test_an_argument_computed_from_another(sample: Sample, closed: None) -> None:
    """d/da of op(a, f(a)), twice: the path through f is counted once."""
    place = sample.differentiable[1]
    base = sample.args[0]
    shape = sample.args[place].shape

    def run(function: Any, a: Tensor) -> Tensor:
        args = list(copies(sample.args))
        args[0] = a
        args[place] = a.sin().mean() * torch.ones(shape, dtype=a.dtype) + args[place] + 2.0
        (g,) = torch.autograd.grad(function(*args).sum(), a, create_graph=True)
        (gg,) = torch.autograd.grad((g * g).sum(), a)
        return torch.stack([g.detach(), gg])

    a = base.clone().requires_grad_()
    torch.testing.assert_close(run(sample.fused, a), run(sample.plain, a), rtol=1e-7, atol=1e-8)


def test_batchnorm_buffers_may_change_before_backward(closed: None) -> None:
    """Evaluate, train, then go back through both: the first uses the statistics it was evaluated with."""
    sample = first_of("linear_scale_batchnorm1d", "full-eval")
    args = list(copies(sample.args, sample.differentiable))
    out = sample.fused(*args)
    expected = torch.autograd.grad(sample.fused(*args).sum(), args[0])[0]
    train = list(args)
    train[10] = True
    second = sample.fused(*train)
    (got,) = torch.autograd.grad(out.sum(), args[0], create_graph=True)
    torch.testing.assert_close(got, expected)
    second.sum().backward()


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_functorch_transforms(transform: str) -> None:
    kl = ops.get("kl_div").call
    x, t = torch.randn(4, 5).log_softmax(-1), torch.randn(4, 5).softmax(-1)

    def run(f: Any) -> Tensor:
        if transform == "grad":
            return torch.func.grad(lambda x: f(x, t, "sum", False, False))(x)
        if transform == "vmap":
            return torch.func.vmap(lambda x, t: f(x, t, "sum", False, False))(x, t)
        return torch.func.jvp(lambda x: f(x, t, "sum", False, False), (x,), (t,))[1]

    torch.testing.assert_close(run(kl), run(plain_kl_div))
    torch.testing.assert_close(run(torch.ops.fxfuse.kl_div), run(plain_kl_div))


# The dispatcher


@pytest.mark.parametrize("road", ["own", "closed"])
@EVERY
def test_opcheck(sample: Sample, road: str, request: pytest.FixtureRequest) -> None:
    if road == "closed":
        request.getfixturevalue("closed")
    overload = ops.get(sample.op).overload
    torch.library.opcheck(overload, copies(sample.args))
    torch.library.opcheck(overload, copies(sample.args, sample.differentiable))


@EVERY
def test_meta_tensors(sample: Sample) -> None:
    meta = tuple(a.to("meta") if isinstance(a, Tensor) else a for a in sample.args)
    out, expected = sample.fused(*meta), sample.plain(*copies(sample.args))
    assert (out.shape, out.dtype, out.stride()) == (expected.shape, expected.dtype, expected.stride())


@pytest.mark.parametrize("sample", [first_of(name) for name in ops.names()], ids=str)
def test_make_fx_sees_one_op(sample: Sample) -> None:
    places = [i for i, a in enumerate(sample.args) if isinstance(a, Tensor)]

    def function(*tensors: Tensor) -> Tensor:
        full = list(sample.args)
        for place, value in zip(places, tensors, strict=True):
            full[place] = value
        if sample.op == "linear_scale_batchnorm1d":
            full[10] = False  # training gives way to ATen on the CPU
        return sample.fused(*full)

    tensors = [sample.args[i] for i in places]
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(function, tracing_mode=mode)(*tensors).graph
        targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
        assert f"fxfuse.{sample.op}.default" in targets


@pytest.mark.parametrize("name", ops.names())
def test_symbolic_trace_names_the_public_callable(name: str) -> None:
    sample = first_of(name)

    def function(x: Tensor, y: Tensor) -> Tensor:
        return ops.get(name).call(x, y, *sample.args[2:])

    traced = torch.fx.symbolic_trace(function)
    assert next(n.target for n in traced.graph.nodes if n.op == "call_function") is ops.get(name).call
    assert f"fxfuse_ops_{name}_{name}(" in traced.code or f"{name}.{name}(" in traced.code
    expected = sample.plain(*copies(sample.args))
    torch.testing.assert_close(traced(*copies(sample.args)[:2]), expected)


COMPILED = [
    first_of("kl_div", "batchmean"),
    first_of("distillation_kl", "batchmean"),
    first_of("matmul_div_sum_scale", "bias"),
    first_of("linear_activation_scale", "gelu"),
    first_of("linear_scale_batchnorm1d", "full-train"),
    first_of("linear_scale_batchnorm1d", "full-eval"),
]


def compiled_matches(sample: Sample, backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    seen: list[str] = []

    def spy(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.extend(str(n.target) for n in gm.graph.nodes)
        return torch._dynamo.lookup_backend(backend)(gm, inputs)

    call = ops.get(sample.op).call
    compiled = torch.compile(lambda *args: call(*args), backend=spy, fullgraph=True, dynamic=dynamic)
    for factor in (1.0, 1.5):
        scaled = tuple(a * factor if isinstance(a, float) else a for a in sample.args)
        mine, theirs = copies(scaled, sample.differentiable), copies(scaled, sample.differentiable)
        a, b = compiled(*mine), sample.plain(*theirs)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        a.sum().backward()
        b.sum().backward()
        for i in sample.differentiable:
            torch.testing.assert_close(mine[i].grad, theirs[i].grad, rtol=1e-8, atol=1e-10)
        for i in (8, 9) if sample.op == "linear_scale_batchnorm1d" else ():
            torch.testing.assert_close(mine[i], theirs[i])
    assert f"fxfuse.{sample.op}.default" in seen


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("sample", COMPILED, ids=str)
def test_compile_aot_eager(sample: Sample, dynamic: bool, closed: None) -> None:
    compiled_matches(sample, "aot_eager", dynamic)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("sample", COMPILED, ids=str)
def test_compile_inductor(sample: Sample, dynamic: bool, closed: None) -> None:
    compiled_matches(sample, "inductor", dynamic)


# Dtypes, autocast, layouts, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@EVERY
def test_cpu_autocast(sample: Sample, dtype: torch.dtype, closed: None) -> None:
    mine, theirs = (copies(sample.to(dtype), sample.differentiable) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        a, b = sample.fused(*mine), sample.plain(*theirs)
    assert (a.dtype, a.stride()) == (b.dtype, b.stride())
    torch.testing.assert_close(a, b, rtol=0.03, atol=0.06)
    a.sum().backward()
    b.sum().backward()
    for i in sample.differentiable:
        assert mine[i].grad.dtype == theirs[i].grad.dtype
    with torch.autocast("cpu", torch.bfloat16):
        call = ops.get(sample.op).call
        traced = torch.compile(lambda *args: call(*args), backend="eager")(*copies(sample.to(dtype)))
    assert (traced.dtype, traced.stride()) == (b.dtype, b.stride())


def test_cuda_autocast_rules() -> None:
    """The casts CUDA's lists ask for, read off the rules themselves: no GPU is needed for that."""
    half, single = torch.bfloat16, torch.float32
    x = torch.randn(2, 2)
    for name, rest in (("kl_div", ("sum", False, False)), ("distillation_kl", (-1, 1.0, 1.0, 1.0, "sum", False))):
        first, second, *others = ops.get(name).autocast("cuda", half, x.half(), x, *rest)
        assert first.dtype is second.dtype is single and tuple(others) == rest
    rule = ops.get("matmul_div_sum_scale").autocast
    assert rule("cuda", half, x, x, None, 1.0, -1, False, False, None)[-1] is single  # sum is a float32 op
    assert rule("cuda", half, x, x, None, 1.0, -1, False, True, None)[-1] is None  # mean is not
    assert rule("cuda", half, x, x, None, 1.0, -1, False, False, half)[-1] is half
    assert rule("cuda", half, x.double(), x.double(), None, 1.0, -1, False, False, None)[-1] is None
    assert rule("cuda", half, x, x, None, 1.0, -1, False, False, None)[0].dtype is half


MIXED = [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float64, torch.float32)]


@pytest.mark.parametrize("pair", MIXED, ids=str)
@pytest.mark.parametrize("name", ["kl_div", "distillation_kl"])
def test_mixed_dtypes(name: str, pair: tuple[torch.dtype, torch.dtype], closed: None) -> None:
    for sample in (s for s in SMALL if s.op == name):
        args = (sample.args[0].to(pair[0]), sample.args[1].to(pair[1]), *sample.args[2:])
        mine, theirs = copies(args, (0, 1)), copies(args, (0, 1))
        a, b = sample.fused(*mine), sample.plain(*theirs)
        assert (a.dtype, a.stride()) == (b.dtype, b.stride())
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
        a.sum().backward()
        b.sum().backward()
        for i in (0, 1):
            assert mine[i].grad.dtype == theirs[i].grad.dtype
            torch.testing.assert_close(mine[i].grad, theirs[i].grad, rtol=0.06, atol=0.06)


def test_batchnorm_half_product_with_float32_scale(closed: None) -> None:
    sample = first_of("linear_scale_batchnorm1d", "full")
    low = [torch.bfloat16] * 3 + [torch.float32] * 10
    args = tuple(a.to(d) if isinstance(a, Tensor) else a for a, d in zip(sample.args, low, strict=True))
    for training in (True, False):
        full = (*args[:10], training, *args[11:])
        mine, theirs = copies(full, sample.differentiable), copies(full, sample.differentiable)
        a, b = sample.fused(*mine), sample.plain(*theirs)
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
        a.sum().backward()


@EVERY
def test_layouts(sample: Sample, closed: None) -> None:
    """Transposed storage, expanded rows, sliced storage: values and strides as eager's."""

    def layouts(tensor: Tensor) -> list[Tensor]:
        sliced = torch.stack([tensor, tensor], -1)[..., 0]
        if tensor.dim() < 2:
            return [sliced]
        return [sliced, tensor.mT.contiguous().mT, tensor[:1].expand_as(tensor)]

    for place in sample.differentiable:
        for other in layouts(sample.args[place]):
            args = tuple(other if i == place else a for i, a in enumerate(sample.args))
            fresh = tuple(a.clone() if i in (8, 9) and isinstance(a, Tensor) else a for i, a in enumerate(args))
            theirs = tuple(a.clone() if i in (8, 9) and isinstance(a, Tensor) else a for i, a in enumerate(args))
            a, b = sample.fused(*fresh), sample.plain(*theirs)
            assert a.stride() == b.stride()
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def outcome(function: Any) -> Any:
    """The result, or the type and first line of what was raised."""
    try:
        return function()
    except Exception as problem:
        return type(problem), str(problem).splitlines()[0]


def raises_the_same(fused: Any, plain: Any) -> None:
    expected = outcome(plain)
    if isinstance(expected, Tensor):
        torch.testing.assert_close(fused(), expected, equal_nan=True)
    else:
        assert outcome(fused) == expected


@NAMES
def test_empty_and_ill_fitting_arguments_as_eager(name: str, closed: None) -> None:
    sample = first_of(name)
    x, y, rest = sample.args[0], sample.args[1], sample.args[2:]
    variants = [
        (x[:0], y if name.startswith(("mat", "lin")) else y[:0], *rest),
        (x[:1], y if name.startswith(("mat", "lin")) else y[:1], *rest),
        (x[..., :0], y[..., :0], *rest),
        (x[..., :-1], y, *rest),
        (x.long(), y.long(), *rest),
        (x, y[0], *rest),
        (x[0, ..., 0], y, *rest),
    ]
    for args in variants:
        raises_the_same(lambda a=args: sample.fused(*copies(a)), lambda a=args: sample.plain(*copies(a)))


def test_zero_output_features_and_bad_words() -> None:
    x, w = torch.full((3, 4), float("inf")), torch.empty(0, 4)
    for mean in (False, True):
        out = ops.get("matmul_div_sum_scale").call(x, w, mean=mean)
        torch.testing.assert_close(out, (x @ w.t()).mean(-1) if mean else (x @ w.t()).sum(-1), equal_nan=True)
    with pytest.raises(ValueError, match="is not a valid value for reduction"):
        ops.get("kl_div").call(x, x, reduction="average")
    with pytest.raises(ValueError, match="unknown activation 'mish'"):
        ops.get("linear_activation_scale").call(x, x, activation="mish")
    with pytest.raises(KeyError, match="kl_div"):
        ops.get("no_such_op")
    with pytest.raises(TypeError):
        ops.get("kl_div").call(x, x, mode="sum")


@pytest.mark.parametrize("training", [True, False])
def test_one_row_in_batchnorm(training: bool) -> None:
    sample = first_of("linear_scale_batchnorm1d")
    args = (sample.args[0][:1], *sample.args[1:10], training, *sample.args[11:])
    raises_the_same(lambda: sample.fused(*copies(args)), lambda: sample.plain(*copies(args)))


def test_clamp_and_hardtanh_differ_at_their_bounds(closed: None) -> None:
    one = torch.eye(5)
    z = torch.tensor([[-1.0, 1.0, 0.0, float("nan"), 2.0]])
    for activation in ("clamp", "hardtanh"):
        args = (z, one, None, activation, -1.0, 1.0, 1.0, 1.0)
        grads = []
        for function in (ops.get("linear_activation_scale").call, plain_activation):
            bias = z.clone().squeeze(0).requires_grad_()
            full = (torch.zeros(1, 5), one, bias, *args[3:])
            function(*full).sum().backward()
            grads.append(bias.grad)
        torch.testing.assert_close(grads[0], grads[1])


# BatchNorm read at run time


@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
def test_batchnorm_module_over_a_sequence(momentum: float | None, affine: bool, tracked: bool, closed: None) -> None:
    torch.manual_seed(11)
    linear = nn.Linear(5, 4).double()
    scale = torch.rand(4, dtype=torch.float64) + 0.5
    options = {"momentum": momentum, "affine": affine, "track_running_stats": tracked, "dtype": torch.float64}
    mine, theirs = nn.BatchNorm1d(4, **options), nn.BatchNorm1d(4, **options)
    for step in range(6):
        mine.train(step % 3 != 2)
        theirs.train(step % 3 != 2)
        x = torch.randn(7, 5, dtype=torch.float64)
        a = bn_file.linear_scale_batchnorm1d_module(mine, x, linear.weight, linear.bias, scale)
        b = theirs(linear(x) * scale)
        torch.testing.assert_close(a, b)
        for (key, left), (_, right) in zip(mine.state_dict().items(), theirs.state_dict().items(), strict=True):
            torch.testing.assert_close(left, right, msg=key)
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        bn_file.linear_scale_batchnorm1d_module(mine, x[0], linear.weight)


# Machinery


def test_an_op_of_ones_own_in_a_few_lines() -> None:
    def reference(x: Tensor, y: Tensor, a: float) -> Tensor:
        return a * x.sin() + y

    op = Op("fxfuse_test::axpy", "(Tensor x, Tensor y, float a=2.0) -> Tensor", reference)
    x, y = torch.randn(3, dtype=torch.float64, requires_grad=True), torch.randn(3, dtype=torch.float64)
    torch.testing.assert_close(op.call(x, y=y), 2 * x.sin() + y)
    compiled = torch.compile(op.call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, y, a=3.0), 3 * x.sin() + y)
    assert torch.autograd.gradgradcheck(op.call, (x, y))
    torch.library.opcheck(op.overload, (x, y, 2.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert op.call(x, y).dtype == torch.float64
    assert op.road(x, y) == ("composed", "this op is its reference")


def test_an_op_with_a_forward_but_no_backward() -> None:
    def reference(x: Tensor, y: Tensor) -> Tensor:
        return x * y.exp()

    def forward(road: Road, x: Tensor, y: Tensor, *, wanted: Any = ()) -> Any:
        return torch.exp(y).mul_(x), ()

    op = Op("fxfuse_test::forward_only", "(Tensor x, Tensor y) -> Tensor", reference, forward=forward)
    args = tuple(torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(op.call, args) and torch.autograd.gradgradcheck(op.call, args)
    torch.library.opcheck(op.overload, args)


@NAMES
def test_roads_say_why(name: str) -> None:
    sample = first_of(name)
    road = ops.get(name).road(*sample.args)
    assert road.name in ("kernel", "closed", "composed") and road.why


def test_blocks_need_no_memory_of_the_inputs_size() -> None:
    """No allocation inside a reduced forward or a backward comes near the inputs' size, but the gradient itself."""
    x, t = torch.randn(2048, 4096), torch.randn(2048, 4096)
    size = x.numel() * x.element_size()
    for name in ("kl_div", "distillation_kl"):
        args = (x, t) if name == "distillation_kl" else (x.log_softmax(-1), t.softmax(-1))
        leaf = args[0].clone().requires_grad_()
        with torch.profiler.profile(profile_memory=True) as prof:
            loss = ops.get(name).call(leaf, args[1], reduction="batchmean")
        assert max(e.self_cpu_memory_usage for e in prof.events()) < size / 4
        with torch.profiler.profile(profile_memory=True) as prof:
            torch.autograd.grad(loss, leaf)
        # One allocation, the gradient, and nothing beside it.
        assert sum(e.self_cpu_memory_usage > size / 4 for e in prof.events()) == 1


def test_import_is_lazy() -> None:
    code = """
import sys, torch, time
start = time.perf_counter()
import fxfuse.ops
spent = time.perf_counter() - start
assert fxfuse.ops.names() and "fxfuse.ops.kl_div" not in sys.modules
fxfuse.ops.get("kl_div")
assert "fxfuse.kernels.loader" not in sys.modules or not sys.modules["fxfuse.kernels.loader"].__dict__.get("_library")
print(spent)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
