# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The rows of a new task, and the folds that hold them out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler


def read_rows(data: Any, needs_order: bool = False) -> tuple[Tensor, Tensor]:
    """Return the inputs and the targets of all rows, of a pair of tensors, a Dataset or a DataLoader.

    Raises:
        ValueError: There are no rows, different numbers of both, or values that are not finite. Or `data` shuffles the
            rows, although their order is needed.
    """
    if not isinstance(data, (tuple, list)):
        loader = data
        if not isinstance(loader, DataLoader):
            loader = DataLoader(data, batch_size=256)
        if needs_order and isinstance(loader.sampler, (RandomSampler, SubsetRandomSampler)):
            raise ValueError(
                "`groups` and `blocked` need the order of the rows, but `data` shuffles them. Pass a Dataset."
            )
        try:
            data = [torch.cat(tensors) for tensors in zip(*loader, strict=True)]
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"`data` is {data!r:.100}, but must be a pair of tensors, inputs and targets, or a Dataset or "
                "DataLoader of such pairs."
            ) from error
    are_tensors = all(isinstance(tensor, Tensor) for tensor in data)
    lengths = [len(tensor) for tensor in data] if are_tensors else []
    if len(lengths) != 2 or lengths[0] != lengths[1] or lengths[0] == 0:
        raise ValueError("`data` must have inputs and targets as tensors, the same number of both, and at least one.")
    x, y = data
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("`data` has NaN or infinite values. Remove these rows.")
    return x, y


def assign_folds(
    y: Tensor,
    folds: int,
    groups: Sequence[Any] | None,
    blocked: bool,
    are_classes: bool,
    repeats: int = 1,
) -> Tensor:
    """Return the folds (repeats, n) that hold out each row in each of several random assignments.

    It is -1 for a row that is the only one of its class. The folds of the second assignment are numbered after those
    of the first one, and so on.

    Raises:
        ValueError: There are not enough rows or groups, or a fold would train without a class.
    """
    count = len(y)
    if groups is not None and len(groups) != count:
        raise ValueError(f"`groups` has {len(groups)} entries, but `data` has {count} rows.")
    classes = y.tolist() if are_classes else [0] * count
    frequency = Counter(classes)
    assignments = []
    for repeat in range(repeats):
        order = torch.randperm(count).tolist()
        fold = torch.full((count,), -1)
        if blocked:
            fold = torch.arange(count) * folds // count
        elif groups is not None:
            labels = dict.fromkeys(groups[row] for row in order)
            number_of = {label: number for number, label in enumerate(labels)}
            fold = torch.tensor([number_of[label] % folds for label in groups])
        else:
            rows = [row for row in order if frequency[classes[row]] > 1]
            rows.sort(key=classes.__getitem__)
            fold[rows] = torch.arange(len(rows)) % folds  # each class is spread over the folds

        for number in range(folds):
            training = (fold != number).nonzero().flatten().tolist()
            missing = set(classes) - {classes[row] for row in training}
            if len(training) in (0, count):
                raise ValueError(f"`folds` is {folds}, but `data` has too few rows or groups. Pass fewer folds.")
            if missing:
                raise ValueError(
                    f"A fold would train without the classes {sorted(missing)[:3]}. Pass fewer folds, or other "
                    "`groups`, or leave out `blocked`."
                )
        assignments.append(torch.where(fold < 0, fold, fold + repeat * folds))
    return torch.stack(assignments)
