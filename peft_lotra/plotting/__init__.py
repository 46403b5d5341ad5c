# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Pictures, which need matplotlib."""

from .pictures import plot_edge_functions, plot_history, plot_spectra


__all__ = ["plot_edge_functions", "plot_history", "plot_spectra"]
