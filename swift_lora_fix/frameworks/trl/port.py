"""TRL's trainer and its ``VLLMGeneration`` behind the port: the only file that reads their attributes.

Each name of TRL's that is used here is in the contract (install/releases.py, ``TRL_ATTRIBUTES``), which is checked
before anything is patched. ``VLLMGeneration`` (trl/generation/vllm_generation.py) holds model, accelerator and engine,
but not its trainer: trainers are noted as they make their accelerator, which both share.
"""

from __future__ import annotations

import contextlib
import inspect
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from ...common.shadowing import do_nothing, shadowed
from ...common.words import Words
from ...engine.vllm.handle import ADAPTER_ID, ADAPTER_NAME, ADAPTER_PATH, EngineHandle
from ...errors import UnsupportedAdapterError, UnsupportedTrainerError
from ...install import releases
from ...policy import adapter as adapters
from ...policy.adapter import DEFAULT_ADAPTER
from ...proof.probe import evaluating, same_random_state
from ...server.trainer import folders
from ...trainer import Answer, Load, Scored, Weights

PUSH_BYTES = 1 << 30  # so much is handed to vLLM at once: whole copies of sharded weights must not pile up
WORDS = Words(
    framework="TRL",
    with_lora="SWIFT_LORA_FIX_MODE=adapter",
    without_lora="SWIFT_LORA_FIX_MODE=fused",
    rank="LoraConfig's r",
    targets="LoraConfig's target_modules",
    start="a PeftModel loaded from",
    resume="resume_from_checkpoint",
)

_trainers: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()  # by accelerator
_claims: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()  # by trainer
_ports: weakref.WeakKeyDictionary[Any, TrlTrainer] = weakref.WeakKeyDictionary()  # by the engine's ``LLM``

# While a ``VLLMGeneration`` is made: what its engine needs beyond TRL's own arguments.
engine_arguments: ContextVar[Mapping[str, Any] | None] = ContextVar("engine_arguments", default=None)
server_seen: ContextVar[ServerSeen | None] = ContextVar("server_seen", default=None)


def note_trainer(trainer: Any) -> None:
    """Called when a transformers ``Trainer`` has made its accelerator."""
    _trainers[trainer.accelerator] = weakref.ref(trainer)


def note_claim(trainer: Any, checkpoint: str | None) -> None:
    """Called when training begins: the checkpoint that it resumes from, resolved by transformers."""
    _claims[trainer] = checkpoint


def port_of_engine(llm: Any) -> TrlTrainer | None:
    """The port of the trainer that ``llm`` makes rollouts for; None for any other engine of this process."""
    port = _ports.get(llm)
    return port if port is not None and port._of() is not None else None


