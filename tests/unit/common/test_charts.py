"""The one place where charts are made."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from swift_lora_fix.common import charts
from swift_lora_fix.errors import ChartError, MissingPackageError


@pytest.mark.parametrize(
    "name, begins", [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.chart", b"\x89PNG"), ("a", b"\x89PNG")]
)
def test_the_name_says_the_format(tmp_path: Path, name: str, begins: bytes) -> None:
    with charts.chart(tmp_path / "new" / name, size=(4, 3)) as (_, (axis,)):
        axis.plot([1, 2], [3, 4])
    assert (tmp_path / "new" / name).read_bytes().startswith(begins)


def test_the_axes_come_row_by_row(tmp_path: Path) -> None:
    with charts.chart(tmp_path / "a.png", size=(4, 3), rows=2, columns=2) as (figure, axes):
        assert axes == figure.axes and len(axes) == 4


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ChartError, match=r"cannot be written: Not a directory\. Name another file with --chart\."):
        with charts.chart(tmp_path / "file" / "a.png", size=(4, 3), option="--chart"):
            pass


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r"pip install matplotlib"):
        with charts.chart(tmp_path / "a.png", size=(4, 3)):
            raise AssertionError("nothing is drawn")
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_a_drawing_that_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        with charts.chart(tmp_path / "a.png", size=(4, 3)):
            1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())
