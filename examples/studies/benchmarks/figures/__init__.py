# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The figures of the benchmarks, one module each, and what they share."""

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parents[2]))

from study_tools import command_line  # noqa: E402


__all__ = ["command_line"]
