"""ms-swift's trainer behind the port: the only file that reads its attributes and calls its methods.

Each name that is used here is in the contract (install/releases.py, ``ATTRIBUTES``). It is checked before anything is
patched, and the release tests check it in the source of every release. Names that older releases lack are noted there.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch

from ...common.log import info
from ...common.shadowing import do_nothing, holding, shadowed
from ...common.words import Words
from ...engine.vllm.fitting import TOWER_OPTION
from ...engine.vllm.room import needed
from ...errors import UnsupportedTrainerError
from ...install import releases
from ...policy.adapter import DEFAULT_ADAPTER
from ...proof.probe import evaluating, same_random_state
from ...server.wire import PROBE
from ...trainer import Answer, Load, Scored, Weights

WORDS = Words(
    framework="ms-swift",
    with_lora="--vllm_enable_lora true",
    without_lora="--vllm_enable_lora false",
    rank="--lora_rank",
    targets="--target_modules",
    start="--adapters",
    resume="--resume_from_checkpoint",
    more="--vllm_engine_kwargs '{}'",
    verify="swift-lora-fix verify --adapter CHECKPOINT",
)


class SwiftTrainer:
    """A trainer that is built on ms-swift's ``RolloutTrainerMixin`` (GRPO, GKD)."""

    words = WORDS

    def __init__(self, trainer: Any) -> None:
        self._of = weakref.ref(trainer)

    @property
    def trainer(self) -> Any:
        trainer = self._of()
        assert trainer is not None, "hooks are called by a trainer that is alive"
        return trainer

    # ---- who it is ---------------------------------------------------------------------------------------------------

    @property
    def model(self) -> torch.nn.Module:
        model: torch.nn.Module = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return model

    @property
    def device(self) -> torch.device:
        device: torch.device = self.trainer.accelerator.device
        return device

    @property
    def step(self) -> int:
        return int(self.trainer.state.global_step)

    @property
    def ranks(self) -> int:
        return int(self.trainer.accelerator.num_processes)

    @property
    def is_main_rank(self) -> bool:
        return bool(self.trainer.accelerator.is_main_process)

    # ---- what its user asked for -------------------------------------------------------------------------------------

    @property
    def uses_vllm(self) -> bool:
        return bool(self.trainer.args.use_vllm)

    @property
    def tuner(self) -> str:
        return str(getattr(self.trainer.args, self._tuner_argument))

    @property
    def _tuner_argument(self) -> str:
        """``train_type`` in 3.x, ``tuner_type`` in 4.x."""
        names = releases.tuner_arguments()
        return next((name for name in names if hasattr(self.trainer.args, name)), names[0])

    @property
    def engine_place(self) -> str:
        return str(self.trainer.vllm_mode)

    @property
    def engine_has_lora(self) -> bool:
        return bool(self.trainer.rollout_enable_lora)

    @property
    def sleep_level(self) -> int:
        return int(self.trainer.args.sleep_level)

    @property
    def offloads_model(self) -> bool:
        """``enable_offload`` is not enough: --offload_optimizer alone sets it too, and does not offload the model."""
        return bool(self.trainer.enable_offload) and bool(self.trainer.args.offload_model)

    @property
    def is_asynchronous(self) -> bool:
        return bool(self.trainer.args.async_generate)

    @property
    def output_folder(self) -> str:
        return str(self.trainer.args.output_dir)

    @property
    def resume_from(self) -> str | None:
        claimed = self.trainer.args.resume_from_checkpoint
        return os.fspath(claimed) if isinstance(claimed, (str, os.PathLike)) else None

    # ---- its engine --------------------------------------------------------------------------------------------------

    @property
    def vllm_engine(self) -> Any:
        return self.trainer.engine.engine

    @property
    def server_client(self) -> Any:
        """ms-swift creates a client on the main rank only."""
        return self.trainer.vllm_client if self.engine_place == "server" and self.is_main_rank else None

    @property
    def server_client_to_be(self) -> Any:
        """The client before ms-swift has prepared its rollouts; None while there is none, or without servers."""
        return vars(self.trainer).get("vllm_client")

    @property
    def adapter_request_class(self) -> Any:
        """``TensorLoRARequest``, from the module that defines the trainer's rollout mixin."""
        return rollout_module(type(self.trainer)).TensorLoRARequest

    @property
    def attaches_adapter(self) -> bool:
        """``GRPOVllmEngine`` adds its LoRA request to rollouts while ``enable_lora`` is true (grpo_vllm_engine.py)."""
        return bool(self.trainer.engine.enable_lora)

    def attach_adapter(self, wanted: bool) -> None:
        self.trainer.engine.enable_lora = wanted

    # ---- what a probe must know --------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        return self.trainer.template.tokenizer

    @property
    def longest_prompt(self) -> int | None:
        """The smaller of the engine's limit and the template's."""
        colocated = self.engine_place == "colocate"
        engine = self.trainer.engine.max_model_len if colocated else self.trainer.args.vllm_max_model_len
        return min((int(limit) for limit in (engine, self.trainer.template.max_length) if limit), default=None)

    @property
    def template_tokens(self) -> int:
        template = self.trainer.template
        with holding(template, mode="vllm", max_length=None):
            return len(template.encode({"messages": [{"role": "user", "content": "a"}]})["input_ids"])

    @property
    def sees_media(self) -> bool:
        """Whether its model is multimodal."""
        return bool(self.trainer.template.model_meta.is_multimodal)

    @contextlib.contextmanager
    def scoring(self) -> Iterator[None]:
        """Score as ms-swift does: with its template in training mode, which a multimodal model's forward hook reads
        too. No sequence parallelism, which splits a sequence among ranks, and no packing of rows into one."""
        rows = {"mode": "train", "max_length": None, "padding_free": False, "sequence_parallel_size": 1}
        with self.trainer._disable_sp_context(), holding(self.trainer.template, **rows):
            yield

    def encoded(self, answers: Sequence[Answer]) -> Mapping[str, Any]:
        """Encode with ms-swift's template and its ``data_collator``, as the trainer encodes its own rollouts. A
        multimodal model needs their positions and media: without them its forward hook makes embeddings that have no
        positions."""
        with self.scoring():
            rows = [self._row(answer) for answer in answers]
            inputs: dict[str, Any] = on_device(self.trainer.template.data_collator(rows), self.device)
        for name in ("loss_scale", "channel"):  # only used in the training loss
            inputs.pop(name, None)
        labels = inputs["labels"]
        base: Any = self.model
        known = inspect.signature(base.get_base_model().forward).parameters
        if "use_cache" in known:
            inputs["use_cache"] = False
        if "logits_to_keep" in known:  # the first one kept predicts the first label
            inputs["logits_to_keep"] = labels.shape[1] - int((labels != -100).any(0).int().argmax()) + 1
        return inputs

    def _row(self, answer: Answer) -> dict[str, Any]:
        """One answer as the template encodes it, but with the engine's own ids. Only the template knows what else a
        multimodal model needs. If its ids differ from the engine's (a prompt that was cut, say), the engine's ids alone
        are used. Raises ValueError if such a request has media, because the ids alone do not contain them."""
        tokens, asked = list(answer.tokens), [*answer.prompt, *answer.tokens]
        alone = {"input_ids": asked, "labels": [-100] * len(answer.prompt) + tokens}
        if not self.sees_media or answer.request is None:
            return alone
        row = self._encode(answer.request, tokens)
        prompt = _end_of(tokens, row["input_ids"]) - len(tokens)
        if prompt < len(answer.prompt) and row["input_ids"][:prompt] == asked[:prompt]:
            # the engine's prompt ends with the start of the answer (a thinking prefix)
            row = self._encode(answer.request, asked[prompt:])
        if list(row["input_ids"][: len(asked)]) == asked:
            row["labels"] = [*alone["labels"], *[-100] * (len(row["input_ids"]) - len(asked))]
            return row
        if not _media(answer.request):
            return alone
        raise ValueError(
            f"the template writes {len(row['input_ids'])} tokens for a probe with media, and the engine was given "
            f"other ones ({len(asked)}): --max_length or --vllm_max_model_len cuts it, or vLLM expands them in "
            "another way"
        )

    def _encode(self, request: Any, response: list[int]) -> dict[str, Any]:
        """The template's encoding of a probe's request and its answer's ids."""
        asked = copy.deepcopy(_fields(request))
        messages = [*asked["messages"], {"role": "assistant", "content": response}]
        kept = {name: asked[name] for name in (*MEDIA, "chat_template_kwargs") if asked.get(name)}
        row: dict[str, Any] = self.trainer.template.encode({"messages": messages, "add_eos": False, **kept})
        row.pop("_extra_kwargs", None)
        return row

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Context for our own requests: restores what ms-swift stores about requests in its engine.

        In a multi-turn rollout with one limit for all turns (--completion_length_limit_scope total), the first request
        sets the length limit of the whole rollout, and ``set_grpo_max_model_len`` records that it is set.
        """
        if self.engine_place != "colocate":
            yield
            return
        with holding(self.trainer.engine, "max_model_len", "set_grpo_max_model_len"):
            yield

    @contextlib.contextmanager
    def making_room(self) -> Iterator[None]:
        """While ms-swift makes its colocated engine: give vLLM the arguments with which its LoRA layers hold the
        adapter. Its ``_prepare_vllm_engine`` reads these arguments and nothing else does so then; they are restored."""
        args = self.trainer.args
        if not (self.tuner == "lora" and args.vllm_mode == "colocate" and args.vllm_enable_lora):
            yield
            return
        asked = int(args.lora_rank)
        room = needed(self.model, DEFAULT_ADAPTER, asked, WORDS)
        values: dict[str, Any] = {"lora_rank": room.rank}
        if room.rank != asked:
            info(f"the engine gets room for LoRA rank {room.rank}, the next one that vLLM takes (--lora_rank {asked}).")
        given = args.vllm_engine_kwargs or {}
        if room.towers and TOWER_OPTION not in given:
            values["vllm_engine_kwargs"] = {**given, TOWER_OPTION: True}
            info(f"the LoRA reaches beyond the language model: the engine is started with {TOWER_OPTION}.")
        with holding(args, **values):
            yield

    # ---- what it is told to do ---------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Have ms-swift list the parameter names that it pushes again, now that it knows of the LoRA layers.

        Up to 4.1 it lists them before, and then omits every wrapped layer when it moves in batches
        (--move_model_batches). After training has begun it is too late: FSDP2's activation checkpointing then puts a
        prefix into ``named_parameters()`` that the names in ``state_dict()`` lack.
        """
        trainer = self.trainer
        trainer.parameter_groups, groups = trainer.split_batches()
        # ms-swift compares these with names that lack "modules_to_save.default.", and so left such modules out
        trainer.parameter_groups_no_lora = [
            group and [name.replace("modules_to_save.default.", "") for name in group] for group in groups
        ]

    def send_base(self, load: Callable[[Load, Weights], Any], note: Callable[[Weights], None]) -> None:
        """Send by ms-swift's own ``_move_full_model_to_vllm``, which maps its names to vLLM's on each release. Only
        what it
        calls around that is wrong: merging the adapter into the base, unmerging it, and sending the adapter too.
        Meanwhile these calls are shadowed on the two objects."""
        trainer = self.trainer
        own_load = trainer._load_state_dict_to_vllm
        shadows: dict[str, Callable[..., Any]] = {
            "_load_state_dict_to_vllm": lambda weights: load(own_load, weights),
            "_move_adapter_to_vllm": do_nothing,
        }
        if hasattr(trainer, "_process_state_dict_for_vllm"):  # from 3.12 on; FSDP2's whole copies pass through it
            own_rename = trainer._process_state_dict_for_vllm

            def rename(raw: Weights, *args: Any, **kwargs: Any) -> Any:
                note(raw)
                return own_rename(raw, *args, **kwargs)

            shadows["_process_state_dict_for_vllm"] = rename
        if hasattr(trainer, "_merge_lora_into_state_dict"):  # FSDP2's substitute for merge_adapter
            shadows["_merge_lora_into_state_dict"] = _without_lora
        merges = {"merge_adapter": do_nothing, "unmerge_adapter": do_nothing}
        with shadowed(trainer, **shadows), shadowed(trainer.model, **merges):
            trainer._move_full_model_to_vllm()

    def probe_rollout(self, infer: Callable[[Sequence[Any], Any], Sequence[Any]]) -> SwiftRollout:
        """A rollout call of our own, to ask the engine a probe when no rollout is being made. infer: ms-swift's own
        ``_engine_infer`` of this trainer."""
        trainer = self.trainer
        like: dict[str, Any] = {"messages": []}
        module = rollout_module(type(trainer))
        request = module.RolloutInferRequest(**like)
        return SwiftRollout(self, infer, [request], trainer.request_config)

    def sync_again(self) -> None:
        self.trainer._last_loaded_step = -1

    def wait_for_rollouts(self) -> None:
        self.trainer._wait_queue()

    def rollout_failed(self, error: Exception) -> None:
        """With --async_generate, in the thread that makes rollouts: hand the error to the trainer's thread, which waits
        for them. Up to 4.5.3, ms-swift only logs it there, and the trainer waits for ever."""
        if self.is_asynchronous and threading.current_thread() is not threading.main_thread():
            for queue in (self.trainer.train_queue, self.trainer.eval_queue):
                queue.put(_Failed(error))

    def metrics(self) -> MutableMapping[str, list[float]] | None:
        """ms-swift averages each list of ``_metrics[mode]`` into ``logging.jsonl`` and wherever --report_to says."""
        metrics: MutableMapping[str, list[float]] = self.trainer._metrics[
            "train" if self.trainer.model.training else "eval"
        ]
        return metrics


