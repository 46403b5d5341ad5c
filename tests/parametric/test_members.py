# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import sys
from collections import Counter
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor

import family_problems as problems
import numpy as np
import pytest
import torch

from peft_lotra import ParametricAdapter
from peft_lotra.kan import KAN
from peft_lotra.optim import LevenbergMarquardt
from peft_lotra.parametric.members import Problem, argument, named, read, residuals_of, take_steps, write


MANY = int(os.environ.get("LOTRA_MEMBERS", "17"))  # with 100 it takes some minutes


class InOnePlace(Executor):
    """Runs each call at once, in reversed order of its results' arrival."""

    def submit(self, function, /, *args, **kwargs):
        future = Future()
        future.set_result(function(*args, **kwargs))
        return future


@pytest.fixture(scope="module")
def base():
    return problems.pretrained()


def test_coordinates_are_read_and_written():
    model = KAN([2, 3, 1])
    model.layers[0].requires_grad_(False)
    vector = read(model)
    assert vector.dtype == np.float64 and len(vector) == sum(p.numel() for p in model.layers[1].parameters())
    write(model, 2 * vector)
    np.testing.assert_allclose(read(model), 2 * vector)
    parts = named(model, vector)
    assert all(part.dtype == torch.float32 and name.startswith("layers.1") for name, part in parts.items())
    assert argument((1.5,)) == 1.5 and argument((1.5, 2.0)) == (1.5, 2.0)


def test_the_loss_is_that_of_the_optimizer(base):
    terms = [*problems.terms_of(3.2), (lambda m, x: m(x), problems.POINTS, 0.3)]
    for model in (copy.deepcopy(base), KAN([1, 4, 1], 6)):
        record = LevenbergMarquardt(model).step(terms)
        assert residuals_of(model, terms).square().sum().item() == pytest.approx(record.loss, rel=1e-6)


def test_steps_are_taken_while_they_halve_the_loss(base):
    model = KAN([1, 4, 1], 6, dtype=torch.float64)
    assert take_steps(model, problems.terms_of(3.0), 1, 9) > 1
    assert take_steps(model, problems.terms_of(3.0), 2, 2) == 2


def test_a_problem_without_a_loss_has_no_indicator(base):
    assert math.isnan(Problem(train=problems.train_by_adam).indicator(base, (3.0,)))


@pytest.mark.parametrize("kind", [pytest.param("process", marks=pytest.mark.slow), "thread", "at once"])
def test_executors_fit_the_same_members(base, kind):
    parameters = [2.5, 2.75, 3.0, 3.25, 3.5, 3.4, 3.1, 2.9]
    alone = ParametricAdapter(base, problems.terms_of, ranks=4)
    alone.fit(parameters, progress=False)
    makers = {
        "process": lambda: ProcessPoolExecutor(2, multiprocessing.get_context("spawn")),
        "thread": lambda: ThreadPoolExecutor(1),
        "at once": InOnePlace,
    }
    family = ParametricAdapter(base, problems.terms_of, ranks=4)
    with makers[kind]() as executor:
        report = family.fit(parameters, executor=executor, progress=False)
    assert len(report) == 8 and family.parameters == alone.parameters
    for one, other in zip(family._path.members, alone._path.members, strict=True):
        np.testing.assert_allclose(one.vector, other.vector, rtol=0, atol=1e-8)
        assert one.indicator == pytest.approx(other.indicator, rel=1e-6)


def test_threads_do_not_disturb_each_other(base):
    family, alone = (ParametricAdapter(base, problems.terms_of, ranks=4) for _ in range(2))
    parameters = [2.9, 2.95, 3.0, 3.05, 3.1, 3.15]
    alone.fit(parameters, progress=False)
    with ThreadPoolExecutor(3) as executor:
        family.fit(parameters, executor=executor, progress=False)
    for one, other in zip(family._path.members, alone._path.members, strict=True):
        np.testing.assert_allclose(one.vector, other.vector, rtol=0, atol=1e-8)


