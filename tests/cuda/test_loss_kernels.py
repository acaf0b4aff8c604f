"""kl_div and distillation_kl on a GPU, through the ops: numbers against float64, edges, streams, graphs, autograd."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from draws import times
from losses import DTYPES, INF, NAN, SHAPES, check, eager_distillation, eager_kl, road, with_grads
from torch import Tensor

from fxfuse.ops.distillation_kl import OP as DISTILLATION
from fxfuse.ops.distillation_kl import distillation_kl
from fxfuse.ops.kl_div import OP as KL
from fxfuse.ops.kl_div import kl_div

__all__ = ["road"]  # every test's

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

REDUCTIONS = ("none", "sum", "mean", "batchmean")


def distributions(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    p, q = torch.randn(2, *shape, device="cuda").softmax(-1).clamp_min(1e-4).to(dtype)
    return p, q


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("log_input", [False, True])
def test_kl_div(dtype: torch.dtype, reduction: str, log_target: bool, log_input: bool) -> None:
    args = reduction, log_target, log_input
    draws = []
    for shape in [(4, 7), (3, 5, 77)] * times(32) + [(5, 1023), (64, 8192)] * times(4):
        p, q = distributions(*shape, dtype=dtype)
        x, t = p if log_input else p.log(), q.log() if log_target else q
        assert KL.road(x, t, *args).name == "kernel"
        draws.append((
            with_grads(lambda x, t: kl_div(x, t, *args), x, t, scale=0.5),
            with_grads(lambda x, t: eager_kl(x, t, *args), x, t, scale=0.5),
            with_grads(lambda x, t: eager_kl(x, t, *args), x.double(), t.double(), scale=0.5),
        ))
    check(draws)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("log_input", [False, True])
def test_kl_div_inf_and_nan_are_eagers(dtype: torch.dtype, log_target: bool, log_input: bool) -> None:
    """Every pair of special numbers, with ordinary ones beside them."""
    special = torch.tensor([0.0, -0.0, -1.0, INF, -INF, NAN, 1.0, 1e-40, 3e38, 0.5, 60000.0, 2.0])
    x, t = torch.cat([torch.cartesian_prod(special, special), torch.rand(9000, 2)]).to("cuda", dtype).t().contiguous()
    for reduction in ("none", "mean"):
        args = reduction, log_target, log_input
        ours = with_grads(lambda x, t: kl_div(x, t, *args), x, t)  # noqa: B023
        eager = with_grads(lambda x, t: eager_kl(x, t, *args), x, t)  # noqa: B023
        for one, peer in zip(ours, eager, strict=True):
            assert torch.equal(one.isnan(), peer.isnan()) and torch.equal(one.isinf(), peer.isinf())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kl_div_with_a_log_of_many_elements(dtype: torch.dtype) -> None:
    """Enough for the road of large tensors, not a whole number of chunks; then special numbers all over it."""

    def ours(x: Tensor) -> Tensor:
        return kl_div(x, t, "batchmean", False, True)

    def eager(x: Tensor) -> Tensor:
        return eager_kl(x, t.to(x.dtype), "batchmean", False, True)

    x, t = distributions(601, 7001, dtype=dtype)
    check([(with_grads(ours, x), with_grads(eager, x), with_grads(eager, x.double()))])
    special = torch.tensor([0.0, -0.0, -1.0, INF, -INF, NAN, 1e-40, 3e38], device="cuda").to(dtype)
    for other, step in ((x, 1013), (t, 2039)):
        some = other.view(-1)[::step]
        some.copy_(special.repeat(len(some) // 8 + 1)[: len(some)])
    for one, peer in zip(with_grads(ours, x), with_grads(eager, x), strict=True):
        assert torch.equal(one.isnan(), peer.isnan()) and torch.equal(one.isinf(), peer.isinf())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [20001, 32000, 151936])
def test_many_long_rows_some_of_them_unusual(dtype: torch.dtype, vocab: int) -> None:
    """More rows than run at a time; a row that is done as eager does it leaves those around it alone."""
    s, t = (torch.randn(300, vocab, device="cuda").mul_(2).to(dtype) for _ in range(2))
    s[::7, 5], t[3::50, -1] = -INF, INF

    def ours(s: Tensor) -> Tensor:
        return distillation_kl(s, t, -1, 2.0, 2.0, 4.0, "sum")

    def eager(s: Tensor) -> Tensor:
        return eager_distillation(s, t.to(s.dtype), 2.0, 2.0, "sum", False)

    check([(with_grads(ours, s), with_grads(eager, s), with_grads(eager, s.double()))])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocab"), [(300, 25001), (150, 32000), (70, 151936), (20, 50000)])
@pytest.mark.parametrize("road", ["hopper"], indirect=True)  # the portable one has nothing to follow
def test_what_tools_follow_has_the_same_bits(dtype: torch.dtype, rows: int, vocab: int, monkeypatch) -> None:
    """One block a row and several, more rows than run at a time, some of them unusual."""
    s, t = torch.randn(2, rows, vocab, device="cuda").to(dtype)
    s[::7, 5], t[3::50, -1] = -INF, INF

    def results() -> list[Tensor]:
        student = with_grads(lambda s: distillation_kl(s, t, -1, 2.0, 2.0, 4.0), s)
        return [*student, *with_grads(lambda s, t: distillation_kl(s, t, -1, 2.0, 2.0, 4.0), s, t)]

    want = results()
    monkeypatch.setenv("FXFUSE_FOLLOWED", "1")
    for a, b in zip(results(), want, strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("log_target", [False, True])
def test_a_certain_teacher_and_an_infinite_scale(dtype: torch.dtype, log_target: bool) -> None:
    """Teacher gradients where one class has all the probability; gradients that float16 cannot hold."""
    draws = []
    for shape in ((65, 512), (4, 32000)) * times(4):
        s, t = torch.randn(2, *shape, device="cuda").mul(3).to(dtype)
        cold = [with_grads(lambda s, t: eager_distillation(s, t, 1e-2, 1e-2, "mean", log_target), *pair)
                for pair in ((s, t), (s.double(), t.double()))]  # fmt: skip
        mine = with_grads(lambda s, t: distillation_kl(s, t, -1, 1e-2, 1e-2, 1e-4, "mean", log_target), s, t)
        draws.append((mine[2:], cold[0][2:], cold[1][2:]))
        ours = with_grads(lambda s, t: distillation_kl(s, t, -1, 1e3, 1e3, 1e6, "sum", log_target), s, t)
        eager = with_grads(lambda s, t: eager_distillation(s, t, 1e3, 1e3, "sum", log_target), s, t)
        for one, peer in zip(ours[1:], eager[1:], strict=True):
            assert torch.equal(one.isnan(), peer.isnan()) and torch.equal(one.isinf(), peer.isinf())
    check(draws)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("margin", [2.0, 5.0, 8.0, 12.0, 16.0])
def test_nearly_certain_teachers(dtype: torch.dtype, log_target: bool, margin: float) -> None:
    """One q is nearly 1, and its gradient what the others leave of it: e^-margin. Judged margin by margin, and with a
    quarter of eager's error at the most in float32, where eager loses most digits there."""

    def ours(s: Tensor, t: Tensor) -> Tensor:
        return distillation_kl(s, t, -1, 1.0, 1.0, 1.0, "sum", log_target)

    draws = []
    for shape in ((65, 512), (40, 5003), (12, 32000), (300, 13000), (5, 128256)):
        s, t = torch.randn(2, *shape, device="cuda")
        columns = torch.randint(shape[1], (shape[0], 1), device="cuda")
        t = t.scatter(1, columns, t.logsumexp(-1, keepdim=True) + margin)
        s, t = s.to(dtype), t.to(dtype)
        eager = [with_grads(lambda s, t: eager_distillation(s, t, 1.0, 1.0, "sum", log_target), *pair)
                 for pair in ((s, t), (s.double(), t.double()))]  # fmt: skip
        draws.append((with_grads(ours, s, t), *eager))
    check(draws)
    if dtype == torch.float32:
        for one, peer, judge in draws:
            assert (one[2].double() - judge[2]).norm() <= 0.25 * (peer[2].double() - judge[2]).norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("log_target", [False, True])
