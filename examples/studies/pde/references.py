# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The errors of the reference solutions: the difference to twice the resolution, and for Burgers to Cole-Hopf.

python examples/studies/pde/references.py
"""

from __future__ import annotations

from problems import command_line  # isort: split


import numpy as np
from problems.families import FAMILIES, cole_hopf


def main() -> None:
    command_line.Parser(__doc__, takes="a minute on one core", writes="nothing", folder=None).parse_args()
    for family in FAMILIES.values():
        for label, parameter in {"base": family.base, **family.targets}.items():
            line = f"{family.name:20s}{label:8s}{parameter:<8g}{family.reference_error(parameter):.1e}"
            if family.name == "burgers":
                exact, ours = cole_hopf(parameter), family.reference(parameter).numpy().reshape(-1)
                line += f"   Cole-Hopf {np.linalg.norm(ours - exact.reshape(-1)) / np.linalg.norm(exact):.1e}"
            print(line)


if __name__ == "__main__":
    main()
