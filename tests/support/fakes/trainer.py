"""A trainer of a framework that does not exist, with names of its own, and a port to it. Its model is a real PEFT's."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from swift_lora_fix.common.words import Words


@dataclass(eq=False)
class Learner:
    """The framework's own object. ``take`` is what its engine does with the weights of a push."""

    policy: torch.nn.Module
    take: Callable[[Any], Any] = lambda weights: None
    updates: int = 0
    llm: Any = None
    request_kind: Any = None
    names_adapter: bool = True
    naps: int = 0
    parks_policy: bool = False
    has_lora: bool = True
    place: str = "colocate"
    algorithm: str = "lora"
    with_vllm: bool = True
    world: int = 1
    client: Any = None
    text: Any = None
    folder: str = ""
    resumed: str | None = None
    must_sync: bool = False
    prepared: int = 0
    numbers: Any = field(default_factory=lambda: defaultdict(list))

    def weights(self) -> dict[str, torch.Tensor]:
        """Under the names of the model's files; a module that is trained whole goes as it is now."""
        found = {}
        for name, parameter in self.policy.named_parameters():
            if "lora_" not in name and "original_module" not in name:
                name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
                found[name if self.has_lora else name.replace(".base_layer", "")] = parameter.data
        return found


class LearnerPort:
    """``swift_lora_fix.trainer.TrainerPort`` of a `Learner`, which it does not keep alive."""

    def __init__(self, learner: Learner) -> None:
        import weakref

        self._of = weakref.ref(learner)

    @property
    def learner(self) -> Learner:
        learner = self._of()
        assert learner is not None
        return learner

    words = Words("the framework", with_lora="--vllm_enable_lora true", without_lora="--vllm_enable_lora false")
    model = property(lambda self: self.learner.policy)
    device = torch.device("cpu")
    step = property(lambda self: self.learner.updates)
    ranks = property(lambda self: self.learner.world)
    is_main_rank = True
    uses_vllm = property(lambda self: self.learner.with_vllm)
    tuner = property(lambda self: self.learner.algorithm)
    engine_place = property(lambda self: self.learner.place)
    engine_has_lora = property(lambda self: self.learner.has_lora)
    sleep_level = property(lambda self: self.learner.naps)
    offloads_model = property(lambda self: self.learner.parks_policy)
    is_asynchronous = False
    resume_from = property(lambda self: self.learner.resumed)
    output_folder = property(lambda self: self.learner.folder)
    vllm_engine = property(lambda self: self.learner.llm)
    server_client = property(lambda self: self.learner.client)
    adapter_request_class = property(lambda self: self.learner.request_kind)
    attaches_adapter = property(lambda self: self.learner.names_adapter)
    tokenizer = property(lambda self: self.learner.text)
    longest_prompt = 120
    template_tokens = 20

    def attach_adapter(self, wanted: bool) -> None:
        self.learner.names_adapter = wanted

    def scoring(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def encoded(self, answers: Sequence[Any]) -> Mapping[str, Any]:
        """Padded on the left, as many frameworks do."""
        width = max(len(answer.prompt) + len(answer.tokens) for answer in answers)
        rows = torch.zeros(3, len(answers), width, dtype=torch.int64)
        ids, mask, labels = rows[0], rows[1], rows[2].fill_(-100)
        for row, answer in enumerate(answers):
            sequence = [*answer.prompt, *answer.tokens]
            ids[row, width - len(sequence) :] = torch.tensor(sequence)
            mask[row, width - len(sequence) :] = 1
            labels[row, width - len(answer.tokens) :] = torch.tensor(answer.tokens)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": places, "use_cache": False}
        return {**inputs, "labels": labels}

    def prepare(self) -> None:
        self.learner.prepared += 1

    def send_base(self, load: Callable[[Any, Any], Any], note: Callable[[Any], None]) -> None:
        note(dict(self.learner.policy.named_parameters()))
        load(self.learner.take, self.learner.weights())

    def sync_again(self) -> None:
        self.learner.must_sync = True

    def wait_for_rollouts(self) -> None:
        raise AssertionError("nothing is asynchronous here")

    def metrics(self) -> Mapping[str, list[float]]:
        return self.learner.numbers


def port_of(model: torch.nn.Module, **attributes: Any) -> Any:
    """A port whose trainer lives as long as it does."""
    learner = Learner(model, **attributes)
    port = LearnerPort(learner)
    port.kept = learner  # type: ignore[attr-defined]
    return port
