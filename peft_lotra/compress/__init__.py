# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""From full to low rank: spectra, and extraction of adapters."""
