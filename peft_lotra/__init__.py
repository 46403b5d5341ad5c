# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""LoTRA: low tensor-rank adaptation of Kolmogorov-Arnold networks, as a PEFT method. Importing it registers it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .layers import known  # noqa: F401  (registers the known families)
from .layers.candidates import KANCandidate
from .layers.registry import FoundKANLayer, KANLayerSpec, find_kan_layers, register_kan_layer
from .tuner import jets  # noqa: F401  (teaches `jet` what PEFT puts around KANs)
from .tuner.config import LoTRAConfig
from .tuner.gradients import preprocess_lotra
from .tuner.hotswap import hotswap_adapter
from .tuner.layer import LoTRALayer
from .tuner.model import LoTRAModel
from .tuner.refit import RefitReport, refit_adapters
from .tuner.registration import register
from .tuner.saving import save_adapter


if TYPE_CHECKING:
    from .bank.bank import AdapterBank
    from .compress.extract import ExtractionReport, extract_lotra
    from .compress.slim import SlimReport, slim, to_dense
    from .compress.spectra import Spectrum, gradient_spectrum, suggest_ranks, update_spectrum
    from .hub.card import write_model_card
    from .hub.push import push_to_hub
    from .optim.learning_rates import LoTRALearningRates, create_lotra_optimizer, lotra_lr_multipliers
    from .parametric import FamilyReport, ParametricAdapter, Prediction
    from .summary import ModelSummary, model_summary
    from .tuner.check import KANLayerReport, check_kan_layer

__all__ = [
    "AdapterBank",
    "ExtractionReport",
    "FamilyReport",
    "FoundKANLayer",
    "KANCandidate",
    "KANLayerReport",
    "KANLayerSpec",
    "LoTRAConfig",
    "LoTRALayer",
    "LoTRALearningRates",
    "LoTRAModel",
    "ModelSummary",
    "ParametricAdapter",
    "Prediction",
    "RefitReport",
    "SlimReport",
    "Spectrum",
    "__version__",
    "check_kan_layer",
    "create_lotra_optimizer",
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

# what is imported when it is first used, by name: a quarter of the time of an import
_LATER = {
    "AdapterBank": "bank",
    "ExtractionReport": "compress.extract",
    "FamilyReport": "parametric",
    "KANLayerReport": "tuner.check",
    "LoTRALearningRates": "optim.learning_rates",
    "ModelSummary": "summary",
    "ParametricAdapter": "parametric",
    "Prediction": "parametric",
    "SlimReport": "compress.slim",
    "Spectrum": "compress.spectra",
    "check_kan_layer": "tuner.check",
    "create_lotra_optimizer": "optim.learning_rates",
    "extract_lotra": "compress.extract",
    "gradient_spectrum": "compress.spectra",
    "lotra_lr_multipliers": "optim.learning_rates",
    "model_summary": "summary",
    "push_to_hub": "hub.push",
    "slim": "compress.slim",
    "suggest_ranks": "compress.spectra",
    "to_dense": "compress.slim",
    "update_spectrum": "compress.spectra",
    "write_model_card": "hub.card",
}


def __getattr__(name: str) -> Any:
    if name in ("compress", "hub", "optim", "parametric", "pde", "summary"):
        return import_module(f".{name}", __name__)
    if name == "enable_mixed":
        raise AttributeError(
            "`enable_mixed` is gone, since it patched PEFT. Adapt the KAN layers by LoTRA, then inject the other "
            'method under another name: `inject_adapter_in_model(LoraConfig(...), model.get_base_model(), "lora")`.'
        )
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_LATER[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


register(config_cls=LoTRAConfig, model_cls=LoTRAModel)
