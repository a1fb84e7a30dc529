"""Every TRL release on the index, its own source against the table in `swift_lora_fix.install.releases`."""

from __future__ import annotations

import ast

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from swift_lora_fix.install import contract, releases

from . import detectors
from .walk import calls_of, find_class, methods_of
from .wheels import CACHE, TRL, download_all, published, wheel

VERSIONS, INDEX_ERROR = published(TRL)
TABLED = [version for version in VERSIONS if releases.trl_family_of(version)]
CLASS = "VLLMGeneration"
COLOCATED = {"self.mode": "colocate", "is_peft_model(model)": True}
SERVER = {"self.mode": "server", "is_peft_model(model)": True}


@pytest.fixture(scope="session", autouse=True)
def _downloaded() -> None:
    download_all(VERSIONS, TRL)


def defects_in(tree: ast.Module) -> set[str]:
    """What the source does, whatever the release is called."""
    sync, remote = calls_of(tree, CLASS, "sync_weights", COLOCATED), calls_of(tree, CLASS, "sync_weights", SERVER)
    found = set()
    if any(call.name == "merge_adapter" for call in sync):
        found.add(releases.TRL_BASE_DRIFT.key)
        if not any(isinstance(node, ast.Try) and node.finalbody for node in ast.walk(find_class(tree, CLASS))):
            found.add(releases.TRL_FAILED_PUSH.key)
    if any(call.name == "reset_prefix_cache" and call.dropped for call in sync):
        found.add(releases.TRL_UNCHECKED_CACHE_RESET.key)
    generate = ast.walk(methods_of(find_class(tree, CLASS))["generate"])
    if any(isinstance(node, ast.Constant) and node.value == "reload_weights" for node in generate):
        found.add(releases.TRL_SLEEP_RELOADS_FILES.key)
    lists_first = any(call.name == "_iter_named_params" and "sync_weights" == call.where[-1] for call in remote)
    if lists_first and sum(call.name == "merge_adapter" for call in remote) > 1:
        found.add(releases.TRL_SERVER_MERGES_TWICE.key)
    return found


def test_there_are_releases_to_check() -> None:
    assert VERSIONS, f"no release to check: the index could not be read and {CACHE} is empty. {INDEX_ERROR}"


@pytest.mark.parametrize("family", releases.TRL_FAMILIES, ids=lambda family: family.label)
def test_the_ends_of_a_row_are_published_releases(family: releases.TrlFamily) -> None:
    assert {family.first, family.last} <= set(VERSIONS)


def test_only_newer_releases_are_missing_from_the_table() -> None:
    assert [v for v in set(VERSIONS) - set(TABLED) if Version(v) < Version(releases.NEWEST_TRL)] == []


@pytest.mark.parametrize("version", VERSIONS)
def test_targets_resolve_and_the_names_are_used(version: str) -> None:
    source = wheel(version, TRL)
    tree = source.tree(releases.TRL_MODULE)
    own = [target for target in releases.TRL_HOOKS if target.attribute.startswith(CLASS)]
    assert detectors.broken_targets(tree, own) == []
    trees = [tree, source.tree(releases.TRL_TRAINER_MODULE)]
    assert contract.unused(trees, releases.TRL_ATTRIBUTES) == []


@pytest.mark.parametrize("version", TABLED)
def test_defects_are_as_the_table_says(version: str) -> None:
    family = releases.trl_family_of(version)
    assert family is not None
    found = defects_in(wheel(version, TRL).tree(releases.TRL_MODULE))
    assert found == {defect.key for defect in family.defects}


@pytest.mark.parametrize("version", TABLED)
def test_the_vllm_that_it_allows(version: str) -> None:
    allowed = releases.vllm_allowed_by_trl(version)
    assert allowed is not None
    assert SpecifierSet(allowed) == SpecifierSet(wheel(version, TRL).extras("vllm", "vllm"))
