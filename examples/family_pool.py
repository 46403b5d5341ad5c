# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Fit a family of adapters in threads, in processes, or on a Dask cluster.

python examples/family_pool.py threads
python examples/family_pool.py processes
python examples/family_pool.py dask                       # two workers here
python examples/family_pool.py dask tcp://scheduler:8786  # a cluster
"""

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import torch

from peft_lotra import ParametricAdapter
from peft_lotra.kan import KAN, jet
from peft_lotra.least_squares import LevenbergMarquardt


torch.set_num_threads(1)  # for each worker
X = torch.linspace(-1, 1, 60, dtype=torch.float64).unsqueeze(1)


# functions that are sent to other processes stand at the top of a module
def oscillation(model, x, c):  # u'' + c^2 sin(c x) = 0, u = 0 at both ends
    n, (slope,), (second,) = jet(model, x)
    u_second = (1 - x**2) * second - 4 * x * slope - 2 * n
    return u_second + c**2 * torch.sin(c * x)


def terms_of(c):
    return [(oscillation, (X, torch.full_like(X, c)))]


def make_executor(kind, address=None):
    if kind == "threads":
        return ThreadPoolExecutor(2)
    if kind == "processes":
        return ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))
    from distributed import Client

    client = Client(address) if address else Client(n_workers=2)
    return client.get_executor()


def main():
    torch.manual_seed(0)
    base = KAN([1, 4, 1], 6, dtype=torch.float64)
    optimizer = LevenbergMarquardt(base, floor=1e-6)
    optimizer.fit(terms_of(3.0), 25, progress=False)
    family = ParametricAdapter(base, terms_of)
    with make_executor(*sys.argv[1:]) as executor:
        values = [2.6, 2.8, 3.0, 3.2, 3.4]
        print(family.fit(values, executor=executor, progress=False))


if __name__ == "__main__":  # spawned processes import this module again
    main()
