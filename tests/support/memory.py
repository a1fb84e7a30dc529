"""Runs in a process of its own: one real vLLM engine on the CPU, and everything that is asserted on it.

    python -m tests.support.memory KIND[,KIND] MODEL_FOLDER UPDATES

KIND: in-process (alone), processes, async, two-workers, async-two-workers. Prints one JSON object for each. ``equal``
compares token ids and logprobs, exactly.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.support import shm

KINDS = sys.argv[1].split(",") if __name__ == "__main__" else []
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0" if KINDS == ["in-process"] else "1",
    VLLM_PLUGINS="swift_lora_fix",
    VLLM_CPU_KVCACHE_SPACE="1",
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
)
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPTS = ["Count to three. Count to three. Count to three.", "What is two plus two? And what is three plus four?"]
MAX_RANK = 16
OPTIONS = dict(
    enable_lora=True,
    max_loras=1,
    max_lora_rank=MAX_RANK,
    enforce_eager=True,
    max_model_len=128,
    max_num_seqs=4,
    enable_prefix_caching=True,
    **({"gpu_memory_utilization": 0.3} if os.environ.get("SLF_GPU") else {}),
)


def peft_model(model: Path, seed: int, **config: Any) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model)
    adapted = get_peft_model(base, LoraConfig(**{"r": 8, "lora_alpha": 12, "target_modules": TARGETS, **config}))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape) * 0.1
    return adapted


class Engine:
    """One way to talk to LLM and AsyncLLM; results are (token ids, logprobs) for each prompt."""

    def __init__(self, kind: str, model: Path) -> None:
        from vllm import SamplingParams

        self.params = SamplingParams(max_tokens=8, temperature=0, logprobs=2)
        self.loop: Any = None
        options = dict(OPTIONS, tensor_parallel_size=2 if kind.endswith("two-workers") else 1)
        if kind.startswith("async"):
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

            self.loop = asyncio.new_event_loop()
            arguments = AsyncEngineArgs(str(model), **options)
            self.engine = self.loop.run_until_complete(self._start(AsyncLLM, arguments))
        else:
            from vllm import LLM

            self.llm = LLM(str(model), **options)
            self.engine = self.llm.llm_engine

    @staticmethod
    async def _start(kind: Any, arguments: Any) -> Any:
        return kind.from_engine_args(arguments)

    def wait(self, value: Any) -> Any:
        return self.loop.run_until_complete(value) if asyncio.iscoroutine(value) else value

    def add(self, request: Any) -> Any:
        return self.wait(self.engine.add_lora(request))

    def generate(self, requests: Any) -> list[Any]:
        """With one request for all prompts, or one for each of them."""
        requests = requests if isinstance(requests, list) else [requests] * len(PROMPTS)
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(requests))]
        if self.loop is None:
            outputs = self.llm.generate(prompts, self.params, lora_request=requests, use_tqdm=False)
        else:
            outputs = self.loop.run_until_complete(self._together(prompts, requests))
        return [_plain(output) for output in outputs]

    async def _together(self, prompts: list[str], requests: list[Any]) -> list[Any]:
        async def one(prompt: str, request: Any) -> Any:
            self.count = getattr(self, "count", 0) + 1
            stream = self.engine.generate(prompt, self.params, f"r{self.count}", lora_request=request)
            return [output async for output in stream][-1]

        return list(await asyncio.gather(*(one(*pair) for pair in zip(prompts, requests))))


def _plain(output: Any) -> Any:
    first = output.outputs[0]
    return [list(first.token_ids), [{str(k): v.logprob for k, v in step.items()} for step in first.logprobs]]


def segments_open() -> int:
    """Segments that this process has not given back."""
    gc.collect()
    inodes = set()
    for name in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{name}"
        with contextlib.suppress(OSError):
            if os.readlink(path).startswith("/memfd:swift-lora-fix"):
                inodes.add(os.stat(path).st_ino)
    return len(inodes)


def family() -> list[int]:
    """This process and its descendants."""
    found, waiting = [], [os.getpid()]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                waiting += map(int, task.read_text().split())
    return found


def memory_mib(pids: list[int]) -> float:
    """Their resident memory, shared memory of theirs included."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/status").read_text()
            total += int(text.split("VmRSS:")[1].split()[0])
    return total / 1024


