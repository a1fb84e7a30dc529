"""What a TRL script with images trains on, and the probe's questions about them (trl_run.py, key ``images``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .tiny import PROMPTS

QUESTIONS = ("What is this?", "Which colour is in the middle?")  # one a picture


def pictures(model: Path) -> list[Path]:
    """The two that ``make_vision_model`` wrote beside its model."""
    return sorted(model.parent.glob("picture*.png"))


def dataset(model: Path) -> Any:
    """Conversations, of which every third one has no image."""
    from datasets import Dataset, Image, List

    own = [str(picture) for picture in pictures(model)]
    rows = {
        "prompt": [[{"role": "user", "content": text}] for text in PROMPTS * 3],
        "images": [[own[row % 2]] if row % 3 else [] for row in range(len(PROMPTS) * 3)],
    }
    return Dataset.from_dict(rows).cast_column("images", List(Image()))


class Asked:
    """One question about a picture, as transformers' processor encodes it. other: another picture, made this size.

    vLLM is given the tokenizer's ids, with one placeholder an image, which it expands itself. TRL 1.16 gives it ids
    that are expanded already, and vLLM expands the first of them once more (TRL issue 6294).
    """

    def __init__(self, processor: Any, text: str, picture: Path, other: Path) -> None:
        from PIL import Image

        shown = Image.open(picture).convert("RGB")
        content = [{"type": "image"}, {"type": "text", "text": text}]
        self._said = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        self.inputs = self._encode(processor, shown)
        self.inputs_of_other = self._encode(processor, Image.open(other).convert("RGB").resize(shown.size))
        self.ids: list[int] = self.inputs["input_ids"][0].tolist()
        ids = processor.tokenizer(self._said)["input_ids"]
        self.request = {"prompt_token_ids": ids, "multi_modal_data": {"image": shown}}

    def _encode(self, processor: Any, shown: Any) -> dict[str, Any]:
        return dict(processor(text=[self._said], images=[shown], return_tensors="pt"))
