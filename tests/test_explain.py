"""explain(): every point is answered, at 80 columns, and what is not known is said to be unknown."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse
from fxfuse import ops
from fxfuse.explanation import _gain
from fxfuse.pattern import available

torch.set_num_threads(1)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn, self.out = nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 16)
        self.scale = nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.out(torch.relu(self.bn(self.fc(x) * self.scale)))) / 2


X = torch.randn(8, 64)


def words(text: object) -> str:
    """The text without its line breaks."""
    return " ".join(str(text).split())


def test_every_point_is_answered():
    explained = fxfuse.explain(fxfuse.optimize(Head(), X))
    text = words(explained)
    assert len(explained.entries) == 2
    for entry in explained.entries:
        shipped = available()[entry.replacement.pattern].words
        for sentence in (shipped.why, shipped.fuses, shipped.algebra, shipped.left):
            assert sentence and words(sentence) in text
        assert entry.estimate is not None and entry.estimate.rates.name in text
        assert entry.road and words(entry.road) in text
    assert "linear → mul → batch_norm1d" in text and "x[8×64], weight[32×64] in float32" in text
    labels = "Left alone, and why", "How it is computed", "bytes moved", "matrix operations", "written on the way"
    for label in labels:
        assert label in text
    assert "bn: no linear_activation_scale, expected linear" in text and "estimates for one forward call" in text


@pytest.mark.parametrize("example", [None, X])
def test_it_fits_eighty_columns(example):
    deep = nn.Sequential(nn.Sequential(nn.Sequential(*(Head() for _ in range(3)))[:1]))
    for model in (Head(), deep, nn.Linear(64, 3)):
        for text in (fxfuse.explain(fxfuse.optimize(model, example)), fxfuse.report(fxfuse.optimize(model, example))):
            assert max(map(len, str(text).splitlines())) <= 80


def test_without_shapes_it_says_what_to_give():
    explained = fxfuse.explain(fxfuse.optimize(Head()))
    assert [e.estimate for e in explained.entries] == [None, None]
    sentence = "no estimate: the shapes were not known when the graph was read; give example_inputs"
    assert words(explained).count(sentence) == 2
    assert "are estimates" not in words(explained)


@pytest.mark.parametrize("training", [True, False])
def test_the_road_is_the_ops_own_answer(training):
    model = Head().train(training)
    first, second = fxfuse.explain(fxfuse.optimize(model, X)).entries
    bn, out = model.bn, model.out
    norm = bn.weight, bn.bias, bn.running_mean, bn.running_var, training, 0.1, 1e-5
    y = torch.randn(8, 32)

    def roads() -> list[str]:
        asked = [
            ops.get("linear_scale_batchnorm1d").road(
                X, model.fc.weight, model.fc.bias, model.scale, None, 1.0, *norm
            ),
            ops.get("linear_activation_scale").road(y, out.weight, out.bias, "gelu", 0.0, 0.0, 1.0, 0.5),
        ]
        return [f"{road.name}: {road.why}" for road in asked]

    assert [first.road_with_gradients, second.road_with_gradients] == roads()
    with torch.no_grad():
        assert [first.road, second.road] == roads()


def test_no_gain_is_promised_on_a_composed_road():
    entry = fxfuse.explain(fxfuse.optimize(Head(), X)).entries[1]
    roads = (("composed: here", "none on this road"), ("closed: here", "at most"), ("kernel: here", "about"))
    for road, sentence in roads:
        assert sentence in words(_gain(dataclasses.replace(entry, road=road)))


def test_equal_layers_are_told_once():
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(6)), nn.Linear(8, 8), nn.Tanh())
    explained = fxfuse.explain(fxfuse.optimize(layers, torch.randn(2, 8)))
    assert len(explained.entries) == 7
    text = str(explained)
    assert text.count("linear → relu") == 1 and "and 2 more, 6 times" in words(text)
    assert text.count("Algebra") == 1 and "as in 1" in text  # the sentences once per pattern


def test_functions_reports_and_the_backend():
    weight = torch.randn(4, 6)
    fused = fxfuse.optimize(lambda x: F.relu(F.linear(x, weight)), torch.randn(3, 6))
    assert str(fxfuse.explain(fused)) == str(fxfuse.explain(fused.report))
    torch.compile(Head(), backend=fxfuse.backend, options={"inner": "eager"})(X)
    explained = fxfuse.explain(fxfuse.reports()[-1])
    assert len(explained.entries) == 2 and all(e.estimate is not None for e in explained.entries)


def test_a_pattern_nobody_registered_has_its_words():
    shipped = available()["linear_activation_scale"]
    pattern = dataclasses.replace(shipped, name="mine", words=fxfuse.Words(why="Because."))
    assert "Because." in str(fxfuse.explain(fxfuse.optimize(Head(), X, patterns=[pattern])))


def test_nothing_replaced():
    text = str(fxfuse.explain(fxfuse.optimize(nn.Linear(3, 3), torch.randn(2, 3))))
    assert "nothing replaced" in text and "How it is computed" not in text


def test_what_could_not_be_traced_and_what_was_undone():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return torch.relu(self.fc(x)) if x.sum() > 0 else x

    text = words(fxfuse.explain(fxfuse.optimize(Branching())))
    assert "the model: keeps its own Python, it branches on the value of gt" in text and "torch.compile(model" in text
    wrong = dataclasses.replace(available()["linear_activation_scale"], name="wrong", lower=None,
                                op=lambda x, **others: x * 0)  # fmt: skip
    fused = fxfuse.optimize(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(2, 3), patterns=[wrong], verify=True)
    text = words(fxfuse.explain(fused))
    assert "the model: wrong was undone" in text and "Verified on the example inputs" in text


def test_only_what_optimize_returned_is_explained():
    with pytest.raises(TypeError, match="has no report"):
        fxfuse.explain(nn.Linear(3, 3))