class _Failed:
    """In place of ms-swift's ``DataCache`` of rollouts that failed: whoever takes them gets the error."""

    def __init__(self, error: Exception) -> None:
        self.error = error  # ms-swift looks for it from 4.6.0 on

    @property
    def results(self) -> Any:
        raise self.error


class SwiftRollout:
    """One call of ms-swift's ``_engine_infer``. infer: the call itself, ``infer(requests, config)``."""

    def __init__(
        self,
        trainer: SwiftTrainer,
        infer: Callable[[Sequence[Any], Any], Sequence[Any]],
        infer_requests: Sequence[Any],
        request_config: Any = None,
        **kwargs: Any,
    ) -> None:
        self._trainer, self._infer, self._requests, self._config = trainer, infer, infer_requests, request_config

    @property
    def has_requests(self) -> bool:
        return bool(self._requests)

    @property
    def most_tokens(self) -> int:
        answers = len(self._requests) * int(self._config.n or 1)
        return answers * int(self._config.max_tokens or 0)

    @property
    def has_media(self) -> bool:
        return self._trainer.sees_media and any(_media(request) for request in self._requests)

    def ask(self, prompts: Sequence[str], new_tokens: int, with_media: bool = False) -> list[Answer]:
        assert self.has_media or not with_media, "whoever asks with media has looked whether there are any"
        like = max(self._requests, key=lambda request: len(_media(request))) if with_media else self._requests[0]
        media = _media(like) if with_media else {}
        requests = [_request(like, index, text, media) for index, text in enumerate(prompts)]
        asked = copy.deepcopy(requests)  # ms-swift stores loaded media in the request that it encodes
        answers = []
        with self._trainer.undisturbed():
            outputs = self._infer(asked, _probe_config(self._config, new_tokens))
        for output, request in zip(outputs, requests):
            choice = output.response.choices[0]
            logprobs = tuple(_number(item["logprob"]) for item in choice.logprobs["content"])
            prompt = tuple(output.response.prompt_token_ids)
            answers.append(Answer(prompt, tuple(choice.token_ids), logprobs, request))
        return answers

    def tokens_per_second(self, most_tokens: int) -> float:
        limit = min(most_tokens, int(self._config.max_tokens or most_tokens))
        config = altered(self._config, max_tokens=limit, return_details=True)
        requests = copy.deepcopy(self._requests)
        with self._trainer.undisturbed():
            started = time.perf_counter()
            outputs = self._infer(requests, config)
            seconds = time.perf_counter() - started
        tokens = sum(len(choice.token_ids or ()) for output in outputs for choice in output.response.choices)
        return max(1, tokens) / seconds


