# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The cost of checks: the fingerprint of a base of 100 million parameters, and the rounding errors of merging.

python examples/studies/trust.py --output examples/studies/results
"""

from __future__ import annotations

from study_tools import command_line  # isort: split


import json
import time
from functools import partial

import torch
from peft import get_peft_model

from peft_lotra import LoTRAConfig
from peft_lotra.files.fingerprint import hash_all_dtypes, is_same
from peft_lotra.kan import KAN


def fingerprint_costs(parameters: int, repeats: int = 3) -> dict[str, float]:
    """The seconds to record a base and to compare a base with the record, each the minimum over `repeats`."""
    costs = {}
    for dtype in (torch.float32, torch.bfloat16):
        values = {"coefficients": torch.randn(parameters).to(dtype)}
        record = hash_all_dtypes(values)
        for what, work in (
            ("record", partial(hash_all_dtypes, values)),
            ("compare", partial(is_same, record, values)),
        ):
            times = []
            for _ in range(repeats):
                started = time.perf_counter()
                work()
                times.append(time.perf_counter() - started)
            costs[f"{what}, {str(dtype).removeprefix('torch.')}"] = round(min(times), 3)
    return costs


def drift(dtype: torch.dtype, keep_base: bool, cycles: int) -> float:
    """The largest change of a base coefficient by cycles of merging and unmerging, relative to the largest one."""
    torch.manual_seed(0)
    base = KAN([16, 32, 4]).to(dtype)
    model = get_peft_model(base, LoTRAConfig(r=4, init_weights=False))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lotra_" not in name}
    for _ in range(cycles):
        model.merge_adapter(keep_base=keep_base)
        model.unmerge_adapter()
    after = dict(model.named_parameters())
    change = max((after[name] - p).abs().max().item() for name, p in before.items())
    return change / max(p.abs().max().item() for p in before.values())


def main() -> None:
    parser = command_line.Parser(
        __doc__, takes="two minutes on one core", writes="trust.json", folder=command_line.RESULTS
    )
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--cycles", type=int, default=1000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, object] = {"parameters": arguments.parameters, "cycles": arguments.cycles}
    report["seconds for the fingerprint, one core"] = fingerprint_costs(arguments.parameters)
    report["drift of the base"] = {
        f"{str(dtype).removeprefix('torch.')}, {'kept' if keep else 'not kept'}": drift(dtype, keep, arguments.cycles)
        for dtype in (torch.float32, torch.bfloat16)
        for keep in (True, False)
    }
    (arguments.output / "trust.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
