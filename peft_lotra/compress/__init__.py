# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Changes of coefficients: spectra, extraction of adapters, what an adapter changed."""
