# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The scripts of examples/ import the modules beside them, as scripts do."""

import sys
from pathlib import Path


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path += [str(EXAMPLES / "studies" / folder) for folder in (".", "pde", "benchmarks", "parametric")]
sys.path.append(str(EXAMPLES / "space"))
