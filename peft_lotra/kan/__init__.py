# Copyright 2026 the peft-lotra authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Kolmogorov-Arnold networks that need nothing but torch; `KANModel` and `KANConfig` also need transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .basis import bspline_basis
from .jets.derivatives import hessian, jet, laplacian
from .layer import KANLinear
from .network import KAN
from .slim_kan import SlimKAN, SlimKANLinear


if TYPE_CHECKING:
    from ..approximation.compression import slim
    from .configuration_kan import KANConfig
    from .modeling_kan import KANModel

__all__ = [
    "KAN",
    "KANConfig",
    "KANLinear",
    "KANModel",
    "SlimKAN",
    "SlimKANLinear",
    "bspline_basis",
    "hessian",
    "jet",
    "laplacian",
    "slim",
]

# `slim` is the function, found by `__getattr__`; the module of that name can be imported from nevertheless.
globals().pop("slim", None)


def __getattr__(name: str):
    # On first use only: transformers takes seconds to import, and the layers do without it.
    if name == "KANConfig":
        from .configuration_kan import KANConfig

        return KANConfig
    if name == "KANModel":
        from .modeling_kan import KANModel

        return KANModel
    if name == "slim":  # it needs the registry of KAN families, which needs PEFT
        from ..approximation.compression import slim

        return slim
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
