"""The report on runs: the console script on logs as ms-swift writes them, and its chart."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from swift_lora_fix.tools.report import chart, reading
from swift_lora_fix.tools.report import view as verb
from tests.support.environments import Environment, swift_lora_fix

FLOOR = 0.0014


def entry(step: int, mismatch: float | None = 0.0013, text: bool = False, **changes: Any) -> dict[str, Any]:
    """One line of logging.jsonl, its numbers as such or as text; no mismatch: a step without a probe."""
    numbers: dict[str, Any] = {
        "seconds": 1.6e-3 if step > 1 else 1.4,
        "seconds_validate": 1e-4,
        "seconds_write": 3.8e-4,
        "seconds_caches": 9.8e-4,
        "seconds_wait": 5e-5,
        "seconds_audit": 2e-4,
        "bytes": 323e6,
        "policy_step": step - 1,
    }
    if mismatch is not None:
        control = 0.02 * step if step > 1 else FLOOR
        numbers.update(mismatch_mean=mismatch, mismatch_max=9 * mismatch, mismatch_kl=mismatch**2, noise_floor=FLOOR)
        numbers.update(control_base=control, control_double=0.8 * control, distinguishable=float(step > 1))
        agrees = float(mismatch <= 2 * FLOOR)
        numbers.update(noise=FLOOR, ratio=mismatch / FLOOR, agrees=agrees, seconds_gate=0.2, probes=1.0)
        numbers.update(against_base=6.0 * step, against_double=5.0 * step, slope=1.0)
    numbers.update(changes)
    ours = {f"lora_sync/{name}": f"{value:.8f}" if text else value for name, value in numbers.items()}
    return {"loss": -6e-08, "reward": 0.28, **ours, "global_step/max_steps": f"{step}/40", "elapsed_time": "4s"}


STOCK = [{"loss": 0.1, "global_step/max_steps": f"{step}/4"} for step in (1, 2, 3)]
END = {"train_runtime": 5.1, "global_step/max_steps": "40/40"}


def write(folder: Path, lines: Iterable[dict[str, Any] | str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "logging.jsonl").write_text(text)
    return folder


def words(text: str) -> str:
    return " ".join(text.split())


def pixels(chart: Path) -> Any:
    from matplotlib import image

    assert chart.read_bytes().startswith(b"\x89PNG")
    return image.imread(chart)[..., :3]


def has_colour(picture: Any, colour: str) -> bool:
    from matplotlib import colors

    return bool((abs(picture - colors.to_rgb(colour)).max(axis=-1) < 0.02).sum() > 30)


@pytest.mark.parametrize("text", [False, True])
def test_a_run_that_is_right(tmp_path: Path, text: bool) -> None:
    lines = [entry(step, 0.0013 + step * 1e-5 if step % 2 else None, text) for step in range(1, 41)]
    done = swift_lora_fix("report", write(tmp_path / "run", [*lines, END]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "", "no progress for what takes a moment"
    said = words(done.stdout)
    assert (
        "40 with numbers, 1 to 40" in said and "20, of which 19 could tell a wrong policy, 0 wrong, 0 left open" in said
    )
    assert "served the trainer's policy at every step that could tell (19 of 20 probed)" in said
    assert f"at most {(0.0013 + 39e-5) / FLOOR:.2f} times the noise of its own numerics, at step 39." in said
    assert "evidence: not no LoRA 126 nats a look (median), 12 decide" in said, said
    assert "the engine stands at 1.000 from the plain base, 0, to the policy, 1 (median)" in said
    assert "time of a sync 1.6 ms (median), longest 1.40 s at step 1" in said
    assert "write 0.38 ms, caches 0.98 ms, wait 0.05 ms, rest 0.09 ms, audit 0.2 ms" in said
    assert "323.0 MB a sync" in said and "0.2 s" not in said and "200 ms (median), at 20 of 40 steps" in said
    picture = pixels(tmp_path / "run" / "lora_sync.png")
    height, width, _ = picture.shape
    assert 900 <= width <= 2000 and 700 <= height <= 2000
    for colour in (chart.MISMATCH, chart.BASE, chart.DOUBLE, *chart.STAGE_COLOURS.values()):
        assert has_colour(picture, colour), colour
    assert (picture.min(axis=-1) < 0.99).any(axis=0).mean() > 0.8, "the axes fill the width"
    assert (picture[:, -2:] > 0.99).all() and (picture[:, :2] > 0.99).all(), "nothing runs over the edge"


def test_steps_with_another_policy(tmp_path: Path) -> None:
    lines = [entry(step, {7: 0.14, 8: math.nan}.get(step, 0.0013)) for step in range(1, 12)]
    done = swift_lora_fix("report", write(tmp_path, lines), "--out", tmp_path / "charts" / "mine.png")
    assert done.returncode == 1, done.stderr
    assert "did NOT serve the trainer's policy at 2 probed steps, the worst at step 8 (nan times" in words(done.stdout)
    assert has_colour(pixels(tmp_path / "charts" / "mine.png"), chart.BAD)
    assert not (tmp_path / "lora_sync.png").exists()


@pytest.mark.parametrize(
    "lines, told",
    [
        ([entry(step, distinguishable=0.0) for step in (1, 2, 3)], "at none of the 3 probed steps"),
        ([entry(step, None) for step in (1, 2, 3)], "no step was probed"),
    ],
)
def test_nothing_proved(tmp_path: Path, lines: list[dict[str, Any]], told: str) -> None:
    done = swift_lora_fix("report", write(tmp_path, lines))
    assert done.returncode == 1 and "Not proved: " in done.stdout and told in words(done.stdout)
    assert pixels(tmp_path / "lora_sync.png").size


@pytest.mark.parametrize(
    "lines, told",
    [
        (None, "has no logging.jsonl"),
        ([], "is empty: the run ended before its first logging step"),
        (STOCK, 'no lora_sync/ line in 3: the plugin was not loaded, .* --external_plugins "$(swift-lora-fix plugin)"'),
        (["[1, 2]", "{", "step 3"], "is no log of a run: none of its 3 lines is a JSON object"),
    ],
)
def test_logs_with_nothing_in_them(tmp_path: Path, lines: list[Any] | None, told: str) -> None:
    if lines is not None:
        write(tmp_path, lines)
    done = swift_lora_fix("report", tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    for part in told.split(".*"):
        assert part.strip() in words(done.stderr)
    assert not list(tmp_path.glob("*.png"))


def test_folders_that_are_none(tmp_path: Path) -> None:
    done = swift_lora_fix("report", tmp_path / "nowhere")
    assert done.returncode == 2 and "nowhere does not exist" in words(done.stderr)
    log = write(tmp_path, [entry(2)]) / "logging.jsonl"
    done = swift_lora_fix("report", log)
    assert done.returncode == 2 and "is no folder: name the run's output folder" in words(done.stderr)
    done = swift_lora_fix("report", tmp_path, "--out", log / "chart.png")
    assert done.returncode == 2 and "cannot be written" in words(done.stderr) and "--out" in done.stderr


def write_checkpoint(folder: Path, step: int, lines: Iterable[dict[str, Any]]) -> Path:
    """A checkpoint of transformers', with the run's log so far: as TRL leaves it."""
    history = [{**line, "step": int(line["global_step/max_steps"].partition("/")[0])} for line in lines]
    for line in history:
        del line["global_step/max_steps"]
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": history}))
    return checkpoint


def test_a_run_of_trls_is_read_from_its_newest_checkpoint(tmp_path: Path) -> None:
    for last in (2, 10, 4):
        write_checkpoint(tmp_path, last, [entry(step) for step in range(1, last + 1)])
    done = swift_lora_fix("report", tmp_path)
    assert done.returncode == 0 and "at every step that could tell (9 of 10 probed)" in words(done.stdout)
    assert "read from checkpoint-10/trainer_state.json" in words(done.stdout)
    assert (tmp_path / "lora_sync.png").is_file()
    one = swift_lora_fix("report", tmp_path / "checkpoint-2")
    assert one.returncode == 0 and "(1 of 2 probed)" in words(one.stdout)


def test_a_run_of_trls_with_nothing_of_ours(tmp_path: Path) -> None:
    state = write_checkpoint(tmp_path, 3, STOCK) / "trainer_state.json"
    done = swift_lora_fix("report", tmp_path)
    assert done.returncode == 2 and "no lora_sync/ line in 3" in words(done.stderr)
    assert "`import swift_lora_fix` before the trainer is made" in words(done.stderr)
    state.write_text("{")
    done = swift_lora_fix("report", tmp_path)
    assert done.returncode == 2 and "is no trainer state of transformers" in words(done.stderr)


def test_what_cannot_be_read_is_left_out_and_counted(tmp_path: Path) -> None:
    torn = json.dumps(entry(5))[:40]
    nowhere = {name: value for name, value in entry(9).items() if name not in ("global_step/max_steps",)}
    nowhere.pop("lora_sync/policy_step")
    done = swift_lora_fix("report", write(tmp_path, [entry(2), torn, "\x00\x00", "", nowhere, "7", entry(3)]))
    said = words(done.stdout)
    assert done.returncode == 0 and "2 with numbers, 2 to 3" in said
    assert "3 lines of 6 could not be read and are left out." in said and "1 line without a step is left out." in said


def test_steps_that_a_resume_did_again(tmp_path: Path) -> None:
    first = [entry(step, 0.5) for step in range(1, 11)]
    again = [entry(step) for step in range(6, 13)]
    report = reading.read(write(tmp_path, [*first[:5], *first[5:], *again]))
    assert [step.step for step in report.steps] == list(range(1, 13))
    assert [step.step for step in report.wrong] == [1, 2, 3, 4, 5], "the last time counts"
    assert report.words == ("4 steps were done again after a resume: the last time counts.",)


def test_the_newest_run_with_lines_of_ours(tmp_path: Path) -> None:
    write(tmp_path / "v2-20260102-030405", [entry(2)])
    write(tmp_path / "v10-20260102-040506", [entry(3)])
    write(tmp_path / "v11-20260103-010101", STOCK)
    (tmp_path / "v12-20260103-020202").mkdir()
    os.utime(tmp_path / "v2-20260102-030405")  # what is newest, the number says
    done = swift_lora_fix("report", tmp_path)
    said = words(done.stdout)
    assert done.returncode == 0, done.stderr
    assert "v10-20260102-040506 is the newest run of" in said and "1 with numbers, 3 to 3" in said
    assert "v11-20260103-010101 newer but without lora_sync/ lines" in said
    assert (tmp_path / "lora_sync.png").is_file()


@pytest.mark.parametrize("mismatch, status, said", [(0.0013, 0, "The engine served"), (0.14, 1, "did NOT serve")])
def test_without_matplotlib_there_is_a_verdict_and_no_chart(
    tmp_path: Path, mismatch: float, status: int, said: str
) -> None:
    environment = Environment(tmp_path / "environment").without("matplotlib")
    done = environment.run("report", write(tmp_path / "run", [entry(2, mismatch)]))
    assert done.returncode == status and said in words(done.stdout), done.stdout + done.stderr
    assert "No chart" in done.stderr and "pip install matplotlib" in words(done.stderr)
    assert "Chart:" not in done.stdout and not list((tmp_path / "run").glob("*.png"))


def evaluation(step: int, mismatch: float | None = 0.0013, **changes: Any) -> dict[str, Any]:
    """The line of an evaluation after this step: ms-swift puts ``eval_`` before every name."""
    numbers = {f"eval_{name}": value for name, value in entry(step, mismatch, **changes).items() if "/max" not in name}
    return {**numbers, "global_step/max_steps": f"{step}/40"}


def test_a_mismatch_in_an_evaluation_is_one(tmp_path: Path) -> None:
    lines = [entry(1), entry(2), evaluation(2, 1.0, policy_step=2.0), entry(3), entry(4), evaluation(4)]
    done = swift_lora_fix("report", write(tmp_path, lines))
    said = words(done.stdout)
    assert done.returncode == 1, said
    assert "4 with numbers, 1 to 4, and 2 evaluations" in said
    assert "probed 6, of which 5 could tell a wrong policy, 1 wrong, 0 left open" in said
    assert "the worst at the evaluation after step 2 (714.3 times what its own numerics explain" in said
    assert has_colour(pixels(tmp_path / "lora_sync.png"), chart.BAD)


def test_an_evaluation_counts_beside_the_step_it_follows(tmp_path: Path) -> None:
    lines = [evaluation(0, None), entry(1), entry(2, 0.002), evaluation(2, 0.0027), entry(3, 0.0014)]
    report = reading.read(write(tmp_path, lines))
    assert [(step.step, step.is_evaluation) for step in report.steps] == [
        (0, True), (1, False), (2, False), (2, True), (3, False),
    ]  # fmt: skip
    assert [step.values.get("mismatch_mean") for step in report.steps] == [None, 0.0013, 0.002, 0.0027, 0.0014]
    assert "at most 1.93 times the noise of its own numerics, at the evaluation after step 2." in report.verdict
    again = [*lines, entry(2, 0.001), evaluation(2, 0.0011), entry(3, 0.0012)]  # a resume did them again
    report = reading.read(write(tmp_path, again))
    assert [step.values.get("mismatch_mean") for step in report.steps] == [None, 0.0013, 0.001, 0.0011, 0.0012]


def test_only_evaluations(tmp_path: Path) -> None:
    done = swift_lora_fix("report", write(tmp_path, [evaluation(2), evaluation(4)]))
    assert done.returncode == 0 and "0 with numbers, and 2 evaluations" in words(done.stdout), done.stdout + done.stderr


def test_a_step_that_the_probe_left_open_is_said(tmp_path: Path) -> None:
    done = swift_lora_fix("report", write(tmp_path, [entry(2), entry(3, agrees=0.5), entry(4)]))
    assert done.returncode == 0 and "(2 of 3 probed)" in words(done.stdout), done.stdout
    assert "1 probed step left it open." in words(done.stdout)


@pytest.mark.parametrize("quiet_seconds, shown", [(-1.0, True), (60.0, False)])
def test_progress_is_shown_for_what_takes_long(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    quiet_seconds: float,
    shown: bool,
) -> None:
    arguments = argparse.Namespace(folder=write(tmp_path, map(entry, range(1, 2101))), out=None)
    monkeypatch.setattr(verb, "QUIET_SECONDS", quiet_seconds)
    assert verb.run(arguments) == 0
    captured = capsys.readouterr()
    assert ("Reading the log" in captured.err) is shown and "Reading the log" not in captured.out
