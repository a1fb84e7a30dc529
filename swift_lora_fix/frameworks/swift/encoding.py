"""Answers of the engine as ms-swift's template encodes its own rollouts, for the trainer to score."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ...common.shadowing import holding
from ...errors import UnsupportedTrainerError
from ...trainer import Answer

MEDIA = ("images", "audios")  # of a request, that a probe has too


@contextlib.contextmanager
def scoring(trainer: Any) -> Iterator[None]:
    """Context in which ms-swift's ``trainer`` scores as it does: with its template in training mode, which a multimodal
    model's forward hook reads too. No sequence parallelism, which splits a sequence among ranks, and no packing of rows
    into one."""
    rows = {"mode": "train", "max_length": None, "padding_free": False, "sequence_parallel_size": 1}
    engine = getattr(trainer, "model_wrapped", None)  # transformers' own
    with trainer._disable_sp_context(), holding(trainer.template, **rows), untraced(engine):
        yield


@contextlib.contextmanager
def untraced(engine: Any) -> Iterator[None]:
    """Context for forwards of the model in a DeepSpeed ``engine`` that ZeRO-3 neither checks against its trace nor
    leaves in it. Of any other model, nothing.

    ZeRO-3 records in one forward which parameters each module uses, and checks the next ones against that. PEFT's
    LoRA layer reads its lora_A before the module that owns it does. Where that is sharded just then, ZeRO-3 from then
    on counts it among the layer's own (``ZeROOrderedDict``, deepspeed 0.19.8), which the record does not say: the
    next forward raises "tracing error at step ...". More forwards, and between gathers, make that likelier.
    """
    offload = getattr(getattr(engine, "optimizer", None), "parameter_offload", None)
    if offload is None:
        yield
        return

    def forget(*_: Any) -> None:
        coordinator = offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()

    before_deepspeed = engine.module.register_forward_pre_hook(forget, prepend=True)
    try:
        yield
    finally:
        before_deepspeed.remove()
        forget()


def encoded(trainer: Any, model: Any, device: torch.device, answers: Sequence[Answer]) -> Mapping[str, Any]:
    """Encode with ms-swift's template and its ``data_collator``, as the trainer encodes its own rollouts. A
    multimodal model needs their positions and media: without them its forward hook makes embeddings that have no
    positions."""
    with scoring(trainer):
        rows = [_row(trainer.template, answer) for answer in answers]
        inputs: dict[str, Any] = on_device(trainer.template.data_collator(rows), device)
    for name in ("loss_scale", "channel"):  # only used in the training loss
        inputs.pop(name, None)
    labels = inputs["labels"]
    known = inspect.signature(model.get_base_model().forward).parameters
    if "use_cache" in known:
        inputs["use_cache"] = False
    if "logits_to_keep" in known:  # the first one kept predicts the first label
        inputs["logits_to_keep"] = labels.shape[1] - int((labels != -100).any(0).int().argmax()) + 1
    return inputs


def _row(template: Any, answer: Answer) -> dict[str, Any]:
    """One answer as the template encodes it, but with the engine's own ids. Only the template knows what else a
    multimodal model needs. If its ids differ from the engine's (a prompt that was cut, say), the engine's ids alone
    are used. Raises ValueError if such a request has media, because the ids alone do not contain them."""
    tokens, asked = list(answer.tokens), [*answer.prompt, *answer.tokens]
    alone = {"input_ids": asked, "labels": [-100] * len(answer.prompt) + tokens}
    if not sees_media(template) or answer.request is None:
        return alone
    row = _encode(template, answer.request, tokens)
    prompt = _end_of(tokens, row["input_ids"]) - len(tokens)
    if prompt < len(answer.prompt) and row["input_ids"][:prompt] == asked[:prompt]:
        # the engine's prompt ends with the start of the answer (a thinking prefix)
        row = _encode(template, answer.request, asked[prompt:])
    if list(row["input_ids"][: len(asked)]) == asked:
        row["labels"] = [*alone["labels"], *[-100] * (len(row["input_ids"]) - len(asked))]
        return row
    if not media_of(answer.request):
        return alone
    raise ValueError(
        f"the template writes {len(row['input_ids'])} tokens for a probe with media, and the engine was given "
        f"other ones ({len(asked)}): --max_length or --vllm_max_model_len cuts it, or vLLM expands them in "
        "another way"
    )


def _encode(template: Any, request: Any, response: list[int]) -> dict[str, Any]:
    """The template's encoding of a probe's request and its answer's ids."""
    asked = copy.deepcopy(fields_of(request))
    messages = [*asked["messages"], {"role": "assistant", "content": response}]
    kept = {name: asked[name] for name in (*MEDIA, "chat_template_kwargs") if asked.get(name)}
    row: dict[str, Any] = template.encode({"messages": messages, "add_eos": False, **kept})
    row.pop("_extra_kwargs", None)
    return row


def sees_media(template: Any) -> bool:
    """Whether its model is multimodal."""
    return bool(template.model_meta.is_multimodal)


def fields_of(request: Any) -> dict[str, Any]:
    """The fields of an ms-swift request, which is an object or a row of the data set."""
    return request if isinstance(request, dict) else vars(request)


def media_of(request: Any) -> dict[str, list[Any]]:
    """A request's first image and first sound, as it has them."""
    found = {name: fields_of(request).get(name) for name in MEDIA}
    return {
        name: list(value if isinstance(value, (list, tuple)) else [value])[:1] for name, value in found.items() if value
    }


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
