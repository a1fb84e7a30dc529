"""TRL's trainer is read in one folder, each name that is read there is in the contract, and the port does what it says.

What it makes of real trainers and engines is asked in tests/real/trl.
"""

from __future__ import annotations

import ast
import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import swift_lora_fix
from swift_lora_fix import errors
from swift_lora_fix.frameworks.trl import port as ports
from swift_lora_fix.frameworks.trl import starting
from swift_lora_fix.frameworks.trl.batch import TrlBatch
from swift_lora_fix.frameworks.trl.port import TrlTrainer
from swift_lora_fix.install import releases
from swift_lora_fix.proof.batch import compare
from tests.support.fakes.engine import Accelerator
from tests.support.peft_models import peft_model

FOLDER = Path(swift_lora_fix.__file__).parent / "frameworks" / "trl"
OF_ACCELERATE = {"unwrap_model", "distributed_type", "name", "deepspeed_plugin"}
OF_TRANSFORMERS = {"args", "output_dir", "apply_chat_template"}
OF_OTHERS = {"vllm_config", "lora_config", "model_config", "max_model_len", "collective_rpc", "_llm_weights_sleeping"}


def test_each_name_is_in_the_contract() -> None:
    """Everything that follows ``generation.`` or ``trainer.`` in the port's folder, however far."""
    read = set()
    files = [file for file in FOLDER.glob("*.py") if file.stem != "instrumentors"]  # its generation is another thing
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        chain, inner = [], node
        while isinstance(inner, ast.Attribute):
            chain.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name) and inner.id in ("generation", "trainer"):
            read |= set(chain)
        for owner in ("generation", "trainer"):
            if isinstance(inner, ast.Name) and inner.id == "self" and owner in chain:
                read |= set(chain[: chain.index(owner)])
    assert {"enable_sleep_mode", "_metrics", "global_step", "processing_class"} <= read, "the test sees them"
    known = {*releases.TRL_ATTRIBUTES, *releases.TRL_SCORING_ATTRIBUTES, "_get_per_token_logps_and_entropies"}
    assert read - known - OF_ACCELERATE - OF_TRANSFORMERS - OF_OTHERS - {"tokenizer"} == set()


class Engine(torch.nn.Module):
    """What is read of ``model_runner.model``."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[dict[str, torch.Tensor]] = []

    def load_weights(self, weights: Any) -> None:
        self.loaded.append(dict(weights))


class Generation:
    """``VLLMGeneration``, as far as it is read. ``fails``: vLLM takes no weight."""

    mode, enable_sleep_mode = "colocate", False

    def __init__(self, model: torch.nn.Module, fails: bool = False) -> None:
        self.model, self.accelerator, self.fails, self.engine = model, Accelerator(), fails, Engine()
        worker = SimpleNamespace(model_runner=SimpleNamespace(model=self.engine))
        executor = SimpleNamespace(driver_worker=SimpleNamespace(worker=worker))
        self.llm = SimpleNamespace(llm_engine=SimpleNamespace(model_executor=executor))

    def sync_weights(self) -> None:
        """As TRL's own: merge, push each, unmerge."""
        self.model.merge_adapter()
        for name, parameter in self.model.named_parameters():
            if "lora_" not in name and "original_module" not in name:
                if self.fails:
                    raise RuntimeError("vLLM is out of memory")
                self.engine.load_weights([(ports.trl_name(name), parameter.data)])
        self.model.unmerge_adapter()


def send(generation: Generation) -> list[dict[str, torch.Tensor]]:
    noted: list[dict[str, torch.Tensor]] = []
    TrlTrainer(generation).send_base(lambda own, weights: own(weights), lambda raw: noted.append(dict(raw)))
    return noted


def test_the_base_goes_unmerged_by_trls_own_way_and_in_one_piece() -> None:
    model = peft_model(modules_to_save=["second"], target_modules=["first", "embed"])
    before = {name: value.clone() for name, value in model.named_parameters()}
    generation = Generation(model)
    noted = send(generation)
    (loaded,) = generation.engine.loaded
    assert set(loaded) == {"embed.weight", "first.weight", "second.weight", "turned.weight", "turned.bias"}
    assert torch.equal(loaded["first.weight"], before["base_model.model.first.base_layer.weight"])
    assert torch.equal(loaded["second.weight"], before["base_model.model.second.modules_to_save.default.weight"])
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert len(noted) == 1 and all(name in before for name in noted[0]), "the trainer's own names"
    assert "merge_adapter" not in vars(model) and "load_weights" not in vars(generation.engine)


