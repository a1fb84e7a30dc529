"""Charts: one style, one way to save them. matplotlib is optional, and imported only when one is drawn.

with charts.chart(path, size=(8, 3)) as (figure, (axis,)):
    axis.plot(...)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ChartError, MissingPackageError
from .files import make_folder

OURS, STOCK, QUIET = "#1565c0", "#c62828", "#616161"  # QUIET: floors, base lines, notes
BAD = STOCK  # marks what should not be
AMBER, VIOLET, GREEN = "#b26a00", "#8e24aa", "#2e7d32"  # for anything else, with no fixed meaning
DPI = 120
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
}


@contextlib.contextmanager
def chart(
    path: Path, *, size: tuple[float, float], rows: int = 1, columns: int = 1, option: str = "--out", **subplots: Any
) -> Iterator[tuple[Any, list[Any]]]:
    """A figure to draw into. It is saved at the end of the block, unless the block raises.

    Args:
        path: the file; its folder is created. The suffix selects the format, PNG if matplotlib does not know it.
        size: width and height in inches, at 120 dots an inch. rows, columns, subplots: as ``Figure.subplots`` takes
            them. option: the command line option that names the file, for the error.

    Yields: the figure, and its axes row by row.

    Raises:
        MissingPackageError: matplotlib is not installed; raised before the block is entered.
        ChartError: the file cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(f"The chart needs matplotlib ({error}): pip install matplotlib") from error
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        canvas = FigureCanvasAgg(figure)  # needs no display
        axes = figure.subplots(rows, columns, squeeze=False, **subplots)
        yield figure, list(axes.flat)
        suffix = path.suffix.lstrip(".").lower()
        try:
            make_folder(path.parent)
            figure.savefig(path, format=suffix if suffix in canvas.get_supported_filetypes() else "png")
        except OSError as error:
            why = error.strerror or error
            raise ChartError(f"{path} cannot be written: {why}. Name another file with {option}.") from error


def horizontal_grid(*axes: Any) -> None:
    """Pale horizontal lines, to read heights by."""
    for axis in axes:
        axis.grid(axis="y")
