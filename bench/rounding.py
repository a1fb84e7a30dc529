"""python -m bench.rounding: what rounding the folded weights to bfloat16 costs, by how it is done.

A trained model (SmolLM2-135M) gets a LoRA that was trained for a few steps, made smaller until its update is as large
as some share of the spacing of the bfloat16 numbers around W (ulp; root mean squares over all merged weights). The
engine's weights are then W + s·B·A, rounded in one of these ways. All sums are in float32, so that nothing but the
rounding differs from the policy, which has W and the LoRA apart.

nearest: what stock's merge does. stochastic: what fused mode does (swift_lora_fix/policy/rounding.py), up or down by
chance, so that the mean is right. feedback: to the nearest, and what was lost is added to the next weight along the
input dimension.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from demo.trained.model import cached
from swift_lora_fix.policy.rounding import rounded

REPOSITORY = Path(__file__).resolve().parents[1]
SIZES = (0.01, 0.1, 0.3, 1.0)  # of the update, in ulp
TOKENS = 128
ULP = 2.0**-7  # bfloat16 has 8 significant bits

Round = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]  # W + update, W, a seed


def spacing(values: torch.Tensor) -> torch.Tensor:
    """The distance between two bfloat16 numbers next to ``values`` (float32)."""
    return torch.exp2(values.abs().clamp(min=torch.finfo(torch.float32).tiny).log2().floor()) * ULP


def nearest(values: torch.Tensor, plain: torch.Tensor, seed: int) -> torch.Tensor:
    return values.bfloat16().float()


def stochastic(values: torch.Tensor, plain: torch.Tensor, seed: int) -> torch.Tensor:
    return rounded(values, plain, torch.bfloat16, seed).float()


def feedback(values: torch.Tensor, plain: torch.Tensor, seed: int) -> torch.Tensor:
    rounded, lost = torch.empty_like(values), torch.zeros_like(values[:, 0])
    for column in range(values.shape[1]):
        wanted = values[:, column] + lost
        rounded[:, column] = wanted.bfloat16().float()
        lost = wanted - rounded[:, column]
    return rounded


WAYS: dict[str, Round] = {"nearest": nearest, "stochastic": stochastic, "feedback": feedback}


def text() -> str:
    """What this repository's English pages say, in their order."""
    return "\n".join(path.read_text() for path in sorted((REPOSITORY / "docs").glob("*.md")))


def trained(folder: Path, rank: int, steps: int) -> tuple[Any, torch.Tensor]:
    """The model with a LoRA on all linear layers, trained on text; and other tokens of it, (rows, TOKENS)."""
    import peft
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = torch.tensor(tokenizer(text())["input_ids"])
    rows = tokens[: len(tokens) // TOKENS * TOKENS].view(-1, TOKENS)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    for step in range(steps):
        batch = rows[4 * step : 4 * step + 4]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1} of {steps}: loss {float(loss):.3f}", flush=True)
    return model.eval(), rows[4 * steps :][:8]


def layers_of(model: Any) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


@torch.no_grad()
def measure(model: Any, rows: torch.Tensor) -> list[dict[str, Any]]:
    """One line for each size of the update and way to round."""

    def logprobs() -> torch.Tensor:
        return torch.cat([model(input_ids=row[None]).logits[0, :-1].log_softmax(-1) for row in rows])

    chosen = rows[:, 1:].reshape(-1, 1)
    layers = layers_of(model)
    weights = [layer.base_layer.weight.data.clone() for layer in layers]
    updates = [layer.get_delta_weight("default") for layer in layers]
    total = sum(float(update.square().sum()) for update in updates) ** 0.5
    ulps = sum(float(spacing(weight).square().sum()) for weight in weights) ** 0.5
    scalings = [copy.copy(layer.scaling) for layer in layers]
    with model.disable_adapter():
        base = logprobs()
    found = []
    for size in SIZES:
        share = size * ulps / total
        for layer, scaling in zip(layers, scalings):
            layer.scaling["default"] = scaling["default"] * share
        policy = logprobs()
        effect = float((base - policy).gather(1, chosen).abs().mean())
        for name, way in WAYS.items():
            off = along = 0.0
            for number, (layer, weight, update) in enumerate(zip(layers, weights, updates)):
                wanted = weight + share * update
                held = way(wanted, weight, number)
                off += float((held - wanted).square().sum())
                along += float(((held - weight) * share * update).sum())
                layer.base_layer.weight.data = held
            with model.disable_adapter():
                served = logprobs()
            for layer, weight in zip(layers, weights):
                layer.base_layer.weight.data = weight
            line = {"ulp": size, "way": name, "arrives": along / (share * total) ** 2}
            line["off"] = off**0.5 / (share * total)
            line["mean"] = float((served - policy).gather(1, chosen).abs().mean())
            line["kl"] = float((policy.exp() * (policy - served)).sum(-1).mean())
            line["effect"] = effect
            found.append(line)
            print(json.dumps(line), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.rounding", description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank (default 16)")
    parser.add_argument("--steps", type=int, default=20, help="training steps of the LoRA (default 20)")
    parser.add_argument("--model", type=Path, help="a folder with the model (default: made in .cache)")
    parser.add_argument("--json", type=Path, default=Path("build/bench_rounding.json"), help="where the record goes")
    args = parser.parse_args()
    model, rows = trained(args.model or cached(REPOSITORY / ".cache"), args.rank, args.steps)
    record = {"model": "SmolLM2-135M-Instruct", "rank": args.rank, "steps": args.steps, "tokens": rows.numel()}
    record.update(date=datetime.date.today().isoformat(), torch=torch.__version__, lines=measure(model, rows))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
