# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Five demos by DeepXDE, with the networks and numbers of points of its documentation; the code is our own."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from functools import partial


os.environ.setdefault("DDE_BACKEND", "pytorch")

import deepxde as dde  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from problems.odes import LORENZ_START, integrate  # noqa: E402
from problems.odes import lorenz as rates_of_lorenz  # noqa: E402


dde.config.set_default_float("float64")
PI = math.pi
PEERS = ("Euler's beam", "Helmholtz", "heat", "Burgers", "Lorenz, three constants")


class CPUTime(dde.callbacks.Callback):
    """Stop at a time of the CPU clock."""

    def __init__(self, end: float) -> None:
        super().__init__()
        self.end = end

    def on_epoch_end(self) -> None:
        self.model.stop_training = time.process_time() > self.end


def beam():
    interval = dde.geometry.Interval(0, 1)

    def equation(x, y):
        d2y = dde.grad.hessian(y, x)
        return dde.grad.hessian(d2y, x) + 1

    def at_end(x, on_boundary):
        return on_boundary and np.isclose(x[0], 1)

    def at_start(x, on_boundary):
        return on_boundary and np.isclose(x[0], 0)

    def moment(x, y, _):
        return dde.grad.hessian(y, x)

    def force(x, y, _):
        return dde.grad.jacobian(dde.grad.hessian(y, x), x)

    conditions = [
        dde.icbc.DirichletBC(interval, lambda x: 0, at_start),
        dde.icbc.NeumannBC(interval, lambda x: 0, at_start),
        dde.icbc.OperatorBC(interval, moment, at_end),
        dde.icbc.OperatorBC(interval, force, at_end),
    ]
    return dde.data.PDE(interval, equation, conditions, num_domain=10, num_boundary=2), [1, 20, 20, 20, 1], "tanh"


def helmholtz():
    square = dde.geometry.Rectangle([0, 0], [1, 1])
    rate = 4 * PI

    def equation(x, y):
        second = dde.grad.hessian(y, x, i=0, j=0) + dde.grad.hessian(y, x, i=1, j=1)
        source = rate**2 * torch.sin(rate * x[:, :1]) * torch.sin(rate * x[:, 1:])
        return -second - rate**2 * y - source

    data = dde.data.PDE(square, equation, [], num_domain=400, num_boundary=80)
    return data, [2, 150, 150, 150, 1], "sin"


def in_time(low: float, high: float, equation: Callable, start: Callable):
    line = dde.geometry.GeometryXTime(dde.geometry.Interval(low, high), dde.geometry.TimeDomain(0, 1))
    conditions = [
        dde.icbc.DirichletBC(line, lambda x: 0, lambda _, on_boundary: on_boundary),
        dde.icbc.IC(line, start, lambda _, on_initial: on_initial),
    ]
    data = dde.data.TimePDE(line, equation, conditions, num_domain=2540, num_boundary=80, num_initial=160)
    return data, [2, 20, 20, 20, 1], "tanh"


def heat():
    def equation(x, y):
        return dde.grad.jacobian(y, x, i=0, j=1) - 0.4 * dde.grad.hessian(y, x, i=0, j=0)

    return in_time(0, 1, equation, lambda x: np.sin(PI * x[:, 0:1]))


def burgers():
    def equation(x, y):
        slope, rate = (dde.grad.jacobian(y, x, i=0, j=j) for j in (0, 1))
        return rate + y * slope - 0.01 / PI * dde.grad.hessian(y, x, i=0, j=0)

    return in_time(-1, 1, equation, lambda x: -np.sin(PI * x[:, 0:1]))


def lorenz(constants: list):
    times = dde.geometry.TimeDomain(0, 3)
    sigma, rho, beta = constants

    def equation(t, values):
        x, y, z = (values[:, i : i + 1] for i in range(3))
        dx, dy, dz = (dde.grad.jacobian(values, t, i=i) for i in range(3))
        return [dx - sigma * (y - x), dy - x * (rho - z) + y, dz - x * y + beta * z]

    def at_start(_, on_initial):
        return on_initial

    observed = np.linspace(0, 3, 25)
    values = integrate(rates_of_lorenz, observed, LORENZ_START)
    # a lambda with a second argument would get auxiliary variables
    conditions = [
        dde.icbc.IC(times, partial(_constant, value), at_start, component=i) for i, value in enumerate(LORENZ_START)
    ]
    conditions += [dde.icbc.PointSetBC(observed[:, None], values[:, i : i + 1], component=i) for i in range(3)]
    data = dde.data.PDE(times, equation, conditions, num_domain=400, num_boundary=2, anchors=observed[:, None])
    return data, [1, 40, 40, 40, 3], "tanh"


def _constant(value: float, x):
    return value


MAKERS = {"Euler's beam": beam, "Helmholtz": helmholtz, "heat": heat, "Burgers": burgers}


def solve_by_deepxde(name: str, exact: Callable | None, seed: int, seconds: float) -> dict:
    """The errors of two ways to train: by Adam alone, and by Adam and L-BFGS for half of the seconds each."""
    errors = {}
    for method in ("Adam", "Adam, L-BFGS"):
        dde.config.set_random_seed(seed)
        constants = [dde.Variable(1.0) for _ in range(3)] if name.startswith("Lorenz") else None
        data, widths, activation = lorenz(constants) if constants else MAKERS[name]()
        network = dde.nn.FNN(widths, activation, "Glorot uniform")
        if name == "Helmholtz":  # its demo has exact conditions
            network.apply_output_transform(lambda x, y: y * (x * (1 - x)).prod(1, keepdim=True))
        model = dde.Model(data, network)
        begin = time.process_time()
        first = seconds if method == "Adam" else seconds / 2
        options = {"external_trainable_variables": constants} if constants else {}
        model.compile("adam", lr=1e-3, **options)
        model.train(iterations=10**9, display_every=10**9, callbacks=[CPUTime(begin + first)], verbose=0)
        if method != "Adam":
            dde.optimizers.config.set_LBFGS_options(maxiter=10**6)
            dde.optimizers.config.LBFGS_options["iter_per_step"] = 50  # of which the callback sees the last
            model.compile("L-BFGS", **options)
            model.train(display_every=10**9, callbacks=[CPUTime(begin + seconds)], verbose=0)
        spent = time.process_time() - begin
        if constants:
            found = [constant.detach().item() for constant in constants]
            errors[method] = max(abs(a / b - 1) for a, b in zip(found, (10, 28, 8 / 3), strict=True))
        else:
            low, high = ([0], [1]) if name == "Euler's beam" else ([-1 if name == "Burgers" else 0, 0], [1, 1])
            x = torch.quasirandom.SobolEngine(len(low), scramble=True, seed=7).draw(4000, dtype=torch.float64)
            x = torch.lerp(torch.tensor(low).double(), torch.tensor(high).double(), x)
            values = torch.tensor(model.predict(x.numpy()))
            errors[method] = ((values.cpu() - exact(x)).norm() / exact(x).norm()).item()
    return {"seed": seed, "errors": errors, "seconds": spent}
