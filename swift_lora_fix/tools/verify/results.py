"""What a verification found: the verdict, a table and a chart."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import MissingPackageError
from ...proof.causes import CAUSES
from ...proof.verdict import MINIMUM_FLOOR
from .runs import Side, Sync

if TYPE_CHECKING:
    from rich.table import Table

CHART_NAME = "verify.png"


@dataclass(frozen=True)
class Result:
    ours: Side
    stock: Side

    @property
    def is_proved(self) -> bool:
        """Whether our run served the adapter at each sync, and could have been told from one that did not."""
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
        return f"Proved: with the plugin all {len(self.ours.syncs)} syncs served the adapter, {_about(self.stock)}"

    def as_dict(self) -> dict[str, Any]:
        sides = {}
        for key, side in (("ours", self.ours), ("stock", self.stock)):
            sides[key] = {"syncs": [asdict(sync) for sync in side.syncs], "ending": side.ending, "log": str(side.log)}
        return {"proved": self.is_proved, "verdict": self.verdict, **sides}

    def table(self) -> Table:
        from rich.table import Table

        table = Table(title="|logprob engine - trainer| at each sync, nats a token")
        table.add_column("run")
        table.add_column("", justify="right")
        for name in ("mean", "max", "floors", "sync", "base changed", "LoRA changed"):
            table.add_column(name, justify="right")
        table.add_column("found", max_width=24)
        for side in (self.stock, self.ours):
            for number, sync in enumerate(side.syncs, start=1):
                found = _found(sync)
                table.add_row(
                    side.name if number == 1 else "",
                    str(number),
                    f"{sync.mean:.4g}",
                    f"{sync.max:.4g}",
                    f"{sync.mean / max(sync.floor, MINIMUM_FLOOR):.1f}",
                    f"{sync.seconds * 1e3:.1f} ms",
                    f"{sync.base_changed}/{sync.base_tensors}",
                    f"{sync.lora_changed}/{sync.lora_tensors}",
                    found,
                    style="" if sync.agrees else "red",
                )
            table.add_section()
        last = self.ours.syncs[-1]
        table.caption = (
            f"floors: in units of the noise floor (plain base, both sides), {last.floor:.4g}. The base alone would be "
            f"{last.control_base:.4g} off, twice the adapter {last.control_double:.4g}. Base changed: tensors of the "
            "trainer's frozen base that differ from the start; LoRA changed: of the trainer's LoRA, by this sync."
        )
        return table

    def draw(self, path: Path) -> None:
        """Save the chart. Raises MissingPackageError without matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise MissingPackageError('the chart needs matplotlib: pip install "swift-lora-fix[plot]"') from None
        figure = Figure(figsize=(8, 4.5), layout="constrained", dpi=150)
        axis = figure.subplots()
        for side, colour, marker in ((self.stock, "tab:red", "s"), (self.ours, "tab:blue", "o")):
            numbers = list(range(1, len(side.syncs) + 1))
            axis.plot(numbers, [sync.mean for sync in side.syncs], color=colour, marker=marker, label=side.name)
        last = self.ours.syncs[-1]
        for level, label, style in (
            (last.control_base, "if the engine served the plain base", ":"),
            (last.control_double, "if it served twice the adapter", "-."),
            (last.floor, "noise floor", "--"),
        ):
            axis.axhline(level, color="grey", linestyle=style, linewidth=1, label=label)
        axis.set_yscale("log")
        axis.set_xticks(range(1, 1 + max(len(self.stock.syncs), len(self.ours.syncs))))
        axis.set_xlabel("sync")
        axis.set_ylabel("mean |logprob engine \u2212 trainer| (nats a token)")
        axis.set_title("Does the engine serve the trainer's policy?")
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(path)


def _found(sync: Sync) -> str:
    if sync.agrees:
        return "agrees"
    if sync.cause == "unknown" and sync.lora_changed:
        return "the sync changed the trainer's LoRA"
    return CAUSES[sync.cause or "unknown"].title


def _about(stock: Side) -> str:
    wrong = [sync for sync in stock.syncs if not sync.agrees]
    parts = []
    if wrong:
        titles = " and ".join(dict.fromkeys(map(_found, wrong)))
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
        return "and so did stock ms-swift, whose trainer kept its base."
    return f"and the trainer's base kept every bit. Stock ms-swift here: {'; '.join(parts)}."
