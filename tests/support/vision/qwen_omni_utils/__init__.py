"""What ms-swift's Omni templates ask of ``qwen_omni_utils``, for images alone."""

from qwen_vl_utils import fetch_image, fetch_video

from . import vision_process

__all__ = ["fetch_image", "fetch_video", "vision_process"]
