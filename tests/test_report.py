"""The report: plain data that pickles, said once, printed for a person."""

from __future__ import annotations

import pickle

import torch
from models import Branching, Plain, ScaleNorm
from torch import nn

import fxfuse
from fxfuse.match import Miss
from fxfuse.report import WAY_IN, NearMiss, Replacement, Report, Untraced

torch.set_num_threads(1)


def test_fields_of_a_real_report():
    report = fxfuse.report(fxfuse.optimize(Branching()))
    first, second = report.replacements
    assert (first.pattern, first.op, first.where) == ("linear_scale_batchnorm1d", "linear_scale_batchnorm1d", "first")
    assert first.operations == ("linear", "mul", "batch_norm1d") and len(first.nodes) == 3
    assert (second.pattern, second.where) == ("linear_activation_scale", "second")
    assert second.operations == ("linear", "relu", "div")
    (untraced,) = report.untraceable
    assert untraced.where == "" and "branches on the value of gt" in untraced.reason
    assert [d.where for d in report.drawings] == ["first", "second"]
    assert {row[3] for row in report.drawings[0].before} == {"", "linear_scale_batchnorm1d"}
    assert [row[0] for row in report.drawings[0].after if row[3]] == ["linear_scale_batchnorm1d_module"]
    assert "fc" not in {row[0] for row in report.drawings[0].after}


def test_printed_report():
    report = fxfuse.report(fxfuse.optimize(Branching()))
    text = str(report)
    assert text.splitlines()[0] == "fxfuse · Branching · 2 replacements" and repr(report) == text
    assert "linear → mul → batch_norm1d" in text and "linear → relu → div" in text
    assert "Could not be traced" in text and WAY_IN in text and "(the model)" in text
    assert max(map(len, text.splitlines())) <= 120
    assert "Could not be traced" not in str(fxfuse.report(fxfuse.optimize(ScaleNorm())))
    assert "· 1 replacement" in str(fxfuse.report(fxfuse.optimize(ScaleNorm())))
    assert "nothing replaced" in str(fxfuse.report(fxfuse.optimize(Plain())))


def test_reports_pickle_and_compare():
    report = fxfuse.report(fxfuse.optimize(Branching()))
    assert pickle.loads(pickle.dumps(report)) == report


def test_paths_are_from_the_model_optimize_was_given():
    report = fxfuse.report(fxfuse.optimize(nn.Sequential(Branching(), nn.Sequential(Branching()))))
    assert [r.where for r in report.replacements] == ["0.first", "0.second", "1.0.first", "1.0.second"]
    assert [u.where for u in report.untraceable] == ["", "0", "1.0"]


def test_the_deepest_miss_of_each_pattern_is_kept():
    report = Report()
    for reason, depth in (("shallow", 1), ("deep", 3), ("middle", 2), ("deep", 3), ("as deep", 3)):
        report.add_misses([Miss("p", None, reason, depth)], "there")
    report.add_misses([Miss("q", None, "other", 1)], "")
    assert [(n.pattern, n.reason, n.where) for n in report.near_misses] == [
        ("p", "deep", "there"), ("p", "as deep", "there"), ("q", "other", ""),
    ]  # fmt: skip


def test_attempts_that_never_began_are_left_out_where_there_is_more_to_say():
    nothing = Report(near_misses=[NearMiss("p", "n", "expected linear", 0)])
    assert len(nothing.settle().near_misses) == 1
    never, nearly = NearMiss("q", "n", "no", 0), NearMiss("p", "n", "nearly", 2)
    replaced = Report(replacements=[Replacement("p", "p", ("n",), "")], near_misses=[never])
    assert replaced.settle().near_misses == []
    assert Report(near_misses=[never, nearly]).settle().near_misses == [nearly]


def test_long_words_are_wrapped():
    report = Report("model", untraceable=[Untraced("a." * 40 + "b", "because " * 30)])
    assert max(map(len, str(report).splitlines())) < 130


def test_explain_tells_of_every_replacement():
    fused = fxfuse.optimize(Branching())
    text = str(fxfuse.explain(fused))
    assert "linear_scale_batchnorm1d" in text and "linear_activation_scale" in text
