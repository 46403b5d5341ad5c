# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The scripts of examples/studies import the modules beside them, as scripts do."""

import sys
from pathlib import Path


STUDIES = Path(__file__).resolve().parents[2] / "examples" / "studies"
sys.path += [str(STUDIES), str(STUDIES / "pde"), str(STUDIES / "benchmarks"), str(STUDIES / "parametric")]