class SwiftBatch:
    """The result of ``_prepare_batch_inputs`` of ms-swift's GRPO trainer for ``samples``. It has then scored each of
    ``batches`` (``old_per_token_logps``), in the model's current mode and at the temperature of the rollouts."""

    def __init__(self, trainer: Any, samples: Sequence[Any], *, batches: Sequence[Any]) -> None:
        self.trainer, self._samples, self._batches = trainer, samples, batches

    @property
    def why_not(self) -> str:
        trainer, config = self.trainer, vars(self.trainer.request_config)
        if not config["logprobs"]:
            return "this release of ms-swift does not ask vLLM for them"
        if trainer.template.sequence_parallel_size > 1:
            return "with sequence parallelism each rank scores the rollouts of others"
        if not trainer.temperature > 0:
            return "they were sampled at temperature 0"
        if not trainer.vllm_version_ge_0_10_2:  # its logprobs are from before temperature, top_k and the like
            return "" if trainer.temperature == 1 else "this vLLM's do not know the temperature"
        altering = [f"{name} {config[name]}" for name, plain in _PLAIN.items() if config.get(name) not in plain]
        return f"sampling altered them ({', '.join(altering)})" if altering else ""

    def scored(self, anew: bool) -> list[Scored]:
        parts, start = [], 0
        for batch in self._batches:
            # from 4.4.0 on, a batch keeps the loss's inputs apart from the model's
            values = vars(batch["grpo_batch"]) if "grpo_batch" in batch else batch
            mask = values["completion_mask"]
            samples = self._samples[start : start + len(mask)]
            start += len(mask)
            held = self._score(batch) if anew else values["old_per_token_logps"]
            served: Any = values["rollout_per_token_logps"]
            if served is None:  # up to 4.3.2, ms-swift only fills it in for an importance correction
                early = () if "grpo_batch" in batch else samples
                served = [_flat(sample["rollout_logprobs"]) for sample in early if "rollout_logprobs" in sample]
            parts.append(Scored(served, held, mask))
        return parts

    def _score(self, batch: Any) -> torch.Tensor:
        """Score again without dropout; the random state is restored."""
        trainer, apart = self.trainer, "grpo_batch" in batch
        inputs = (dict(batch["model_inputs"]), batch["grpo_batch"]) if apart else (dict(batch),)
        more = {"origin_data": batch["_origin_data"]} if apart and "_origin_data" in batch else {}
        model, device = trainer.accelerator.unwrap_model(trainer.model), trainer.accelerator.device
        with torch.no_grad(), evaluating(model), same_random_state(device):
            logps: torch.Tensor = trainer._get_per_token_logps_and_entropies(trainer.model, *inputs, **more)[0]
        return logps


