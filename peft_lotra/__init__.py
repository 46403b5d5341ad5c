# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""LoTRA: low tensor-rank adaptation of Kolmogorov-Arnold networks, as a PEFT method. Importing it registers it.

Without PEFT there are `kan`, `derivatives`, `least_squares`, `layers` and `pde` alone.
"""

from importlib.util import find_spec
from typing import NoReturn

from . import pde  # noqa: F401  (as an attribute)
from ._version import __version__
from .layers.kinds import KANLayerSpec, register_kan_layer
from .layers.search import find_kan_layers


if find_spec("peft"):
    from . import plotting  # noqa: F401  (as an attribute)
    from .bank.bank import AdapterBank
    from .bank.training import BankAdamW
    from .compress.changes import what_changed
    from .compress.extract import extract_lotra
    from .compress.spectra import update_spectrum
    from .hub.card import write_model_card
    from .hub.load import load_adapters
    from .hub.push import push_to_hub
    from .parametric.adapter import ParametricAdapter
    from .selection.fit import fit_adapter
    from .selection.path import fit_path, start_from_data
    from .tuner import jets  # noqa: F401  (teaches `jet` what PEFT puts around KANs)
    from .tuner.config import LoTRAConfig
    from .tuner.gradients import start_from_gradient
    from .tuner.hotswap import hotswap_adapter
    from .tuner.layer import LoTRALayer
    from .tuner.learning_rates import create_lotra_optimizer
    from .tuner.linear_path import LinearPath
    from .tuner.model import LoTRAModel
    from .tuner.registration import register
    from .tuner.saving import save_adapter

    register(config_cls=LoTRAConfig, model_cls=LoTRAModel)


__all__ = [
    "AdapterBank",
    "BankAdamW",
    "KANLayerSpec",
    "LinearPath",
    "LoTRAConfig",
    "LoTRALayer",
    "LoTRAModel",
    "ParametricAdapter",
    "__version__",
    "create_lotra_optimizer",
    "extract_lotra",
    "find_kan_layers",
    "fit_adapter",
    "fit_path",
    "hotswap_adapter",
    "load_adapters",
    "push_to_hub",
    "register_kan_layer",
    "save_adapter",
    "start_from_data",
    "start_from_gradient",
    "update_spectrum",
    "what_changed",
    "write_model_card",
]


def __getattr__(name: str) -> NoReturn:
    if name in __all__:
        raise ImportError(f"`peft_lotra.{name}` needs PEFT, which is not installed. Install it by `pip install peft`.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
