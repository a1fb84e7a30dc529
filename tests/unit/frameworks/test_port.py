"""ms-swift's trainer is read in one folder, and each name that is read there is in the contract.

What the port makes of a template and of an engine is asked of stand-ins here; of real ones in tests/real/swift.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib.util
import math
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch

import swift_lora_fix
from swift_lora_fix import errors
from swift_lora_fix.frameworks.swift import encoding
from swift_lora_fix.frameworks.swift.batch import SwiftBatch
from swift_lora_fix.frameworks.swift.port import SwiftTrainer
from swift_lora_fix.frameworks.swift.rollouts import SwiftRollout
from swift_lora_fix.install import contract, releases
from swift_lora_fix.server.wire import PROBE
from swift_lora_fix.trainer import Answer

PACKAGE = Path(swift_lora_fix.__file__).parent
FOLDER = PACKAGE / "frameworks" / "swift"
OF_TRANSFORMERS = {"resume_from_checkpoint", "output_dir"}
# names of Python's, of PyTorch's, and of what vLLM and ms-swift answer with, which are no trainer's
OTHERS = {"get", "update", "choices", "logprobs", "response", "prompt_token_ids", "token_ids", "content", "n"}


def names_read_of_the_trainer() -> set[str]:
    """Everything that follows ``trainer.`` or ``self.trainer.`` in the port's folder, however far."""
    found = set()
    for node in (node for file in FOLDER.glob("*.py") for node in ast.walk(ast.parse(file.read_text()))):
        chain, inner = [], node
        while isinstance(inner, ast.Attribute):
            chain.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name) and inner.id == "trainer":
            found |= set(chain)
        if isinstance(inner, ast.Name) and inner.id == "self" and "trainer" in chain:
            found |= set(chain[: chain.index("trainer")])
    return found


def test_each_name_is_in_the_contract() -> None:
    named = {attribute.name for attribute in releases.ATTRIBUTES}
    read = names_read_of_the_trainer()
    assert {"enable_offload", "_last_loaded_step", "sleep_level", "vllm_client"} <= read, "the test sees them"
    assert read - named - OF_TRANSFORMERS - {"__wrapped__"} == set()


def test_no_other_folder_reads_it() -> None:
    mine = {"enable_offload", "rollout_enable_lora", "_last_loaded_step", "vllm_client", "accelerator", "_metrics"}
    readers = {
        path.parent.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in mine
    }
    assert readers == {"frameworks/swift", "frameworks/trl"}, "TRL has some of these names, too"


def test_a_renamed_attribute_is_a_contract_error_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = ast.parse("class RolloutTrainerMixin:\n    def f(self):\n        return self.offload_is_on, 'sleep_level'\n")
    assert contract.unused([tree], ["enable_offload", "sleep_level", "f"]) == ["enable_offload"]
    module = type(ast)("some.rollout_mixin")
    monkeypatch.setattr(contract, "_sources", lambda name: [tree])
    monkeypatch.setattr(releases, "HOOKS", ())
    monkeypatch.setattr(releases, "CALLS", ())
    with pytest.raises(errors.ContractError, match="enable_offload is not used by its trainer any more"):
        contract.check(module)


# ---- stand-ins for ms-swift ------------------------------------------------------------------------------------------

USER, IMAGE, ASSISTANT, THINKING, END = 900, 901, 902, 903, 904
FAILS = "what the engine fails at, after it has noted the length"


