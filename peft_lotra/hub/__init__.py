# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Adapters on the Hub: the push, the model card, and the code of the card that builds the base."""

from .card import write_model_card
from .push import push_to_hub


__all__ = ["push_to_hub", "write_model_card"]
