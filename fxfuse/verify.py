"""Original against fused on example inputs; a replacement out of bounds is found by bisection, undone and named.

The judge is the original in float64. Everything runs on copies: running statistics, gradients, modes and the random
state of the model and of the process stay as they were.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fxfuse.choice import UNDONE, Choice, Key
from fxfuse.pattern import Pattern
from fxfuse.report import Report, Undone
from fxfuse.trial import Example, Excess, Seen, compare, run

__all__ = ["Verdict", "verified"]

#: (model, example, patterns, freeze, choice) -> fused; one of the two in :mod:`fxfuse.api`
Make = Callable[..., Any]


def verified(
    make: Make, model: Any, example: Example, patterns: tuple[Pattern, ...], freeze: bool
) -> tuple[Any, Verdict]:
    """The fused model without the replacements that change more than rounding does on these inputs, and the verdict.

    Outputs, gradients of inputs and parameters, and buffers are compared, in train and in eval mode. What was undone
    stays undone for graphs that are traced later, in copies and in pickles.

    Raises:
        ValueError: when the original itself does not run on the inputs in any mode.
    """
    trial = _Trial(make, model, example, patterns, freeze)
    refused: dict[Key, Undone] = {}
    notes = list(trial.notes)
    while True:
        choice = Choice(frozenset(refused))
        excess, share = trial.excess(choice)
        if excess is None:
            break
        guilty = trial.guilty(choice)
        if guilty is None:
            notes.append(f"Verification could not decide: without any replacement {excess.what} is out of bounds, too. "
                         "Does the model give the same result twice?")  # fmt: skip
            break
        key, excess = guilty
        place = choice.places[key]
        refused[key] = Undone(place.pattern, place.where, place.operations, place.nodes, excess.what, excess.error,
                              excess.bound)  # fmt: skip
    fused = make(model, example, patterns, freeze, Choice(frozenset(refused)))
    verdict = Verdict(list(refused.values()), notes)
    if excess is None:
        modes = " and ".join(filter(None, trial.names.values()))
        verdict.sentence = (
            f"Verified on the example inputs{modes and f' in {modes}'}: outputs, gradients and buffers, against the "
            f"original in float64. The largest error is {share:.0%} of what is allowed."
        )
    return fused, verdict


@dataclass
class Verdict:
    """What verification found: what it took back, what it has to remark, and its one sentence where all is well."""

    undone: list[Undone]
    notes: list[str]
    sentence: str | None = None

    def enter(self, report: Report) -> None:
        """Write it into the report of what was verified."""
        report.undone = self.undone
        report.near_misses = [n for n in report.near_misses if n.reason != UNDONE]
        if self.sentence is not None:
            report.verified = self.sentence
        report.notes += self.notes


@dataclass
class _Trial:
    """What the original gives, computed once, and the comparison with a fused copy under a choice of replacements."""

    make: Make
    model: Any
    example: Example
    patterns: tuple[Pattern, ...]
    freeze: bool
    eager: dict[bool | None, Seen] = field(default_factory=dict)
    exact: dict[bool | None, Seen | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        failures: list[str] = []
        for mode in self.modes():
            try:
                self.eager[mode] = run(self.copied(), self.example, mode)
            except Exception as error:  # whatever the user's model raises for these inputs
                failures.append(f"{_MODES[mode]} was not compared: the original raises {_first_line(error)}")
                continue
            try:
                self.exact[mode] = run(self.copied(double=True), self.example, mode, double=True)
            except Exception as error:  # a dtype written into the model
                self.exact[mode] = None
                note = f"The original does not run in float64 ({_first_line(error)}); it was compared in its own dtype."
                if note not in self.notes:  # as a rule the same in both modes
                    self.notes.append(note)
        if not self.eager:
            raise ValueError(f"example_inputs do not run through the model: {failures[0].partition('raises ')[2]}")
        self.notes += [f"{failure[0].upper()}{failure[1:]}." for failure in failures]

    @property
    def names(self) -> dict[bool | None, str]:
        """The modes that are compared, in words."""
        return {mode: _MODES[mode] for mode in self.eager}

    def modes(self) -> tuple[bool | None, ...]:
        return (True, False) if isinstance(self.model, nn.Module) and not _one_mode(self.model) else (None,)

    def copied(self, double: bool = False) -> Any:
        """A copy of the original that may be run; a function is its own."""
        if not isinstance(self.model, nn.Module):
            return self.model
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch's own, about exported programs
                copied = copy.deepcopy(self.model)
        except Exception as error:
            why = _first_line(error)
            raise ValueError(f"verify=True runs a copy, and this model cannot be copied: {why}") from error
        return copied.double() if double else copied

    def excess(self, choice: Choice) -> tuple[Excess | None, float]:
        """The worst value out of bounds over the modes, and the largest share of a bound that is used up."""
        fused = self.make(self.copied(), self.example, self.patterns, self.freeze, choice)
        largest = 0.0
        for mode, eager in self.eager.items():
            if isinstance(fused, nn.Module):  # every mode starts from the same buffers
                self._restore(fused)
            try:
                seen = run(fused, self.example, mode)
            except Exception as error:  # the original ran
                return Excess(f"the call ({_first_line(error)}){_in(mode)}", math.nan, math.nan), math.inf
            found, share = compare(seen, eager, self.exact[mode])
            if found is not None:
                return Excess(found.what + _in(mode), found.error, found.bound), math.inf
            largest = max(largest, share)
        return None, largest

    def _restore(self, fused: nn.Module) -> None:
        held = dict(self.model.named_buffers(remove_duplicate=False))
        with torch.no_grad():
            for name, buffer in fused.named_buffers(remove_duplicate=False):
                if name in held:
                    buffer.copy_(held[name])

    def guilty(self, choice: Choice) -> tuple[Key, Excess] | None:
        """The first replacement with which, added to those before it, a value goes out of bounds.

        None when that happens without any replacement at all.
        """
        keys = list(choice.places)
        good, bad = 0, len(keys)
        found: Excess | None = None
        if not keys or self.excess(Choice(choice.refused, frozenset()))[0] is not None:
            return None
        while bad - good > 1:
            middle = (good + bad) // 2
            excess, _ = self.excess(Choice(choice.refused, frozenset(keys[:middle])))
            if excess is None:
                good = middle
            else:
                bad, found = middle, excess
        if found is None:
            found, _ = self.excess(Choice(choice.refused, frozenset(keys[:bad])))
        return (keys[bad - 1], found) if found is not None else None


_MODES = {True: "train", False: "eval", None: ""}


def _in(mode: bool | None) -> str:
    return f" ({_MODES[mode]})" if mode is not None else ""


def _one_mode(model: nn.Module) -> bool:
    """An exported program refuses to change its mode."""
    return isinstance(model, torch.fx.GraphModule) and "train" in model.__dict__


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120]}" if text else type(error).__name__