class Template:
    """A message is one token, its length; an image is two. Settings by ms-swift's names."""

    def __init__(self, multimodal: bool, padding_side: str = "left") -> None:
        self.model_meta = SimpleNamespace(is_multimodal=multimodal)
        self.mode, self.max_length, self.padding_free, self.sequence_parallel_size = "vllm", 7, True, 4
        self.padding_side, self.encoded = padding_side, []  # type: ignore[var-annotated]

    def settings(self) -> tuple[Any, ...]:
        return self.mode, self.max_length, self.padding_free, self.sequence_parallel_size

    def encode(self, inputs: dict[str, Any]) -> dict[str, Any]:
        assert self.settings() == ("train", None, False, 1)
        self.encoded.append(copy.deepcopy(inputs))
        user, assistant = inputs["messages"]
        images = inputs.get("images", [])
        ids = [USER, *[IMAGE] * 2 * len(images), len(user["content"]), ASSISTANT, *assistant["content"], END]
        row: dict[str, Any] = {"input_ids": ids, "labels": ids, "loss_scale": [1.0] * len(ids), "_extra_kwargs": {}}
        if images:
            row["pixel_values"] = torch.ones(2 * len(images), 3)
            images[0] = "loaded"
        return row

    def data_collator(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        assert self.settings() == ("train", None, False, 1) and all("_extra_kwargs" not in row for row in rows)
        width = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, value: int) -> torch.Tensor:
            missing = [[value] * (width - len(row["input_ids"])) for row in rows]
            left = self.padding_side == "left"
            return torch.tensor([p + row[name] if left else row[name] + p for p, row in zip(missing, rows)])

        pixels = [row["pixel_values"] for row in rows if "pixel_values" in row]
        media = {"pixel_values": torch.cat(pixels), "sizes": [(1, 2)]} if pixels else {}
        return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "loss_scale": None, **media}


@dataclass
class Request:
    messages: Any
    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)
    objects: dict[str, Any] = field(default_factory=dict)
    tools: Any = None
    uuid: str = "own"
    audios: list[Any] = field(default_factory=list)


@dataclass
class Config:
    n: int = 1
    max_tokens: int | None = 40
    seed: int | None = None
    logprobs: bool = False
    return_details: bool = False


class Peft(torch.nn.Module):
    def get_base_model(self) -> Any:
        def forward(input_ids: Any, use_cache: bool = True, logits_to_keep: int = 0) -> None: ...

        return SimpleNamespace(forward=forward)


class Trainer(SimpleNamespace):
    __hash__ = object.__hash__  # type: ignore[assignment]


class Engine:
    """Its limit, and how it limits what is asked (ms-swift's ``InferEngine``)."""

    def __init__(self) -> None:
        self.max_model_len, self.asked = 200, []  # type: ignore[var-annotated]

    @staticmethod
    def _get_num_tokens(inputs: dict[str, Any]) -> int:
        return len(inputs["input_ids"])

    def set_default_max_tokens(self, config: Config, inputs: dict[str, Any]) -> None:
        assert config.max_tokens is not None
        config.max_tokens = min(config.max_tokens, self.max_model_len - len(inputs["input_ids"]))

    def infer(self, requests: Sequence[Any], config: Config) -> list[Any]:
        outputs = []
        for request in requests:
            own, text = copy.copy(config), request.messages[0]["content"]
            self.set_default_max_tokens(own, {"input_ids": text})
            self.asked.append((len(text), own.max_tokens, request))
            if text == FAILS:
                raise RuntimeError("no answer")
            choice = SimpleNamespace(token_ids=[5], logprobs={"content": [{"logprob": -1.0}]})
            prompt = [USER, *[IMAGE] * 2 * len(request.images), len(text), ASSISTANT]
            outputs.append(SimpleNamespace(response=SimpleNamespace(choices=[choice], prompt_token_ids=prompt)))
            request.images[:] = ["loaded" for _ in request.images]
        return outputs


def made(template: Template, place: str = "colocate") -> Any:
    """A trainer. Its port does not keep it alive."""

    @contextlib.contextmanager
    def without_sequence_parallelism() -> Iterator[None]:
        yield

    accelerator = SimpleNamespace(device=torch.device("cpu"), unwrap_model=lambda model: model)
    return Trainer(
        accelerator=accelerator, model=Peft(), template=template, vllm_mode=place, engine=Engine(),
        _disable_sp_context=without_sequence_parallelism,
    )  # fmt: skip


def rollout_of(trainer: Any, requests: Sequence[Any], config: Config | None = None) -> SwiftRollout:
    return SwiftRollout(SwiftTrainer(trainer), trainer.engine.infer, requests, config or Config())


