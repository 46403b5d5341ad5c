# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Inference from several threads, while another one loads adapters."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from helpers import adapt, inputs, lotra_layers, nested
from stand_ins import FAMILIES, as_model
from torch import nn

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN


# of batches that are cut differently; another adapter's rows are far off
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _frequent_switches():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def with_adapters(model, names, **config):
    adapted = adapt(model, adapter_name=names[0], **config)
    for name in names[1:]:
        adapted.add_adapter(name, LoTRAConfig(r=2, init_weights=False, **config))
    return adapted.eval()


def run_threads(model, jobs, expected, seconds, beside=lambda: None):
    """Runs the jobs again and again, each in a thread of its own, until `beside` is done and the time is over.

    Returns the number of forward passes, all of which gave what was expected.
    """
    over = threading.Event()

    def work(job):
        count = 0
        try:
            with torch.no_grad():
                while not over.is_set():
                    y = model(job[0], **job[1])
                    torch.testing.assert_close(y, expected[id(job)], **ROUNDING)
                    count += 1
        finally:
            over.set()
        return count

    with ThreadPoolExecutor(len(jobs)) as pool:
        futures = [pool.submit(work, job) for job in jobs]
        try:
            beside()
            over.wait(seconds)
        finally:
            over.set()
        return sum(future.result() for future in futures)


def make_jobs(names):
    mixed = [(names + ["__base__"]) * rows for rows in (1, 2, 3)]
    jobs = [(inputs(len(batch)), {"adapter_names": batch}) for batch in mixed]
    jobs += [(inputs(5), {"adapter_names": [name] * 5}) for name in (names[0], "__base__")]
    return [*jobs, (inputs(4), {})]


@pytest.mark.parametrize("kind", ["nested", "efficient-kan", "fast-kan"])
def test_adapter_names_while_adapters_are_loaded(kind, tmp_path):
    base = nested() if kind == "nested" else as_model(nn.Sequential(*(FAMILIES[kind](3, 3) for _ in range(2))))
    config = {"modules_to_save": ["head"]} if kind == "nested" else {}
    model = with_adapters(base, ["a", "b"], **config)
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    jobs = make_jobs(["a", "b"])
    with torch.no_grad():
        expected = {id(job): model(job[0], **job[1]) for job in jobs}

    def load():
        for index in range(8):
            model.load_adapter(tmp_path / "a", f"new{index}", low_cpu_mem_usage=index % 2 == 1)
            with torch.no_grad():  # at once, and beside the others
                y = model(jobs[0][0], adapter_names=[f"new{index}"] * 3)
                torch.testing.assert_close(y, model(jobs[0][0], adapter_names=["a"] * 3), **ROUNDING)

    assert run_threads(model, jobs, expected, 0.3, load) > 30
    assert len(model.peft_config) == 10 and model.active_adapters == ["a"]


def test_without_the_locks_it_goes_wrong(monkeypatch):
    """So that the tests above can fail."""
    model = with_adapters(KAN([3, 8, 8, 2]), ["a", "b"])
    jobs = make_jobs(["a", "b"])
    with torch.no_grad():
        expected = {id(job): model(job[0], **job[1]) for job in jobs}
    for layer in (model.base_model, *lotra_layers(model).values()):
        monkeypatch.setattr(layer.lotra_lock, "held", nullcontext())
    with pytest.raises((AssertionError, ValueError, RuntimeError, KeyError, TypeError)):
        run_threads(model, jobs, expected, 5.0)


def test_the_base_is_as_it_was():
    model = with_adapters(KAN([3, 8, 8, 2]), ["a", "b"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    jobs = make_jobs(["a", "b"])
    with torch.no_grad():
        expected = {id(job): model(job[0], **job[1]) for job in jobs}
    run_threads(model, jobs, expected, 0.3)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


def test_a_copied_model_has_locks_of_its_own():
    model = adapt(KAN([3, 4, 2]))
    x = inputs()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for layer, other in zip(lotra_layers(model).values(), lotra_layers(copied).values(), strict=True):
            assert layer.lotra_lock is not other.lotra_lock
            with layer.lotra_lock, ThreadPoolExecutor(1) as pool:
                assert torch.equal(pool.submit(copied, x).result(5), model(x))
