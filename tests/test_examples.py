"""Patterns of one's own: the files of examples/ and the page that explains them, as a user would run them."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fxfuse
from fxfuse import pattern, vocabulary
from fxfuse.vocabulary import define, spell

ROOT = Path(__file__).parent.parent
EXAMPLES = {"gated_residual": "GatedResidual", "rms_norm": "RMSNorm"}
PAGE = ROOT / "docs" / "add-a-pattern.md"

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _nothing_stays_registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Patterns and words of one test are not those of the next."""
    monkeypatch.setattr(pattern, "_registered", {})
    for table in ("OPERATIONS", "_FUNCTIONS", "_METHODS", "_ATEN"):
        monkeypatch.setattr(vocabulary, table, dict(getattr(vocabulary, table)))
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    yield
    for name in (*EXAMPLES, "measure"):
        sys.modules.pop(name, None)


@pytest.fixture
def load() -> Callable[[str], ModuleType]:
    return importlib.import_module


def inputs_of(name: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(8, 512) for _ in range(2 if name == "gated_residual" else 1))


def test_every_example_is_tested():
    files = {p.stem for p in (ROOT / "examples").glob("*.py")}
    assert files == {*EXAMPLES, "measure"}
    for name in EXAMPLES:
        assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) < 40


@pytest.mark.parametrize("name", EXAMPLES)
def test_matched_verified_and_reported_by_optimize(name, load):
    model, inputs = getattr(load(name), EXAMPLES[name])(), inputs_of(name)
    with torch.no_grad():
        next(model.parameters()).uniform_(0.5, 2)
    fused = fxfuse.optimize(model, inputs, verify=True)
    report = fxfuse.report(fused)
    assert [r.pattern for r in report.replacements] == [name] and not report.undone
    assert report.verified.startswith("Verified on the example inputs in train and eval")
    torch.testing.assert_close(fused(*inputs), model(*inputs))
    text = str(fxfuse.explain(fused))
    assert f"1. {name} in the model" in text and "× in time" in text
    assert all(words in " ".join(text.split()) for words in load(name).pattern.words.why.split(". "))


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_matched_by_the_torch_compile_backend(name, inner, load):
    model, inputs = getattr(load(name), EXAMPLES[name])(), inputs_of(name)
    fast = torch.compile(model, backend=fxfuse.backend, options={"inner": inner}, fullgraph=True)
    torch.testing.assert_close(fast(*inputs), model(*inputs))
    assert [r.pattern for r in fxfuse.reports()[-1].replacements] == [name]


def test_the_guard_says_why(load):
    module = load("gated_residual")
    x, y = torch.randn(4, 512), torch.randn(4, 512, dtype=torch.float64)
    (miss,) = fxfuse.report(fxfuse.optimize(module.GatedResidual(), (x, y))).near_misses
    assert miss.reason == "the dtypes differ: addcmul would not promote alike"
    (miss,) = fxfuse.report(fxfuse.optimize(module.GatedResidual())).near_misses
    assert "give example_inputs" in miss.reason


def test_rms_norm_in_other_spellings(load):
    load("rms_norm")
    w = torch.rand(16) + 0.5

    def other(x):
        mean = torch.mean(torch.pow(x, 2), keepdim=True, dim=-1)
        return torch.rsqrt(1e-5 + mean) * x * w

    x = torch.randn(3, 16)
    fused = fxfuse.optimize(other, x, verify=True)
    assert [r.operations for r in fxfuse.report(fused).replacements] == [("pow", "mean", "add", "rsqrt", "mul", "mul")]
    torch.testing.assert_close(fused(x), other(x))


def test_found_by_its_entry_point(load, monkeypatch):
    held = load("gated_residual").pattern
    fxfuse.unregister("gated_residual")

    class Entry:
        name, group = "gated_residual", "fxfuse.patterns"

        def load(self):
            return held

    listed = pattern.metadata.entry_points
    monkeypatch.setattr(pattern.metadata, "entry_points", lambda group: [*listed(group=group), Entry()])
    pattern._discovered.cache_clear()
    try:
        assert pattern.available()["gated_residual"] is held
        fused = fxfuse.optimize(load("gated_residual").GatedResidual(), inputs_of("gated_residual"))
        assert [r.pattern for r in fxfuse.report(fused).replacements] == ["gated_residual"]
        monkeypatch.setattr(Entry, "load", lambda self: "a string")
        pattern._discovered.cache_clear()
        with pytest.raises(TypeError, match=r"entry point 'gated_residual' .* is a str"):
            pattern.available()
    finally:
        pattern._discovered.cache_clear()


def test_measure_times_both(load, capsys):
    load("measure").main("gated_residual:GatedResidual", 8, 16)
    printed = capsys.readouterr().out
    assert "gated_residual" in printed
    assert re.search(r"eager +[\d.]+ ms\nfxfuse +[\d.]+ ms", printed)


def test_the_page_holds_the_example_as_it_is():
    held = re.search(r"<!-- example: (\S+) -->\n```python\n(.*?)```\n<!-- /example -->", PAGE.read_text(), re.S)
    assert held is not None
    assert held[2] == (ROOT / "examples" / held[1]).read_text()


def test_the_code_of_the_page_runs(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.S | re.M)
    assert len(blocks) >= 5
    space: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), space)
    printed = capsys.readouterr().out
    assert "gated_residual" in printed and re.search(r"^wrong (output|gradient of \w+).* allowed: ", printed, re.M)


# --- words of one's own ----------------------------------------------------------------------------------------------


def test_define_and_spell():
    cosh = define("cosh", "x")
    assert define("cosh", "x") is cosh  # the same definition again, as a reloaded notebook cell makes it
    spell(cosh, "input", functions=(torch.cosh,), methods="cosh", aten="cosh")
    assert vocabulary.spelling_of(torch.cosh, "call_function").operation is cosh
    assert vocabulary.spelling_of("cosh", "call_method").operation is cosh
    assert vocabulary.spelling_of(torch.ops.aten.cosh.default, "call_function").operation is cosh


def test_words_that_are_taken_are_refused():
    with pytest.raises(ValueError, match="another operation named 'mul'"):
        define("mul", "left right")
    with pytest.raises(ValueError, match="a spelling of 'mine' is one of 'mul' already"):
        spell(define("mine", "a b"), "input other", functions=(torch.mul,))
    with pytest.raises(ValueError, match="is one of 'relu' already"):
        spell(define("mine", "a b"), "self", methods="relu")