# ---- what is asked ---------------------------------------------------------------------------------------------------


def total_length_context() -> Any:
    """ms-swift's own limit for all turns together, out of the installed release, without importing it."""
    spec = importlib.util.find_spec("swift")
    assert spec is not None and spec.submodule_search_locations is not None
    name = next(f.layout.rollout_module for f in reversed(releases.FAMILIES) if _file_of(spec, f.layout).is_file())
    tree = ast.parse(_file_of(spec, SimpleNamespace(rollout_module=name)).read_text())
    function = next(
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "multi_turn_completion_length_context"
    )
    names: dict[str, Any] = {"contextmanager": contextlib.contextmanager, "MethodType": MethodType}
    names.update(RequestConfig=Any, Dict=dict, Any=Any)
    exec(compile(ast.Module([function], []), "rollout_mixin", "exec"), names)
    return names[function.name]


def _file_of(spec: Any, layout: Any) -> Path:
    return Path(spec.submodule_search_locations[0], *layout.rollout_module.split(".")[1:]).with_suffix(".py")


@pytest.mark.parametrize("fails", [False, True])
def test_a_probe_leaves_the_limit_of_a_multi_turn_rollout_to_the_first_real_request(fails: bool) -> None:
    own = total_length_context()
    limits = []
    for is_asked in (False, True):
        trainer = made(Template(multimodal=False))
        trainer.multi_turn_scheduler, trainer.use_fast_infer = object(), True
        trainer.completion_length_limit_scope = "total"
        requests = [
            Request([{"role": "user", "content": "x" * 100}]),
            Request([{"role": "user", "content": "y" * 110}]),
        ]
        with own(trainer):
            rollout = rollout_of(trainer, requests)
            if is_asked and fails:
                with pytest.raises(RuntimeError, match="no answer"):
                    rollout.ask([FAILS], 16)
            elif is_asked:
                rollout.ask(["z" * 30, "zz"], 16)
                rollout.tokens_per_second(8)
            trainer.engine.asked.clear()
            trainer.engine.infer(requests, Config())
            limits.append([asked[:2] for asked in trainer.engine.asked] + [trainer.engine.max_model_len])
        assert trainer.engine.max_model_len == 200
    assert limits[0] == limits[1] == [(100, 40), (110, 30), 140]


def test_a_probe_with_media_has_the_first_image_of_the_batch_and_nothing_else() -> None:
    trainer = made(Template(multimodal=True))
    message = [{"role": "user", "content": "<image>what?"}]
    own = Request(message, ["a.png", "b.png"], ["c.mp4"], {"bbox": [1]}, ["tool"])
    requests = [Request([{"role": "user", "content": "text"}]), own]
    before, rollout = copy.deepcopy(requests), rollout_of(trainer, requests)
    assert rollout.has_media and not rollout_of(trainer, requests[:1]).has_media
    for with_media, images in ((False, []), (True, ["a.png"])):
        answers = rollout.ask(["one", "three"], 16, with_media)
        asked = [
            Request([{"role": "user", "content": t}], images, uuid=f"{PROBE}{i}")
            for i, t in enumerate(["one", "three"])
        ]
        assert [answer.request for answer in answers] == asked, "not what became of it as it was encoded"
        assert answers[0].logprobs == (-1.0,) and answers[0].tokens == (5,)
    assert requests == before
    assert not rollout_of(made(Template(multimodal=False)), requests).has_media, "this model would not look at it"
    rows = rollout_of(trainer, [{"messages": message, "images": [{"path": "a.png"}], "request_id": "own"}])
    assert rows.has_media


def test_a_probe_with_media_is_like_the_request_that_has_most_kinds_of_them() -> None:
    trainer, said = made(Template(multimodal=True)), [{"role": "user", "content": "what?"}]
    heard = Request(said, audios=["a.wav", "b.wav"])
    both = Request(said, ["b.png"], audios=["c.wav", "d.wav"])
    assert rollout_of(trainer, [heard]).has_media
    for requests, media in (
        ([heard], ([], ["a.wav"])),
        ([Request(said, ["a.png"]), heard, both], (["b.png"], ["c.wav"])),
    ):
        (answer,) = rollout_of(trainer, requests).ask(["one"], 16, True)
        assert (answer.request.images, answer.request.audios) == media
        with SwiftTrainer(trainer).scoring():
            encoding._encode(trainer.template, answer.request, [5])
        encoded = trainer.template.encoded[-1]
        assert (encoded.get("images", []), encoded.get("audios", [])) == media, "the trainer scores what was heard"


