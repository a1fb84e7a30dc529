"""ms-swift's trainer behind the port. Only this folder reads its attributes and calls its methods.

Each name that it uses is in the contract (install/releases.py, ``ATTRIBUTES``). It is checked before anything is
patched, and the release tests check it in the source of every release. Names that older releases lack are noted there.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch

from ...common.log import info
from ...common.shadowing import do_nothing, holding, shadowed
from ...engine.vllm.fitting import TOWER_OPTION
from ...engine.vllm.room import needed
from ...errors import UnsupportedTrainerError
from ...install import releases
from ...policy.adapter import DEFAULT_ADAPTER
from ...trainer import Answer, Load, Weights
from . import encoding
from .words import WORDS


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
        return encoding.sees_media(self.trainer.template)

    def scoring(self) -> contextlib.AbstractContextManager[None]:
        return encoding.scoring(self.trainer)

    def encoded(self, answers: Sequence[Answer]) -> Mapping[str, Any]:
        return encoding.encoded(self.trainer, self.model, self.device, answers)

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
        what it calls around that is wrong: merging the adapter into the base, unmerging it, and sending the adapter
        too. Meanwhile these calls are shadowed on the two objects."""
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


def rollout_module(trainer_class: type) -> Any:
    """The module of ms-swift's ``RolloutTrainerMixin`` in the trainer's bases."""
    for cls in trainer_class.__mro__:
        if cls.__name__ == releases.ROLLOUT_CLASS:
            return sys.modules[cls.__module__]
    raise UnsupportedTrainerError(f"{trainer_class.__name__} is not built on ms-swift's {releases.ROLLOUT_CLASS}.")


def _without_lora(state_dict: Weights) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state_dict.items() if "lora_" not in name}
