"""Reads a run's log, where this package's numbers are called ``lora_sync/...``.

That is ms-swift's ``logging.jsonl``; of TRL the ``log_history`` in the newest checkpoint's ``trainer_state.json``.

Both have an entry of its own for an evaluation, with ``eval_`` before each name. The training step after an evaluation
has no sync of its own: the evaluation already gave the engine that policy.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

from ...errors import RunLogError
from .facts import PREFIX, RunReport, Step, plural

LOG_NAME = "logging.jsonl"
STATE_NAME = "trainer_state.json"
STEPS = ("global_step/max_steps", "step")  # what ms-swift calls it, and transformers
EVALUATION = "eval_"

Progress = Callable[[int, int], None]  # bytes read, bytes in all


@dataclass
class _Reading:
    """What one file contained so far."""

    steps: list[Step] = field(default_factory=list)  # ascending; an evaluation comes after the step it follows
    lines: int = 0
    corrupt: int = 0
    without_step: int = 0
    repeated: int = 0

    def add(self, step: Step) -> None:
        """Add a step. A resumed run repeats the steps after its checkpoint, in the same log: the last time counts."""
        while self.steps and self.steps[-1].step > step.step:
            self.steps.pop()
            self.repeated += 1
        for index, known in enumerate(self.steps[-2:], max(0, len(self.steps) - 2)):
            if (known.step, known.is_evaluation) == (step.step, step.is_evaluation):
                self.steps[index] = Step(step.step, {**known.values, **step.values}, step.is_evaluation)
                return
        self.steps.append(step)


def read(folder: Path, progress: Progress = lambda done, total: None) -> RunReport:
    """Read the run in ``folder``, or the newest of its ``vN-...`` folders that has lines of ours; its newest checkpoint
    where ms-swift left no log.

    Raises RunLogError when there is no log, it is empty, or it has no lines of ours.
    """
    logs = _logs(folder)
    readings: dict[Path, _Reading] = {}
    for log in logs:
        readings[log] = reading = _read(log, progress)
        if reading.steps:
            place = folder if log.name == STATE_NAME else log.parent
            return RunReport(place, tuple(reading.steps), tuple(_words(folder, log, logs, reading)))
    raise RunLogError(_nothing(readings))


def _logs(folder: Path) -> list[Path]:
    """The logs to try, the preferred one first."""
    if not folder.exists():
        raise RunLogError(f"{folder} does not exist.")
    if not folder.is_dir():
        raise RunLogError(
            f"{folder} is no folder: name the run's output folder, which holds {LOG_NAME} (ms-swift) or checkpoints."
        )
    versions = sorted((path.parent for path in folder.glob(f"v*/{LOG_NAME}")), key=_age, reverse=True)
    logs = [log for log in (folder / LOG_NAME, *(version / LOG_NAME for version in versions)) if log.is_file()]
    states = sorted(folder.glob(f"checkpoint-*/{STATE_NAME}"), key=lambda state: _step_of(state.parent), reverse=True)
    logs = logs or [state for state in (folder / STATE_NAME, *states[:1]) if state.is_file()]
    if not logs:
        raise RunLogError(
            f"{folder} has no {LOG_NAME}, and no vN-... folder in it has one. ms-swift writes it into the run's output "
            "folder at the first logging step: name that folder. Nor has it a checkpoint-N, where TRL's log is."
        )
    return logs


def _step_of(checkpoint: Path) -> int:
    number = checkpoint.name.partition("-")[2]
    return int(number) if number.isdigit() else -1


def _age(folder: Path) -> tuple[int, float]:
    """ms-swift counts its folders up: v0-20260102-030405, v1-..."""
    number = re.match(r"v(\d+)(-|$)", folder.name)
    return (int(number[1]) if number else -1, folder.stat().st_mtime)


def _read(log: Path, progress: Progress) -> _Reading:
    reading, done, total = _Reading(), 0, log.stat().st_size
    try:
        with log.open("rb") as lines:
            for line in _history(log) if log.name == STATE_NAME else lines:
                done += len(line)
                if not line.strip():
                    continue
                reading.lines += 1
                _take(line, reading)
                if reading.lines % 1000 == 0:
                    progress(done, total)
    except RunLogError:  # an OSError, too
        raise
    except OSError as error:
        raise RunLogError(f"{log} cannot be read: {error.strerror}.") from error
    return reading


def _history(state: Path) -> Iterator[bytes]:
    """The log in a ``trainer_state.json``, an entry a line. Raises RunLogError when it is none."""
    try:
        history = json.loads(state.read_bytes())["log_history"]
    except (ValueError, KeyError, TypeError):
        raise RunLogError(f"{state} cannot be read: it is no trainer state of transformers.") from None
    for entry in history:
        yield json.dumps(entry).encode()


def _take(line: bytes, reading: _Reading) -> None:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict):
        reading.corrupt += 1
        return
    for is_evaluation, prefix in ((False, PREFIX), (True, EVALUATION + PREFIX)):
        values = {
            name[len(prefix) :]: number
            for name, value in entry.items()
            if name.startswith(prefix) and (number := _number(value)) is not None
        }
        if not values:
            continue
        step = _step(entry, values)
        if step is None:
            reading.without_step += 1
        else:
            reading.add(Step(step, values, is_evaluation))


def _number(value: Any) -> float | None:
    """ms-swift writes numbers; some of its releases write them as text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _step(entry: dict[str, Any], values: dict[str, float]) -> int | None:
    said = next((entry[name] for name in STEPS if name in entry), "")
    number = _number(str(said).partition("/")[0])
    if number is None:
        number = values.get("policy_step")
    return int(number) if number is not None and math.isfinite(number) else None