# ---- what the trainer is given ---------------------------------------------------------------------------------------


def asked(text: str, prompt: Sequence[int], tokens: Sequence[int], images: Sequence[Any] = ()) -> Answer:
    request = Request([{"role": "user", "content": text}], list(images))
    return Answer(tuple(prompt), tuple(tokens), (0.0,) * len(tokens), request)


def test_the_template_is_asked_what_it_writes_around_a_text() -> None:
    trainer, asked_for = made(Template(multimodal=True)), []

    def encode(inputs: dict[str, Any]) -> dict[str, Any]:
        asked_for.append((trainer.template.mode, trainer.template.max_length, inputs["messages"]))
        return {"input_ids": [USER, 1, ASSISTANT, THINKING]}

    trainer.template.encode = encode
    assert SwiftTrainer(trainer).template_tokens == 4
    assert asked_for == [("vllm", None, [{"role": "user", "content": "a"}])], "as rollouts are encoded, and never cut"
    assert trainer.template.settings() == ("vllm", 7, True, 4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_model_is_given_the_engines_ids(side: str) -> None:
    trainer = made(Template(multimodal=False, padding_side=side))
    answers = [asked("ab", (1, 2, 3), (4, 5)), asked("abc", (6,), (7,))]
    inputs = SwiftTrainer(trainer).encoded(answers)
    short = [0, 0, 0, 6, 7] if side == "left" else [6, 7, 0, 0, 0]
    assert inputs["input_ids"].tolist() == [[1, 2, 3, 4, 5], short]
    answered = [-100, -100, -100, -100, 7] if side == "left" else [-100, 7, -100, -100, -100]
    assert inputs["labels"].tolist() == [[-100, -100, -100, 4, 5], answered] and "loss_scale" not in inputs
    assert inputs["use_cache"] is False and inputs["logits_to_keep"] == (3 if side == "left" else 5)
    assert trainer.template.settings() == ("vllm", 7, True, 4) and trainer.template.encoded == []


def test_a_multimodal_model_is_given_what_its_template_makes_of_the_request() -> None:
    trainer = made(Template(multimodal=True))
    answers = [
        asked("abc", (USER, 3, ASSISTANT), (5, 6)),
        asked("ab", (USER, IMAGE, IMAGE, 2, ASSISTANT), (7,), ["a.png"]),
    ]
    inputs = SwiftTrainer(trainer).encoded(answers)
    assert inputs["input_ids"].tolist() == [
        [0, USER, 3, ASSISTANT, 5, 6, END],
        [USER, IMAGE, IMAGE, 2, ASSISTANT, 7, END],
    ]
    assert inputs["labels"].tolist() == [[-100] * 4 + [5, 6, -100], [-100] * 5 + [7, -100]]
    assert inputs["pixel_values"].shape == (2, 3) and inputs["sizes"] == [(1, 2)]
    assert trainer.template.encoded[1]["images"] == ["a.png"] and trainer.template.encoded[1]["add_eos"] is False
    assert answers[1].request.images == ["a.png"], "what was loaded is not kept"


def test_what_the_engine_was_given_to_go_on_from_belongs_to_the_prompt() -> None:
    trainer = made(Template(multimodal=True))
    inputs = SwiftTrainer(trainer).encoded([asked("abc", (USER, 3, ASSISTANT, THINKING), (5, 6))])
    assert inputs["input_ids"].tolist() == [[USER, 3, ASSISTANT, THINKING, 5, 6, END]]
    assert inputs["labels"].tolist() == [[-100] * 4 + [5, 6, -100]]


def test_what_the_template_writes_otherwise_is_the_engines_own_unless_it_has_images() -> None:
    trainer = made(Template(multimodal=True))
    inputs = SwiftTrainer(trainer).encoded([asked("abcdefgh", (USER, 2, ASSISTANT), (7,))])
    assert inputs["input_ids"].tolist() == [[USER, 2, ASSISTANT, 7]], "a prompt that was cut"
    assert inputs["labels"].tolist() == [[-100, -100, -100, 7]]
    with pytest.raises(ValueError, match="the engine was given other ones .5.: --max_length"):
        SwiftTrainer(trainer).encoded([asked("ab", (USER, IMAGE, 2, ASSISTANT), (7,), ["a.png"])])
    trainer.template.encode = lambda inputs: {"input_ids": [1, 2]}
    with pytest.raises(errors.UnsupportedTrainerError, match="does not write an answer's token ids"):
        SwiftTrainer(trainer).encoded([asked("ab", (1,), (3,))])


class Scorer:
    """ms-swift's trainer, where it scores rollouts. Dropout is all that its model does."""

    def __init__(self, **sampling: Any) -> None:
        plain = dict(top_k=-1, top_p=1.0, repetition_penalty=1.0, logprobs=True, temperature=0.7)
        self.request_config = SimpleNamespace(**{**plain, **sampling})
        self.temperature, self.vllm_version_ge_0_10_2 = self.request_config.temperature, True
        self.template = SimpleNamespace(sequence_parallel_size=1)
        self.model = torch.nn.Dropout(0.5)
        self.accelerator = SimpleNamespace(unwrap_model=lambda model: model, device=torch.device("cpu"))
        self.scored: list[Any] = []

    def _get_per_token_logps_and_entropies(self, model: Any, inputs: Any, grpo_batch: Any = None, **more: Any) -> Any:
        self.scored.append((inputs, grpo_batch, more))
        inputs["use_cache"] = False  # as ms-swift does
        torch.rand(1)  # as a router that jitters does
        return model(torch.ones(2, 3)), None


def batch_of(apart: bool, rollout: Any, **inputs: Any) -> dict[str, Any]:
    """As 4.4.0 and later make it (apart), or earlier ones."""
    values = dict(completion_mask=torch.ones(2, 3), old_per_token_logps=torch.zeros(2, 3))
    values["rollout_per_token_logps"] = rollout
    return {"model_inputs": inputs, "grpo_batch": SimpleNamespace(**values)} if apart else {**values, **inputs}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({}, ""),
        ({"min_p": None, "frequency_penalty": 0.0, "structured_outputs_regex": None, "top_k": 0}, ""),
        ({"top_p": 0.9, "top_k": 50}, r"sampling altered them \(top_k 50, top_p 0.9\)"),
        ({"min_p": 0.1}, "min_p 0.1"),
        ({"repetition_penalty": 1.1}, "repetition_penalty 1.1"),
        ({"presence_penalty": 0.5}, "presence_penalty 0.5"),
        ({"structured_outputs_regex": "[0-9]+"}, "structured_outputs_regex"),
        ({"top_p": None}, "top_p None"),  # the model's own generation config decides
        ({"temperature": 0.0}, "temperature 0"),
        ({"logprobs": False}, "does not ask vLLM for them"),
    ],
)
def test_sampling_that_alters_the_engines_logprobs(changes: dict[str, Any], said: str) -> None:
    found = SwiftBatch(Scorer(**changes), [], batches=[]).why_not
    assert re.search(said, found) if said else not found, found


