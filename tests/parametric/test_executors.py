# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Members that executors fit, and members in a folder."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor

import family_problems as problems
import pytest
import torch

from peft_lotra import ParametricAdapter


PARAMETERS = [2.6, 2.9, 3.0, 3.1, 3.25]


@pytest.fixture(scope="module")
def base():
    return problems.pretrained()


def make(base, terms_of=problems.terms_of, ranks=4):
    return ParametricAdapter(base, terms_of, ranks=ranks)


@pytest.fixture(scope="module")
def alone(base):
    family = make(base)
    family.fit(PARAMETERS, progress=False)
    return family


def assert_equal(family, other):
    assert family.parameters == other.parameters
    for c in family.parameters:
        one, two = family.as_adapter(c).state_dict(), other.as_adapter(c).state_dict()
        torch.testing.assert_close(one, two, rtol=0, atol=1e-8)


class NoExecutor(Executor):
    """Refuses all work."""

    def submit(self, function, /, *args, **kwargs):
        pytest.fail("a member is fitted again")


@pytest.mark.parametrize(
    "executor",
    [
        pytest.param(lambda: ProcessPoolExecutor(2, multiprocessing.get_context("spawn")), marks=pytest.mark.slow),
        lambda: ThreadPoolExecutor(3),
    ],
    ids=["processes", "threads"],
)
def test_executors_fit_the_same_members(base, alone, executor):
    family = make(base)
    with executor() as pool:
        report = family.fit(PARAMETERS, executor=pool, progress=False)
    assert len(report) == len(PARAMETERS)
    assert_equal(family, alone)


def test_nothing_is_fitted_twice(base, alone, tmp_path):
    make(base).fit(PARAMETERS, folder=tmp_path / "run", progress=False)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    assert len(files) == len(PARAMETERS) and all(path.suffix == ".safetensors" for path in files)
    again = make(base)
    report = again.fit(PARAMETERS, executor=NoExecutor(), folder=tmp_path / "run", progress=False)
    assert len(report) == len(PARAMETERS) and all(member.steps > 0 for member in report)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == files
    assert_equal(again, alone)


def test_a_search_that_was_broken_off_goes_on(base, tmp_path):
    first, second = make(base), make(base)
    first.fit(between=(2.6, 3.4), max_members=11, folder=tmp_path, progress=False)
    missing = sorted(tmp_path.iterdir())[0]
    missing.unlink()
    second.fit(between=(2.6, 3.4), max_members=11, folder=tmp_path, progress=False)
    assert missing.exists()
    assert_equal(first, second)


def test_other_bases_ranks_and_steps_are_fitted_again(base, tmp_path):
    make(base).fit([3.0], folder=tmp_path, progress=False)
    for family, arguments in (
        (make(problems.pretrained(seed=1)), {}),
        (make(base, ranks=5), {}),
        (make(base), {"max_steps": 4}),
    ):
        before = set(tmp_path.iterdir())
        family.fit([3.0], folder=tmp_path, progress=False, **arguments)
        assert len(set(tmp_path.iterdir()) - before) == 1


@pytest.mark.slow
def test_members_by_a_cluster(base, alone, tmp_path):
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None, "local_directory": str(tmp_path)}
    family = make(base)
    with distributed.LocalCluster(**options) as local, distributed.Client(local) as client:
        family.fit(PARAMETERS, executor=client.get_executor(), progress=False)
    assert_equal(family, alone)
