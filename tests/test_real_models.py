"""Models of the transformers library, tiny and with random weights, through both doors; nothing is downloaded."""

from __future__ import annotations

import copy
import importlib.util
import os

import pytest
import torch
from models import assert_same, fingerprint, patterns_in, ran_fused

import fxfuse

torch.set_num_threads(1)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("transformers") is None,
        reason="NOT RUN: BERT, ViT, LeViT, GPT-2, T5 need `pip install transformers`; models.py has blocks alike",
    ),
    pytest.mark.filterwarnings("ignore"),
]

IDS = torch.arange(2 * 7).reshape(2, 7) % 30 + 1
MASK = torch.ones(2, 7, dtype=torch.long).index_fill(1, torch.tensor([6]), 0)
IMAGE = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)


def bert():
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                        max_position_embeddings=16)  # fmt: skip
    return BertModel(config), {"input_ids": IDS, "attention_mask": MASK}


def vit():
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32,
                       patch_size=8)  # fmt: skip
    return ViTModel(config), {"pixel_values": IMAGE}


def levit():
    from transformers import LevitConfig, LevitForImageClassification

    config = LevitConfig(image_size=32, hidden_sizes=[16, 32, 48], num_attention_heads=[2, 2, 2], depths=[1, 1, 1],
                         key_dim=[8, 8, 8], num_labels=5)  # fmt: skip
    return LevitForImageClassification(config), {"pixel_values": IMAGE}


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config), {"input_ids": IDS, "attention_mask": MASK, "labels": IDS, "use_cache": False}


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=40, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0,
                      dropout_rate=0.0)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS, "use_cache": False}
    return T5ForConditionalGeneration(config), inputs


#: (by optimize, by torch.compile) how many matches there are at least of the pattern
MODELS = {
    bert: ("linear_activation_scale", 3, 3),  # two layers and the pooler
    vit: ("linear_activation_scale", 3, 3),
    levit: ("linear_scale_batchnorm1d", 10, 10),
    gpt2: ("linear_activation_scale", 0, 0),  # its layers are Conv1D: addmm with a weight that is not transposed
    t5: ("linear_activation_scale", 0, 2),  # its feed-forward asks for dtypes, which a symbolic trace cannot answer
}


def build(make):
    torch.manual_seed(0)
    model, inputs = make()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model, inputs


def tensors(output):
    return {k: v for k, v in output.items() if isinstance(v, torch.Tensor)}


def compare(model, fused, inputs):
    """Outputs and gradients in both modes, in float64 so that what differs is a mistake and not rounding."""
    for mode in (False, True):
        grads = []
        results = []
        for module in (fused, model):
            module.train(mode)
            module.zero_grad(set_to_none=True)
            output = tensors(module(**inputs))
            sum(v.square().sum() for v in output.values() if v.requires_grad).backward()
            results.append(output)
            grads.append({n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})
        assert_same(*results, rtol=1e-6, atol=1e-8)
        assert list(grads[0]) == list(grads[1])
        assert_same(*grads, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("make", MODELS, ids=lambda m: m.__name__)
def test_optimize(make):
    model, inputs = build(make)
    model = model.double()
    inputs = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    reference = copy.deepcopy(model)
    before = fingerprint(model)
    fused = fxfuse.optimize(model)
    after = fingerprint(model)
    assert all(torch.equal(v, after[k]) if torch.is_tensor(v) else v == after[k] for k, v in before.items())
    assert list(fused.state_dict()) == list(model.state_dict())
    found = patterns_in(fused)
    pattern, count, _ = MODELS[make]
    assert found.count(pattern) >= count, str(fxfuse.report(fused))
    compare(reference, fused, inputs)
    assert len(ran_fused(fused, **inputs)) >= count
    again = copy.deepcopy(fused)
    assert len(ran_fused(again, **inputs)) == len(ran_fused(fused, **inputs))


@pytest.mark.slow
@pytest.mark.parametrize("make", MODELS, ids=lambda m: m.__name__)
def test_compile(make):
    torch._dynamo.reset()
    model, inputs = build(make)
    model = model.double()
    inputs = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    reference = copy.deepcopy(model)
    start = len(fxfuse.reports())
    fast = torch.compile(model, backend="fxfuse", options={"inner": "eager"})
    for mode in (False, True):
        model.train(mode), reference.train(mode)
        got, expected = tensors(fast(**inputs)), tensors(reference(**inputs))
        assert_same(got, expected, rtol=1e-6, atol=1e-8)
        found = [r.pattern for report in fxfuse.reports()[start:] for r in report.replacements]
        pattern, _, count = MODELS[make]
        assert found.count(pattern) >= count
        start = len(fxfuse.reports())