def refusal(engine: Engine, request: Any, call: str) -> list[str]:
    try:
        getattr(engine, call)(request)
    except Exception as error:
        # AsyncLLM.generate says EngineGenerateError() from whatever it was
        error = error.__cause__ if type(error).__name__ == "EngineGenerateError" and error.__cause__ else error
        return [type(error).__name__, str(error)]
    return ["", "not refused"]


def adapters(engine: Engine, model: Path, found: dict[str, Any]) -> Any:
    """Tensors against folders; returns the tensors."""
    from vllm.lora.request import LoRARequest

    from swift_lora_fix.memory import LoRATensorRequest, from_peft_model, from_safetensors

    folders, trained = [], []
    for seed in (1, 2):
        trained.append(peft_model(model, seed))
        folders.append(model.parent / f"adapter-{seed}")
        trained[-1].save_pretrained(folders[-1])
    want = [engine.generate(LoRARequest(f"folder-{i}", 10 + i, str(folder))) for i, folder in enumerate(folders)]
    memory = from_safetensors(folders[0], lora_name="memory", lora_int_id=20)
    found["equal"] = engine.generate(memory) == want[0]
    found["again"] = engine.generate(memory) == want[0]
    found["peft"] = engine.generate(from_peft_model(trained[0], lora_int_id=21)) == want[0]
    found["differ"] = len({json.dumps(x) for x in [*want, engine.generate(None)]}) == 3

    # one name and id, another policy: neither slots nor cached KV blocks of the old one
    other = from_safetensors(folders[1], lora_name="memory", lora_int_id=20)
    engine.generate(memory)  # more ids were used than max_cpu_loras: vLLM evicted it meanwhile
    found["conflict"] = refusal(engine, other, "generate")
    replacing = from_safetensors(folders[1], lora_name="memory", lora_int_id=20, load_inplace=True)
    engine.add(replacing)
    found["replaced"] = engine.generate(replacing) == want[1]

    # two adapters in turn where there is room for one: each is evicted while requests for it wait
    second = from_safetensors(folders[0], lora_name="second", lora_int_id=22)
    both = engine.generate([replacing, second] * 3)
    alone = [engine.generate([r] * 6) for r in (replacing, second)]
    found["evicted"] = [both[i] == alone[i % 2][i] for i in range(6)]
    found["open"] = segments_open()

    bf16 = {name: tensor.bfloat16() for name, tensor in memory.content.tensors.items()}
    untouched = {name: tensor.clone() for name, tensor in bf16.items()}
    engine.add(LoRATensorRequest("bf16", 23, trained[0].peft_config["default"], bf16))
    found["untouched"] = all(bool((bf16[name] == untouched[name]).all()) for name in bf16)
    return memory.content.config, memory.content.tensors, want[0]


def refusals(engine: Engine, config: Any, tensors: Any, want: Any, found: dict[str, Any]) -> None:
    import torch

    from swift_lora_fix.memory import LoRATensorRequest

    wrong = {name.replace("q_proj", "nope"): tensor for name, tensor in tensors.items()}
    nan = {name: tensor.clone() for name, tensor in tensors.items()}
    next(iter(nan.values()))[0, 0] = float("nan")
    tall = {n: torch.cat([t] * 4, dim=0 if "lora_A" in n else 1) for n, t in tensors.items()}
    cases = {
        "rank": ({**config, "r": 4 * config["r"]}, tall),
        "module": (config, wrong),
        "dora": ({**config, "use_dora": True}, tensors),
        "nan": (config, nan),
    }
    for call in ("add", "generate"):
        for name, (bad_config, bad) in cases.items():
            request = LoRATensorRequest(name, 30, bad_config, bad, load_inplace=True)
            found[f"{name}-{call}"] = refusal(engine, request, call)
    found["after"] = engine.generate(LoRATensorRequest("after", 31, config, tensors)) == want
    found["open_after"] = segments_open()


