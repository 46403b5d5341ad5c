# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Make the folder `family` that app.py shows.

It has a base trained at one viscosity, and its family of adapters.

python examples/space/fit.py      # about a minute of one core
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from burgers import MEMBERS, network, terms_of
from safetensors.torch import save_file

from peft_lotra import ParametricAdapter
from peft_lotra.least_squares import LevenbergMarquardt


FOLDER = Path(__file__).parent / "family"


def main() -> None:
    notes = """Needs the package alone; takes a minute on one core;
    writes the folder --output."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, epilog=notes
    )
    parser.add_argument("--output", type=Path, default=FOLDER)
    folder = parser.parse_args().output
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        parser.error(f"--output {folder}: {error.strerror}")
    torch.manual_seed(0)
    base = network()
    optimizer = LevenbergMarquardt(base, floor=1e-6)
    for nu, steps in ((0.2, 15), (0.08, 15), (0.045, 40)):
        optimizer.fit(terms_of(nu, 2500), steps)
    family = ParametricAdapter(base, terms_of, ranks=8, log=True)
    print(family.fit(MEMBERS, max_steps=40))
    family.save_pretrained(folder)
    save_file(
        {name: part.contiguous() for name, part in base.state_dict().items()},
        folder / "base.safetensors",
    )


if __name__ == "__main__":
    main()