def test_a_push_that_fails_leaves_the_trainer_as_it_was() -> None:
    model = peft_model()
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(RuntimeError, match="out of memory"):
        Generation(model, fails=True).sync_weights()
    assert any(not torch.equal(value, before[name]) for name, value in model.named_parameters()), "stock stays merged"
    model.unmerge_adapter()
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(RuntimeError, match="out of memory"):
        send(Generation(model, fails=True))
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert not model.base_model.model.first.merged and "unmerge_adapter" not in vars(model)


def test_large_models_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "PUSH_BYTES", 200)
    generation = Generation(peft_model())
    send(generation)
    assert len(generation.engine.loaded) > 1
    assert len({name for part in generation.engine.loaded for name in part}) == sum(map(len, generation.engine.loaded))


def test_a_trainer_is_found_by_its_accelerator_and_not_kept_alive() -> None:
    generation = Generation(peft_model())
    port = TrlTrainer(generation)
    with pytest.raises(errors.UnsupportedTrainerError, match="before the trainer is made"):
        port.trainer  # noqa: B018
    trainer = type("Trainer", (), {})()
    trainer.accelerator, trainer.state = generation.accelerator, SimpleNamespace(global_step=3)
    ports.note_trainer(trainer)
    ports.note_claim(trainer, "run/checkpoint-2")
    assert (port.step, port.resume_from) == (3, "run/checkpoint-2")
    del trainer
    gc.collect()
    with pytest.raises(errors.UnsupportedTrainerError):
        port.trainer  # noqa: B018


@pytest.mark.parametrize("kind, tuner", [("lora", "lora"), ("none", "full")])
def test_what_is_trained(kind: str, tuner: str) -> None:
    model = peft_model() if kind == "lora" else torch.nn.Linear(2, 2)
    assert starting.tuner_of(model) == tuner


def test_the_engine_gets_the_next_rank_that_vllm_takes() -> None:
    limits = (1, 8, 16, 32)
    assert starting.lora_arguments(peft_model(r=4), limits)["max_lora_rank"] == 8
    patterned = peft_model(r=4, rank_pattern={"second": 9})
    assert starting.lora_arguments(patterned, limits) == {"enable_lora": True, "max_loras": 1, "max_lora_rank": 16}
    with pytest.raises(errors.UnsupportedAdapterError, match="rank 64.*end at 32"):
        starting.lora_arguments(peft_model(r=64), limits)


def test_weights_are_not_read_from_files_again_after_a_sleep() -> None:
    """TRL 0.28 to 1.9: ``generate`` has the engine reload the model's files after they were synced."""
    generation, called = Generation(peft_model()), []
    generation.llm.collective_rpc = called.append
    holder = type("Llm", (), {"collective_rpc": lambda self, method: called.append(method)})()
    generation.llm, generation.enable_sleep_mode = holder, True
    port = TrlTrainer(generation)
    with port.keeping_weights():
        holder.collective_rpc("reload_weights")
        holder.collective_rpc("other")
    holder.collective_rpc("reload_weights")
    assert called == ["other", "reload_weights"]


class Trainer:
    """TRL's GRPO trainer as far as a batch of it is read. Its model drops half of its inputs out while it trains."""

    rollout_func = None

    def __init__(self, **sampling: Any) -> None:
        self.model, self.accelerator = torch.nn.Dropout(0.5), Accelerator()
        plain = dict(top_k=0, top_p=1.0, min_p=None, repetition_penalty=1.0, structured_outputs_regex=None)
        given = {"temperature": 1.0, "generation_kwargs": {}, **plain, **sampling}
        self.vllm_generation = SimpleNamespace(**given)
        self.args = SimpleNamespace(per_device_train_batch_size=4, per_device_eval_batch_size=2)
        self.chunks: list[Any] = []

    def _get_per_token_logps_and_entropies(
        self, model: Any, ids: Any, mask: Any, keep: int, batch_size: Any = None, pixel_values: Any = None
    ) -> Any:
        self.chunks.append(batch_size)
        return model(ids.float())[:, -keep:] * pixel_values, None