class TrlTrainer:
    """A trainer of TRL's with a colocated engine. generation: its ``VLLMGeneration``, which is not kept alive."""

    words = WORDS
    offloads_model = False
    is_asynchronous = False

    def __init__(self, generation: Any) -> None:
        self._of = weakref.ref(generation)
        self.attaches_adapter = True
        self.is_pushing = False  # TRL's own sync runs inside ours
        self.must_sync = False
        self.takes_folders = False  # its vLLM server does
        self._has_slept = False  # since the last sync

    @property
    def generation(self) -> Any:
        generation = self._of()
        assert generation is not None, "hooks are called by a generation that is alive"
        return generation

    @property
    def trainer(self) -> Any:
        """Raises UnsupportedTrainerError where no transformers ``Trainer`` has this accelerator."""
        found = _trainers.get(self.generation.accelerator)
        trainer = found() if found is not None else None
        if trainer is None:
            raise UnsupportedTrainerError(
                "This VLLMGeneration belongs to no transformers Trainer that was made after swift_lora_fix was armed. "
                "Import swift_lora_fix before the trainer is made."
            )
        return trainer

    # ---- who it is ---------------------------------------------------------------------------------------------------

    @property
    def model(self) -> torch.nn.Module:
        model: torch.nn.Module = self.generation.accelerator.unwrap_model(self.generation.model)
        return model

    @property
    def device(self) -> torch.device:
        device: torch.device = self.generation.accelerator.device
        return device

    @property
    def step(self) -> int:
        return int(self.trainer.state.global_step)

    @property
    def ranks(self) -> int:
        return int(self.generation.accelerator.num_processes)

    @property
    def is_main_rank(self) -> bool:
        return bool(self.generation.accelerator.is_main_process)

    # ---- what its user asked for -------------------------------------------------------------------------------------

    @property
    def uses_vllm(self) -> bool:
        return True  # VLLMGeneration is nothing else

    @property
    def tuner(self) -> str:
        return tuner_of(self.generation.model)

    @property
    def engine_place(self) -> str:
        return "folders" if self.takes_folders else str(self.generation.mode)

    @property
    def sharding(self) -> str:
        return sharding_of(self.generation.accelerator)

    @property
    def engine_has_lora(self) -> bool:
        return self.takes_folders or self.vllm_engine.vllm_config.lora_config is not None

    @property
    def sleep_level(self) -> int:
        """TRL's colocated engine sleeps at level 2 after each rollout."""
        return 2 if self.generation.enable_sleep_mode and not self.takes_folders else 0

    @property
    def output_folder(self) -> str:
        return str(self.trainer.args.output_dir)

    @property
    def resume_from(self) -> str | None:
        return _claims.get(self.trainer)

    # ---- its engine --------------------------------------------------------------------------------------------------

    @property
    def vllm_engine(self) -> Any:
        return self.generation.llm.llm_engine

    @property
    def server_client(self) -> Any:
        return self.generation.vllm_client if self.takes_folders and self.is_main_rank else None

    def note_engine(self) -> None:
        """Its ``LLM``, or the client of its server, was made: that one's rollouts are this trainer's."""
        asked = self.server_client if self.takes_folders else self.generation.llm
        if asked is not None:
            _ports[asked] = self

    def told_by_main_rank(self, problem: str) -> str:
        """What the main rank says. Only that one has a client of the server."""
        from accelerate.utils import broadcast_object_list

        told: list[str] = broadcast_object_list([problem], from_process=0)
        return told[0]

    @property
    def adapter_request_class(self) -> Any:
        """vLLM itself takes folders only: ``swift_lora_fix.memory`` takes tensors."""
        from ...memory.staged import StagedRequest

        return StagedRequest

    def attach_adapter(self, wanted: bool) -> None:
        self.attaches_adapter = wanted

    def request_fields(self) -> dict[str, Any]:
        """What each of its rollout requests gets beside TRL's own arguments."""
        if not (self.attaches_adapter and self.engine_has_lora):
            return {}
        from vllm.lora.request import LoRARequest

        return {"lora_request": LoRARequest(ADAPTER_NAME, ADAPTER_ID, ADAPTER_PATH)}

    # ---- what a probe must know --------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        from transformers import ProcessorMixin

        processing = self.generation.processing_class
        return processing.tokenizer if isinstance(processing, ProcessorMixin) else processing

    @property
    def longest_prompt(self) -> int | None:
        if not self.takes_folders:
            return int(self.vllm_engine.vllm_config.model_config.max_model_len)
        client = self.server_client
        return int(client.get_server_info()["model_config"]["max_model_len"]) if client is not None else None

    @property
    def template_tokens(self) -> int:
        return len(_ids(self.tokenizer, "a"))

    def scoring(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def encoded(self, answers: Sequence[Answer]) -> Mapping[str, Any]:
        """The ids alone, padded on the right: TRL's rollouts are token ids, too."""
        width = max(len(answer.prompt) + len(answer.tokens) for answer in answers)
        rows = torch.zeros(3, len(answers), width, dtype=torch.int64)
        ids, mask, labels = rows[0], rows[1], rows[2].fill_(-100)
        for row, answer in enumerate(answers):
            sequence = [*answer.prompt, *answer.tokens]
            ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = 1
            labels[row, len(answer.prompt) : len(sequence)] = torch.tensor(answer.tokens)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        base: Any = self.model
        known = inspect.signature(base.get_base_model().forward).parameters
        if "use_cache" in known:
            inputs["use_cache"] = False
        if "logits_to_keep" in known:  # the first one kept predicts the first label
            inputs["logits_to_keep"] = width - min(len(answer.prompt) for answer in answers) + 1
        return inputs

    # ---- what it is told to do ---------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Nothing: TRL lists the parameters anew at each sync."""

    def send_base(self, load: Callable[[Load, Weights], Any], note: Callable[[Weights], None]) -> None:
        """Send by TRL's own ``sync_weights``, which gathers and names the parameters on each release, and calls the
        engine's ``load_weights`` for each. Merging before, unmerging after are shadowed on the model meanwhile. The
        weights are handed on in groups, the last when TRL would unmerge: they are still gathered then."""
        generation, engine = self.generation, EngineHandle(self.vllm_engine)
        names = {trl_name(name): name for name, _ in generation.model.named_parameters() if "lora_" not in name}
        own_load = engine.model.load_weights
        waiting: dict[str, torch.Tensor] = {}

        def hand_on(*args: Any, **kwargs: Any) -> None:
            if waiting:
                note({names[name]: value for name, value in waiting.items() if name in names})
                load(lambda weights: own_load(weights.items()), dict(waiting))
                waiting.clear()

        def collect(weights: Any) -> None:
            waiting.update(weights)
            if sum(value.numel() * value.element_size() for value in waiting.values()) > PUSH_BYTES:
                hand_on()

        merges = {"merge_adapter": do_nothing, "unmerge_adapter": hand_on}
        self.is_pushing = True
        try:
            with shadowed(engine.model, load_weights=collect), shadowed(generation.model, **merges):
                type(generation).sync_weights(generation)
        finally:
            self.is_pushing = False

    def sync_again(self) -> None:
        self.must_sync = True

    def wake_weights(self) -> None:
        """As TRL's own sync does before it writes."""
        if self.sleep_level:
            self.generation.llm.wake_up(tags=["weights"])
            self.generation._llm_weights_sleeping = False  # from 1.10 on TRL looks at it

    def note_synced(self) -> None:
        self.must_sync = self._has_slept = False

    def note_generated(self) -> None:
        """TRL puts the engine to sleep at the end of each ``generate``."""
        self._has_slept = bool(self.sleep_level)

    @property
    def lacks_policy(self) -> bool:
        """Whether something was lost since the last sync."""
        return self.must_sync or self._has_slept

    def keeping_weights(self) -> contextlib.AbstractContextManager[None]:
        """Up to 1.9 TRL has a waking engine read its weights from the model's files again, after they were synced."""
        if not self.sleep_level:
            return contextlib.nullcontext()
        llm = self.generation.llm
        own = llm.collective_rpc

        def call(method: Any, *args: Any, **kwargs: Any) -> Any:
            return [] if method == "reload_weights" else own(method, *args, **kwargs)

        return shadowed(llm, collective_rpc=call)

    def wait_for_rollouts(self) -> None:
        raise AssertionError("nothing is asynchronous here")

    def metrics(self) -> MutableMapping[str, list[float]] | None:
        """TRL averages each list of ``_metrics[mode]`` into its log."""
        mode = "train" if self.trainer.model.training else "eval"
        metrics: MutableMapping[str, list[float]] = self.trainer._metrics[mode]
        return metrics


class TrlRollout:
    """One call of ``LLM.generate`` for a trainer. infer: the call itself; the rest are its arguments."""

    has_media = False  # images of a batch are not probed with here

    def __init__(
        self,
        trainer: TrlTrainer,
        infer: Callable[..., Any],
        prompts: Any,
        sampling_params: Any = None,
        **kwargs: Any,
    ) -> None:
        self._trainer, self._infer = trainer, infer
        self._prompts = list(prompts) if isinstance(prompts, (list, tuple)) else [prompts]
        self._sampling = sampling_params

    @property
    def has_requests(self) -> bool:
        return bool(self._prompts)

    @property
    def most_tokens(self) -> int:
        return len(self._prompts) * int(self._sampling.n or 1) * int(self._sampling.max_tokens or 0)

    def ask(self, prompts: Sequence[str], new_tokens: int, with_media: bool = False) -> list[Answer]:
        from vllm import SamplingParams

        how = SamplingParams(temperature=1.0, max_tokens=new_tokens, logprobs=0, seed=0)
        asked = [{"prompt_token_ids": _ids(self._trainer.tokenizer, text)} for text in prompts]
        answers = []
        for output in self._infer(asked, how, use_tqdm=False):
            answer = output.outputs[0]
            logprobs = tuple(float(at[token].logprob) for at, token in zip(answer.logprobs, answer.token_ids))
            answers.append(Answer(tuple(output.prompt_token_ids), tuple(answer.token_ids), logprobs))
        return answers

    def tokens_per_second(self, most_tokens: int) -> float:
        how = self._sampling.clone()
        how.max_tokens = min(most_tokens, int(how.max_tokens or most_tokens))
        started = time.perf_counter()
        outputs = self._infer(self._prompts, how, use_tqdm=False)
        seconds = time.perf_counter() - started
        return max(1, sum(len(answer.token_ids) for output in outputs for answer in output.outputs)) / seconds


class TrlServerRollout(TrlRollout):
    """One call of ``VLLMClient.generate``. infer: the call itself; the rest are its arguments."""

    def __init__(
        self,
        trainer: TrlTrainer,
        infer: Callable[..., Any],
        prompts: Sequence[Any],
        features: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(trainer, infer, prompts)
        self._arguments = kwargs

    @property
    def most_tokens(self) -> int:
        return len(self._prompts) * int(self._arguments["n"]) * int(self._arguments["max_tokens"])

    def ask(self, prompts: Sequence[str], new_tokens: int, with_media: bool = False) -> list[Answer]:
        how: dict[str, Any] = dict(n=1, temperature=1.0, max_tokens=new_tokens, logprobs=0)
        asked = [_ids(self._trainer.tokenizer, text) for text in prompts]
        said = self._infer(asked, **how, generation_kwargs={"seed": 0})
        parts = zip(said["prompt_ids"], said["completion_ids"], said["logprobs"])
        return [Answer(tuple(ids), tuple(answer), tuple(at[0] for at in logps)) for ids, answer, logps in parts]

    def tokens_per_second(self, most_tokens: int) -> float:
        raise AssertionError("a server has one mode")


class TrlBatch:
    """Rollouts that ``trainer`` has scored: what ``_generate_and_score_completions`` of its GRPO returns."""

    def __init__(self, trainer: Any, batch: Mapping[str, Any]) -> None:
        self.trainer, self._batch = trainer, batch

    @property
    def why_not(self) -> str:
        trainer, generation = self.trainer, self.trainer.vllm_generation
        if trainer.rollout_func is not None:
            return "a rollout_func of the user's made them"
        if "sampling_per_token_logps" not in self._batch:
            return "TRL did not get them from vLLM"
        if "old_per_token_logps" not in self._batch:
            return "TRL does not score its rollouts here (vllm_importance_sampling_correction is off)"
        if not generation.temperature > 0:
            return "they were sampled at temperature 0"
        asked = {name: getattr(generation, name) for name in _PLAIN} | generation.generation_kwargs
        altering = [f"{name} {asked[name]}" for name, plain in _PLAIN.items() if asked[name] not in plain]
        if asked.get("temperature", generation.temperature) != generation.temperature:
            altering.append(f"temperature {asked['temperature']}")
        return f"sampling altered them ({', '.join(altering)})" if altering else ""

    def scored(self, anew: bool) -> list[Scored]:
        batch = self._batch
        mask = batch["completion_mask"] * batch["tool_mask"] if "tool_mask" in batch else batch["completion_mask"]
        held = self._score() if anew else batch["old_per_token_logps"]
        return [Scored(batch["sampling_per_token_logps"], held, mask)]

    def _score(self) -> torch.Tensor:
        """Score again without dropout; the random state is restored. What the model gets beside the ids (images) is in
        the batch under the names that TRL's own scoring takes."""
        trainer, batch = self.trainer, self._batch
        score = trainer._get_per_token_logps_and_entropies
        ids, mask = (torch.cat([batch[f"prompt_{what}"], batch[f"completion_{what}"]], 1) for what in ("ids", "mask"))
        parameters, args = inspect.signature(score).parameters, trainer.args
        more = {name: batch[name] for name in parameters if name in batch}
        if "batch_size" in parameters:  # as TRL's own: the whole batch at a time may be more than the memory holds
            of_training, of_evaluation = args.per_device_train_batch_size, args.per_device_eval_batch_size
            more["batch_size"] = of_training if trainer.model.training else of_evaluation
        model, device = trainer.accelerator.unwrap_model(trainer.model), trainer.accelerator.device
        with torch.no_grad(), evaluating(model), same_random_state(device):
            logps: torch.Tensor = score(trainer.model, ids, mask, batch["completion_ids"].size(1), **more)[0]
        return logps


# Sampling settings with which vLLM samples from the model's own distribution at the temperature.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "top_k": (-1, 0, None),
    "top_p": (1.0,),
    "min_p": (None, 0.0),
    "repetition_penalty": (1.0,),
    "structured_outputs_regex": (None, ""),
}


def _ids(tokenizer: Any, text: str) -> list[int]:
    """A prompt of ``text``, with the tokenizer's chat template where it has one."""
    if not tokenizer.chat_template:
        return list(tokenizer(text)["input_ids"])
    said = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True)["input_ids"])