def test_distillation(dtype: torch.dtype, shape: tuple[int, int], log_target: bool) -> None:
    for ts, tt, reduction in ((2.0, 2.0, "batchmean"), (1.0, 4.0, "mean"), (0.5, 1.0, "sum"), (3.0, 2.0, "none")):

        def ours(s: Tensor, t: Tensor) -> Tensor:
            return distillation_kl(s, t, -1, ts, tt, ts * tt, reduction, log_target)  # noqa: B023

        def eager(s: Tensor, t: Tensor) -> Tensor:
            return eager_distillation(s, t, ts, tt, reduction, log_target)  # noqa: B023

        both, alone = [], []
        for _ in range(times(64 if shape[0] * shape[1] < 10**5 else 24)):
            s, t = torch.randn(2, *shape, device="cuda").mul(2).to(dtype)
            assert DISTILLATION.road(s, t, -1, ts, tt, ts * tt, reduction, log_target).name == "kernel"
            exact = with_grads(eager, s.double(), t.double())
            both.append((with_grads(ours, s, t), with_grads(eager, s, t), exact))
            # The student's gradient alone takes another road through the kernels, and no gradient a third.
            alone.append((
                [ours(s, t), *with_grads(lambda s: ours(s, t), s)],  # noqa: B023
                [eager(s, t), *with_grads(lambda s: eager(s, t), s)],  # noqa: B023
                [exact[0], *exact[:2]],
            ))
        check(both)
        check(alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("temperature", "size"), [(1e-2, 3.0), (1e3, 1e4), (1.0, 1e4)])
