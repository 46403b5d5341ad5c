# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0
"""The accuracy of transfer: the elliptic family, near target, base and adapter by Levenberg-Marquardt, three seeds.

python examples/studies/pde/accuracy.py             # five minutes of one core
python examples/studies/pde/accuracy.py --quick     # for CI
"""

from __future__ import annotations

from problems import command_line  # isort: split


from dataclasses import asdict, replace
from pathlib import Path

import torch
from problems.families import FAMILIES, relative_error
from problems.methods import CACHE, METHODS, QUICK, Setting, pretrained, train
from rich.console import Console
from study_tools import files


torch.set_num_threads(1)

SETTING = Setting(points=2500, lm_steps=30, name="accuracy")  # the network, base and ranks of transfer.py


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="five minutes on one core",
        writes="accuracy.json; bases in --cache",
        folder=command_line.RESULTS / "pde",
        quick="a tiny setting: to see it run",
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the trained bases (default: %(default)s)")
    args = parser.parse_args()
    setting = replace(QUICK, name="accuracy") if args.quick else SETTING
    family = FAMILIES["elliptic"]
    parameter = family.targets["near"]
    runs = []
    for seed in (0,) if args.quick else (0, 1, 2):
        base = pretrained(family, setting, seed, args.cache)
        base_error = relative_error(base, family.reference(family.base))
        model, curve = train(METHODS["lotra_lm"], family, "near", parameter, base, setting, seed)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        full = sum(p.numel() for p in base.parameters())
        runs.append(
            {"seed": seed, "base_error": base_error, "error": curve[-1][2], "trainable": trainable, "full": full}
            | {"curve": curve}
        )
        Console().print(
            f"elliptic, seed {seed}: base {base_error:.1e}; near target, before {curve[0][2]:.1e}, after "
            f"{curve[-1][0]} steps {curve[-1][2]:.1e} ({curve[-1][1]:.0f} CPU s), {trainable} of {full} parameters"
        )
    reference_error = None if args.quick else family.reference_error(parameter)
    result = {"setting": asdict(setting), "reference_error": reference_error, "runs": runs}
    name = "accuracy_quick" if args.quick else "accuracy"
    files.write(args.output / f"{name}.json", result, indent=None)


if __name__ == "__main__":
    main()
