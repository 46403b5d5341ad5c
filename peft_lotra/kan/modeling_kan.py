# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A Kolmogorov-Arnold network as a transformers model."""

from __future__ import annotations

from itertools import chain
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from .configuration_kan import KANConfig, ProblemType
from .knots import KnotMap
from .layer import SplineLayer
from .network import KAN
from .slim_kan import SlimKAN, SlimKANLinear


class KANModel(PreTrainedModel):
    """A `KAN`, or with `ranks` a `SlimKAN`, as a model of transformers: for `save_pretrained`, the Hub and `Trainer`.

    Importing this module registers it for `AutoConfig` and `AutoModel`.

    Args:
        config: The configuration.

    Attributes:
        kan: The network.

    Raises:
        ValueError: The configuration has values that `KAN` refuses.

    Example:
        >>> from peft_lotra.kan import KANConfig, KANModel
        >>> model = KANModel(KANConfig(widths=(2, 5, 1)))
        >>> model(torch.zeros(4, 2), labels=torch.ones(4)).logits.shape
        torch.Size([4, 1])
    """

    config_class = KANConfig
    base_model_prefix = "kan"
    main_input_name = "inputs"

    def __init__(self, config: KANConfig) -> None:
        super().__init__(config)
        arguments = (config.grid_size, config.spline_order, config.grid_range, config.norm)
        if config.ranks is None:
            self.kan = KAN(config.widths, *arguments)
        else:
            self.kan = SlimKAN(config.widths, config.ranks, *arguments)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        if not isinstance(module, SplineLayer):
            return
        # transformers calls this when a tensor of the module was missing from a checkpoint, and marks the others
        values = {}
        for tensor in chain(module.parameters(recurse=False), module.buffers(recurse=False)):
            if getattr(tensor, "_is_hf_initialized", False):
                values[tensor] = tensor.clone()
        module.reset_parameters()
        for tensor, value in values.items():
            tensor.copy_(value)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load as transformers does, and move the tensors to their own memory."""
        # matrix products choose their instructions by the address, which the file would decide
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for tensor in chain(model.parameters(), model.buffers()):
            tensor.data = tensor.data.clone()
        return loaded

    def save_pretrained(self, *args, **kwargs) -> None:
        """Save as transformers does, after an update of `config.ranks` and `config.grid_size`.

        `slim`, `to_dense` and `refine_grid` change these. Raise a `ValueError` if a configuration cannot
        hold the grids.
        """
        layers = [layer for layer in self.kan.layers if isinstance(layer, SplineLayer)]
        sizes = {layer.grid_size for layer in layers}
        if len(sizes) > 1 or any(isinstance(layer, KnotMap) for layer in self.kan.layers):
            raise ValueError(
                f"A KANConfig has one `grid_size` and no KnotMap, but the grids of the layers have {sorted(sizes)} "
                "intervals, or a KnotMap is before one. Save the module by `torch.save`."
            )
        if sizes:
            self.config.grid_size = sizes.pop()
        ranks = [layer.ranks if isinstance(layer, SlimKANLinear) else None for layer in layers]
        self.config.ranks = tuple(ranks) if any(ranks) else None
        super().save_pretrained(*args, **kwargs)

    @can_return_tuple  # for `return_dict=False`, here or in the configuration
    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        """Evaluate the network, and with `labels` the loss.

        Args:
            inputs: Shape (..., widths[0]), of the model's dtype.
            labels: By `config.problem_type`, with the loss,
                "regression": targets of the shape of the logits, or without a last dimension of 1; squared error;
                "single_label_classification": indices of classes, shape (...), -100 for none; cross entropy;
                "multi_label_classification": zeros and ones of the shape of the logits; binary cross entropy.
                With None, one output means regression; otherwise integers mean one label, booleans several, and
                floating point labels are refused.

        Returns:
            The `logits` (..., widths[-1]), for regression the predictions, and with labels the `loss`; with
                `return_dict=False` a tuple of these, the loss first.

        Raises:
            ValueError: The shape of inputs or labels does not fit, or the loss cannot be told from the labels.
        """
        logits = self.kan(inputs)
        loss = None if labels is None else self._loss(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)  # pyright: ignore[reportArgumentType] (its stub)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        kind = self.config.problem_type
        if kind is None:
            if self.config.num_labels == 1:
                kind = "regression"
            elif labels.dtype == torch.bool:
                kind = "multi_label_classification"
            elif not labels.is_floating_point():
                kind = "single_label_classification"
        kinds = get_args(ProblemType)
        if kind not in kinds:
            raise ValueError(
                f"`config.problem_type` is {kind!r}, and labels of {labels.dtype} for several outputs do not tell it. "
                f"Set it to one of {kinds}."
            )
        if kind == "regression" and labels.shape + (1,) == logits.shape:
            labels = labels.unsqueeze(-1)
        # a wrong shape would broadcast to a loss that looks right
        expected = logits.shape[:-1] if kind == "single_label_classification" else logits.shape
        if labels.shape != expected:
            raise ValueError(
                f"The labels have shape {tuple(labels.shape)}, but {kind} expects {tuple(expected)} here."
            )
        if kind == "single_label_classification":
            rows = logits.reshape(-1, logits.shape[-1])
            return F.cross_entropy(rows, labels.reshape(-1).long())
        labels = labels.to(logits.dtype)
        if kind == "regression":
            return F.mse_loss(logits, labels)
        return F.binary_cross_entropy_with_logits(logits, labels)


AutoConfig.register("kan", KANConfig, exist_ok=True)
AutoModel.register(KANConfig, KANModel, exist_ok=True)
