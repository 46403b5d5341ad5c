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

"""LoTRA: low tensor-rank adaptation of Kolmogorov-Arnold networks, as a PEFT method. Importing it registers it."""

from ._version import __version__
from .config import LoTRAConfig
from .extraction import extract_lotra
from .initialization import preprocess_lotra
from .kan_layers import FoundKANLayer, KANLayerSpec, find_kan_layers, register_kan_layer
from .layer import LoTRALayer
from .model import LoTRAModel
from .optim import create_lotra_optimizer, lotra_lr_multipliers
from .ranks import gradient_spectrum, suggest_ranks, update_spectrum
from .refit import RefitReport, refit_adapters
from .registration import register
from .saving import save_adapter


__all__ = [
    "FoundKANLayer",
    "KANLayerSpec",
    "LoTRAConfig",
    "LoTRALayer",
    "LoTRAModel",
    "RefitReport",
    "__version__",
    "create_lotra_optimizer",
    "extract_lotra",
    "find_kan_layers",
    "gradient_spectrum",
    "lotra_lr_multipliers",
    "preprocess_lotra",
    "refit_adapters",
    "register_kan_layer",
    "save_adapter",
    "suggest_ranks",
    "update_spectrum",
]

register(config_cls=LoTRAConfig, model_cls=LoTRAModel)
