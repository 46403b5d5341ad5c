# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Make the folders `family` and `digits` that app.py shows.

`family` has a base trained at one viscosity, and its family of adapters;
`digits` the base and the adapter of quickstart.py.

python examples/space/fit.py      # about a minute of one core
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from burgers import MEMBERS, network, terms_of
from safetensors.torch import save_file

from peft_lotra import ParametricAdapter
from peft_lotra.least_squares import LevenbergMarquardt


FOLDER = Path(__file__).parent
sys.path.append(str(FOLDER.parent))
from quickstart import compare  # noqa: E402


def main() -> None:
    notes = """Needs the package alone; takes a minute on one core;
    writes into the folder --output."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, epilog=notes
    )
    parser.add_argument("--output", type=Path, default=FOLDER)
    folder = parser.parse_args().output
    torch.manual_seed(0)
    base = network()
    optimizer = LevenbergMarquardt(base, floor=1e-6)
    for nu, steps in ((0.2, 15), (0.08, 15), (0.045, 40)):
        optimizer.fit(terms_of(nu, 2500), steps)
    family = ParametricAdapter(base, terms_of, ranks=8, log=True)
    print(family.fit(MEMBERS, max_steps=40))
    family.save_pretrained(folder / "family")
    save_base(base, folder / "family")

    digits, adapted, _, _ = compare(0, 300)
    adapted.save_pretrained(folder / "digits" / "adapter")
    save_base(digits, folder / "digits")


def save_base(base: torch.nn.Module, folder: Path) -> None:
    tensors = {k: v.contiguous() for k, v in base.state_dict().items()}
    save_file(tensors, folder / "base.safetensors")


if __name__ == "__main__":
    main()
