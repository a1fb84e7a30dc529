"""What ms-swift's Qwen-VL templates ask of ``qwen_vl_utils``, for images alone: tests put this folder on the path."""

from __future__ import annotations

from typing import Any

from . import vision_process


def fetch_image(element: dict[str, Any], image_patch_size: int = 14) -> Any:
    """An RGB image whose sides are multiples of what becomes one token."""
    from PIL import Image

    image = element["image"]
    image = image if isinstance(image, Image.Image) else Image.open(image)
    unit = 2 * image_patch_size
    return image.convert("RGB").resize(tuple(max(unit, side // unit * unit) for side in image.size))


def fetch_video(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError(f"{vision_process.__name__}: no video here")
