"""TRL's trainer and its ``VLLMGeneration`` behind the port. Only this folder reads their attributes.

Each name of TRL's that it uses is in the contract (install/releases.py, ``TRL_ATTRIBUTES``), which is checked before
anything is patched. ``VLLMGeneration`` (trl/generation/vllm_generation.py) holds model, accelerator and engine,
but not its trainer: trainers are noted as they make their accelerator, which both share.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from ...common.shadowing import do_nothing, shadowed
from ...engine.vllm.handle import ADAPTER_ID, ADAPTER_NAME, ADAPTER_PATH, EngineHandle
from ...errors import UnsupportedTrainerError
from ...trainer import Answer, Load, Weights
from .starting import sharding_of, tuner_of
from .words import WORDS

PUSH_BYTES = 1 << 30  # so much is handed to vLLM at once: whole copies of sharded weights must not pile up

_trainers: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()  # by accelerator
_claims: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()  # by trainer
_ports: weakref.WeakKeyDictionary[Any, TrlTrainer] = weakref.WeakKeyDictionary()  # by the engine's ``LLM``


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
        self.told_of_prompts = False  # that TRL gives vLLM other prompts about images than it scores
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

    def completed(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a request, with `request_fields` where they say nothing else. (vLLM's older ``LLM.chat``
        passes ``lora_request=None`` on to ``LLM.generate``.)"""
        given = {name: value for name, value in kwargs.items() if name != "lora_request" or value is not None}
        return {**self.request_fields(), **given}

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
        return len(self.prompt_ids("a"))

    def prompt_ids(self, text: str) -> list[int]:
        """A prompt of ``text``, with the tokenizer's chat template where it has one that takes a user's message alone:
        some raise without a system's."""
        tokenizer, said = self.tokenizer, [{"role": "user", "content": text}]
        if tokenizer.chat_template:
            with contextlib.suppress(Exception):
                made = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True)
                return list(made["input_ids"])
        return list(tokenizer(text)["input_ids"])

    def image_prompt(self, text: str) -> str:
        """A prompt of ``text`` about one image, as the processor's chat template writes it."""
        said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        return str(self.generation.processing_class.apply_chat_template(said, add_generation_prompt=True))

    def scoring(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def encoded(self, answers: Sequence[Answer]) -> Mapping[str, Any]:
        """The ids, padded on the right: TRL's rollouts are token ids, too. For prompts about an image also what the
        processor makes of it."""
        width = max(len(answer.prompt) + len(answer.tokens) for answer in answers)
        rows = torch.zeros(3, len(answers), width, dtype=torch.int64)
        ids, mask, labels = rows[0], rows[1], rows[2].fill_(-100)
        for row, answer in enumerate(answers):
            sequence = [*answer.prompt, *answer.tokens]
            ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = 1
            labels[row, len(answer.prompt) : len(sequence)] = torch.tensor(answer.tokens)
        seen = self._seen(answers, width) if answers[0].request is not None else {}
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels, **seen}
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        base: Any = self.model
        known = inspect.signature(base.get_base_model().forward).parameters
        if "use_cache" in known:
            inputs["use_cache"] = False
        if "logits_to_keep" in known:  # the first one kept predicts the first label
            inputs["logits_to_keep"] = width - min(len(answer.prompt) for answer in answers) + 1
        return inputs

    def _seen(self, answers: Sequence[Answer], width: int) -> dict[str, torch.Tensor]:
        """The processor's tensors beside the ids, those of tokens ``width`` wide. Raises ValueError where it writes a
        prompt in another way than vLLM did."""
        texts, images = zip(*(answer.request for answer in answers))
        how = dict(padding=True, padding_side="right", return_tensors="pt")
        made = dict(self.generation.processing_class(text=list(texts), images=[[one] for one in images], **how))
        ids, mask = made.pop("input_ids"), made.pop("attention_mask").bool()
        if [row[kept].tolist() for row, kept in zip(ids, mask)] != [list(answer.prompt) for answer in answers]:
            raise ValueError("the processor writes a prompt about an image in another way than vLLM does")
        more = (0, width - ids.shape[1])
        return {name: pad(value, more) if value.shape == ids.shape else value for name, value in made.items()}

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


def trl_name(name: str) -> str:
    """The name under which TRL sends a parameter of a PEFT model (``_iter_named_params``)."""
    name = name.removeprefix("base_model.model.").replace(".base_layer", "")
    return name.replace("_checkpoint_wrapped_module.", "").replace("modules_to_save.default.", "")
