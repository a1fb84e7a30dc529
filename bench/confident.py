"""Confident adapters resumed many times, for real: the checkpoint that could never be resumed.

    python -m bench.confident FOLDER [--adapters 5] [--resumes 4]

Each adapter is trained on a few texts of its own until its effect is several nats a token (bench/record_gaps, policy
``confident``), on the tests' tiny model. Each run of ms-swift starts from it (--adapters), learns nothing and makes two
syncs, which the gate examines. Prints a row a run, and ends with 1 if a run was stopped or a sync did not agree.

The engine is vLLM on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from tests.support.driver import Run, make_model, this_python

from .record_gaps import DENSE, Trainer, prompts_of, say

STEPS, RATE = 60, 2e-2
ROW = "{:>7} {:>6} {:>5} {:>9} {:>9} {:>7} {:>7} {:>9} {:>13}  {}"


def confident(model: Path, folder: Path, seed: int) -> Path:
    """An adapter that is sure of texts of its own."""
    import torch
    from transformers import AutoTokenizer

    torch.manual_seed(seed)
    trainer = Trainer(model, DENSE, quick=False)
    texts = prompts_of(AutoTokenizer.from_pretrained(model), 16 * (seed + 1), short=True)[-16:]
    trainer.learn(texts, STEPS, RATE)
    trainer.model.save_pretrained(folder)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--adapters", type=int, default=5)
    parser.add_argument("--resumes", type=int, default=4)
    args = parser.parse_args()
    model = make_model(this_python(), args.folder / "models")
    print(ROW.format("adapter", "resume", "sync", "mean", "largest", "noise", "ratio", "to base", "kind", "outcome"))
    wrong = 0
    for seed in range(args.adapters):
        adapter = confident(model, args.folder / f"adapter{seed}", seed)
        for number in range(args.resumes):
            wrong += not resumed(args.folder / f"run{seed}-{number}", model, adapter, seed, number)
    say(f"{args.adapters * args.resumes} resumes, {wrong} of them with an alarm or a look that was left open")
    return 1 if wrong else 0


def resumed(folder: Path, model: Path, adapter: Path, seed: int, number: int) -> bool:
    """Whether each sync of a run that starts from ``adapter`` agrees, on prompts of both kinds."""
    settings = {"adapters": adapter, "learning_rate": 0, "max_steps": 2, "save_steps": 100, "seed": 42 + number}
    rank = json.loads((adapter / "adapter_config.json").read_text())["r"]
    room = {"max_length": 700, "vllm_max_model_len": 768, "lora_rank": rank, "lora_alpha": 2 * rank}
    run = Run(f"run{seed}-{number}", this_python(), model, folder, True, arguments={**settings, **room}, probe=False)
    run.environment = {"SWIFT_LORA_FIX_GATE_EVERY": "1"}
    run.start()
    if run.returncode != 0:
        print(f"{seed:>7} {number:>6}  stopped: {run.log.strip().splitlines()[-1][:300]}", flush=True)
        return False
    sound = True
    for line in run.metrics():
        values = {name.removeprefix("lora_sync/"): value for name, value in line.items()}
        outcome = {1.0: "agrees", 0.5: "left open"}.get(values["agrees"], "WRONG")
        sound = sound and values["agrees"] == 1
        numbers = [
            f"{values[name]:.4g}" for name in ("mismatch_mean", "mismatch_max", "noise", "ratio", "control_base")
        ]
        step = int(values["policy_step"])
        print(ROW.format(seed, number, step, *numbers, "short", outcome), flush=True)
        print(ROW.format("", "", "", f"{values['long_mismatch_mean']:.4g}", "", "", f"{values['long_ratio']:.4g}", "",
                         "long", ""), flush=True)  # fmt: skip
    return sound


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