def updates(engine: Engine, config: Any, tensors: Any, count: int, found: dict[str, Any]) -> None:
    """Many policies under one id; the last one is what is served."""
    import torch

    from swift_lora_fix.memory import LoRATensorRequest, sending, update

    for adapter in (10, 11, 20, 21, 22, 23, 31):
        engine.wait(engine.engine.remove_lora(adapter))
    pids = family()
    before, memory, latest = shm.names(), [], tensors
    start = time.perf_counter()
    for step in range(count):
        latest = {name: tensor + 0.02 * torch.randn(tensor.shape) for name, tensor in tensors.items()}
        engine.wait(update(getattr(engine, "llm", engine.engine), LoRATensorRequest("policy", 40, config, latest)))
        if step % 10 == 0:
            memory.append(memory_mib(pids))
    found["update_seconds"] = (time.perf_counter() - start) / count
    found["path"] = [type(writer).__name__ for writer in sending.ledger_of(engine.engine).writers.values()]
    found["growth_mib"] = max(memory[-5:]) - max(memory[len(memory) // 4 : len(memory) // 4 + 5])
    found["new_in_shm"] = sorted(shm.names() - before)
    request = LoRATensorRequest("policy", 40, config, latest)
    served = engine.generate(_as_loaded(engine, request))
    found["updated"] = served == engine.generate(LoRATensorRequest("sent", 41, config, latest))
    found["open_last"] = segments_open()


def _as_loaded(engine: Engine, request: Any) -> Any:
    """The plain request for what the engine holds under this id."""
    from swift_lora_fix.memory import sending

    return sending.ledger_of(engine.engine).loaded[request.lora_int_id][1]


def killed(engine: Engine, config: Any, tensors: Any, found: dict[str, Any]) -> None:
    """The engine dies after the tensors were written and before it has loaded them; then it is used again."""
    from swift_lora_fix.memory import LoRATensorRequest

    others = [pid for pid in family() if pid != os.getpid()]
    for pid in others:
        os.kill(pid, signal.SIGSTOP)
    before = shm.names()
    request = LoRATensorRequest("late", 50, config, tensors)
    # vLLM's own call never returns when its engine dies meanwhile (SyncMPClient.call_utility), so not in this thread
    threading.Thread(target=refusal, args=(engine, request, "add"), daemon=True).start()
    deadline = time.monotonic() + 300
    while not segments_open() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)
    found["open_between"] = segments_open()
    for pid in others:
        os.kill(pid, signal.SIGKILL)
    # a thread of vLLM's notices that; a call before it does would hang as the one above
    while not engine.engine.engine_core.resources.engine_dead:
        time.sleep(0.05)
    found["dead"] = refusal(engine, LoRATensorRequest("later", 51, config, tensors), "add")
    found["open_dead"] = segments_open()  # of the call that vLLM leaves hanging
    found["new_in_shm_dead"] = sorted(shm.names() - before)


def cancelled(engine: Engine, config: Any, tensors: Any, found: dict[str, Any]) -> None:
    """The task that sends is cancelled while the engine stands still."""
    from swift_lora_fix.memory import LoRATensorRequest

    others = [pid for pid in family() if pid != os.getpid()]
    for pid in others:
        os.kill(pid, signal.SIGSTOP)
    request = LoRATensorRequest("late", 50, config, tensors)
    try:
        engine.loop.run_until_complete(asyncio.wait_for(engine.engine.add_lora(request), 1.0))
    except asyncio.TimeoutError:
        found["cancelled"] = True
    found["open_cancelled"] = segments_open()
    for pid in others:
        os.kill(pid, signal.SIGCONT)


def observe(kind: str, model: Path, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": kind}
    seconds: dict[str, float] = {}

    def timed(stage: Any, *arguments: Any) -> Any:
        start = time.perf_counter()
        result = stage(*arguments)
        seconds[stage.__name__] = round(time.perf_counter() - start, 1)
        return result

    engine = timed(Engine, kind, model)
    config, tensors, want = timed(adapters, engine, model, found)
    timed(refusals, engine, config, tensors, want, found)
    timed(updates, engine, config, tensors, count, found)
    if kind == "processes":
        timed(killed, engine, config, tensors, found)
    if kind == "async":
        timed(cancelled, engine, config, tensors, found)
    found["swift"] = sorted(name for name in sys.modules if name.split(".")[0] == "swift")
    for pid in family():
        if pid != os.getpid():
            os.kill(pid, signal.SIGKILL)  # vLLM's own shutdown takes seconds
    return {**found, "seconds": seconds}


def main() -> None:
    for kind in KINDS:
        print("MEMORY " + json.dumps(observe(kind, Path(sys.argv[2]), int(sys.argv[3]))), flush=True)
    os._exit(0)


if __name__ == "__main__":
    import swift_lora_fix.memory  # noqa: F401  before vLLM

    main()
