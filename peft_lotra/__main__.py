# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""`python -m peft_lotra`: the command line."""

from .cli import main


if __name__ == "__main__":
    main(prog_name="peft-lotra")