def trl_name(name: str) -> str:
    """The name under which TRL sends a parameter of a PEFT model (``_iter_named_params``)."""
    name = name.removeprefix("base_model.model.").replace(".base_layer", "")
    return name.replace("_checkpoint_wrapped_module.", "").replace("modules_to_save.default.", "")


def sharding_of(accelerator: Any) -> str:
    """How accelerate shards the model, where a sync from there was not tried yet; else ""."""
    if accelerator.distributed_type.name == "FSDP":
        return "FSDP"
    plugin = accelerator.state.deepspeed_plugin
    return "DeepSpeed ZeRO-3" if plugin is not None and plugin.zero_stage == 3 else ""


def tuner_of(model: Any) -> str:
    """``lora`` when a LoRA is trained; otherwise what is, in words."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return "full"
    config = model.peft_config.get(DEFAULT_ADAPTER)
    return config.peft_type.value.lower() if config is not None else f"none named {DEFAULT_ADAPTER}"


def lora_arguments(model: Any, limits: Sequence[int]) -> dict[str, Any]:
    """What vLLM's engine needs to hold ``model``'s adapter in LoRA layers.

    limits: the ranks that vLLM takes (``MaxLoRARanks``). Raises UnsupportedAdapterError when the rank is above them.
    """
    rank = _rank_of(model)
    room = releases.engine_rank(rank, limits)
    if room is None:
        raise UnsupportedAdapterError(
            f"The adapter has rank {rank}, and vLLM's LoRA layers end at {max(limits)}: train a smaller one, or leave "
            "SWIFT_LORA_FIX_MODE unset (fused mode)."
        )
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}


def _rank_of(model: Any) -> int:
    config = model.peft_config[DEFAULT_ADAPTER]
    return max([int(config.r), *map(int, (config.rank_pattern or {}).values())])


# values of PEFT's init_lora_weights (LoraConfig) that take the adapter's first values out of the base
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass
class ServerSeen:
    """What a trainer's vLLM server says while TRL connects to it. rank: the adapter's; 0: it is not to be asked.
    problem: why it does not get the adapter as a folder, "" if it does. is_said: it was logged."""

    rank: int
    problem: str
    is_said: bool = False

    def look(self, client: Any) -> bool:
        """Whether it gets the adapter as a folder."""
        if self.rank:
            self.problem = folders.why_not(client.base_url, client.get_server_info()["lora_config"], self.rank)
        return not self.problem


def server_of(model: Any, accelerator: Any, mode: str) -> ServerSeen:
    """What is known before TRL has connected. mode: SWIFT_LORA_FIX_MODE."""
    if tuner_of(model) != "lora":
        return ServerSeen(0, f"the tuner is {tuner_of(model)!r}, not 'lora'")
    if mode not in ("", "adapter"):
        return ServerSeen(0, f"SWIFT_LORA_FIX_MODE={mode!r} is for colocated engines")
    made = str(model.peft_config[DEFAULT_ADAPTER].init_lora_weights)
    if made.startswith(CHANGE_THE_BASE):
        return ServerSeen(0, f"init_lora_weights={made!r} changes the base, and the server has its model folder's")
    if sharding_of(accelerator):
        return ServerSeen(0, f"the model is sharded by {sharding_of(accelerator)}, and that is not tried with servers")
    try:
        adapters.bind(model, words=WORDS)
    except UnsupportedAdapterError as error:
        return ServerSeen(0, str(error).rstrip("."))
    return ServerSeen(_rank_of(model), "before TRL 1.11 servers are TRL's own, which have no LoRA layers")


@contextlib.contextmanager
def making_engine(arguments: Mapping[str, Any], server: ServerSeen | None = None) -> Iterator[None]:
    """Context in which an ``LLM`` is made with ``arguments`` beside its own, or a client connects to ``server``."""
    tokens = engine_arguments.set(arguments), server_seen.set(server)
    try:
        yield
    finally:
        engine_arguments.reset(tokens[0])
        server_seen.reset(tokens[1])
