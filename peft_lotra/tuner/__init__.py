# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The PEFT method: config, model, adapted layer, and what happens to adapters."""
