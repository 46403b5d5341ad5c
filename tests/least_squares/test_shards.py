# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Levenberg-Marquardt steps whose rows are divided among processes, see `sharded_worker.py`."""

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
    """Return the results of two processes."""
    return start_group("sharded_worker.py", 2, tmp_path_factory.mktemp("group"))


@pytest.fixture
def group(tmp_path):
    """Start a group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_group_of_one_process_is_the_optimizer_alone(group):
    data = terms()
    model = network()
    copied = copy.deepcopy(model)

    records = LevenbergMarquardt(model, group=group).fit(data, 3, progress=False)
    expected = LevenbergMarquardt(copied).fit(data, 3, progress=False)

    losses = [record.losses for record in records]
    np.testing.assert_allclose(losses, [record.losses for record in expected], rtol=1e-10)
    torch.testing.assert_close(model.state_dict(), copied.state_dict(), rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "forgetting", "chunks"])
def test_shards_end_where_one_process_does(ranks, kind):
    for results in ranks:
        assert_close(results["sharded"][kind], results["alone"][kind])
    assert ranks[0]["sharded"] == ranks[1]["sharded"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["nothing here", "another start"])
def test_a_shard_may_have_no_rows_or_other_parameters(ranks, case):
    """All processes start with the parameters of the first one."""
    for results in ranks:
        assert_close(results[case], results["alone"]["plain"])


def assert_close(values, expected):
    for name in expected:
        np.testing.assert_allclose(values[name], expected[name], rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_what_is_wrong_in_one_process_ends_all(ranks):
    first, second = (results["wrong"] for results in ranks)

    for errors in (first, second):
        for case in ("other terms", "other weights"):
            assert errors[case].startswith("ValueError: The processes have different residual terms")
        assert errors["no rows at all"] == "ValueError: The residual term 1 (fit) has no rows."
    assert first["one is not finite"].endswith("residuals of another process are NaN or infinite.")
    assert second["one is not finite"].startswith("residuals are NaN or infinite: 27 of")
