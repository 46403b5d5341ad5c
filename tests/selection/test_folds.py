# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The folds of few rows, and what full fine-tuning trains."""

import pytest
import torch
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, TensorDataset

from peft_lotra import fit_adapter
from peft_lotra.kan import KAN
from peft_lotra.selection.data import assign_folds
from peft_lotra.selection.starts import start_all


QUICK = {"steps": 1, "folds": 2, "progress": False}


def test_each_row_is_held_out_once_in_each_division():
    targets = torch.arange(4).repeat(6)

    fold = assign_folds(targets, 3, None, False, True, repeats=2)

    assert fold.shape == (2, 24)
    assert fold[0].bincount().tolist() == [8, 8, 8]
    assert fold[1].bincount().tolist() == [0, 0, 0, 8, 8, 8]
    assert not torch.equal(fold[0] + 3, fold[1])


@pytest.mark.parametrize("options", [{"groups": [0, 0, 1, 1, 2, 2]}, {"blocked": True}])
@pytest.mark.parametrize("sampler", [RandomSampler, SubsetRandomSampler])
def test_a_loader_that_shuffles_is_refused_where_the_order_counts(sampler, options):
    """The labels in `groups` would be those of other rows."""
    rows = TensorDataset(torch.rand(6, 2), torch.rand(6, 1))
    loader = DataLoader(rows, sampler=sampler(range(6)))

    with pytest.raises(ValueError, match="`data` shuffles them"):
        fit_adapter(KAN([2, 8, 1]), loader, mse_loss, **QUICK, **options)


def test_the_grids_of_a_frozen_base_are_not_fine_tuned():
    kan = pytest.importorskip("kan")
    base = kan.KAN([2, 3, 1], grid=4, k=3, seed=0, auto_save=False)
    base.speed()
    grids = {f"act_fun.{number}.grid" for number in range(2)}
    base.requires_grad_(False)

    (values,) = start_all(base, [None]).values

    assert values.keys() == dict(base.named_parameters()).keys() - grids
