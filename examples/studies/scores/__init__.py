# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The problems of the scoreboard, and the peers that run beside."""

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1] / "pde"))  # the standard problems
