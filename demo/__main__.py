"""The demo behind ``scripts/demo``: issue 8233 on this machine, without and with the plugin, told in one table.

Five real ``swift rlhf`` runs, two at a time:

    uninterrupted   from scratch with the plugin, batches of step 0 to 5: what should have happened
    interrupted     the same, killed outright as the batch of step 3 begins; checkpoint-2 is left behind
    stock, fixed    the resume of the report: checkpoint-2 is policy and reference (--ref_adapters), beta 0.04
    continued       resumes what was interrupted, nothing else changed: must repeat ``uninterrupted`` bit for bit
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from rich.console import Console

from demo.checks import Check
from demo.report import RELEASE_TITLE, Outcome, save_chart, table
from swift_lora_fix.errors import ChartError, MissingPackageError
from swift_lora_fix.install import releases
from tests.support import bounds
from tests.support.driver import REPOSITORY, Run, make_model, this_python
from tests.support.hangs import Hang

CHECKPOINT_STEP = 2
KILL_STEP = 3
STEPS = 6  # the last batch is that of step 5
HEARTBEAT_SECONDS = 20
TAIL_LINES = 25
CRASH = "expected scalar type"  # BFloat16 but found Float: the optimizer's state is fp32, the LoRA no longer

WHAT = {
    "uninterrupted": "from scratch with the plugin, never interrupted",
    "interrupted": f"from scratch with the plugin, to be killed as batch {KILL_STEP + 1} (step {KILL_STEP}) begins",
    "stock": "resume without the plugin",
    "fixed": "resume with the plugin",
    "continued": "resume with the plugin, no reference adapter",
}


class RunFailed(Exception):
    """A run did not end as it has to for the demo to say anything."""

    def __init__(self, run: Run, why: str) -> None:
        super().__init__(f"{run.name}: {why}")
        self.run = run


class Demo:
    """One demo in one folder."""

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder = folder
        self.console = console
        self.started = time.monotonic()
        self.pool = ThreadPoolExecutor(max_workers=2)
        self.watched: dict[str, tuple[Run, Future[Run]]] = {}
        self.told: dict[str, int] = {}  # batches, by run
        family = releases.family_of(releases.installed_swift() or "0")
        self.double_counts = family is not None and family.has(releases.DOUBLE_COUNT)

    def run(self) -> Outcome:
        """Start everything. Raises RunFailed when a run dies for another reason than the one it is started for."""
        self.say("making a tiny Qwen2 and its tokenizer")
        self.model = make_model(this_python(), self.folder / "models")  # by this Python: see tests.support.tiny
        checkpoint = self.folder / "interrupted" / "run" / f"checkpoint-{CHECKPOINT_STEP}"
        resume = {"resume_from_checkpoint": checkpoint, "max_steps": STEPS, "save_steps": 100}
        report = {**resume, "ref_adapters": checkpoint, "beta": 0.04}

        interrupted = self.start("interrupted", environment={"SLF_KILL_AT_STEP": str(KILL_STEP)})
        uninterrupted = self.start("uninterrupted", arguments={"max_steps": STEPS, "save_steps": 100})
        self.watch(interrupted)
        stock = self.start("stock", fixed=False, arguments=report)
        fixed = self.start("fixed", arguments=report)
        continued = self.start("continued", arguments=resume)
        self.watch(uninterrupted, stock, fixed, continued)
        runs = [future.result() for future in (interrupted, stock, fixed, uninterrupted, continued)]
        probes = [run.probes() for run in runs]
        return Outcome(probes[0], probes[1], probes[2], runs[1].returncode != 0, self.judge(*runs))

    def stop(self) -> None:
        """Start no further run; those that run end by themselves."""
        self.pool.shutdown(wait=False, cancel_futures=True)

    # ---- runs ------------------------------------------------------------------------------------------------------

    def start(self, name: str, fixed: bool = True, **options: Any) -> Future[Run]:
        run = Run(name, this_python(), self.model, self.folder / name, fixed, **options)

        def go() -> Run:
            self.say(f"{name}: {WHAT[name]}")
            try:
                return run.start()
            except Hang as error:
                raise RunFailed(run, str(error)) from error

        future = self.pool.submit(go)
        self.watched[name], self.told[name] = (run, future), 0
        return future

    def watch(self, *futures: Future[Run]) -> None:
        """Wait, tell each batch as it comes, and check each run as it ends."""
        pending = set(futures)
        last_said = time.monotonic()
        with self.console.status("") as status:
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                if self.tell_batches():
                    last_said = time.monotonic()
                for future in done:
                    run = future.result()
                    self.say(f"{run.name}: ended with status {run.returncode}")
                    self.check(run)
                running = [name for name, (_, future) in self.watched.items() if future.running()]
                line = f"running: {', '.join(running)}"
                status.update(f"[{self.elapsed:3.0f} s] {line}")
                if not self.console.is_terminal and time.monotonic() - last_said > HEARTBEAT_SECONDS:
                    self.say(line)
                    last_said = time.monotonic()

    def tell_batches(self) -> bool:
        news = False
        for name, (run, _) in self.watched.items():
            try:
                probes = run.probes()
            except ValueError:
                continue  # a line is being written
            for probe in probes[self.told[name] :]:
                self.say(
                    f"{name}: batch of step {probe['step']}, |logprob engine - trainer| {probe['mean']:.4f} on average"
                )
                news = True
            self.told[name] = len(probes)
        return news

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def say(self, text: str) -> None:
        self.console.print(f"[{self.elapsed:3.0f} s] {text}", markup=False, highlight=False, soft_wrap=True)

    def check(self, run: Run) -> None:
        """Raise RunFailed when the run ended in a way that says nothing."""
        steps = [probe["step"] for probe in run.probes()]
        if run.name == "interrupted":
            if run.returncode != -signal.SIGKILL or steps != list(range(KILL_STEP)):
                raise RunFailed(run, f"was to be killed as the batch of step {KILL_STEP} began, not before")
            if not (run.output / f"checkpoint-{CHECKPOINT_STEP}" / "adapter_model.safetensors").is_file():
                raise RunFailed(run, f"left no checkpoint-{CHECKPOINT_STEP}")
        elif run.name == "stock" and not self.double_counts and run.returncode != 0 and CRASH in run.log:
            return  # what the release is known for
        elif run.returncode != 0:
            raise RunFailed(run, f"died with status {run.returncode}")
        elif steps[-1:] != [STEPS - 1]:
            raise RunFailed(run, f"ended before the batch of step {STEPS - 1}")

    # ---- what they show --------------------------------------------------------------------------------------------

    def judge(self, interrupted: Run, stock: Run, fixed: Run, uninterrupted: Run, continued: Run) -> list[Check]:
        floor = interrupted.probes()[0]
        without, with_it = stock.probes(), fixed.probes()
        checks = [
            Check(
                bounds.is_floor(floor),
                f"noise floor: the first batch from scratch (LoRA is zero) differs by {floor['mean']:.4f}",
                f"LoRA effect 0; bf16 rounding is below {bounds.FLOOR_CEILING}",
            ),
            Check(
                all(bounds.is_large(p, floor) for p in with_it),
                "the LoRA is large: its own effect is "
                f"{min(p['lora_effect'] for p in with_it) / floor['mean']:.0f} times the floor or more",
                f"above {bounds.LARGE_LORA_FACTOR:.0f} in every batch",
            ),
            *(self.judge_double_count(without, floor) if self.double_counts else self.judge_crash(stock)),
            Check(
                without[-1]["base_changed"] > bounds.DRIFT_SHARE,
                f"without the plugin {without[-1]['base_changed']:.1%} of the trainer's frozen base entries changed",
                f"above {bounds.DRIFT_SHARE:.0%}",
            ),
            Check(
                all(bounds.agrees(p, floor) for p in with_it),
                "with the plugin every batch after the resume agrees: at most "
                f"{max(p['mean'] for p in with_it) / floor['mean']:.1f} times the floor on average, "
                f"{max(p['max'] for p in with_it) / floor['max']:.1f} times at the maximum",
                f"at most {bounds.MEAN_BOUND:.0f} and {bounds.MAX_BOUND:.0f} in every batch",
            ),
            Check(
                all(bounds.only_read(p) for p in with_it),
                "with the plugin the syncs changed not one bit of the trainer's base and LoRA, which stays fp32",
                "0 entries, 0 merges, no storage shared with the engine",
            ),
            Check(
                _policy(continued)[0] == _policy(interrupted)[-1] and _policy(continued) == _policy(uninterrupted)[2:],
                "with the plugin the interrupted run goes on as if never interrupted (run 'continued')",
                f"greedy tokens, logprobs and LoRA of steps {CHECKPOINT_STEP} to {STEPS - 1} equal bit for bit",
            ),
            Check(
                "LoRA weights from --resume_from_checkpoint" in fixed.log and "swift.lora_fix" not in stock.log,
                "the plugin says that it resumes and from where; it was not in the stock run",
                "its log line",
            ),
        ]
        return checks

    def judge_double_count(self, probes: list[bounds.Probe], floor: bounds.Probe) -> list[Check]:
        first, *later = probes
        return [
            Check(
                bounds.agrees(first, floor) and all(bounds.double_counted(p, floor) for p in later),
                "without the plugin the first batch is right and every later one has the LoRA twice: "
                f"{min(p['mean'] for p in later) / floor['mean']:.0f} to "
                f"{max(p['mean'] for p in later) / floor['mean']:.0f} times the floor",
                f"above {bounds.DOUBLE_COUNT_FACTOR:.0f} in every later batch",
            )
        ]

    def judge_crash(self, stock: Run) -> list[Check]:
        steps = [probe["step"] for probe in stock.probes()]
        error = next((line for line in stock.log.splitlines() if CRASH in line), "no such error")
        return [
            Check(
                stock.returncode != 0 and steps == [CHECKPOINT_STEP],
                f"without the plugin the first optimizer step after the resume crashes: {error.split(': ', 1)[-1]}",
                f"dies after the batch of step {CHECKPOINT_STEP}",
            ),
            Check(
                "torch.bfloat16" in stock.probes()[0]["lora_dtypes"],
                "without the plugin the first sync cast the trainer's fp32 LoRA to bf16",
                "dtypes after the sync",
            ),
        ]


def _policy(run: Run) -> list[tuple]:
    """What engine and trainer did in each batch, to the last bit."""
    names = ("step", "tokens", "mean", "max", "lora_effect", "lora_norm", "lora_sum")
    return [tuple(probe[name] for name in names) for probe in run.probes()]


def show_failure(console: Console, error: RunFailed) -> None:
    log = error.run.folder / "log.txt"
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines() if log.is_file() else []
    for line in [line for line in lines if line.strip()][-TAIL_LINES:]:
        console.print(f"  | {line}", markup=False, highlight=False, soft_wrap=True)
    text = f"FAILED: {error} ({WHAT[error.run.name]}). Its log, of which this is the end: {log}"
    console.print(text, style="bold red", markup=False, highlight=False, soft_wrap=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/demo")
    parser.add_argument("--model", choices=["tiny"], help="smollm2: see demo.trained")
    parser.add_argument("--release", choices=sorted(RELEASE_TITLE), default="affected")
    parser.add_argument("--chart", type=Path, metavar="FILE")
    parser.add_argument("--keep", type=Path, metavar="FOLDER")
    parser.add_argument("--relative-to", type=Path, default=Path.cwd(), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.chart = args.relative_to / args.chart if args.chart else REPOSITORY / "build" / f"demo-{args.release}.png"
    args.keep = args.relative_to / args.keep if args.keep else None
    if args.keep and args.keep.exists() and (not args.keep.is_dir() or any(args.keep.iterdir())):
        parser.error(f"--keep {args.keep}: not an empty folder")
    return args


def main() -> int:
    args = parse()
    console = Console()
    folder = args.keep or Path(tempfile.mkdtemp(prefix="swift-lora-fix-demo-"))
    versions = f"ms-swift {releases.installed_swift()}, vLLM {releases.installed_vllm()}"
    console.print(
        f"{versions}: five real runs, two at a time, about 3 minutes. Logs: {folder}/*/log.txt", soft_wrap=True
    )

    demo = Demo(folder, console)
    try:
        outcome = demo.run()
    except RunFailed as error:
        demo.stop()
        show_failure(console, error)
        return 1
    except subprocess.CalledProcessError as error:  # the model
        command = shlex.join(map(str, error.cmd))
        console.print(f"FAILED: no tiny model. To see why: {command}", style="bold red", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        demo.stop()
        console.print(f"Interrupted. The runs' files: {folder}", soft_wrap=True)
        return 130

    console.print(table(outcome, versions))
    for check in outcome.checks:
        mark, style = ("ok  ", "green") if check.passed else ("FAIL", "bold red")
        console.print(f"{mark} {check.text}", style=style, markup=False, highlight=False, soft_wrap=True)
        console.print(f"     bound: {check.bound}", style="dim", markup=False, highlight=False, soft_wrap=True)
    try:
        save_chart(outcome, versions, args.chart)
        chart = f"Chart: {args.chart}"
    except (MissingPackageError, ChartError) as error:
        chart = f"No chart: {error}"
    passed = all(check.passed for check in outcome.checks)
    if passed and not args.keep:
        shutil.rmtree(folder)
    else:
        console.print(f"The runs' files: {folder}", soft_wrap=True)
    console.print(chart, markup=False, soft_wrap=True)
    verdict = RELEASE_TITLE[args.release] + " without the plugin; gone with it"
    if passed:
        console.print(f"Shown: {verdict} ({demo.elapsed:.0f} s).", style="bold green", soft_wrap=True)
    else:
        console.print(f"NOT shown: {verdict} ({demo.elapsed:.0f} s).", style="bold red", soft_wrap=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
