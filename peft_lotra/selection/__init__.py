# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The choice of an adapter by data: its learning rate, and whether another model is better."""
