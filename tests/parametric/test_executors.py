# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Members that executors fit."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import family_problems as problems
import pytest
import torch

from peft_lotra import ParametricAdapter


PARAMETERS = [2.6, 2.9, 3.0, 3.1, 3.25]


def make(base):
    return ParametricAdapter(base, problems.terms_of, ranks=4)


@pytest.fixture(scope="module")
def expected(base):
    """The family that is fitted without an executor."""
    family = make(base)
    family.fit(PARAMETERS, progress=False)
    return family


def assert_close(family, expected):
    assert family.parameters == expected.parameters
    for c in family.parameters:
        state = family.as_adapter(c).state_dict()
        torch.testing.assert_close(state, expected.as_adapter(c).state_dict(), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    "executor",
    [
        pytest.param(lambda: ProcessPoolExecutor(1, multiprocessing.get_context("spawn")), marks=pytest.mark.slow),
        lambda: ThreadPoolExecutor(3),
    ],
    ids=["processes", "threads"],
)
def test_executors_fit_the_same_members(base, expected, executor):
    family = make(base)

    with executor() as pool:
        report = family.fit(PARAMETERS, executor=pool, progress=False)

    assert len(report) == len(PARAMETERS)
    assert_close(family, expected)


@pytest.mark.slow
def test_a_cluster_fits_the_same_members(base, expected, tmp_path):
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None, "local_directory": str(tmp_path)}
    family = make(base)

    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        family.fit(PARAMETERS, executor=client.get_executor(), progress=False)

    assert_close(family, expected)
