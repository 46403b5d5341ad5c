# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Configuration of `KANModel`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from transformers import PretrainedConfig

from .network import Norm, pairs


ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]


class KANConfig(PretrainedConfig):
    """The shape of a `KANModel`, which `save_pretrained` and the Hub store.

    `num_labels`, `id2label` and `label2id` follow from the last width; pass `id2label` to name the labels.

    Args:
        widths: Sizes of the input, of each hidden layer and of the output.
        grid_size: Number of intervals of each grid.
        spline_order: Degree of the splines, 1 to 5.
        grid_range: Ends of the grids of a new model.
        ranks: Makes it a Slim KAN: as for `SlimKAN`, (ro, ri, rb) for all layers, or a list with ranks or None for
            each. None for a dense KAN.
        norm: As for `KAN`.
        problem_type: "regression", "single_label_classification", "multi_label_classification", or None to choose by
            the labels; see `KANModel.forward`.
        **kwargs: As for `transformers.PretrainedConfig`.

    Attributes:
        widths, grid_size, spline_order, grid_range, ranks, norm, problem_type: The arguments, lists as tuples.

    Raises:
        ValueError: `num_labels` or `id2label` disagree with the last width.

    Example:
        >>> from peft_lotra.kan import KANConfig
        >>> KANConfig(widths=[2, 5, 3]).num_labels
        3
    """

    model_type = "kan"
    # transformers 5 makes each subclass a dataclass, whose own comparison would not see what `__init__` sets.
    __eq__ = PretrainedConfig.__eq__

    def __init__(
        self,
        widths: Sequence[int] = (2, 5, 1),
        grid_size: int = 5,
        spline_order: int = 3,
        grid_range: tuple[float, float] = (-1.0, 1.0),
        ranks: int | Sequence | None = None,
        norm: Norm = None,
        problem_type: ProblemType | None = None,
        **kwargs,
    ) -> None:
        # Tuples, so that a configuration read from JSON, which has lists, equals the one that was written.
        pairs(widths)  # which checks them
        self.widths = tuple(widths)
        self.grid_size = grid_size
        self.spline_order = spline_order
        self.grid_range: tuple[float, float] = _as_tuples(grid_range)  # pyright: ignore[reportAttributeAccessIssue]
        self.ranks = _as_tuples(ranks)
        self.norm: Norm = norm

        last = self.widths[-1]
        if kwargs.get("id2label") is None and kwargs.get("num_labels") is None:
            kwargs["num_labels"] = last
        super().__init__(problem_type=problem_type, **kwargs)
        if self.num_labels != last:
            raise ValueError(
                f"`num_labels` (the length of `id2label`) is {self.num_labels}, but the last of `widths` = "
                f"{self.widths} is {last}. Give only `widths`, or make the two agree."
            )


def _as_tuples(value):
    """Return lists, also nested ones, as tuples."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_as_tuples, value))
    return value
