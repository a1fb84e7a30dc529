"""The possible faults between trainer and engine, and how they are reported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """title: what is wrong. advice: what a user can do about it."""

    title: str
    advice: str


CAUSES = {
    "double-count": Cause(
        "the LoRA is counted twice",
        "Something merged the adapter into the engine's base, or wrote it twice over. Keep other weight syncs and "
        "merge_adapter() out of the run.",
    ),
    "not-applied": Cause(
        "the adapter is not applied, the engine serves the plain base",
        "Keep other adapters and load_lora/remove_lora calls out of this engine; on a sleeping engine, report it.",
    ),
    "not-loaded": Cause(
        "the adapter is not in the engine",
        "Keep other adapters and remove_lora calls out of this engine.",
    ),
    "stale": Cause(
        "the engine serves an earlier policy",
        "A sync did not reach the engine. Look in the log for the last sync and for what wrote to the engine since.",
    ),
    "stale-cache": Cause(
        "the engine reuses prefix-cache blocks of an earlier policy",
        "The prefix cache was not reset after a sync. Keep other users of this engine away, or run vLLM "
        "without prefix caching.",
    ),
    "scaling": Cause(
        "the adapter's scaling is not the one that the trainer uses",
        "lora_alpha or module.scaling was changed after the run began. Set it before training starts.",
    ),
    "module-doubled": Cause(
        "a module's LoRA is counted twice", "Something wrote to the engine's memory after the sync."
    ),
    "misplaced": Cause(
        "modules hold the LoRA of other modules", "Something wrote to the engine's memory after the sync."
    ),
    "not-finite": Cause(
        "the engine holds NaN or infinity in the adapter", "Something wrote to the engine's memory after the sync."
    ),
    "engine-not-finite": Cause(
        "the engine answers with NaN or infinite logprobs",
        "A kernel or a weight of the engine is broken, while the trainer's logprobs of the same tokens are finite. Try "
        "another attention or LoRA kernel of vLLM, or another release of it.",
    ),
    "trainer-not-finite": Cause(
        "the trainer computes NaN or infinite logprobs",
        "The policy itself is broken: look at the loss and the gradients of the steps before. Start from an earlier "
        "checkpoint.",
    ),
    "slots-changed": Cause(
        "the engine's LoRA slots hold other values than were written",
        "Something wrote to the engine's memory after the sync.",
    ),
    "weights-changed": Cause(
        "the engine's weights are not the trainer's with the adapter folded in",
        "Something wrote to the engine's weights after the sync. Keep other load_weights calls out of it.",
    ),
    "base-changed": Cause(
        "the engine's base weights are not the trainer's",
        "Something wrote to the engine's weights after the base was sent. Keep other load_weights calls out of it.",
    ),
    "base-replaced": Cause(
        "the engine's base is another model's",
        "The engine's weights were loaded again from elsewhere after the base was sent. Check which model it "
        "was started with, and what calls load_weights.",
    ),
    "base-not-served": Cause(
        "the engine holds the trainer's base and yet does not compute with it",
        "Its kernels want these weights in another layout than they are sent in, or the model is not the same in both "
        "(quantised, another implementation). Try another MoE or quantisation backend of vLLM, and report it.",
    ),
    "trainer-base-changed": Cause(
        "the trainer's frozen base has changed since it was sent to the engine",
        "Something merges into, or writes to, the trainer's base: merge_adapter(), a callback, a plugin.",
    ),
    "unknown": Cause(
        "engine and trainer disagree, for a reason that no test names",
        "Run `swift-lora-fix doctor`; try vLLM's enforce_eager and SWIFT_LORA_FIX_WRITER=loader, and report it.",
    ),
}


@dataclass(frozen=True)
class Finding:
    """One disagreement. cause: a key of ``CAUSES``; test: what found it; evidence: numbers and names, in words."""

    cause: str
    test: str
    evidence: str

    def __str__(self) -> str:
        cause = CAUSES[self.cause]
        return f"{cause.title} [{self.cause}]. Found by the {self.test}: {self.evidence}. {cause.advice}"
