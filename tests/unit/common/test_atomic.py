"""A folder that appears with all of its content, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from swift_lora_fix import errors
from swift_lora_fix.common import atomic


@pytest.mark.parametrize("fails_at, is_there", [("temporary", False), ("parent", True)])
def test_what_is_said_to_be_left_is_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str, is_there: bool
) -> None:
    """Once the folder has its name it stays, even if the disk then fails."""
    flush, target = atomic._flush, tmp_path / "target"

    def failing(path: Path) -> None:
        if (path == tmp_path) == (fails_at == "parent"):
            raise OSError(5, "Input/output error")
        flush(path)

    monkeypatch.setattr(atomic, "_flush", failing)
    with pytest.raises(errors.AdapterFileError) as caught, atomic.all_or_nothing(target) as folder:
        (folder / "file").write_text("content")
    assert target.exists() is is_there and sorted(tmp_path.iterdir()) == ([target] if is_there else [])
    assert ("nothing was left" in str(caught.value)) is not is_there
    assert "Input/output error" in str(caught.value)
