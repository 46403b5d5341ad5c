# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""(c) Peak memory of a training step, and of forward and backward of a layer, each in its own process."""

from __future__ import annotations

import json
import sys

import torch

from figures.measure import in_child, peak_memory
from figures.subjects import (
    GRID,
    KANS,
    LAYERS,
    METHODS,
    forward_backward,
    make_kan,
    make_layer,
    random_inputs,
    squared_error,
    too_large,
    training_step,
)


def cells(quick: bool) -> list[dict]:
    """The kind ("step": a KAN by a method; "layer": a layer by its name), the width and the batch."""
    sizes = {"own KAN": [(256, 4096), (1024, 1024)], "efficient-kan": [(256, 4096)]}
    methods, layers = tuple(METHODS), tuple(LAYERS)
    if quick:
        sizes, methods, layers = {"own KAN": [(64, 256)]}, ("LoTRA",), ("KANLinear",)
    steps = [
        {"what": "step", "kan": kan, "method": method, "width": width, "batch": batch}
        for kan in sizes
        for width, batch in sizes[kan]
        for method in methods
    ]
    width, batch = sizes["own KAN"][0]
    return steps + [{"what": "layer", "layer": layer, "width": width, "batch": batch} for layer in layers]


def measure(cell: dict, device: torch.device, quick: bool) -> dict:
    layer = KANS[cell["kan"]] if cell["what"] == "step" else cell["layer"]
    reason = too_large(layer, cell["batch"], [cell["width"], cell["width"]])
    if reason:
        return {"skipped": {layer: reason}}
    return in_child(["-m", __name__, json.dumps(cell), str(device)], torch.get_num_threads())


def run_cell(cell: dict, device: torch.device) -> float:
    """The peak of the cell in MiB, without model and inputs, with gradients and the state of the optimizer."""
    width, batch = cell["width"], cell["batch"]
    if cell["what"] == "step":
        model = METHODS[cell["method"]](make_kan(cell["kan"], [width, width], device))
        x = random_inputs(batch, width, device)
    else:
        model, x = make_layer(cell["layer"], width, batch, GRID, device)

    def run(rows: torch.Tensor) -> None:
        step = cell["what"] == "step"
        parts = training_step(model, rows, squared_error) if step else forward_backward(model, rows)
        for part in parts.values():
            part()

    # excludes compilers and thread pools; two sizes, so that compilation covers any size
    for rows in (8, 12):
        run(x.detach()[:rows].requires_grad_())
    for parameter in model.parameters():
        parameter.grad = None
    return peak_memory(lambda: run(x), device)


if __name__ == "__main__":
    where = torch.device(sys.argv[2])
    print(json.dumps({"mib": round(run_cell(json.loads(sys.argv[1]), where), 1)}))
