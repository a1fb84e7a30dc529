"""Lets torchvision be imported beside a torch without CUDA: on the matrix's path (running.py).

Its compiled operators cannot be loaded there, and its import fails where it looks for two of them. Nobody calls these.
"""

import wrapt


@wrapt.when_imported("torch")
def _declare(torch):
    if torch.version.cuda is None:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
