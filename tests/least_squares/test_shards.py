# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Levenberg-Marquardt steps whose rows are divided among processes, see `sharded_worker.py`."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from process_groups import start_group
from residuals import network, terms

from peft_lotra.least_squares import LevenbergMarquardt


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes found."""
    return start_group("sharded_worker.py", 2, tmp_path_factory.mktemp("group"))


@pytest.fixture
def group(tmp_path):
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_group_needs_to_be_started():
    with pytest.raises(ValueError, match="init_process_group"):
        LevenbergMarquardt(network(), group=object())


def test_a_group_of_one_process_is_the_optimizer_alone(group):
    data = terms()
    alone = network()
    shared = copy.deepcopy(alone)
    first = LevenbergMarquardt(alone).fit(data, 3, progress=False)
    second = LevenbergMarquardt(shared, group=group).fit(data, 3, progress=False)
    np.testing.assert_allclose([r.losses for r in second], [r.losses for r in first], rtol=1e-10)
    for one, other in zip(shared.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "forgetting", "chunks"])
def test_shards_end_where_one_process_does(ranks, kind):
    for found in ranks:
        for name, alone in found["alone"][kind].items():
            np.testing.assert_allclose(found["sharded"][kind][name], alone, rtol=1e-10, atol=1e-10)
    assert ranks[0]["sharded"] == ranks[1]["sharded"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["nothing here", "another start"])
def test_a_shard_may_have_no_rows_or_other_parameters(ranks, case):
    """The parameters of the first process count."""
    for found in ranks:
        for name, alone in found["alone"]["plain"].items():
            np.testing.assert_allclose(found[case][name], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_what_is_wrong_in_one_process_ends_all(ranks):
    errors = [found["wrong"] for found in ranks]

    for case in ("other terms", "other weights"):
        assert all(
            error[case].startswith("ValueError: The processes have different residual terms") for error in errors
        )
    assert all(error["no rows at all"] == "ValueError: The residual term 1 (fit) has no rows." for error in errors)
    assert errors[0]["one is not finite"].endswith("residuals of another process are.")
    assert errors[1]["one is not finite"].startswith("residuals are NaN or infinite: 27 of")
