"""The request of a verification, what it measured and the verdict, as frozen records."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...proof.causes import CAUSES


@dataclass(frozen=True)
class Request:
    """What to verify. extra: more arguments of the framework's, which override ours."""

    model: str
    adapter: str
    use_hf: bool
    syncs: int
    extra: tuple[str, ...] = ()
    framework: str = "ms-swift"  # or "TRL"


@dataclass(frozen=True)
class Sync:
    """One sync as the observer saw it. Logprob differences are in nats a token.

    base_changed: how many of the trainer's base_tensors differ from the start.
    lora_changed: how many of its lora_tensors this sync changed, in dtype or value.
    noise: what the policy's own numerics explain. ratio: the mismatch in units of that noise, robust."""

    step: int
    seconds: float
    mean: float
    max: float
    kl: float
    noise: float
    ratio: float
    control_base: float
    control_double: float
    agrees: bool
    is_distinguishable: bool
    cause: str | None
    base_changed: int
    base_tensors: int
    lora_changed: int
    lora_tensors: int


@dataclass(frozen=True)
class Side:
    """One of the two runs. ending: why it stopped early, in its own last words; empty if it did not. floors: the gate's
    floors on the plain base, by kind of prompts."""

    name: str
    syncs: tuple[Sync, ...]
    ending: str
    log: Path
    floors: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    ours: Side
    stock: Side
    framework: str = "ms-swift"

    @property
    def is_proved(self) -> bool:
        """Whether our run served the adapter at each sync, and the probe could have shown otherwise."""
        return not self.ours.ending and all(
            sync.agrees and sync.is_distinguishable and not sync.base_changed and not sync.lora_changed
            for sync in self.ours.syncs
        )

    @property
    def exit_code(self) -> int:
        return 0 if self.is_proved else 1

    @property
    def verdict(self) -> str:
        wrong = [sync for sync in self.ours.syncs if not sync.agrees]
        written = [sync for sync in self.ours.syncs if sync.base_changed or sync.lora_changed]
        if self.ours.ending:
            return f"Not proved: the run with the plugin ended early, {self.ours.ending}. Log: {self.ours.log}"
        if wrong:
            return f"Wrong: with the plugin {len(wrong)} of {len(self.ours.syncs)} syncs were not the trainer's policy."
        if written:
            return f"Wrong: with the plugin {len(written)} of {len(self.ours.syncs)} syncs changed the trainer."
        if not self.is_proved:
            return (
                "Not proved: engine and trainer agree, but this adapter does too little for the probe to tell it from "
                "the plain base, or from twice itself."
            )
        about = _about(self.stock, self.framework)
        return f"Proved: with the plugin all {len(self.ours.syncs)} syncs served the adapter, {about}"

    def as_dict(self) -> dict[str, Any]:
        sides = {}
        for key, side in (("ours", self.ours), ("stock", self.stock)):
            sides[key] = {
                "syncs": [asdict(sync) for sync in side.syncs],
                "ending": side.ending,
                "log": str(side.log),
                "floors": side.floors,
            }
        return {"proved": self.is_proved, "framework": self.framework, "verdict": self.verdict, **sides}


def found(sync: Sync) -> str:
    if sync.agrees:
        return "agrees"
    if sync.cause == "unknown" and sync.lora_changed:
        return "the sync changed the trainer's LoRA"
    return CAUSES[sync.cause or "unknown"].title


def _about(stock: Side, framework: str) -> str:
    wrong = [sync for sync in stock.syncs if not sync.agrees]
    parts = []
    if wrong:
        titles = " and ".join(dict.fromkeys(map(found, wrong)))
        parts.append(f"{len(wrong)} of its {len(stock.syncs)} syncs did not ({titles})")
    if stock.ending:
        parts.append(f"its run ended early ({stock.ending})")
    if stock.syncs and stock.syncs[-1].base_changed:
        last = stock.syncs[-1]
        parts.append(f"it changed {last.base_changed} of the trainer's {last.base_tensors} frozen base tensors")
    cast = sum(sync.lora_changed > 0 for sync in stock.syncs)
    if cast:
        parts.append(f"{cast} of its syncs changed the LoRA that it trains, in dtype or in value")
    if not parts:
        return f"and so did stock {framework}, whose trainer kept its base."
    return f"and the trainer's base kept every bit. Stock {framework} here: {'; '.join(parts)}."
