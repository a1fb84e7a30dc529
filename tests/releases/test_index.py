"""Every ms-swift release on the index, its own source against the table in `swift_lora_fix.install.releases`."""

from __future__ import annotations

import pytest
from packaging.version import Version

from swift_lora_fix.install import contract, releases

from . import detectors
from .wheels import CACHE, Wheel, download_all, published, wheel

VERSIONS, INDEX_ERROR = published()
TABLED = [version for version in VERSIONS if releases.family_of(version)]
UNTABLED = [version for version in VERSIONS if not releases.family_of(version)]


@pytest.fixture(scope="session", autouse=True)
def _downloaded() -> None:
    download_all(VERSIONS)


def family_and_source(version: str) -> tuple[releases.Family, Wheel]:
    family = releases.family_of(version)
    assert family is not None
    return family, wheel(version)


def test_there_are_releases_to_check() -> None:
    assert VERSIONS, f"no release to check: the index could not be read and {CACHE} is empty. {INDEX_ERROR}"


@pytest.mark.parametrize("family", releases.FAMILIES, ids=lambda family: family.label)
def test_the_ends_of_a_row_are_published_releases(family: releases.Family) -> None:
    assert {family.first, family.last} <= set(VERSIONS)


def test_only_newer_releases_are_missing_from_the_table() -> None:
    assert [v for v in UNTABLED if Version(v) < Version(releases.NEWEST_KNOWN)] == []


@pytest.mark.parametrize("version", VERSIONS)
def test_targets_resolve(version: str) -> None:
    source = wheel(version)
    assert detectors.broken_targets(source.rollout, releases.HOOKS + releases.CALLS) == []
    (scoring,) = [name for name in releases.scoring_modules() if name in source]
    assert detectors.broken_targets(source.tree(scoring), releases.SCORING_HOOKS) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_what_the_port_uses_is_used_by_the_trainer(version: str) -> None:
    source = wheel(version)
    trees = [source.tree(module) for module in releases.trainer_modules(source.layout.rollout_module)]
    assert contract.unused(trees, releases.attributes_of(version)) == []


def test_an_attribute_is_in_the_table_from_the_release_that_brings_it() -> None:
    for attribute in releases.ATTRIBUTES:
        before = [v for v in VERSIONS if Version(v) < Version(attribute.since)]
        if before:
            source = wheel(max(before, key=Version))
            trees = [source.tree(module) for module in releases.trainer_modules(source.layout.rollout_module)]
            assert contract.unused(trees, [attribute.name]) == [attribute.name]


def test_an_attribute_is_in_the_table_to_the_release_that_has_it_last() -> None:
    for attribute in releases.ATTRIBUTES:
        after = [v for v in VERSIONS if attribute.until and Version(v) > Version(attribute.until)]
        if after:
            source = wheel(min(after, key=Version))
            trees = [source.tree(module) for module in releases.trainer_modules(source.layout.rollout_module)]
            assert contract.unused(trees, [attribute.name]) == [attribute.name]


@pytest.mark.parametrize("version", TABLED)
def test_defects_are_as_the_table_says(version: str) -> None:
    family, source = family_and_source(version)
    assert detectors.defects_in(source) == {defect.key for defect in family.defects}


@pytest.mark.parametrize("version", TABLED)
def test_layout_is_as_the_table_says(version: str) -> None:
    family, source = family_and_source(version)
    assert source.layout == family.layout
    assert family.layout.engine_module in source
    assert family.layout.server_module in source
    assert detectors.tuner_argument(source) == family.layout.tuner_argument
    assert detectors.adapter_id(source) == family.adapter_id
    assert detectors.load_format(source) == family.load_format


@pytest.mark.parametrize("version", VERSIONS)
def test_megatron_modules(version: str) -> None:
    mixin, trainer = releases.megatron_modules()
    source = wheel(version)
    assert (trainer in source) is (Version(version) >= Version("3.11.0"))
    assert (mixin in source) is (Version(version) >= Version("3.12.0"))


def test_releases_newer_than_the_table() -> None:
    """Their contract is checked above. What they still get wrong is for a person to put into the table."""
    found = {version: sorted(detectors.defects_in(wheel(version))) for version in UNTABLED}
    if found:
        pytest.skip(f"not in the table yet; defects found in the source: {found}")