BATCH = {
    "prompt_ids": torch.tensor([[7], [7]]),
    "prompt_mask": torch.tensor([[1], [1]]),
    "completion_ids": torch.tensor([[1, 2, 3], [4, 5, 0]]),
    "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    "tool_mask": torch.tensor([[1, 0, 1], [1, 1, 1]]),
    "old_per_token_logps": torch.full((2, 3), -1.0),
    "sampling_per_token_logps": torch.full((2, 3), -1.5),
    "pixel_values": 10,
}


def test_a_batch_is_compared_where_the_engine_chose_the_tokens() -> None:
    batch = TrlBatch(Trainer(), BATCH)
    assert batch.why_not == ""
    found, wrong = compare(batch.scored(anew=False), 1, torch.device("cpu"))
    assert found is not None and (found.tokens, found.distance.mean, wrong) == (4, 0.5, "")


def test_a_batch_is_scored_anew_without_dropout_and_with_its_images() -> None:
    trainer = Trainer()
    (part,) = TrlBatch(trainer, BATCH).scored(anew=True)
    assert part.trainer.tolist() == [[10, 20, 30], [40, 50, 0]] and trainer.model.training
    trainer.model.eval()
    TrlBatch(trainer, BATCH).scored(anew=True)
    assert trainer.chunks == [4, 2], "in parts, as TRL scores: a whole batch may be more than the memory holds"


def test_a_chat_template_that_refuses_a_lone_users_message_is_not_used() -> None:
    class Tokenizer:
        chat_template = "raise_exception('The first message must be a system message')"

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in text]}

        def apply_chat_template(self, *_: Any, **__: Any) -> Any:
            raise ValueError(self.chat_template)

    port: Any = SimpleNamespace(tokenizer=Tokenizer())
    assert TrlTrainer.prompt_ids(port, "ab") == [97, 98]


@pytest.mark.parametrize(
    "sampling, lacking, why",
    [
        ({"top_p": 0.9}, "", "sampling altered them (top_p 0.9)"),
        ({"generation_kwargs": {"top_k": 5}}, "", "sampling altered them (top_k 5)"),
        ({"generation_kwargs": {"logit_bias": {5: -100}}}, "", "sampling altered them (logit_bias {5: -100})"),
        ({"generation_kwargs": {"structured_outputs": {"choice": ["yes"]}}}, "", "sampling altered them (structured_"),
        ({"generation_kwargs": {"frequency_penalty": 0.0, "bad_words": []}}, "", ""),
        ({"generation_kwargs": {"temperature": 0.5}}, "", "sampling altered them (temperature 0.5)"),
        ({"temperature": 0.0}, "", "they were sampled at temperature 0"),
        ({}, "old_per_token_logps", "TRL does not score its rollouts here"),
        ({}, "sampling_per_token_logps", "TRL did not get them from vLLM"),
    ],
)
def test_what_is_not_like_with_like_is_not_compared(sampling: dict[str, Any], lacking: str, why: str) -> None:
    batch = {name: value for name, value in BATCH.items() if name != lacking}
    assert TrlBatch(Trainer(**sampling), batch).why_not.startswith(why)


@pytest.mark.parametrize(
    ("init", "problem"), [("pissa", "init_lora_weights='pissa' changes the base"), (True, "before TRL")]
)
def test_a_server_has_the_base_of_its_model_folder(init: Any, problem: str) -> None:
    """PiSSA takes the adapter's first values out of the trainer's base, which no folder of an adapter carries."""
    assert starting.server_of(peft_model(init_lora_weights=init), Accelerator(), "").problem.startswith(problem)


def test_releases_and_what_they_allow() -> None:
    assert releases.vllm_allowed_by_trl("1.16.0") == "<=0.31.0,>=0.22.0"
    assert releases.vllm_allowed_by_trl("0.29.1") == "<0.13.0,>=0.10.2"
    assert releases.vllm_allowed_by_trl("1.17.0") is None and releases.trl_family_of("0.27.2") is None
    family = releases.trl_family_of("1.9.2")
    assert family is not None and releases.TRL_SLEEP_RELOADS_FILES in family.defects
    family = releases.trl_family_of("1.10.0")
    assert family is not None and releases.TRL_SLEEP_RELOADS_FILES not in family.defects
    assert releases.is_trl_too_old("0.27.2") and not releases.is_trl_too_old("0.28.0")
