# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Make `study_tools` and `problems`, which are one folder up, importable."""

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1]))

from study_tools import command_line  # noqa: E402


__all__ = ["command_line"]
