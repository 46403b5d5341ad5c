# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""LoTRA: low tensor-rank adaptation of Kolmogorov-Arnold networks, as a PEFT method. Importing it registers it."""

from . import kan
from ._version import __version__
from .approximation.compression import SlimReport, slim, to_dense
from .approximation.extraction import ExtractionReport, extract_lotra
from .approximation.spectra import Spectrum, gradient_spectrum, suggest_ranks, update_spectrum
from .families import known  # noqa: F401  (registers the known families)
from .families.candidates import KANCandidate
from .families.registry import FoundKANLayer, KANLayerSpec, find_kan_layers, register_kan_layer
from .files.format import save_adapter
from .hub.card import write_model_card
from .hub.push import push_to_hub
from .optim.learning_rates import LoTRALearningRates, create_lotra_optimizer, lotra_lr_multipliers
from .summary import ModelSummary, model_summary
from .tuner import jets  # noqa: F401  (teaches `jet` what PEFT puts around KANs)
from .tuner.check import KANLayerReport, check_kan_layer
from .tuner.config import LoTRAConfig
from .tuner.gradients import preprocess_lotra
from .tuner.hotswap import hotswap_adapter
from .tuner.layer import LoTRALayer
from .tuner.mixed_model import enable_mixed
from .tuner.model import LoTRAModel
from .tuner.refit import RefitReport, refit_adapters
from .tuner.registration import register


__all__ = [
    "ExtractionReport",
    "FoundKANLayer",
    "KANCandidate",
    "KANLayerReport",
    "KANLayerSpec",
    "LoTRAConfig",
    "LoTRALayer",
    "LoTRALearningRates",
    "LoTRAModel",
    "ModelSummary",
    "RefitReport",
    "SlimReport",
    "Spectrum",
    "__version__",
    "check_kan_layer",
    "create_lotra_optimizer",
    "enable_mixed",
    "extract_lotra",
    "find_kan_layers",
    "gradient_spectrum",
    "hotswap_adapter",
    "lotra_lr_multipliers",
    "model_summary",
    "preprocess_lotra",
    "push_to_hub",
    "refit_adapters",
    "register_kan_layer",
    "save_adapter",
    "slim",
    "suggest_ranks",
    "to_dense",
    "update_spectrum",
    "write_model_card",
]

kan.slim = slim
register(config_cls=LoTRAConfig, model_cls=LoTRAModel)
