"""Models the compiler's own tests share, and what they check them with."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

import fxfuse
from fxfuse.plan import plan_of

# --- small ones, one match each ----------------------------------------------------------------------------------


class ScaleNorm(nn.Module):
    """linear · scale → BatchNorm1d, then an activation of its own: [N, 8] -> [N, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 6)
        self.scale = nn.Parameter(torch.rand(6) + 0.5)
        self.bn = nn.BatchNorm1d(6)

    def forward(self, x):
        return F.relu(self.bn(self.fc(x) * self.scale))


class Halved(nn.Module):
    """linear → relu → / 2: [N, 8] -> [N, 6]."""

    def __init__(self, inputs: int = 8) -> None:
        super().__init__()
        self.fc = nn.Linear(inputs, 6)
        self.divisor = 2.0

    def forward(self, x):
        return F.relu(self.fc(x)) / self.divisor


class Plain(nn.Module):
    """Nothing to fuse, but a batch norm that comes near: [N, 8] -> [N, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(8)

    def forward(self, x):
        return self.bn(x) + 1


class Branching(nn.Module):
    """A branch on a value around two children that match."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ScaleNorm(), Halved(6)

    def forward(self, x):
        if x.sum() > 1e6:
            x = x - 1
        return self.second(self.first(x))


class Holder(nn.Module):
    """A child that matches, inside a forward given as a function of (self, ...)."""

    def __init__(self, **attributes) -> None:
        super().__init__()
        self.block = Halved()
        for name, value in attributes.items():
            setattr(self, name, value)


def module(forward, **attributes) -> nn.Module:
    """A module with this forward and a `block` that matches linear → relu → / 2."""
    return type("Case", (Holder,), {"forward": forward, "__module__": __name__})(**attributes)


# --- what they are checked with ----------------------------------------------------------------------------------


@contextlib.contextmanager
def fused_runs(module: Any) -> Iterator[list[str]]:
    """The names of the modules that run by a fused graph inside the block, one entry a call ('' is the model)."""
    runs: list[str] = []
    undo = []
    named = module.named_modules() if isinstance(module, nn.Module) else [("", module)]
    for name, part in list(named):
        plan = plan_of(part) if isinstance(part, nn.Module) else part._plan
        for variants in plan.variants.values() if plan is not None else ():
            for variant in variants:
                if variant.run is not None:
                    undo.append((variant, variant.run))
                    variant.run = _counted(variant.run, name, runs)
    try:
        yield runs
    finally:
        for variant, run in reversed(undo):
            variant.run = run


def _counted(run, name, runs):
    def call(*args):
        runs.append(name)
        return run(*args)

    return call


def ran_fused(module: Any, *args: Any, **kwargs: Any) -> list[str]:
    """Call twice (a graph may be made at the first call) and tell which modules ran fused the second time."""
    module(*args, **kwargs)
    with fused_runs(module) as runs:
        module(*args, **kwargs)
    return runs


def fingerprint(module: nn.Module) -> dict[str, Any]:
    """Everything optimize must not touch: bits, modes, hooks, attributes, types, identities."""
    parts: dict[str, Any] = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    for name, part in module.named_modules():
        hooks = {key: list(value.items()) for key, value in part.__dict__.items() if "_hooks" in key and value}
        parts[f"<{name}>"] = (type(part), id(part), part.training, sorted(part.__dict__), hooks)
        parts[f"<{name}> attributes"] = {k: id(v) for k, v in part.__dict__.items()}
    return parts


def assert_untouched(before: dict[str, Any], module: nn.Module) -> None:
    after = fingerprint(module)
    assert list(before) == list(after)
    for key, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, after[key]), key
        else:
            assert value == after[key], key


def tensors_of(value: Any) -> list[Any]:
    """The leaves of an output, whatever holds them."""
    if hasattr(value, "__dataclass_fields__"):
        value = {k: getattr(value, k) for k in value.__dataclass_fields__}
    return tree_flatten(value)[0]


