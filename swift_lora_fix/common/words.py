"""What a framework's users call things. (This loads no torch: the command line must start without it.)"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """How a framework's users call things, for messages.

    with_lora, without_lora: what they set to have an engine with LoRA layers, or one without. rank, targets: the LoRA's
    options. start: what comes before the folder of an adapter that a run starts from; resume: before the checkpoint
    that it goes on from. more: how else the engine can be told to do something: a format of a JSON object of vLLM's
    arguments, "" where there is no way. verify: what proves a run apart from training, "" where nothing does.
    """

    framework: str
    with_lora: str
    without_lora: str
    rank: str = "the LoRA's rank"
    targets: str = "target_modules"
    start: str = "the folder"
    resume: str = "the checkpoint"
    more: str = ""
    verify: str = ""


# Where no framework is known: adapters that are read by themselves, and programs of vLLM's alone.
PLAIN = Words("the trainer", with_lora="an engine with LoRA layers", without_lora="an engine without LoRA layers")
