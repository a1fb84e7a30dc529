"""What takes too long for every run of the suite, on request:

SLF_SOAK=1 SLF_CLEAN_SECONDS=inf scripts/test tests/real/swift/test_soak.py
"""

from __future__ import annotations

import os

import pytest

from swift_lora_fix.proof.verdict import ALLOWED
from tests.support.driver import Run
from tests.support.faults import CLEAN_MINIMUM, CLEAN_SYNCS, FAULTS, messages, named, records, verdicts

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not os.environ.get("SLF_SOAK"), reason="on request: SLF_SOAK=1"),
]

# The cause that is named for each fault, by run.
CAUSES: dict[str, dict[str, str]] = {
    # With the trainer's model away nobody looks at its values while rollouts are made: an audit then only says that the
    # engine's are not those of the sync, and the answers tell the rest.
    "faults_offloaded": {
        **FAULTS,
        "one_module_doubled": "slots-changed",
        "one_layer_from_another": "slots-changed",
        "trainer_base_by_one_ulp": "",
    },
    # There are no slots, so nothing can be removed. The weights are compared with the trainer's: one that holds neither
    # the base nor twice the adapter is only known to be another.
    "faults_fused": {
        **FAULTS,
        "removed": "",
        "one_layer_from_another": "weights-changed",
        "another_model": "weights-changed",
    },
}
each_run = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.needs(name, "train_fixed")) for name in CAUSES]
)
each_fault = pytest.mark.parametrize(
    ("name", "fault"),
    [
        pytest.param(name, fault, marks=pytest.mark.needs(name, "train_fixed"))
        for name, causes in CAUSES.items()
        for fault in causes
    ],
)


@each_run
def test_every_fault_was_made(run: Run, name: str) -> None:
    made = [record["fault"] for record in records(run) if record["fault"] in FAULTS]
    assert made == list(FAULTS) and run.returncode == 0, run.log[-3000:]


@each_fault
def test_a_fault_is_caught_and_named(run: Run, name: str, fault: str) -> None:
    cause = CAUSES[name][fault]
    assert named(run, fault) == ([cause] if cause else [])


@each_run
def test_each_is_repaired_before_its_rollouts_are_trained_on(run: Run, name: str) -> None:
    assert run.log.count("repaired: the engine serves the trainer's policy again") == len(list(messages(run)))


@each_run
def test_many_clean_syncs_raise_no_alarm(run: Run, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{name}: {len(verdicts(run))} of {CLEAN_SYNCS} clean syncs")
    assert len(verdicts(run)) >= CLEAN_MINIMUM
    for *_, ratio, is_distinguishable in verdicts(run):
        assert ratio < ALLOWED and is_distinguishable
