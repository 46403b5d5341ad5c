# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The KAN layers of any library: where the coefficients are, and what they mean.

* Kinds: `kinds` describes layers, `known` lists those of libraries. `layout` and `coefficients` read parameters.
* Recognition: `recognize` gives a module a description, or one reason why it has none. `probe` runs copies of a layer,
  and `evidence` compares their gradients.
* Formula: `formula` compares a layer with the formula of its kind, and reads it. `derivatives` tells `jet` of it.

`search` finds the layers of a model.
"""

from . import derivatives, known  # noqa: F401  (teaches `jet` these layers; registers the known kinds)
