# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What operations cost, counted: `python examples/studies/benchmarks/calls.py` shows it and writes the limits."""

import json
import sys
from pathlib import Path

import pytest


sys.path.append(str(Path(__file__).parents[2] / "examples" / "studies" / "benchmarks"))

import calls  # noqa: E402


pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", calls.OPERATIONS)
def test_an_operation_costs_at_most_its_limits(name):
    """The limits are for one version of torch and PEFT, those of functions for one version of Python too."""
    committed = json.loads(calls.LIMITS.read_text())
    limits = committed["limits"][name]
    written, present = committed["versions"], calls.versions()
    if written.pop("python") != present.pop("python"):
        del limits["functions"]
    if written != present:
        pytest.skip(f"The limits were written with {written}, these are {present}.")

    costs = calls.measure(name).totals()

    assert {unit: costs[unit] for unit, limit in limits.items() if costs[unit] > limit} == {}


def test_a_load_enters_few_files():
    files = {name.partition(":")[0] for name in calls.measure("load").functions}

    assert len(files) <= 16, files


@pytest.mark.parametrize("description", calls.NUMBERS)
def test_calls_do_not_grow_with_the_number_of_adapters(description):
    """Nor does the peak, unless it is the batch that has more adapters.

    A PeftModel reads the components of each adapter of a batch, by two functions for each layer.
    """
    _, *numbers = calls.NUMBERS[description]
    totals = []
    for number in numbers:
        costs = calls.measure(description.format(number))
        # PEFT lists the state dict of the whole model to save one adapter: a `detach` for each tensor
        listed = costs.operators["aten.detach.default"]
        totals.append({**costs.totals(), "operators": costs.operators.total() - listed})

    few, many = totals
    units = ["operators", "functions", "peak"]
    if " over " in description:
        units.remove("peak")
    if description.endswith(" over {:,} adapters"):
        units.remove("functions")
    # groups of other sizes take other products
    assert {unit: (few[unit], many[unit]) for unit in units if many[unit] > 1.05 * few[unit]} == {}