def rollout_module(trainer_class: type) -> Any:
    """The module of ms-swift's ``RolloutTrainerMixin`` in the trainer's bases."""
    for cls in trainer_class.__mro__:
        if cls.__name__ == releases.ROLLOUT_CLASS:
            return sys.modules[cls.__module__]
    raise UnsupportedTrainerError(f"{trainer_class.__name__} is not built on ms-swift's {releases.ROLLOUT_CLASS}.")


def tag(outputs: Any, step: int | None, digest: str) -> Any:
    """Write the policy that made the rollouts into ``rollout_infos`` of ms-swift's ``RolloutOutput``."""
    for output in outputs if isinstance(outputs, list) else ():
        if isinstance(output.rollout_infos, dict):
            output.rollout_infos.update(policy_step=step, policy_digest=digest)
    return outputs


MEDIA = ("images", "audios")  # of a request, that a probe has too

# Request settings with which vLLM samples from the model's own distribution at the temperature.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "top_k": (-1, 0),
    "top_p": (1.0,),
    "min_p": (None, 0.0),
    "repetition_penalty": (1.0,),
    "presence_penalty": (None, 0.0),
    "frequency_penalty": (None, 0.0),
    "structured_outputs_regex": (None, ""),
}


def _number(logprob: float | None) -> float:
    """A rollout server's JSON has null where a number is not finite."""
    return float("nan") if logprob is None else float(logprob)


