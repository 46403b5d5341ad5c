# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The summary of a model: one line for each adapter of each KAN layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..layers.registry import find_kan_layers
from ..modules.calls import unwrap
from ..modules.report import Report, TextTable
from ..tucker import Rank, form_text
from .layer import lotra_layers


class LayerSummary(NamedTuple):
    """One line of the summary: an adapter of a KAN layer, or a KAN layer without adapters."""

    layer: str  # the name of the layer, as in `find_kan_layers` and `target_modules`
    kind: str
    shape: tuple[int, ...]  # (out, in, basis), or (out, in, basis, kernel), of the coefficient tensor
    has_residual: bool
    adapter: str | None = None  # a layer without adapters has the defaults below
    ranks: tuple[Rank, ...] | None = None
    parameters: int = 0  # the number of parameters of the adapter
    trainable: int = 0  # the number of parameters of the adapter that require a gradient
    kilobytes: float = 0.0  # the memory of the adapter, in units of 1000 bytes
    scale: float | None = None  # the present scale of the update
    active: bool = False  # whether a forward pass uses the adapter: active, and adapters are not disabled
    merged: bool = False


class ModelSummary(Report, list[LayerSummary]):
    """The result of `model_summary`, a list of [`LayerSummary`]; prints as a table.

    Attributes:
        all_parameters, trainable_parameters: The parameters of the model, as `print_trainable_parameters` counts them.
        kilobytes: The memory of the parameters and buffers of the model, in units of 1000 bytes.
    """

    def __init__(self, lines: Iterable[LayerSummary], model: nn.Module) -> None:
        super().__init__(lines)
        parameters = list(model.parameters())  # a layer that the model uses in several places counts once
        self.all_parameters = sum(parameter.numel() for parameter in parameters)
        self.trainable_parameters = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        self.kilobytes = _kilobytes([*parameters, *model.buffers()])

    def as_dict(self) -> dict[str, Any]:
        """Return the summary in plain values, for JSON."""
        return {"layers": [line._asdict() for line in self], **vars(self)}

    def _table(self) -> TextTable:
        columns = ["layer", "kind", ">(out, in, basis)", "adapter", ">ranks", ">trainable / all", ">kB", ">scale"]
        rows = []
        for line in self:
            sizes = list(map(str, line.shape))
            if line.has_residual:
                sizes[2] += "+1"
            row = [line.layer, line.kind, f"({', '.join(sizes)})"]
            if line.adapter is None:
                row += [*["-"] * 5, "not adapted"]
            else:
                states = [name for name in ("active", "merged") if getattr(line, name)]
                row += [line.adapter, form_text(line.ranks), f"{line.trainable:,} / {line.parameters:,}"]
                row += [f"{line.kilobytes:.1f}", f"{line.scale:g}", ", ".join(states) or "inactive"]
            rows.append(row)

        share = self.trainable_parameters / max(self.all_parameters, 1)
        adapters_kilobytes = sum(line.kilobytes for line in self)
        notes = [
            f"{self.trainable_parameters:,} of {self.all_parameters:,} parameters trainable ({share:.2%})",
            f"adapters take {adapters_kilobytes:,.1f} of the {self.kilobytes:,.1f} kB of the model",
        ]
        if any(line.has_residual for line in self):
            notes.append("+1: the weights of the base branch")
        return TextTable([*columns, "state"], rows, notes)


def model_summary(model: nn.Module) -> ModelSummary:
    """List the KAN layers of a model, with their adapters: shapes, ranks, parameters, kilobytes, scale and state.

    Args:
        model: Any model, adapted or not; also a compiled one.

    Returns:
        A list of [`LayerSummary`], which prints as a table; `as_dict()` returns plain values.

    Raises:
        ValueError: A pattern of the kind of a layer does not fit its parameters.

    Example:
        >>> from peft_lotra.kan import KAN
        >>> print(model_summary(KAN([8, 5])))
        layer     kind        (out, in, basis)  adapter  ranks  trainable / all  kB  scale  state
        layers.0  peft-lotra       (5, 8, 8+1)  -            -                -   -      -  not adapted
        360 of 360 parameters trainable (100.00%)
        adapters take 0.0 of the 1.5 kB of the model
        +1: the weights of the base branch
    """
    network = unwrap(model)
    adapted = dict(lotra_layers(network))
    lines = []
    for name, kind, shape, has_residual, *_ in find_kan_layers(network):
        layer = adapted.get(name)
        if layer is None or not layer.lotra_r:
            lines.append(LayerSummary(name, kind, shape, has_residual))
            continue
        for adapter in layer.lotra_r:
            components = layer.get_components(adapter)
            tensors = components._asdict().values()
            trainable = [tensor.numel() for tensor in tensors if tensor.requires_grad]
            is_active = adapter in layer.active_adapters and not layer.disable_adapters
            line = LayerSummary(
                name,
                kind,
                shape,
                has_residual,
                adapter,
                components.form,
                parameters=components.numel(),
                trainable=sum(trainable),
                kilobytes=_kilobytes(tensors),
                scale=float(layer.lotra_scaling[adapter]),
                active=is_active,
                merged=adapter in layer.merged_adapters,
            )
            lines.append(line)
    return ModelSummary(lines, model)


def _kilobytes(tensors: Iterable[Tensor]) -> float:
    return sum(tensor.nbytes for tensor in tensors) / 1000
