# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Changes by adapters, in numbers and in pictures; the pictures need matplotlib."""

from .edges import EdgeChange, EdgeChanges, edge_changes
from .parts import ChangeParts, Pair, what_changed
from .pictures import plot_edge_functions, plot_history, plot_network_change, plot_spectra


__all__ = [
    "ChangeParts",
    "EdgeChange",
    "EdgeChanges",
    "Pair",
    "edge_changes",
    "plot_edge_functions",
    "plot_history",
    "plot_network_change",
    "plot_spectra",
    "what_changed",
]