def test_logprobs_of_an_old_vllm_are_those_before_sampling() -> None:
    trainer = Scorer(top_p=0.9)
    trainer.vllm_version_ge_0_10_2 = False
    assert "do not know the temperature" in SwiftBatch(trainer, [], batches=[]).why_not
    trainer.temperature = 1.0
    assert not SwiftBatch(trainer, [], batches=[]).why_not


def test_sequence_parallelism() -> None:
    trainer = Scorer()
    trainer.template.sequence_parallel_size = 2
    assert "sequence parallelism" in SwiftBatch(trainer, [], batches=[]).why_not


@pytest.mark.parametrize("apart", [True, False])
def test_where_ms_swift_laid_the_rollouts_logprobs_out(apart: bool) -> None:
    laid = torch.full((2, 3), -1.0)
    batches = [batch_of(apart, laid), batch_of(apart, None)]
    first, second = SwiftBatch(Scorer(), [SimpleNamespace()] * 4 if apart else [{}] * 4, batches=batches).scored(False)
    assert first.engine is laid and first.trainer.tolist() == [[0.0] * 3] * 2 and first.mask.shape == (2, 3)
    assert second.engine == [], "they are missing, which is said"


def test_where_it_did_not_up_to_4_3_2() -> None:
    """Each batch takes its own samples, in order; several turns are one row."""
    samples = [{"rollout_logprobs": [[float(-n)], [-0.5, -0.25]]} for n in range(4)]
    parts = SwiftBatch(Scorer(), samples, batches=[batch_of(False, None), batch_of(False, None)]).scored(False)
    assert [row[0] for part in parts for row in part.engine] == [0.0, -1.0, -2.0, -3.0]
    assert parts[0].engine[0] == [0.0, -0.5, -0.25]
    del samples[3]["rollout_logprobs"]
    assert len(SwiftBatch(Scorer(), samples, batches=[batch_of(False, None)] * 2).scored(False)[1].engine) == 1


