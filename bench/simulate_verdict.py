"""How often the verdict stops a sound run, and which faults it finds: probes resampled from bench/recorded_gaps.

    python -m bench.simulate_verdict [--examinations 300000] [--faults 3000] [--chart docs/verdict-power.png]

An examination draws its prompts (with their 16 tokens, whose gaps depend on each other) from those recorded of a policy
and a fault, 4 a probe, and its plain base's floor from the floors recorded with it, 8 prompts. What is asked next, and
when it ends, is ``judge``'s own. For speed the first looks are computed in numpy, for all examinations at once, with
the arithmetic of swift_lora_fix/proof/hypotheses.py (``--check`` compares the two); only examinations that a first look
does not settle go through ``judge`` itself.

Three kinds of noise: ``recorded``, as it is; ``wild``, in which 2 % of the tokens are off by more (a Cauchy's absolute
value with scale 0.5 nats, random sign; the token that stopped a sound run was off by 2.57) without the trainer's shaken
logprobs showing it; ``flips``, in which one prompt in 8 has all its tokens from a random one on at five times its noise
(a router flip that stays in the KV cache), not shown by the shaken ones either.

A rate of no alarm in N examinations is, at 95 % confidence, below 3 / N. Resampling cannot show what was not recorded:
``a first probe is bad`` is how often half of an alarm happens; the other half is that the second says the same.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swift_lora_fix.proof import verdict as v
from swift_lora_fix.proof.hypotheses import CENSOR, DEGREES, LEVERAGE

HERE = Path(__file__).parent
PROBE, FLOOR_PROMPTS, CHUNK = 4, 8, 5000
OLD_FLOORS, OLD_CEILING = 4.0, 0.5  # the rule before: 4 times the plain base's mean gap, which may be 0.5 nats
CAUSES = {"b": "not-applied", "d": "double-count", "q": "stale"}
EFFECTS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6)  # in what a sound engine's mean gap is
PARTS = ("alarms", "faults", "power")
Array = Any


@dataclass
class Run:
    """One policy and fault as recorded: columns (prompts, tokens) in nats, absolute logprobs; expected is ``p``."""

    name: str
    fault: str
    columns: dict[str, Array]
    floor: dict[str, Array]

    @property
    def prompts(self) -> int:
        return len(self.columns["p"])

    def mean(self, name: str) -> float:
        return float(np.abs(self.columns[name] - self.columns["p"]).mean())


def _columns(run: dict[str, Any], size: int, unit: float) -> dict[str, Array]:
    named = {key: np.array(values, float).reshape(-1, size) * unit for key, values in run.items() if key != "floor"}
    p = named.pop("p")
    found = {"p": p, **{key: p + values for key, values in named.items()}}
    if "r" in found:  # fused: what the engine should say is the rounded weights'
        found.update(x=p, p=found["r"], s=found["c"])
    return found


def load(folder: Path = HERE / "recorded_gaps") -> list[Run]:
    """Every run, with the floor that was recorded with it, or else the fault-free one of its policy."""
    found = []
    for path in sorted(folder.glob("*.json.gz")):
        whole = json.loads(gzip.decompress(path.read_bytes()))
        size, unit, runs = whole["tokens_per_answer"], whole["unit"], whole["runs"]
        for key, run in runs.items():
            sound = runs["fused none" if key.startswith("fused ") else "none"]
            floor = _columns(run.get("floor", sound.get("floor")), size, unit)
            name = f"{whole['case']} {whole['policy']}{' fused' * key.startswith('fused ')}"
            found.append(Run(name, key.removeprefix("fused "), _columns(run, size, unit), floor))
    return found


def evidence(run: Run, prompts: Sequence[int], noise: Array | None = None, asked: str = v.OTHER) -> v.Evidence:
    """A probe of these prompts; ``noise`` is added to what the engine says."""
    c = {key: values[list(prompts)] for key, values in run.columns.items()}
    if noise is not None:
        c["e"] = c["e"] + noise
    flat = {key: tuple(values.ravel().tolist()) for key, values in c.items()}
    return v.Evidence(flat["e"], flat["p"], flat["b"], flat["d"], flat["s"], flat["q"], flat.get("x"),
                      (run.columns["p"].shape[1],) * len(prompts), asked)  # fmt: skip


def floor_of(run: Run, prompts: Sequence[int]) -> v.Floor:
    flat = {key: tuple(values[list(prompts)].ravel().tolist()) for key, values in run.floor.items()}
    return v.Floor(flat["e"], flat["p"], flat["s"], (run.floor["p"].shape[1],) * len(prompts))


# --- the arithmetic of hypotheses.py, for many examinations at once: arrays (examinations, tokens)


def scale_of(values: Array, degrees: float) -> Array:
    squares = values**2
    squared = np.sort(squares, axis=1)[:, squares.shape[1] // 2]
    squared = np.where(squared > 0, squared, squares.mean(1))[:, None]
    for _ in range(60):
        after = ((degrees + 1) * squares / (degrees + squares / np.maximum(squared, 1e-300))).mean(1)[:, None]
        if np.all(np.abs(after - squared) <= 1e-6 * squared):
            break
        squared = after
    return np.sqrt(squared[:, 0])


def noise_of(again: Array) -> Array:
    scale = np.maximum(scale_of(again, DEGREES), v.MINIMUM_FLOOR)[:, None]
    return np.sqrt((DEGREES * scale**2 + again**2) / (DEGREES + 1))


def _cap(ways: Array, scales: Array) -> Array:
    sizes = np.sort(np.abs(ways) / scales, axis=1)
    return LEVERAGE * sizes[:, sizes.shape[1] // 2][:, None]


def meant(ways: Array, again: Array, scales: Array) -> Array:
    cap = _cap(ways, scales)
    first, second = np.clip(ways / scales, -cap, cap), np.clip(again / scales, -cap, cap)
    with np.errstate(all="ignore"):
        common = np.nan_to_num((first * second).sum(1) / (first**2).sum(1))
    return np.clip(2 * common - 1, 0, 1)


def slope_of(
    gaps: Array, ways: Array, again: Array, scales: Array, degrees: float, prompts: int
) -> tuple[Array, Array, Array]:
    cap, n = _cap(again, scales), gaps.shape[1]
    best = np.full(len(gaps), np.inf)
    found = [np.full(len(gaps), np.nan), np.full(len(gaps), np.nan), np.full((len(gaps), prompts), np.nan)]
    with np.errstate(all="ignore"):
        pulls = np.where(again != 0, again / scales**2 * np.minimum(1.0, cap * scales / np.abs(again)), 0.0)
        for start in (0.0, 1.0):
            slope, going = np.full((len(gaps), 1), start), np.ones((len(gaps), 1), bool)
            for _ in range(60):
                trust = (degrees + 1) / (degrees + ((gaps - slope * ways) / scales) ** 2)
                tops, bottoms = trust * pulls * gaps, trust * pulls * ways
                bread = bottoms.sum(1, keepdims=True)
                going &= bread > 0
                after = np.where(going, tops.sum(1, keepdims=True) / bread, slope)
                moved, slope = np.abs(after - slope).max(), after
                if moved < 1e-6:
                    break
            misfit = ((degrees + 1) / 2 * np.log1p(((gaps - slope * ways) / scales) ** 2 / degrees)).sum(1)
            better = (misfit < best) & (bread[:, 0] > 0) & (cap[:, 0] > 0)
            best = np.where(better, misfit, best)
            error = np.sqrt(((tops - slope * bottoms) ** 2).sum(1) * n / (n - 1)) / bread[:, 0]
            under = _each(bottoms, prompts).sum(2)
            alone = np.where(under > 0, _each(tops, prompts).sum(2) / under, np.nan)
            for target, values in zip(found, (slope[:, 0], error, alone)):
                target[better] = values[better]
    return found[0], found[1], found[2]


def _each(values: Array, prompts: int) -> Array:
    """(examinations, tokens) to (examinations, prompts, tokens)."""
    return values.reshape(len(values), prompts, -1)


def _shared(shown: Array) -> Array:
    return shown.sum(1) >= v.SHARE * shown.shape[1]


def looks(c: dict[str, Array], engine: Array, probe_tokens: int, prompts: int) -> dict[str, Array]:
    """``_Look`` of many: ratio, and of each cause weight, slope, error, reach; ``good``, ``cause``."""
    degrees = DEGREES + 1
    gaps, scales = c["e"] - c["p"], engine[:, None] * noise_of(c["s"] - c["p"])
    here = scale_of(gaps / scales, degrees)
    error = math.sqrt((degrees + 3) / (2 * degrees * gaps.shape[1]))
    found: dict[str, Array] = {"ratio": here}
    log = lambda z: -(degrees + 1) / 2 * np.log1p(z**2 / degrees)  # noqa: E731
    clip = lambda z: np.clip(z, -CENSOR, CENSOR)  # noqa: E731
    alone = scale_of(_each(gaps / scales, prompts).reshape(len(gaps) * prompts, -1), degrees).reshape(-1, prompts)
    good, parts = np.ones(len(here), bool), np.zeros(len(here), bool)
    nearest, name = np.full(len(here), np.inf), np.full(len(here), "", dtype="U16")
    closest, near_name = nearest.copy(), name.copy()
    for key, cause in CAUSES.items():
        ways = c[key] - c["p"]
        extra = c["x"] - c["p"] if "x" in c and key != "b" else 0.0
        wider, left = np.sqrt(scales**2 + extra**2), gaps - ways
        there = scale_of(left / wider, degrees)
        factor = np.maximum(1.0, np.minimum(here, there))[:, None]
        widening = np.log(wider / scales)
        weights = clip(log(gaps / scales / factor) - log(left / wider / factor) + widening)
        weight = weights.sum(1)
        again = c[key] - c["s"]
        share = np.sqrt(meant(ways, again, scales))[:, None]
        reach = clip(-log(share * ways / wider / factor)).mean(1) * probe_tokens * v.BUDGET
        widths = np.maximum(here, 1e-9)[:, None] * scales
        slope, slope_error, slopes = slope_of(gaps, ways, again, widths, degrees, prompts)
        found.update({f"{cause} weight": weight, f"{cause} slope": slope, f"{cause} error": slope_error,
                      f"{cause} reach": reach})  # fmt: skip
        told = reach >= v.DECISIVE
        if key != "q":
            good &= ~told | (weight >= v.DECISIVE)
        with np.errstate(all="ignore"):
            sided = _shared(np.sign(slope)[:, None] * slopes > v.PART / 2)
            parts |= told & (np.abs(slope) - v.ERRORS * slope_error > v.PART) & sided
            ends = np.abs(slope - 1) <= v.PART + 3 * slope_error
        fits = (there < here) & (there < np.maximum(v.ALLOWED, 0.5 * here))
        fits &= _shared(_each(weights, prompts).sum(2) < 0)
        for most, best, names in ((-v.DECISIVE, nearest, name), (0.0, closest, near_name)):
            # as in _nearer: the closest of those with that weight, named only if it explains what is said
            better = (weight <= most) & (there < here) & (there < best)
            names[better] = np.where((fits & ends)[better], cause, "")
            best[better] = there[better]
    off = (here * math.exp(-v.ERRORS * error) > v.ALLOWED) & _shared(alone > v.ALLOWED) | parts
    found["cause"] = np.where(name != "", name, np.where(off, np.where(near_name != "", near_name, "unknown"), ""))
    fit = (here <= v.ALLOWED) & (here * math.exp(error) <= 1.5 * v.ALLOWED)
    found["good"] = (found["cause"] == "") & fit & good
    return found


def _todays_rule(gap: Array, floor: Array, rounding: Any) -> Array:
    """Which examinations it stops."""
    return (gap > OLD_FLOORS * np.maximum(floor + rounding, v.MINIMUM_FLOOR)) | (floor > OLD_CEILING)


class Simulation:
    def __init__(self, seed: int) -> None:
        self.draw = np.random.default_rng(seed)

    def prompts(self, run: Run, examinations: int, probes: int) -> Array:
        """No prompt twice in an examination: that would count its tokens twice."""
        return self.draw.random((examinations, run.prompts)).argsort(1)[:, : probes * PROBE]

    def noise(self, kind: str, run: Run, shape: tuple[int, ...]) -> Array | None:
        """Added to the engine's logprobs: shape (..., prompts, tokens)."""
        if kind == "wild":
            wild = np.abs(self.draw.standard_cauchy(shape)) * 0.5 * self.draw.choice([-1, 1], shape)
            return np.where(self.draw.random(shape) < 0.02, wild, 0.0)
        if kind == "flips":
            size = 5 * run.mean("s") * self.draw.standard_t(3, shape)
            starts = self.draw.integers(0, shape[-1], (*shape[:-1], 1))
            flipped = (self.draw.random((*shape[:-1], 1)) < 1 / 8) & (np.arange(shape[-1]) >= starts)
            return np.where(flipped, size, 0.0)
        return None

    def floors(self, run: Run, count: int = 200) -> tuple[list[v.Floor], Array]:
        size = len(run.floor["p"])
        made = [floor_of(run, self.draw.integers(0, size, FLOOR_PROMPTS)) for _ in range(count)]
        return made, np.array([v._engine_factor(floor) for floor in made])

    def examine(self, run: Run, kind: str, floor: v.Floor, first: v.Evidence, prompts: Sequence[int]) -> v.Verdict:
        """To its end. What the first prompts say again is what they said: engines are deterministic here."""
        asked, used = [first], list(prompts)
        found = v.judge(asked, floor)
        while found.is_unsure:
            if found.ask == v.OTHER:
                asked.append(self.probe(run, kind, used))
            else:
                asked.append(v.replace(asked[0], asked=found.ask))
            found = v.judge(asked, floor)
        return found

    def probe(self, run: Run, kind: str, used: list[int]) -> v.Evidence:
        """Of prompts that are not used yet, as long as there are any."""
        left = np.setdiff1d(np.arange(run.prompts), used[-(run.prompts - PROBE) :])
        index = self.draw.choice(left, PROBE, replace=False)
        used += index.tolist()
        return evidence(run, index, self.noise(kind, run, (PROBE, run.columns["p"].shape[1])))

    def batches(
        self, run: Run, kind: str, examinations: int, probes: int
    ) -> Iterator[tuple[Array, dict[str, Array], Array, list[v.Floor], Array]]:
        """prompts, columns (examinations, tokens) with the noise in, the noise, floors, the floor of each."""
        floors, factors = self.floors(run)
        for start in range(0, examinations, CHUNK):
            size = min(CHUNK, examinations - start)
            index = self.prompts(run, size, probes)
            c = {key: values[index] for key, values in run.columns.items()}
            noise = self.noise(kind, run, c["p"].shape)
            if noise is not None:
                c["e"] = c["e"] + noise
            which = self.draw.integers(0, len(floors), size)
            yield index, c, factors[which], floors, which

    def alarms(self, run: Run, kind: str, examinations: int) -> dict[str, Any]:
        """Of a sound engine: how many examinations end in a disagreement, under the new rule and today's."""
        counts = dict(examinations=examinations, asked_more=0, first_leans=0, first_bad=0, alarms=0, undecided=0, old=0)
        causes: dict[str, int] = {}
        for index, c, factors, floors, which in self.batches(run, kind, examinations, 1):
            flat = {key: values.reshape(len(index), -1) for key, values in c.items()}
            found = looks(flat, factors, flat["p"].shape[1], PROBE)
            old_floor = np.array([np.abs(np.subtract(f.engine, f.base)).mean() for f in floors])[which]
            rounding = np.abs(flat["x"] - flat["p"]).mean(1) if "x" in flat else 0.0
            old_gap = np.abs(flat["e"] - flat.get("x", flat["p"])).mean(1)
            counts["old"] += int(_todays_rule(old_gap, old_floor, rounding).sum())
            counts["first_leans"] += int((found["ratio"] > v.ALLOWED).sum())
            counts["first_bad"] += int((found["cause"] != "").sum())
            for number in np.flatnonzero(~found["good"]):
                counts["asked_more"] += 1
                noise = c["e"][number] - run.columns["e"][index[number]]
                first = evidence(run, index[number], noise)
                ended = self.examine(run, kind, floors[which[number]], first, index[number])
                counts["alarms"] += ended.disagrees
                counts["undecided"] += ended.outcome == "unsure"
                if ended.disagrees:
                    causes[ended.cause] = causes.get(ended.cause, 0) + 1
        return {**counts, "causes": causes}

    def power(self, run: Run, examinations: int, kind: str = "recorded") -> dict[str, Any]:
        """Of a faulty engine: how many are found, under which names; of those that are not, what is said."""
        names: dict[str, int] = {}
        said = dict(found=0, old=0, probes=0, floor=0)
        for index, c, factors, floors, which in self.batches(run, kind, examinations, 2):
            flat = {key: values.reshape(len(index), -1) for key, values in c.items()}
            half = flat["p"].shape[1] // 2
            parts = [{k: x[:, :half] for k, x in flat.items()}, {k: x[:, half:] for k, x in flat.items()}]
            one = looks(parts[0], factors, half, PROBE)
            both = looks(flat, factors, half, 2 * PROBE)
            old_floor = np.array([np.abs(np.subtract(f.engine, f.base)).mean() for f in floors])[which]
            old_gap = np.abs(parts[0]["e"] - parts[0].get("x", parts[0]["p"])).mean(1)
            rounding = np.abs(parts[0]["x"] - parts[0]["p"]).mean(1) if "x" in flat else 0.0
            said["old"] += int(_todays_rule(old_gap, old_floor, rounding).sum())
            quick = ~one["good"] & (both["cause"] != "")  # found with the second probe
            for cause, count in zip(*np.unique(both["cause"][quick], return_counts=True)):
                names[str(cause)] = names.get(str(cause), 0) + int(count)
            said["found"] += int(quick.sum())
            said["probes"] += 2 * int(quick.sum())
            judged = [v.judge_floor(floor)[0] in ("disagrees", "noisy") for floor in floors]
            said["floor"] += int(np.array(judged)[which].sum())
            settled = one["good"]  # by the first probe, for good
            names["(agrees)"] = names.get("(agrees)", 0) + int(settled.sum())
            said["probes"] += int(settled.sum())
            for number in np.flatnonzero(~quick & ~settled):
                noise = c["e"][number][:PROBE] - run.columns["e"][index[number][:PROBE]]
                first = evidence(run, index[number][:PROBE], noise)
                ended = self.examine(run, kind, floors[which[number]], first, index[number][:PROBE])
                said["found"] += ended.disagrees
                said["probes"] += ended.probes
                key = ended.cause if ended.disagrees else f"({ended.outcome})"
                names[key] = names.get(key, 0) + 1
        return {**said, "names": {name: count for name, count in names.items() if count}}


