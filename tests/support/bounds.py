"""What counts as agreement between engine and trainer and what as a defect: shared by the e2e suite and the demo.

All are multiples of the *floor*: what engine and trainer differ by for the plain base, the first rollout from scratch,
where every lora_B is zero. It is bf16 rounding in two kernels. A trained LoRA makes logits larger and bf16's steps with
them; measured on two cores, up to 1.9 times the floor's mean and maximum. A double count stands at 20 to 300 times.
"""

from __future__ import annotations

from typing import Any

Probe = dict[str, Any]  # one line of what plugins/slf_probe.py records

MEAN_BOUND = 3.0
MAX_BOUND = 4.0
DOUBLE_COUNT_FACTOR = 10.0  # a mean above this many floors is no rounding
LARGE_LORA_FACTOR = 50.0  # a LoRA whose own effect is below this many floors would not be missed
FLOOR_CEILING = 0.02  # absolute: a floor above this is not bf16 noise of these tiny models
DRIFT_SHARE = 0.01  # stock's first sync changes more than this share of the trainer's base entries


def is_floor(probe: Probe) -> bool:
    """Whether this rollout is the plain base's, and as quiet as bf16 rounding is."""
    return probe["lora_effect"] == 0.0 and 0.0 < probe["mean"] < FLOOR_CEILING


def agrees(probe: Probe, floor: Probe) -> bool:
    """Whether the engine served the trainer's policy in this rollout."""
    return probe["mean"] <= MEAN_BOUND * floor["mean"] and probe["max"] <= MAX_BOUND * floor["max"]


def double_counted(probe: Probe, floor: Probe) -> bool:
    """Whether the engine served something else, far beyond rounding."""
    return probe["mean"] > DOUBLE_COUNT_FACTOR * floor["mean"]


def is_large(probe: Probe, floor: Probe) -> bool:
    """Whether the LoRA is large enough that a wrong one shows."""
    return probe["lora_effect"] > LARGE_LORA_FACTOR * floor["mean"]


def only_read(probe: Probe) -> bool:
    """Whether the syncs so far left the trainer as it was: values, dtypes, objects, storage."""
    untouched = ("base_changed", "lora_changed_by_sync", "merge_calls", "new_parameter_objects", "shared_storage")
    return not any(probe[name] for name in untouched) and probe["lora_dtypes"] == ["torch.float32"]


def say_the_same(source: Probe, other: Probe, floor: Probe) -> bool:
    """Whether two greedy answers are the same, each up to where the source was undecided: rounding tips that over."""
    for tokens, others, margins in zip(source["tokens"], other["tokens"], source["margins"], strict=True):
        for token, other_token, margin in zip(tokens, others, margins):
            if token != other_token:
                if margin > 4 * floor["max"]:
                    return False
                break
    return True
