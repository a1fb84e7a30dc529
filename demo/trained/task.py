"""The task of the demonstration: small sums, answered as JSON. No model, no ms-swift.

The model that is trained answers with a sentence, with Python, or with JSON of its own taste. What it has to learn is
the form that it is asked for. A reward that an answer can have in part leads there.
"""

from __future__ import annotations

import difflib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QUESTION = 'What is {a} + {b}? Answer as JSON, like {{"sum": 12}}.'
FOR_LIKENESS, FOR_FORM, FOR_SUM = 0.2, 0.5, 0.3  # add up to 1


@dataclass(frozen=True)
class Score:
    """What one answer earns. ``reward`` is between 0 and 1; ``form``: it is a JSON object, a number under "sum"."""

    reward: float
    form: bool
    right: bool


def score(text: str, answer: int) -> Score:
    """Half for the form, a little for being like the right answer, the rest for the right sum in the right form."""
    text = text.strip()
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    form = isinstance(value, dict) and list(value) == ["sum"] and type(value["sum"]) is int
    right = form and value["sum"] == answer
    likeness = difflib.SequenceMatcher(None, text, json.dumps({"sum": answer}), autojunk=False).ratio()
    return Score(FOR_LIKENESS * likeness + FOR_FORM * form + FOR_SUM * right, form, right)


def questions(seed: int = 0) -> Iterator[dict[str, Any]]:
    """All 81 sums of two digits from 1 to 9, as rows of ms-swift, in an order that the seed decides."""
    sums = [(a, b) for a in range(1, 10) for b in range(1, 10)]
    random.Random(seed).shuffle(sums)
    for a, b in sums:
        yield {"messages": [{"role": "user", "content": QUESTION.format(a=a, b=b)}], "answer": a + b}


def write_questions(path: Path, seed: int = 0) -> Path:
    """As JSON lines, one question each; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in questions(seed)))
    return path


def record_of(step: int, completions: list[str], answers: list[int]) -> dict[str, Any]:
    """One batch as a record that can be written as JSON: all rewards, two counts, and the first three answers."""
    scores = [score(text, answer) for text, answer in zip(completions, answers)]
    return {
        "step": step,
        "rewards": [one.reward for one in scores],
        "format_errors": sum(not one.form for one in scores),
        "right": sum(one.right for one in scores),
        "texts": completions[:3],
    }
