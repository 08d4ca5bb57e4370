"""Matplotlib with its own defaults. Charts do not depend on a ``matplotlibrc`` of the user or of the working folder.

Import Matplotlib's names from here: on its first import Matplotlib reads a ``matplotlibrc`` in the working folder, which may be of
another program, damaged, or a pipe.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def _outside_of_the_working_folder() -> Iterator[None]:
    """Makes the folder of this file the working folder, if that has a ``matplotlibrc`` which would be read now."""
    before = Path.cwd()
    if "matplotlib" in sys.modules or not os.path.lexists(before / "matplotlibrc"):
        yield
        return
    os.chdir(Path(__file__).parent)
    try:
        yield
    finally:
        os.chdir(before)


with _outside_of_the_working_folder():
    import matplotlib
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure
    from matplotlib.patches import Rectangle as Rectangle
    from matplotlib.ticker import LogLocator as LogLocator
    from matplotlib.ticker import MaxNLocator as MaxNLocator
    from matplotlib.transforms import Bbox as Bbox

cycler = matplotlib.cycler


@contextmanager
def plain_style(settings: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Matplotlib's defaults, with these settings (``rcParams``) changed, inside the block."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings or {})
        yield