@pytest.mark.parametrize("apart", [True, False])
def test_scoring_anew_drops_nothing_out_and_leaves_everything_as_it_was(apart: bool) -> None:
    trainer, made = Scorer(), batch_of(apart, torch.zeros(2, 3), input_ids="ids")
    made["_origin_data"] = ["a picture"]
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    (part,) = SwiftBatch(trainer, [None] * 2, batches=[made]).scored(True)
    assert part.trainer.tolist() == [[1.0] * 3] * 2, "half of them were zero otherwise"
    assert trainer.model.training and torch.equal(torch.rand(1), expected)
    inputs, grpo_batch, more = trainer.scored[0]
    assert inputs["input_ids"] == "ids" and "use_cache" not in (made["model_inputs"] if apart else made)
    assert (grpo_batch, more) == ((made["grpo_batch"], {"origin_data": ["a picture"]}) if apart else (None, {}))


def test_an_error_of_rollouts_in_the_background_reaches_the_thread_that_waits_for_them() -> None:
    """Up to 4.5.3 ms-swift only logs it, and waits for ever."""
    trainer = made(Template(multimodal=False))
    trainer.train_queue, trainer.eval_queue, trainer.args = Queue(), Queue(), SimpleNamespace(async_generate=True)
    error = errors.PolicyMismatchError("it serves another policy")
    SwiftTrainer(trainer).rollout_failed(error)
    assert trainer.train_queue.empty(), "in the trainer's own thread it is raised"
    with ThreadPoolExecutor(1) as thread:
        thread.submit(SwiftTrainer(trainer).rollout_failed, error).result()
    taken = trainer.train_queue.get_nowait()
    assert taken.error is error, "as ms-swift looks for it from 4.6.0 on"
    with pytest.raises(errors.PolicyMismatchError, match="another policy"):
        taken.results  # noqa: B018


def test_what_a_server_says_that_is_no_number_is_not_finite() -> None:
    """JSON has null for it (ms-swift's RolloutOutput, 4.0.1 and 4.6.0). A probe that fails would only be a warning."""
    trainer = made(Template(multimodal=False), "server")
    choice = SimpleNamespace(token_ids=[5, 6], logprobs={"content": [{"logprob": None}, {"logprob": -1.5}]})
    response = SimpleNamespace(choices=[choice], prompt_token_ids=[1])
    rollout = SwiftRollout(
        SwiftTrainer(trainer), lambda *_: [SimpleNamespace(response=response)], [Request([])], Config()
    )
    (answer,) = rollout.ask(["Read these words."], 2)
    assert math.isnan(answer.logprobs[0]) and answer.logprobs[1] == -1.5
