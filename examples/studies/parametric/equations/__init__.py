# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The families of the parametric studies; the references are those of examples/studies/pde."""

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parents[2] / "pde"))
from problems import command_line  # noqa: E402


__all__ = ["command_line"]