def _flat(turns: Sequence[Sequence[float]]) -> list[float]:
    return [logprob for turn in turns for logprob in turn]


def altered(config: Any, **values: Any) -> Any:
    """A copy of a request config with these values; those that this release of ms-swift lacks are skipped."""
    changed = copy.copy(config)
    known = inspect.signature(type(config)).parameters
    for name, value in values.items():
        if name in known:
            setattr(changed, name, value)
    return changed


def _fields(request: Any) -> dict[str, Any]:
    """The fields of an ms-swift request, which is an object or a row of the data set."""
    return request if isinstance(request, dict) else vars(request)


def _media(request: Any) -> dict[str, list[Any]]:
    """A request's first image and first sound, as it has them."""
    found = {name: _fields(request).get(name) for name in MEDIA}
    return {
        name: list(value if isinstance(value, (list, tuple)) else [value])[:1] for name, value in found.items() if value
    }


def _request(like: Any, index: int, text: str, media: Mapping[str, Any]) -> Any:
    """A request like the run's own, but with only ``text`` and ``media``: no tools, no data of a scheduler."""
    request = copy.copy(like)
    fields = _fields(request)
    fields["messages"] = [{"role": "user", "content": text}]
    for name in (*MEDIA, "videos"):
        if fields.get(name):
            fields[name] = list(media.get(name, ()))
    if fields.get("objects"):  # boxes in images
        fields["objects"] = {}
    if fields.get("tools"):
        fields["tools"] = None
    for name in ("uuid", "request_id"):
        if name in fields:
            fields[name] = f"{PROBE}{index}"
    return copy.deepcopy(request)


def _probe_config(like: Any, new_tokens: int) -> Any:
    sampling = dict(temperature=1.0, top_k=-1, top_p=1.0, min_p=0.0, repetition_penalty=1.0, n=1, seed=0, stop=[])
    answer = dict(max_tokens=new_tokens, logprobs=True, top_logprobs=None, return_details=True, stream=False)
    return altered(like, structured_outputs_regex=None, **sampling, **answer)


def on_device(value: Any, device: torch.device) -> Any:
    """``value`` with all tensors on ``device``, in nested mappings and lists too."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: on_device(item, device) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_device(item, device) for item in value)
    return value


def _end_of(part: Sequence[int], ids: Sequence[int]) -> int:
    """The index just after the last occurrence of ``part``. Raises UnsupportedTrainerError if there is none."""
    for end in range(len(ids), len(part) - 1, -1):
        if list(ids[end - len(part) : end]) == list(part):
            return end
    raise UnsupportedTrainerError("ms-swift's template does not write an answer's token ids into the row it trains on.")


def _without_lora(state_dict: Weights) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state_dict.items() if "lora_" not in name}
