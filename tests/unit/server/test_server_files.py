"""What a rollout server opens, and what it parses. Real files, no server."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from swift_lora_fix import errors
from swift_lora_fix.common.digest import checksum
from swift_lora_fix.server.content import BLOCK, ContentHash, content_digest
from swift_lora_fix.server.rollout import files
from swift_lora_fix.server.rollout.files import Source, Spool, base_shapes, base_sums, opened, spooled
from swift_lora_fix.server.wire import CONFIG, WEIGHTS, Policy, config_bytes, limit_of, parse_object, root_of

LIMIT = 1 << 16
POLICY = {"version": 3, "step": 40, "digest": "cbef3eb6775dfc5a", "run": "0af1"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def folder(root: Path) -> Path:
    return write(root / "v1")


def write(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir()
    (folder / CONFIG).write_bytes(b"{}")
    (folder / WEIGHTS).write_bytes(weights)
    return folder


def read(folder: Any, root: Path, digest: str = content_digest(b"{}", b"weights")) -> tuple[bytes, bytes]:
    with spooled(str(folder), str(root), LIMIT) as spool:
        return bytes_of(spool.sealed(digest))


def bytes_of(source: Source) -> tuple[bytes, bytes]:
    assert Path(source.weights).stat().st_size <= LIMIT
    return source.config, Path(source.weights).read_bytes()


# ---- the protocol --------------------------------------------------------------------------------------------------


def test_a_policy_goes_there_and_back() -> None:
    assert Policy.from_dict(json.loads(json.dumps(POLICY))).as_dict() == POLICY


@pytest.mark.parametrize(
    "field, value",
    [
        ("version", -1),
        ("version", "3"),
        ("version", True),
        ("version", 1 << 63),
        ("step", 1.0),
        ("digest", ""),
        ("digest", "a b"),
        ("digest", "x" * 129),
        ("run", "0AF1"),
        ("run", "../x"),
        ("run", None),
    ],
)
def test_what_is_no_policy_is_named(field: str, value: Any) -> None:
    with pytest.raises(errors.ProtocolError, match=f"policy's {field} is") as caught:
        Policy.from_dict({**POLICY, field: value})
    assert repr(value) in str(caught.value) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize("value", [None, [], {**POLICY, "more": 1}, {k: POLICY[k] for k in ("version", "step")}])
def test_what_has_other_fields_is_no_policy(value: Any) -> None:
    with pytest.raises(errors.ProtocolError, match="exactly version, step, digest, run"):
        Policy.from_dict(value)


def test_the_content_digest_covers_both_files_and_where_they_part() -> None:
    whole = content_digest(b"{}", b"weights")
    assert len(whole) == 64
    others = [(b"{}w", b"eights"), (b"{ }", b"weights"), (b"{}", b"weightS"), (b"", b"{}weights")]
    assert len({whole, *(content_digest(*pair) for pair in others)}) == 5


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 5])
def test_what_is_hashed_as_it_comes_has_the_digest_of_the_whole(size: int) -> None:
    weights = bytes(range(251)) * (size // 251 + 1)
    weights = weights[:size]
    for step in (1 << 20, BLOCK, 5 * BLOCK):
        hashed = ContentHash(b"{}")
        for start in range(0, size, step):
            hashed.update(weights[start : start + step])
        assert hashed.hexdigest() == content_digest(b"{}", weights) == ContentHash(b"{}").of(memoryview(weights))
        with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as target:
            source.write(weights + b"and more")
            source.flush()
            write = partial(os.pwrite, target.fileno())
            assert ContentHash(b"{}").copy(source.fileno(), write, size) == hashed.hexdigest()
            assert target.read() == weights
    if size:
        other = bytearray(weights)
        other[-1] ^= 1
        assert (
            content_digest(b"{}", bytes(other)) != content_digest(b"{}", weights) != content_digest(b"{}", weights[1:])
        )


def test_a_config_that_travels_has_the_bytes_of_the_file() -> None:
    config = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "note": "é"}
    assert config_bytes(dict(reversed(list(config.items())))) == json.dumps(config, sort_keys=True).encode()


@pytest.mark.parametrize("text, phrase", [(b"\xff", "not JSON"), ("", "not JSON"), ("[]", "list where a JSON object")])
def test_what_is_no_object(text: Any, phrase: str) -> None:
    with pytest.raises(errors.ProtocolError, match=f"the header is {phrase}"):
        parse_object(text, "the header")


def test_settings() -> None:
    assert (
        root_of({}) == f"/dev/shm/swift_lora_fix-{os.geteuid()}"
        and root_of({"SWIFT_LORA_FIX_ROOT": "/a//b/../c/"}) == "/a/c"
    )
    assert limit_of({}) == 8 << 30 and limit_of({"SWIFT_LORA_FIX_MAX_MIB": "3"}) == 3 << 20
    with pytest.raises(errors.SettingsError, match="SWIFT_LORA_FIX_ROOT='here'"):
        root_of({"SWIFT_LORA_FIX_ROOT": "here"})
    for value in ("0", "-1", "1.5", "many"):
        with pytest.raises(errors.SettingsError, match=f"SWIFT_LORA_FIX_MAX_MIB='{value}'"):
            limit_of({"SWIFT_LORA_FIX_MAX_MIB": value})


# ---- folders -------------------------------------------------------------------------------------------------------


def test_a_folder_is_read(folder: Path, root: Path) -> None:
    assert read(folder, root) == (b"{}", b"weights")


def test_another_digest(folder: Path, root: Path) -> None:
    with pytest.raises(errors.StagingError, match="truncated or changed") as caught:
        read(folder, root, "0" * 64)
    assert caught.value.status == 422


@pytest.mark.parametrize("path", ["{0}", "{0}/", "{0}/v1/..", "{0}/../v1", "{0}/v1/deeper", "v1", "", "/"])
def test_paths_that_are_not_right_below_the_root(folder: Path, root: Path, path: str) -> None:
    write(root.parent / "v1")
    write(folder / "deeper")
    with pytest.raises(errors.AccessError, match="not right below this server's root") as caught:
        read(path.format(root), root)
    assert isinstance(caught.value, PermissionError)


def test_links_are_not_followed(folder: Path, root: Path) -> None:
    outside = write(root.parent / "outside")
    (root / "linked").symlink_to(outside)
    with pytest.raises(errors.AccessError, match="linked is refused: a link"):
        read(root / "linked", root)
    for name in (CONFIG, WEIGHTS):
        half = write(root / f"half-{name}")
        (half / name).unlink()
        (half / name).symlink_to(outside / name)
        with pytest.raises(errors.AccessError, match=f"{name} is refused: a link"):
            read(half, root)


def test_what_is_no_regular_file(root: Path) -> None:
    pipe = write(root / "pipe")
    (pipe / WEIGHTS).unlink()
    os.mkfifo(pipe / WEIGHTS)
    with pytest.raises(errors.AccessError, match="not a regular file"):
        read(pipe, root)
    (root / "file").write_bytes(b"")
    with pytest.raises(errors.AccessError, match="file is refused"):
        read(root / "file", root)


def test_what_is_not_there(root: Path) -> None:
    (write(root / "half") / WEIGHTS).unlink()
    for path, below in (
        (root / "absent", root),
        (root / "half", root),
        (root.parent / "no" / "v1", root.parent / "no"),
    ):
        with pytest.raises(errors.StagingError, match="cannot be opened on the server") as caught:
            read(path, below)
        assert caught.value.status == 404


def test_a_root_that_is_a_link_is_the_admins_choice(folder: Path, root: Path) -> None:
    (root.parent / "link").symlink_to(root)
    assert read(root.parent / "link" / "v1", root.parent / "link") == (b"{}", b"weights")


def test_too_large(root: Path) -> None:
    with pytest.raises(errors.StagingError, match="65537 bytes or more, this server takes 65536") as caught:
        read(write(root / "large", b"\0" * (LIMIT + 1)), root)
    assert caught.value.status == 413
    whole = b"\0" * LIMIT
    assert read(write(root / "fits", whole), root, content_digest(b"{}", whole))[1] == whole


def test_a_config_that_grows_is_read_to_its_limit(folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = files._check_file

    def grows(descriptor: int, where: str, limit: int) -> None:
        checked(descriptor, where, limit)
        (folder / CONFIG).write_bytes(b" " * (files.CONFIG_LIMIT + 10))

    monkeypatch.setattr(files, "_check_file", grows)
    with spooled(str(folder), str(root), LIMIT) as spool:
        assert len(spool.config) == files.CONFIG_LIMIT


def test_a_file_that_cannot_be_read_can_come_another_way(
    folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(*_: Any) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(os, "pread", stale)
    with pytest.raises(errors.StagingError, match="v1/adapter_model.safetensors cannot be read.*Stale") as caught:
        read(folder, root)
    assert caught.value.status == 404


def test_descriptors_are_given_back(folder: Path, root: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with opened(str(folder), str(root), LIMIT):
        pass
    (folder / WEIGHTS).unlink()
    with pytest.raises(errors.StagingError), opened(str(folder), str(root), LIMIT):
        pass
    assert len(os.listdir("/proc/self/fd")) == before


# ---- bodies --------------------------------------------------------------------------------------------------------


def test_a_body_is_spooled(root: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with Spool(b"{}", LIMIT) as spool:
        for chunk in (b"wei", b"ghts"):
            spool.write(chunk)
        with pytest.raises(errors.StagingError, match="truncated or changed"):
            spool.sealed("0" * 64)
        source = spool.sealed(content_digest(b"{}", b"weights"))
        assert bytes_of(source) == bytes_of(source) == (b"{}", b"weights")
        with pytest.raises(errors.SegmentError, match="Operation not permitted"):
            spool.write(b"more")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_body_that_is_too_large_is_not_kept() -> None:
    with Spool(b"{}", 10) as spool:
        spool.write(b"\0" * 10)
        with pytest.raises(errors.StagingError) as caught:
            spool.write(b"\0")
        assert caught.value.status == 413 and os.stat(spool.path).st_size == 10


# ---- the base ------------------------------------------------------------------------------------------------------


def test_the_base_is_summed_as_the_engine_holds_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wide, whole = torch.randn(5, 3), torch.arange(7)
    safetensors.torch.save_file({"wide": wide}, str(tmp_path / "model-1.safetensors"))
    safetensors.torch.save_file({"whole": whole}, str(tmp_path / "model-2.safetensors"))
    assert base_sums(str(tmp_path), torch.bfloat16) == {
        "wide": ["bfloat16", [5, 3], int(checksum(wide.bfloat16()))],
        "whole": ["int64", [7], int(checksum(whole))],
    }
    assert base_sums(str(tmp_path))["wide"] == ["float32", [5, 3], int(checksum(wide))]
    assert {name: header.shape for name, header in base_shapes(str(tmp_path)).items()} == {
        "wide": (5, 3),
        "whole": (7,),
    }
    assert base_sums(str(tmp_path / "absent")) == {}