def assert_same(got: Any, expected: Any, **close: Any) -> None:
    assert type(got) is type(expected)
    got, expected = tensors_of(got), tensors_of(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        if isinstance(b, torch.Tensor):
            torch.testing.assert_close(a, b, **close)
        else:
            assert a == b


def check(model: nn.Module, *args: Any, example: Any = None, modes=(True, False, True), **kwargs: Any) -> nn.Module:
    """Optimize; compare outputs, gradients and state with eager in both modes; the original stays as it was."""
    reference = copy.deepcopy(model)
    before = fingerprint(model)
    fused = fxfuse.optimize(model, example)
    assert_untouched(before, model)
    assert list(fused.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(fused.parameters(), model.parameters(), strict=True))
    for mode in modes:
        fused.train(mode), reference.train(mode)
        outputs = []
        for module in (fused, reference):
            module.zero_grad(set_to_none=True)
            torch.manual_seed(7)
            inputs = tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, (args, kwargs))
            out = module(*inputs[0], **inputs[1])
            outputs.append(out)
            total = sum(t.double().square().sum() for t in tensors_of(out) if torch.is_tensor(t) and t.requires_grad)
            if isinstance(total, torch.Tensor):
                total.backward()
        assert_same(*outputs, rtol=1e-4, atol=1e-5)
        for (name, a), b in zip(fused.named_parameters(), reference.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), name
            if b.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        for (name, a), b in zip(fused.named_buffers(), reference.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    fused.zero_grad(set_to_none=True)
    return fused


def patterns_in(fused: Any) -> list[str]:
    return sorted(r.pattern for r in fxfuse.report(fused).replacements)


def reason_of(fused) -> str:
    """Why the model itself could not be traced."""
    return next(u.reason for u in fxfuse.report(fused).untraceable if u.where == "")


# --- blocks as real models have them -----------------------------------------------------------------------------


class LinearNorm(nn.Module):
    """LeViT's Linear_BN: [B, N, C] -> [B, N, D], the norm over the tokens of all images."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.bn = nn.BatchNorm1d(outputs)

    def forward(self, x):
        x = self.linear(x)
        return self.bn(x.flatten(0, 1)).reshape_as(x)


class LeViTBlock(nn.Module):
    """LeViT's attention and MLP, with residual connections that are dropped at random in training."""

    def __init__(self, dim: int = 16, heads: int = 2, drop: float = 0.0) -> None:
        super().__init__()
        self.heads, self.drop, self.scale = heads, drop, (dim // heads) ** -0.5
        self.qkv = LinearNorm(dim, 3 * dim)
        self.proj = nn.Sequential(nn.Hardswish(), LinearNorm(dim, dim))
        self.mlp = nn.Sequential(LinearNorm(dim, 2 * dim), nn.Hardswish(), LinearNorm(2 * dim, dim))

    def residual(self, x, y):
        if self.training and self.drop > 0:
            keep = torch.rand(x.size(0), 1, 1, device=x.device).ge_(self.drop).div(1 - self.drop)
            return x + y * keep.detach()
        return x + y

    def attention(self, x):
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        weights = ((q @ k.transpose(-2, -1)) * self.scale).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))

    def forward(self, x):
        x = self.residual(x, self.attention(x))
        return self.residual(x, self.mlp(x))


class MixerBlock(nn.Module):
    """MLP-Mixer: a linear-GELU-linear over tokens, another over channels. [B, N, C] -> [B, N, C]."""

    def __init__(self, tokens: int = 6, dim: int = 16) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.tokens = nn.Sequential(nn.Linear(tokens, 12), nn.GELU(), nn.Dropout(0.1), nn.Linear(12, tokens))
        self.channels = nn.Sequential(nn.Linear(dim, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, dim))

    def forward(self, x):
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class BertLayer(nn.Module):
    """BERT's layer: attention with an optional mask, then intermediate (linear → gelu) and output. dict out."""

    def __init__(self, dim: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.attention_output = nn.Linear(dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.intermediate = Intermediate(dim, 4 * dim)
        self.output = nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(0.1)

    def forward(self, hidden, attention_mask=None, *, output_attentions=False):
        shape = (*hidden.shape[:2], self.heads, -1)
        q, k, v = (layer(hidden).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        scores = q @ k.transpose(-1, -2) / (q.shape[-1] ** 0.5)
        if attention_mask is not None:
            scores = scores + attention_mask
        weights = self.dropout(scores.softmax(-1))
        context = (weights @ v).transpose(1, 2).flatten(2)
        hidden = self.norm1(hidden + self.dropout(self.attention_output(context)))
        hidden = self.norm2(hidden + self.dropout(self.output(self.intermediate(hidden))))
        return {"hidden": hidden, "weights": weights} if output_attentions else {"hidden": hidden}


class Intermediate(nn.Module):
    """BERT's BertIntermediate, the activation in an attribute as HuggingFace has it."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, inner)
        self.act = F.gelu

    def forward(self, x):
        return self.act(self.dense(x))
