# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Threads serve different adapters while another one is exchanged, and one more is loaded."""

from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import pytest
import torch
from helpers import KINDS, X, adapt, add_adapter, assert_equal, net
from peft import get_peft_model_state_dict
from torch import nn
from torch.testing import assert_close

from peft_lotra import LoTRALayer, hotswap_adapter


def several(kind):
    return net() if kind == "own" else nn.Sequential(KINDS[kind](), nn.Tanh(), nn.Linear(4, 3), KINDS[kind]())


@pytest.mark.parametrize("kind", ["own", "fast-kan", "cheby-kan"])
def test_no_answer_is_wrong_while_threads_swap_and_load(kind, tmp_path):
    model = adapt(several(kind))
    for index in range(4):
        add_adapter(model, f"a{index}")
    files = [tmp_path / name for name in ("first", "second")]
    for file in files:
        torch.manual_seed(int(file.name == "second"))
        other = adapt(several(kind))
        other.load_state_dict({n: v for n, v in model.state_dict().items() if "lotra" not in n}, strict=False)
        other.save_pretrained(file)
    rows = [["default"] * len(X)] + [[f"a{index}"] * len(X) for index in range(4)]
    rows += [[f"a{index % 4}" for index in range(len(X))], None]  # the active adapter, without names
    with torch.no_grad():
        right = [[] for _ in rows]
        for file in files:
            hotswap_adapter(model, file)
            for index, names in enumerate(rows):
                right[index].append(model(X, adapter_names=names))

        def serve(index, count=100):
            names = rows[index]
            with torch.no_grad():
                answers = [model(X, adapter_names=names) for _ in range(count)]
            return sum(not any(torch.equal(y, answer) for answer in right[index]) for y in answers)

        def swap():
            for count in range(40):
                hotswap_adapter(model, files[count % 2])
            return 0

        def load():
            for count in range(20):
                model.load_adapter(files[0], f"loaded{count}")
            return 0

        with ThreadPoolExecutor(8) as threads:
            jobs = [threads.submit(serve, index) for index in range(len(rows))]
            jobs += [threads.submit(swap), threads.submit(load)]
            assert [job.result() for job in jobs] == [0] * len(jobs)


def test_a_save_during_a_hotswap_writes_one_of_both_adapters(tmp_path, monkeypatch):
    model, other = adapt(net()), adapt(net())
    other.save_pretrained(tmp_path)
    replace = LoTRALayer.replace_components
    threads, saved = [], []

    def replace_while_another_thread_saves(layer, *args):
        replace(layer, *args)
        if not threads:  # the other layer still has the former components
            threads.append(Thread(target=lambda: saved.append(get_peft_model_state_dict(model))))
            threads[0].start()
            threads[0].join(timeout=1)

    monkeypatch.setattr(LoTRALayer, "replace_components", replace_while_another_thread_saves)
    hotswap_adapter(model, tmp_path)
    threads[0].join()

    assert_equal(saved, [get_peft_model_state_dict(other)])


@pytest.mark.parametrize("kind", ["own", "fast-kan", "cheby-kan"])
def test_another_thread_may_compile_meanwhile(kind):
    """While a graph is made, torch says in all threads that it compiles."""
    torch._dynamo.reset()
    model = adapt(several(kind))
    add_adapter(model, "other")
    names = ["default", "other"] * 4
    answers = []

    def backend(graph, _):
        with ThreadPoolExecutor(1) as threads:
            answers.append(threads.submit(torch.no_grad()(model), X, adapter_names=names).result())
        return graph

    with torch.no_grad():
        expected = model(X, adapter_names=names)
        torch.compile(nn.Linear(2, 2), backend=backend)(torch.rand(1, 2))

    assert_close(answers, [expected])
