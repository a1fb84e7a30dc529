"""ms-swift reads its settings from here."""

IMAGE_MIN_TOKEN_NUM = 1
IMAGE_MAX_TOKEN_NUM = 64