def test_failures_in_another_process_are_named(base):
    family = ParametricAdapter(base, problems.terms_that_fail, ranks=4)
    with pytest.warns(RuntimeWarning, match="2.6: ZeroDivisionError"):
        report = family.fit([2.5, 2.6, 2.7], executor=InOnePlace(), progress=False)
    assert family.parameters == [2.5, 2.7] and 2.6 in report.failed


def test_what_cannot_be_sent_is_named(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    family = ParametricAdapter(base, lambda c: problems.terms_of(c), ranks=4)
    with pytest.raises(ValueError, match="cannot be sent to another process.*top level of a module"):
        family.fit([3.0], executor=InOnePlace(), progress=False)


def test_local_functions_are_sent_by_cloudpickle(base):
    pytest.importorskip("cloudpickle")
    family = ParametricAdapter(base, lambda c: problems.terms_of(c), ranks=4)
    family.fit([3.0], executor=InOnePlace(), progress=False)
    assert family.parameters == [3.0]


def test_workers_that_die_and_a_run_that_is_resumed(base, tmp_path, monkeypatch):
    counts = tmp_path / "counts"
    monkeypatch.setenv("PEFT_LOTRA_COUNTS", str(counts))
    parameters = [2.9, 3.0, 3.1, 3.2, 3.3, 3.4]
    alone = ParametricAdapter(base, problems.terms_of, ranks=4)
    alone.fit(parameters, progress=False)
    folder = tmp_path / "run"
    family = ParametricAdapter(base, problems.terms_that_kill_once, ranks=4)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        with pytest.raises(RuntimeError, match="workers of `executor` died.*same folder"):
            family.fit(parameters, executor=executor, folder=folder, progress=False)
    kept = len(list(folder.glob("member-*")))
    assert 0 < kept < len(parameters)
    counts.write_text("")
    again = ParametricAdapter(base, problems.terms_that_kill_once, ranks=4)
    again.fit(parameters, folder=folder, progress=False)
    assert again.parameters == parameters
    evaluated = Counter(counts.read_text().splitlines())
    # the loss of the base is evaluated once at each; where a member is fitted, more often
    assert sum(count > 1 for count in evaluated.values()) == len(parameters) - kept
    for one, other in zip(again._path.members, alone._path.members, strict=True):
        np.testing.assert_allclose(one.vector, other.vector, rtol=0, atol=1e-8)


def test_the_indicator_may_be_another_loss(base):
    family = ParametricAdapter(base, problems.terms_of, ranks=4, loss_of=lambda model, c: 7.0 * c)
    family.fit([2.9, 3.0], progress=False)
    assert family.predict(2.95).indicator == pytest.approx(7 * 2.95)


@pytest.mark.slow
def test_many_members_by_a_pool_and_by_a_cluster_that_loses_a_worker(base, tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setenv("PEFT_LOTRA_COUNTS", str(tmp_path / "counts"))
    parameters = np.linspace(2.6, 3.4, MANY).tolist()
    alone, pool, cluster = (
        ParametricAdapter(base, terms_of, ranks=4)
        for terms_of in (problems.terms_of, problems.terms_of, problems.terms_that_kill_once)
    )
    alone.fit(parameters, progress=False)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as executor:
        pool.fit(parameters, executor=executor, folder=tmp_path / "pool", progress=False)
    again = ParametricAdapter(base, problems.terms_of, ranks=4)
    again.fit(parameters, executor=NoExecutor(), folder=tmp_path / "pool", progress=False)  # nothing is fitted
    folder = str(tmp_path / "dask")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, local_directory=folder
        ) as local,
        distributed.Client(local) as client,
    ):
        cluster.fit(parameters, executor=client.get_executor(), folder=tmp_path / "cluster", progress=False)
    assert (tmp_path / "counts.killed").exists()
    for family in (pool, again, cluster):
        assert len(family.parameters) == MANY
        for one, other in zip(family._path.members, alone._path.members, strict=True):
            np.testing.assert_allclose(one.vector, other.vector, rtol=0, atol=1e-8)


class NoExecutor(Executor):
    """Refuses all work."""

    def submit(self, function, /, *args, **kwargs):
        pytest.fail("a member is fitted again")
