# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Count the calls of the package's own functions: how far a reader, or a debugger, has to travel.

    python examples/studies/benchmarks/calls.py --most 20

Two operations on a [2, 8, 8, 1] KAN are counted: `get_peft_model`, and a forward pass of the adapted model after the
first one, which fills caches. Frames of comprehensions, generator expressions and lambdas do not count, since Python
versions differ in whether they make frames. The numbers are deterministic, unlike times.
"""

from __future__ import annotations

from figures import command_line  # isort: split


import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table

import peft_lotra
from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN


ROOT = Path(peft_lotra.__file__).parent


def count_calls(function: Callable[[], Any]) -> tuple[Any, Counter[str]]:
    """Call a function.

    Returns:
        The result of the function, and the number of calls of each function of the package, by "file:name".
    """
    calls: Counter[str] = Counter()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and not code.co_name.startswith("<") and code.co_filename.startswith(f"{ROOT}/"):
            calls[f"{Path(code.co_filename).relative_to(ROOT).as_posix()}:{code.co_name}"] += 1

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        result = function()
    finally:
        sys.setprofile(before)
    return result, calls


def measure() -> dict[str, Counter[str]]:
    """The calls of both operations, by the name of the operation."""
    kan, x = KAN([2, 8, 8, 1]), torch.rand(32, 2)
    model, attach = count_calls(lambda: get_peft_model(kan, LoTRAConfig(r=4)))
    model(x)
    _, forward = count_calls(lambda: model(x))
    return {"get_peft_model": attach, "forward": forward}


def main(arguments: list[str] | None = None) -> None:
    parser = command_line.Parser(__doc__, takes="five seconds", writes="nothing", folder=None)
    parser.add_argument("--most", type=int, default=10, metavar="N", help="list the N most frequent functions")
    options = parser.parse_args(arguments)
    console = Console(highlight=False)
    for operation, calls in measure().items():
        table = Table("function", title=f"{operation}: {calls.total():,} calls", title_justify="left")
        table.add_column("calls", justify="right")
        for name, number in calls.most_common(options.most):
            table.add_row(name, f"{number:,}")
        console.print(table)


if __name__ == "__main__":
    main()
