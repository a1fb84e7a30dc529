"""Prompts about an image: what vLLM is asked, what the trainer is fed for it, and what is said of TRL's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import ProcessorMixin

from swift_lora_fix.frameworks.trl.port import TrlTrainer
from swift_lora_fix.frameworks.trl.rollouts import TrlRollout
from swift_lora_fix.trainer import Answer
from tests.support.fakes.engine import Accelerator
from tests.support.peft_models import peft_model

PLACEHOLDER, WIDE = 9, 3  # an image is so many of them


class Processor(ProcessorMixin):  # type: ignore[misc]
    """A text is its words' lengths; "<image>" is one placeholder, which is expanded for the trainer."""

    image_token_id = PLACEHOLDER

    def __init__(self) -> None:
        pass

    @staticmethod
    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": [PLACEHOLDER if word == "<image>" else len(word) for word in text.split()]}

    def apply_chat_template(self, said: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        (image, text) = said[0]["content"]
        assert image == {"type": "image"} and add_generation_prompt
        return f"user <image> {text['text']}"

    def __call__(self, text: list[str], images: list[list[str]], padding_side: str, **how: Any) -> dict[str, Any]:
        assert padding_side == "right" and len(text) == len(images)
        rows = [expanded(self.tokenizer(one)["input_ids"]) for one in text]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        seen = torch.tensor([len(one) for of_row in images for one in of_row])
        types = (ids == PLACEHOLDER).long()
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "mm_token_type_ids": types, "pixel_values": seen}


def expanded(ids: list[int]) -> list[int]:
    """As vLLM does, too: the first placeholder, whatever follows."""
    at = ids.index(PLACEHOLDER)
    return [*ids[:at], *[PLACEHOLDER] * WIDE, *ids[at + 1 :]]


class Generation:
    def __init__(self) -> None:
        self.model, self.accelerator, self.processing_class = peft_model(), Accelerator(), Processor()


def vllm(asked: list[dict[str, Any]], how: Any = None, use_tqdm: bool = False) -> list[Any]:
    """Each answer is the tokens 1 and 2."""
    said = [SimpleNamespace(token_ids=[1, 2], logprobs=[{token: SimpleNamespace(logprob=-1.0)} for token in (1, 2)])]
    vllm.asked = asked  # type: ignore[attr-defined]
    return [
        SimpleNamespace(
            prompt_token_ids=expanded(one["prompt_token_ids"])
            if "multi_modal_data" in one
            else one["prompt_token_ids"],
            outputs=said,
        )
        for one in asked
    ]


def row(ids: list[int], image: Any = None) -> dict[str, Any]:
    return {"prompt_token_ids": ids, **({} if image is None else {"multi_modal_data": {"image": image}})}


@pytest.fixture
def generation() -> Generation:
    return Generation()


def ask(port: TrlTrainer, rollout: TrlRollout) -> list[Answer]:
    pytest.importorskip("vllm")
    return rollout.ask(["a bc", "a bc def"], 2, with_media=True)


def test_vllm_is_given_one_placeholder_and_the_first_image_of_the_rollout(generation: Generation) -> None:
    port = TrlTrainer(generation)
    rollout = TrlRollout(port, vllm, [row([1]), row([4, 9, 9, 9], ["first", "second"]), row([4, 9, 9, 9], "third")])
    assert rollout.has_media and not TrlRollout(port, vllm, [row([1])]).has_media
    answers = ask(port, rollout)
    assert vllm.asked == [row([4, 9, 1, 2], "first"), row([4, 9, 1, 2, 3], "first")]  # type: ignore[attr-defined]
    assert [answer.prompt for answer in answers] == [(4, 9, 9, 9, 1, 2), (4, 9, 9, 9, 1, 2, 3)]


@pytest.mark.parametrize(
    "prompt", ["text", {"prompt": "text", "multi_modal_data": {"image": "one"}}, row([1]) | {"multi_modal_data": None}]
)
def test_whatever_else_a_user_asks_this_engine_is_let_through(generation: Generation, prompt: Any) -> None:
    rollout = TrlRollout(TrlTrainer(generation), vllm, [prompt])
    assert rollout.has_media == ("prompt" in prompt)
    rollout.check_prompts([SimpleNamespace(prompt_token_ids=[9, 9, 9])])


def answers_about(*texts: str) -> list[Answer]:
    made = [(text, expanded(Processor().tokenizer(text)["input_ids"])) for text in texts]
    return [Answer(tuple(ids), (1, 2), (-1.0, -1.0), (text, "image")) for text, ids in made]


def test_the_trainer_is_fed_what_the_processor_makes_of_the_image(generation: Generation) -> None:
    fed = TrlTrainer(generation).encoded(answers_about("user <image> a", "user <image> a bc"))
    assert fed["input_ids"].tolist() == [[4, 9, 9, 9, 1, 1, 2, 0], [4, 9, 9, 9, 1, 2, 1, 2]]
    assert fed["mm_token_type_ids"].tolist() == [[0, 1, 1, 1, 0, 0, 0, 0]] * 2
    assert fed["labels"].tolist() == [[-100] * 5 + [1, 2, -100], [-100] * 6 + [1, 2]]
    assert fed["pixel_values"].tolist() == [5, 5], "of another width, and left as it is"
    of_text = TrlTrainer(generation).encoded([Answer((1, 2), (3,), (-1.0,))])
    assert "pixel_values" not in of_text and "mm_token_type_ids" not in of_text


def test_a_prompt_that_vllm_wrote_in_another_way_is_not_scored(generation: Generation) -> None:
    (answer,) = answers_about("user <image> a")
    other = Answer((*answer.prompt, 7), answer.tokens, answer.logprobs, answer.request)
    with pytest.raises(ValueError, match="in another way than vLLM"):
        TrlTrainer(generation).encoded([other])


@pytest.mark.parametrize(
    "ids, image, wrong",
    [
        ([4, 9, 9, 9], "one", True),
        ([4, 9], "mended in TRL", False),
        ([4, 1], None, False),
        ([4, 9, 9], ["a", "b"], False),
    ],
)
def test_a_placeholder_that_is_expanded_twice_is_said_once(
    generation: Generation, ids: list[int], image: Any, wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("swift_lora_fix.frameworks.trl.rollouts.warning", said.append)
    port = TrlTrainer(generation)
    for _ in range(2):
        prompts = [row([4, 1]), row(ids, image)]
        TrlRollout(port, vllm, prompts).check_prompts(vllm(prompts))
    assert len(said) == wrong
    assert not wrong or "in 4 tokens, and vLLM answers one of 6" in said[0]
