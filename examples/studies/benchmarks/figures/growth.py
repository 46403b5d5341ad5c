# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""(d) The costs by width, batch, grid and number of adapters."""

from __future__ import annotations

import itertools

import torch
from peft import get_peft_model

from figures import layers
from figures.measure import interleave
from figures.subjects import METHODS, RANKS, make_kan, random_inputs, squared_error, training_step
from peft_lotra import LoTRAConfig


TITLE = "Growth"
STEP = ("frozen base", "LoTRA", "full fine-tuning")
GRIDS = ("KANLinear", "inkan", "flashkan", "efficient-kan")

# the series, the varied quantity, and the values of the others
SERIES = {
    "width": (32, 128, 512, 2048),
    "batch": (64, 512, 4096, 16384),
    "grid": (8, 16, 32, 64),
    "adapters": (1, 4, 16),
}


def cells(quick: bool) -> list[dict]:
    """A series and a value of its varied quantity. Widths and batches: a training step of one own layer n -> n."""
    at = {"width": 16, "batch": 64} if quick else {"width": 256, "batch": 256}
    result = []
    for series, values in SERIES.items():
        batch = {"grid": 4096, "adapters": 1024}.get(series, 256)
        held = at | ({} if quick else {"batch": batch})
        result += [{"series": series, "value": value, **held} for value in (values[:2] if quick else values)]
    return result


def measure(cell: dict, device: torch.device, quick: bool) -> dict:
    series, value, seconds = cell["series"], cell["value"], 0.1 if quick else 2.0
    if series == "grid":
        size = {"width": cell["width"], "batch": cell["batch"], "grid": value}
        return layers.measure(size, device, quick, GRIDS)
    if series == "adapters":
        return interleave(adapters(value, cell, device), device, seconds)
    size = cell | {series: value}
    x = random_inputs(size["batch"], size["width"], device)
    subjects = {
        name: training_step(METHODS[name](make_kan("own KAN", [size["width"]] * 2, device)), x, squared_error)
        for name in STEP
    }
    return interleave(subjects, device, seconds)


def adapters(number: int, cell: dict, device: torch.device) -> dict:
    """Inference with many adapters on one base: one active adapter, all active, and one for each row."""
    names = [f"adapter_{index}" for index in range(number)]

    def build():
        config = LoTRAConfig(r=RANKS, init_weights=False)
        model = get_peft_model(make_kan("own KAN", [cell["width"]] * 2, device), config, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, LoTRAConfig(r=RANKS, init_weights=False))
        return model.eval()

    base, one, every = make_kan("own KAN", [cell["width"]] * 2, device).eval(), build(), build()
    every.base_model.set_adapter(names)
    x = random_inputs(cell["batch"], cell["width"], device).detach()
    rows = list(itertools.islice(itertools.cycle(names), len(x)))
    return {
        "base": {"forward": _inference(lambda: base(x))},
        "one in force": {"forward": _inference(lambda: one(x))},
        "all in force": {"forward": _inference(lambda: every(x))},
        "one for each row": {"forward": _inference(lambda: one(x, adapter_names=rows))},
    }


def _inference(call):
    def run() -> None:
        with torch.no_grad():
            call()

    return run