def test_extreme_temperatures_and_logits(dtype: torch.dtype, temperature: float, size: float) -> None:
    def eager(s: Tensor, t: Tensor) -> Tensor:
        return eager_distillation(s, t, temperature, temperature, "mean", False)

    draws = []
    for shape in ((65, 512), (4, 32000)) * times(4):
        s, t = torch.randn(2, *shape, device="cuda").clamp(-1, 1).mul(size).to(dtype)
        draws.append((
            with_grads(lambda s: distillation_kl(s, t, -1, temperature, temperature, temperature**2), s),  # noqa: B023
            with_grads(lambda s: eager(s, t), s),  # noqa: B023
            with_grads(lambda s: eager(s, t.double()), s.double()),  # noqa: B023
        ))
    check(draws)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [10, 1000, 5003, 32000, 128256])
@pytest.mark.parametrize("log_target", [False, True])
def test_distillation_inf_and_nan_are_eagers(dtype: torch.dtype, vocab: int, log_target: bool) -> None:
    s, t = torch.randn(2, 6, vocab, device="cuda").to(dtype)
    s[0, vocab // 2], t[1, 0], s[2, -1], s[3, 1] = -INF, INF, NAN, INF
    t[4], t[5, ::2] = -INF, -INF
    for row in range(6):  # one row at a time: a loss of all would be NaN whatever the others are
        pair = s[row : row + 1].clone(), t[row : row + 1].clone()
        ours = with_grads(lambda s, t: distillation_kl(s, t, -1, 2.0, 2.0, 4.0, "sum", log_target), *pair)
        eager = with_grads(lambda s, t: eager_distillation(s, t, 2.0, 2.0, "sum", log_target), *pair)
        for one, peer in zip(ours, eager, strict=True):
            assert torch.equal(one.isnan(), peer.isnan()) and torch.equal(one.isinf(), peer.isinf()), row


LOSSES = {
    "kl_div": lambda x, t: kl_div(x.log_softmax(-1), t.softmax(-1), "batchmean"),
    "kl_div_none": lambda x, t: kl_div(x.log_softmax(-1), t.softmax(-1), "none"),
    "distillation_kl": lambda x, t: distillation_kl(x, t, -1, 2.0, 2.0, 4.0, "batchmean"),
    "distillation_kl_none": lambda x, t: distillation_kl(x, t, -1, 2.0, 2.0, 4.0, "none"),
}


@pytest.fixture(params=LOSSES)
def loss(request: pytest.FixtureRequest) -> Callable[[Tensor, Tensor], Tensor]:
    return LOSSES[request.param]


def logits(*shape: int) -> tuple[Tensor, Tensor]:
    s, t = torch.randn(2, *shape, device="cuda")
    return s.requires_grad_(), t.requires_grad_()


def test_a_retained_graph_gives_the_same_gradient_again(loss: Callable[..., Tensor]) -> None:
    pair = logits(9, 4096)
    value = loss(*pair).sum()
    first = [g.clone() for g in torch.autograd.grad(value, pair, torch.tensor(3.0, device="cuda"), retain_graph=True)]
    second = torch.autograd.grad(value, pair, torch.tensor(3.0, device="cuda"), retain_graph=True)
    third = torch.autograd.grad(value, pair)
    for a, b, c in zip(first, second, third, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(a, 3 * c, rtol=1e-5, atol=1e-7)


def test_incoming_gradients_of_any_kind() -> None:
    x, t = torch.randn(8, 1000, device="cuda").log_softmax(-1), torch.rand(8, 1000, device="cuda")
    leaf = x.clone().requires_grad_()
    one, column, turned = (torch.rand(shape, device="cuda") for shape in ((), (8, 1), (1000, 8)))
    for grad in (torch.rand_like(x), one.expand(8, 1000), column.expand(8, 1000), turned.t()):
        (ours,) = torch.autograd.grad(kl_div(leaf, t, "none"), leaf, grad)
        torch.testing.assert_close(ours, -(grad * t), rtol=1e-6, atol=0)
    leaf = x.clone().requires_grad_()
    (kl_div(leaf, t, "sum") * 2 + kl_div(leaf, t, "sum") * torch.tensor(0.5, device="cuda")).backward()
    torch.testing.assert_close(leaf.grad, -2.5 * t, rtol=1e-6, atol=0)


def test_backward_does_not_wait_for_the_device() -> None:
    pair = logits(64, 4096)
    LOSSES["distillation_kl"](*pair).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        (LOSSES["distillation_kl"](*pair) * 3).backward()
        (kl_div(pair[0], pair[1].exp(), "mean") * 3).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_second_derivatives(loss: Callable[..., Tensor]) -> None:
    pair = logits(2, 30)

    def second(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(function(*pair).sum(), pair, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), pair)

    name = next(k for k, v in LOSSES.items() if v is loss)
    reduction = "none" if name.endswith("none") else "batchmean"
    peer = (lambda s, t: eager_distillation(s, t, 2.0, 2.0, reduction, False)) if name.startswith("d") else (
        lambda s, t: F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction=reduction))
    for ours, theirs in zip(second(loss), second(peer), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.captures
def test_same_bits_on_every_run_on_any_stream_and_in_a_graph(loss: Callable[..., Tensor]) -> None:
    pair = logits(70, 33000)

    def run() -> list[Tensor]:
        value = loss(*pair)
        return [value.detach(), *torch.autograd.grad(value.sum(), pair)]

    first = run()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        second = run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        third = run()
    graph.replay()
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_misaligned_strided_and_empty_inputs(loss: Callable[..., Tensor]) -> None:
    s, t = torch.randn(2, 12, 3000, device="cuda")
    want = with_grads(loss, s, t)
    flat = torch.empty(s.numel() + 3, device="cuda")
    offset = flat[3:].view_as(s).copy_(s)
    strided = torch.empty(3000, 12, device="cuda").t().copy_(s)
    for other in (offset, strided):
        for a, b in zip(with_grads(loss, other, t), want, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-8)
    empty = torch.empty(0, 5, device="cuda", requires_grad=True)
    peer = F.kl_div(empty, empty, reduction="mean")
    ours = kl_div(empty, empty, "mean")
    assert torch.equal(ours.isnan(), peer.isnan())
    ours.backward()


def test_autocast_gives_float32(loss: Callable[..., Tensor]) -> None:
    s, t = torch.randn(2, 16, 512, device="cuda", dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        assert loss(s, t).dtype == torch.float32


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_under_torch_compile(loss: Callable[..., Tensor], backend: str) -> None:
    pair = logits(16, 3001)
    compiled = torch.compile(lambda s, t: loss(s * 1.5, t) * 2, backend=backend, fullgraph=True)
    value, peer = compiled(*pair), loss(pair[0] * 1.5, pair[1]) * 2
    torch.testing.assert_close(value, peer)
    for a, b in zip(torch.autograd.grad(value.sum(), pair), torch.autograd.grad(peer.sum(), pair), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-8)


@pytest.mark.memory
def test_memory_is_the_gradients_and_rows() -> None:
    s, t = torch.randn(2, 512, 50257, device="cuda", dtype=torch.bfloat16)
    s.requires_grad_()
    LOSSES["distillation_kl"](s, t).backward()
    s.grad = None
    gc.collect()  # what other tests left is not to be freed meanwhile
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    LOSSES["distillation_kl"](s, t).backward()
    assert torch.cuda.max_memory_allocated() - before <= s.nbytes + 4 * 2**20


SUMS = {
    "distillation_kl": (
        lambda s, t: distillation_kl(s, t, -1, 2.0, 2.0, 4.0, "sum"),
        lambda s, t: eager_distillation(s, t, 2.0, 2.0, "sum", False),
    ),
    "kl_div": (lambda s, t: kl_div(s, t, "sum", True), lambda s, t: eager_kl(s, t, "sum", True, False)),
}
MORE_THAN_AN_INT_COUNTS = 17_200, 128_000  # rows, columns
sixty_gigabytes = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 60 << 30,
    reason="needs 60 GB of GPU memory",
)


@pytest.fixture
def more_than_an_int_counts() -> tuple[Tensor, Tensor]:
    """Two of 2.2 G elements in bfloat16."""
    s, t = (torch.empty(MORE_THAN_AN_INT_COUNTS, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(2))
    assert s.numel() > 2**31
    return s, t


@pytest.mark.large
@sixty_gigabytes
@pytest.mark.parametrize("sum_of", SUMS)
def test_sums_of_more_elements_than_an_int_counts(sum_of: str, more_than_an_int_counts: tuple[Tensor, Tensor]) -> None:
    """The last rows have their gradients, and the losses of quarters add up."""
    (s, t), (ours, eager), tail = more_than_an_int_counts, SUMS[sum_of], 100
    leaf = s.detach().requires_grad_()
    loss = ours(leaf, t)
    (grad,) = torch.autograd.grad(loss, leaf)
    pairs = (s[-tail:], t[-tail:]), (s[-tail:].double(), t[-tail:].double())
    peers = [with_grads(lambda s: eager(s, pair[1]), pair[0])[1:] for pair in pairs]  # noqa: B023
    check([([grad[-tail:]], *peers)])
    del grad
    parts = sum(float(ours(a, b)) for a, b in zip(s.split(4300), t.split(4300), strict=True))
    assert abs(float(loss.detach()) / parts - 1) < 1e-2


@pytest.mark.large
@sixty_gigabytes
def test_each_of_more_elements_than_an_int_counts(more_than_an_int_counts: tuple[Tensor, Tensor]) -> None:
    """Without a reduction the last rows have the losses and gradients that they have among few."""

    def ours(s: Tensor, t: Tensor) -> Tensor:
        return distillation_kl(s, t, -1, 2.0, 2.0, 4.0, "none")

    (s, t), tail = more_than_an_int_counts, 100
    assert torch.equal(ours(s, t)[-tail:], ours(s[-200:], t[-200:])[-tail:])
    grads = []
    for logits, targets in ((s, t), (s[-200:], t[-200:])):
        leaf = logits.detach().requires_grad_()
        loss = ours(leaf, targets)
        grads += torch.autograd.grad(loss, leaf, loss.detach())
        del loss
    assert torch.equal(grads[0][-tail:], grads[1][-tail:])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_second_device(loss: Callable[..., Tensor]) -> None:
    s, t = torch.randn(2, 40, 32000)
    want = with_grads(loss, s.cuda(0), t.cuda(0))
    for a, b in zip(with_grads(loss, s.cuda(1), t.cuda(1)), want, strict=True):
        assert a.device.index == 1 and torch.equal(a.cpu(), b.cpu())
    assert torch.cuda.current_device() == 0