def with_effect(sound: Run, times: float, told: bool) -> Run:
    """A sound engine's run with a fault in it that moves the mean |engine - policy| by ``times`` its sound value.

    told: the fault is twice the adapter, and adapter and hypotheses are as large as that takes. Or else nobody thought
    of it: it moves each token by what twice the adapter does to another, and the hypotheses are the recorded ones."""
    c = dict(sound.columns)
    way = c["d"] - c["p"]
    fault = way if told else np.roll(way.reshape(-1), 7).reshape(way.shape)
    before = np.abs(c["e"] - c["p"]).mean()
    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        moved = np.abs(c["e"] - c["p"] + middle * fault).mean() - before
        low, high = (middle, high) if moved < times * before else (low, middle)
    c["e"] = c["e"] + low * fault
    if told:
        for key in CAUSES:
            c[key] = c["p"] + low * (c[key] - c["p"])
    return Run(sound.name, f"{times} times", c, sound.floor)


def check(runs: list[Run], simulation: Simulation, count: int = 40) -> None:
    """The numpy arithmetic is the package's."""
    for run in runs:
        for index, c, factors, _, _ in simulation.batches(run, "recorded", count, 1):
            flat = {key: values.reshape(len(index), -1) for key, values in c.items()}
            found = looks(flat, factors, flat["p"].shape[1], PROBE)
            for number in range(len(index)):
                one = v._Look([evidence(run, index[number])], float(factors[number]), v.ALLOWED)
                assert math.isclose(one.student.ratio, found["ratio"][number], rel_tol=1e-4), run
                assert (one.cause, one.state == "good") == (found["cause"][number], bool(found["good"][number])), (
                    run.name, run.fault, one.cause, found["cause"][number]
                )  # fmt: skip
                for cause, estimate in one.estimates.items():
                    assert math.isclose(estimate.weight, found[f"{cause} weight"][number], abs_tol=0.02), run
                    assert math.isclose(estimate.slope, found[f"{cause} slope"][number], abs_tol=0.01), run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recorded", type=Path, default=HERE / "recorded_gaps")
    parser.add_argument("--examinations", type=int, default=300_000, help="of sound engines, of each kind of noise")
    parser.add_argument("--faults", type=int, default=3000, help="examinations of each fault")
    parser.add_argument("--power", type=int, default=100, help="examinations of each point of the chart")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--chart", type=Path)
    parser.add_argument("--json", type=Path, help="write every number there")
    arguments = parser.parse_args()
    simulation, runs = Simulation(arguments.seed), load(arguments.recorded)
    if arguments.check:
        check(runs, simulation)
        print("numpy and hypotheses.py agree on every run")
    results: dict[str, Any] = {"alarms": [], "faults": [], "power": []}
    sound = [run for run in runs if run.fault == "none"]
    for kind in ("recorded", "wild", "flips") if "alarms" in arguments.parts else ():
        # flips make a tenth of the examinations long ones
        each = max(1, arguments.examinations // len(sound) // (20 if kind == "flips" else 1))
        total, alarms = 0, 0
        for run in sound:
            start = time.time()
            found = simulation.alarms(run, kind, each)
            results["alarms"].append({"run": run.name, "noise": kind, **found})
            total, alarms = total + each, alarms + found["alarms"]
            leans = found["first_leans"] / each
            print(f"sound {kind:8} {run.name:24} alarms {found['alarms']} {found['causes'] or ''} of {each}; "
                  f"asked more {found['asked_more'] / each:.2%}, undecided {found['undecided'] / each:.2%}; a first "
                  f"probe leans {leans:.2e}, is bad {found['first_bad'] / each:.2e}; today's rule stops "
                  f"{found['old'] / each:.2%} ({time.time() - start:.0f} s)", flush=True)  # fmt: skip
        bound = (3 if not alarms else alarms + 2 * alarms**0.5 + 3) / total
        print(f"sound {kind}: {alarms} alarms in {total} examinations, at 95 % confidence below {bound:.1e}")
    for run in runs if "faults" in arguments.parts else ():
        if run.fault == "none":
            continue
        found = simulation.power(run, arguments.faults)
        clean = next(one for one in sound if one.name == run.name)
        floors = (run.mean("e") - clean.mean("e")) / np.abs(run.floor["e"] - run.floor["p"]).mean()
        if run.fault.startswith(("base", "another")):
            floors = (run.mean("e") - clean.mean("e")) / np.abs(clean.floor["e"] - clean.floor["p"]).mean()
        results["faults"].append({"run": run.name, "fault": run.fault, "floors": floors, **found})
        print(f"fault {run.name:24} {run.fault:14} moves the mean by {floors:6.1f} floors: found "
              f"{found['found'] / arguments.faults:.4f} with {found['probes'] / arguments.faults:.1f} probes, base "
              f"found {found['floor'] / arguments.faults:.3f}, today's {found['old'] / arguments.faults:.4f}; "
              f"{found['names']}", flush=True)  # fmt: skip
    for run in sound if "power" in arguments.parts else ():
        floor = run.mean("e") / float(np.abs(run.floor["e"] - run.floor["p"]).mean())
        for told in (True, False):
            for times in EFFECTS:
                found = simulation.power(with_effect(run, times, told), arguments.power)
                row = {"run": run.name, "told": told, "times": times, "floors": times * floor}
                results["power"].append({**row, "count": arguments.power, **found})
                if found["found"] == found["old"] == arguments.power:
                    break
    for run in sound if "power" in arguments.parts else ():
        for told, words in ((True, "double count"), (False, "unknown fault")):
            rows = [row for row in results["power"] if row["run"] == run.name and row["told"] == told]
            new, old = (_first(rows, name) for name in ("found", "old"))
            print(f"smallest effect found at 0.9, {run.name:24} {words}: moves the mean by {new}; today's rule {old}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results))
    if arguments.chart and results["power"]:
        draw(results, arguments.chart)


def _first(rows: list[dict[str, Any]], name: str) -> str:
    for row in rows:
        if row[name] >= 0.9 * row["count"]:
            return f"{row['times']} times the sound one ({row['floors']:.2g} floors of the plain base)"
    return f"more than {rows[-1]['times']} times"


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.4), sharey=True)
    names = sorted({row["run"] for row in results["power"]})
    colours = dict(zip(names, pyplot.get_cmap("tab20").colors))
    for axis, told, title in ((axes[0], True, "the LoRA counted twice"), (axes[1], False, "a fault without a name")):
        for name in names:
            rows = [row for row in results["power"] if row["run"] == name and row["told"] == told]
            at = [row["times"] for row in rows]
            axis.plot(at, [row["found"] / row["count"] for row in rows], "o-", ms=3, color=colours[name], label=name)
            axis.plot(at, [row["old"] / row["count"] for row in rows], ":", lw=1, color=colours[name])
        axis.set(title=title, xscale="log", xlabel="the fault moves the mean by, in what a sound engine's is")
        axis.set_xticks([0.05, 0.1, 0.2, 0.5, 1, 2, 4], ["0.05", "0.1", "0.2", "0.5", "1", "2", "4"])
        axis.minorticks_off()
        axis.axhline(0.9, color="0.8", lw=0.8, zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("share of examinations that find it")
    axes[1].legend(fontsize=7, frameon=False, loc="upper left")
    figure.suptitle("Found: new verdict (solid), today's rule of 4 floors (dotted); gaps recorded from real engines")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
