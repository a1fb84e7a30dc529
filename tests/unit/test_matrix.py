"""What the matrix (tests/matrix) takes for passed, and that its table says what the records say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.matrix import cells, device, running, table
from tests.support import rollout_server
from tests.support.driver import Run, this_python

CELL = cells.Cell("some/cell", "qwen2_5_vl", {})
SOUND = {
    "text": {"mean": 0.01, "base": 0.5},
    "media": {"mean": 0.02, "base": 0.4, "of": ["image"]},
    "base_changed": 0,
    "lora_changed": 0,
    "merges": 0,
}


def part(folder: Path, steps: list[int], log: str = "", agrees: float = 1, **changes: Any) -> Run:
    run = Run("cell", this_python(), folder, folder, True, returncode=0)
    run.output.mkdir(parents=True)
    (folder / "log.txt").write_text(log)
    (folder / "judge.jsonl").write_text("".join(f"{json.dumps({**SOUND, **changes, 'step': n})}\n" for n in steps))
    gates = [{"lora_sync/policy_step": step, "lora_sync/agrees": agrees} for step in steps]
    (run.output / "logging.jsonl").write_text("".join(f"{json.dumps(gate)}\n" for gate in gates))
    return run


PARTS = {"trained": [0, 1], "resumed": [2, 3]}


def found(folder: Path, **changes: Any) -> tuple[str, str]:
    return running.judge(CELL, [part(folder / "trained", [0, 1]), part(folder / "resumed", [2, 3], **changes)])


def test_four_sound_syncs_pass(tmp_path: Path) -> None:
    assert found(tmp_path) == ("passed", "")


def test_what_could_not_be_compared_is_not_in_what_passed(tmp_path: Path) -> None:
    runs = [part(tmp_path / name, steps, media=None, media_why_not="38 tokens") for name, steps in PARTS.items()]
    assert running.judge(CELL, runs) == ("passed", "in text; of media nothing could be compared: 38 tokens")


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"text": {"mean": 0.3, "base": 0.5}}, "text off by 0.3, without the adapter by 0.5"),
        ({"media": {"mean": 0.3, "base": 0.5, "of": ["image"]}}, "media off by 0.3"),
        ({"media": {"mean": 0.02, "base": 0.4, "without_towers": 0.03}}, "without the towers' LoRA by 0.03"),
        ({"media": None}, "no image in the prompts"),
        ({"media": {"mean": 0.02, "base": 0.4, "of": ["audio"]}}, "no image in the prompts"),
        ({"base_changed": 7}, "base_changed 7"),
        ({"lora_changed": 1}, "lora_changed 1"),
        ({"merges": 2}, "merges 2"),
        ({"agrees": 0}, "the plugin's gate says"),
        ({"log": "stepping aside: the tuner is 'full'"}, "stepping aside: the tuner"),
    ],
)
def test_what_is_not_sound_fails_and_is_named(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    outcome, why = found(tmp_path, **changes)
    assert outcome == "failing" and told in why


def test_a_stock_run_is_judged_by_the_numbers_alone(tmp_path: Path) -> None:
    stock = dataclasses.replace(CELL, stock=True)
    assert running.judge(stock, [part(tmp_path / "sound", [0, 1, 2, 3], agrees=0)]) == ("passed", "")
    outcome, why = running.judge(stock, [part(tmp_path / "drifting", [0, 1, 2, 3], base_changed=7)])
    assert outcome == "failing" and "base_changed 7" in why


def test_a_sync_that_nobody_judged_fails(tmp_path: Path) -> None:
    runs = [part(tmp_path / "trained", [0]), part(tmp_path / "resumed", [2, 3])]
    assert running.judge(CELL, runs) == ("failing", "judged at steps [0, 2, 3], not at each of 4")


@pytest.mark.parametrize(
    "line, outcome",
    [
        ("[rank0]: swift_lora_fix.errors.UnsupportedAdapterError: vLLM has no room", "refused"),
        ("swift_lora_fix.errors.PolicyMismatchError: it serves another one", "failing"),
        ("RuntimeError: CUDA", "failing"),
    ],
)
def test_a_run_that_ends_early_is_refused_or_failing(tmp_path: Path, line: str, outcome: str) -> None:
    run = part(tmp_path / "trained", [0], log=f"Traceback\n{line}\nChildFailedError: later\n")
    run.returncode = 1
    found, why = running.judge(CELL, [run])
    assert found == outcome and line.removeprefix("[rank0]: ") in why


def test_each_published_command_is_there_once_and_its_changes_are_said() -> None:
    published = json.loads(cells.PUBLISHED.read_text())["commands"]
    made = {cell.name: cell for cell in cells.published()}
    assert len(published) == len(made) == 18
    for command in published:
        cell = made[command["name"]]
        for name, value in command["arguments"].items():
            kept = str(cell.arguments.get(name)) == value
            assert kept or name in cell.changed, f"{cell.name}: --{name} {value} was changed in silence"


def test_the_servers_of_published_commands() -> None:
    made = {cell.name: cell for cell in cells.published()}
    node, game = made["grpo/multi_node/server_multi_node"], made["grpo/plugin/openenv/run_grpo_sudoku_server"]
    assert node.server == {} and node.mode == "adapter" and node.trainer == "zero2, server"
    assert game.server == {"multi_turn_scheduler": "slf_turns", "max_turns": 2}, "turns are made by the server"
    assert node.arguments["vllm_enable_lora"] is None and "vllm_enable_lora" in node.changed, "told to the server"
    assert made["grpo/external/moe_lora"].needs_gpu and made["grpo/external/moe_lora"].server == {}
    teacher = rollout_server.TeacherServer(Path("model"), Path("folder"), {"max_logprobs": 8}).command()
    assert teacher[1].endswith("deploy.py") and "--max_logprobs" in teacher and "--vllm_enable_lora" not in teacher


@pytest.mark.parametrize("visible", [(), ("3",), ("3", "5")], ids=["CPU", "one GPU", "two GPUs"])
def test_a_server_of_its_own_has_nccl_where_it_has_a_gpu_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: tuple[str, ...]
) -> None:
    monkeypatch.setattr(device, "gpus", lambda: visible)
    cell = cells.all_cells()["grpo/external/moe_lora"]
    run, server = running._part(cell, tmp_path, tmp_path, {}), running._server(cell, tmp_path, tmp_path)
    words = run.command()
    shims = [word for word in (*words, *server.command()) if "slf_cpu" in word or "shims" in word]
    assert run.gpu == server.gpu == bool(visible) != bool(shims)
    assert "torch.distributed.run" in words and f"--nproc_per_node={run.ranks}" in words, "DeepSpeed wants a launcher"
    assert run.ranks == (1 if visible else 2) and sum("slf_grow.py" in word for word in words) == 1
    assert run.environment.get("CUDA_VISIBLE_DEVICES") == ("3" if visible else None)
    assert server.environment.get("CUDA_VISIBLE_DEVICES") == (visible[-1] if visible else None)
    transports = {made.environment["SWIFT_LORA_FIX_TRANSPORT"] for made in (run, server)}
    assert transports == {"reload" if len(visible) == 1 else ""}


def test_the_4_bit_command_runs_on_one_gpu_with_its_own_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "gpus", lambda: ("0",))
    cell = cells.all_cells()["grpo/internal/qlora"]
    words = " ".join(running._part(cell, tmp_path, tmp_path, {}).command())
    for flag in ("--deepspeed zero2", "--quant_bits 4", "--bnb_4bit_quant_type nf4", "--sleep_level 1"):
        assert flag in words
    assert "--use_cpu" not in words and "--nproc_per_node=1" in words


def test_the_committed_table_is_that_of_the_records() -> None:
    assert (running.HERE / "README.md").read_text() == table.render(), "scripts/matrix --table"
