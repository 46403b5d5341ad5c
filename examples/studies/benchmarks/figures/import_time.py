# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""(e) The time to import the package, beside the time to import PEFT."""

from __future__ import annotations

import statistics

import torch

from figures.measure import in_child, quartiles


SCRIPT = """
import json, time
times = {}
for module in ("torch", "peft", "peft_lotra"):
    start = time.perf_counter()
    __import__(module)
    times[module] = 1e3 * (time.perf_counter() - start)
print(json.dumps(times))
"""


def cells(quick: bool) -> list[dict]:
    """One cell: imports torch, peft and peft_lotra one after the other in fresh processes."""
    return [{"processes": 2 if quick else 7}]


def measure(cell: dict, device: torch.device, quick: bool) -> dict:
    in_child(["-c", SCRIPT], torch.get_num_threads())  # fills the caches of the disk
    runs = [in_child(["-c", SCRIPT], torch.get_num_threads()) for _ in range(cell["processes"])]
    times = {name: {"total": quartiles([run[name] for run in runs])} for name in runs[0]}
    share = statistics.median(run["peft_lotra"] / (run["torch"] + run["peft"]) for run in runs)
    return {"ms": times, "rounds": len(runs), "share_of_peft": round(share, 4)}