def _words(folder: Path, log: Path, logs: Sequence[Path], reading: _Reading) -> Iterator[str]:
    if log.name == STATE_NAME:
        yield f"read from {log.relative_to(folder)}: what was logged after it is not in it."
    elif log.parent != folder:
        newer = [other.parent.name for other in logs[: logs.index(log)] if other.parent != folder]
        skipped = f", {_list(newer)} newer but without {PREFIX} lines" if newer else ""
        yield f"{log.parent.name} is the newest run of {folder} with {PREFIX} lines{skipped}."
    if reading.corrupt:
        lines = f"{plural(reading.corrupt, 'line')} of {reading.lines:,}"
        yield f"{lines} could not be read and {_are(reading.corrupt)} left out."
    if reading.without_step:
        yield f"{plural(reading.without_step, 'line')} without a step {_are(reading.without_step)} left out."
    if reading.repeated:
        were = "was" if reading.repeated == 1 else "were"
        yield f"{plural(reading.repeated, 'step')} {were} done again after a resume: the last time counts."


def _nothing(readings: dict[Path, _Reading]) -> str:
    """Why no log has any lines of ours."""
    log, reading = next(iter(readings.items()))
    others = f" (nor in {len(readings) - 1} more)" if len(readings) > 1 else ""
    if not any(each.lines for each in readings.values()):
        return f"{log} is empty{others}: the run ended before its first logging step."
    if all(each.corrupt == each.lines for each in readings.values()):
        return f"{log} is no log of a run{others}: none of its {plural(reading.lines, 'line')} is a JSON object."
    return (
        f"{log} has no {PREFIX} line in {reading.lines}{others}: the plugin was not loaded, or it stepped aside, which "
        f"the run's own output says. Train with {_how(log)}; `swift-lora-fix doctor` tells whether this environment "
        "can."
    )


def _how(log: Path) -> str:
    """How our numbers get into such a log."""
    if log.name == STATE_NAME:
        return "`import swift_lora_fix` before the trainer is made"
    return '--external_plugins "$(swift-lora-fix plugin)"'


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
