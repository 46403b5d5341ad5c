# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Find a formula for what a saved adapter changes.

    python find_formula.py BASE ADAPTER DATA.csv

BASE: the folder of a base that `KAN.save_pretrained` wrote, its name on the
    Hub, or a function that returns the base, such as my_networks:build
ADAPTER: the folder of the adapter, or its name on the Hub
DATA.csv: a line with the names of the inputs, and a line for each sample

Prints a formula for each output of the adapted network, minus the base's. The
page what_changed.md explains the method.
"""

import argparse
import sys
from importlib import import_module
from itertools import combinations, product
from typing import NamedTuple

import numpy as np
import sympy
import torch
from numpy.polynomial.legendre import legvander
from peft import PeftModel, get_peft_model
from scipy.optimize import least_squares

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN
from peft_lotra.least_squares import LevenbergMarquardt


np.seterr(all="ignore")  # functions are tried outside of their domain, too
X, B, C = sympy.symbols("x b c")
LIBRARY = sympy.sympify(
    "[x, (x - c)**2, (x - c)**3, sin(b*(x - c)), exp(b*x), exp(-b*x),"
    "Abs(x - c), tanh(b*(x - c)), exp(-(b*(x - c))**2), 1/(x - c),"
    "sqrt(x - c), sqrt(c - x), log(x - c), log(c - x)]"
)
SYMBOLS = {g: [s for s in (B, C) if s in g.free_symbols] for g in LIBRARY}
RATES, SHIFTS = np.geomspace(0.3, 15, 22), np.linspace(-3, 3, 61)  # b and c
SMALL, LACK, MISFIT = 0.01, 0.007, 0.05  # shares of the change
PEAK = 0.2  # the largest share that one row has in a term


class Formula(NamedTuple):
    expression: sympy.Expr
    terms: list  # (variable, a, (g, {b, c})); no term where g is 0
    misfit: float  # root mean square, as a share of the change
    reason: str  # for a refusal, or empty
    constant: float
    units: dict  # the half range of each variable; None: the size of f

    def __str__(self):
        if self.reason:
            return f"no formula: {self.reason}"
        shown = simplify(self.terms, self.constant, self.units)
        return f"{shown}, misfit {self.misfit:.1%}"


def simplify(terms, constant, units):
    """Return the sum of the terms, with three digits, without small constants.

    Constants below a thousandth of their unit are left out. A sine loses whole
    half periods of its shift: sin(3.14 x - 3.14) is -sin(3.14 x).
    """

    def rounded(value, unit=0):
        return sympy.Float(value).n(3) if abs(value) > 0.001 * unit else 0

    expression = rounded(constant, units[None])
    for variable, a, (g, constants) in terms:
        b, shift = constants.get(B, 1), constants.get(C, 0)
        if g.has(sympy.sin):
            half_periods = round(shift * b / np.pi)
            shift -= half_periods * np.pi / b
            a *= (-1) ** half_periods
        short = {B: rounded(b), C: rounded(shift, units[variable])}
        function = g.subs({**short, X: variable})
        digits = {v: v.n(3) for v in function.atoms(sympy.Float)}
        expression += rounded(a) * function.xreplace(digits)
    return expression


def remover(columns):
    """Return a function that subtracts the least-squares fit by columns."""
    vectors, sizes, _ = np.linalg.svd(np.column_stack([*columns]), False)
    basis = vectors[:, sizes > 1e-7 * sizes[0]]
    return lambda values: values - basis @ (basis.T @ values)


def fit_function(g, x, change, slope, remove):
    """Fit slope a g(x) after `remove`; return the squared misfit, b and c."""
    function = sympy.lambdify([X, *SYMBOLS[g]], g)

    def column(constants, x=x, slope=slope):
        values = slope * function(x, *constants)
        squares = values**2
        valid = squares.max(0) < PEAK * squares.sum(0)  # false for NaN, too
        return remove(np.where(valid, values, 0.0))

    def residual(constants):
        values = column(constants)
        return change - values * (values @ change) / (values @ values + 1e-12)

    if g == X:
        return np.sum(residual(()) ** 2), {}
    axes = {B: 2 * RATES / np.ptp(x), C: x.min() + np.ptp(x) * (SHIFTS + 1) / 2}
    points = np.array([*product(*(axes[symbol] for symbol in SYMBOLS[g]))])
    columns = column(points.T, x[:, None], slope[:, None])
    gains = (change @ columns) ** 2 / (np.sum(columns**2, 0) + 1e-12)
    top, ends = points[np.argsort(-gains)[:2]], (points.min(0), points.max(0))
    fits = [least_squares(residual, p, bounds=ends, max_nfev=30) for p in top]
    best = min(fits, key=lambda fit: fit.cost)
    return 2 * best.cost, dict(zip(SYMBOLS[g], best.x, strict=True))


def choose(library, x, left, slope, remove):
    """Return the best function and its constants; zero if BIC prefers no term."""
    rows, total = len(x), left @ left
    best, choice = rows * np.log(total / rows + SMALL**2), (0 * X, {})
    for g in library:
        squares, constants = fit_function(g, x, left, slope, remove)
        price = 2 * (1 + len(constants)) * np.log(rows)
        score = rows * np.log(squares / rows + SMALL**2) + price
        if score < best and total - squares > SMALL**2 * rows:
            best, choice = score, (g, constants)
    return choice


def find_formula(x, change, slope=1.0):
    """Find f in change = slope f(x), for arrays (rows, in), (rows,), (rows,)."""
    if not np.ptp(x, axis=0).all():
        raise ValueError("A column of x is constant: leave it out.")
    slope = slope * np.ones(len(x))
    columns = dict(zip(sympy.symbols(f"x:{x.shape[1]}"), x.T, strict=True))
    for i, j in combinations(list(columns), 2):
        columns[i * j] = columns[i] * columns[j]
    fits, chosen = {None: slope}, {}
    for variable, z in columns.items():
        degree = 8 if variable.is_Symbol else 1
        powers = legvander(2 * (z - z.min()) / np.ptp(z) - 1, degree)
        fits[variable] = (slope * powers.T[1:]).T
    count = np.column_stack([*fits.values()]).shape[1]
    if len(x) <= count:
        raise ValueError(f"{len(x)} rows are too few for {count} polynomials.")
    size = np.std(remover([slope])(change))
    smooth = np.std(remover(fits.values())(change)) / size
    for variable, z in 3 * list(columns.items()):
        del fits[variable]
        remove = remover(fits.values())
        library = LIBRARY if variable.is_Symbol else LIBRARY[:1]
        g, constants = choose(library, z, remove(change) / size, slope, remove)
        chosen[variable] = g, constants
        function = sympy.lambdify([X, *constants], g)
        fits[variable] = slope * function(z, *constants.values())
    matrix = np.column_stack([*fits.values()])
    factors = np.linalg.lstsq(matrix, change)[0]
    terms = [*zip(columns, factors[1:], chosen.values(), strict=True)]
    expression = sympy.Float(factors[0])
    for variable, a, (g, constants) in terms:
        expression += a * g.subs({**constants, X: variable})
    misfit = np.std(change - matrix @ factors) / size
    noise = (1 + 3 * count / len(x)) * smooth**2  # what `count` terms may hide
    lack = misfit**2 > noise + LACK**2
    reason = f"polynomials fit to {smooth:.1%}" if lack else ""
    reason = f"the misfit is {misfit:.0%}" if misfit > MISFIT else reason
    units = {v: np.ptp(z) / 2 for v, z in columns.items()} | {None: size}
    return Formula(expression, terms, misfit, reason, factors[0], units)


def train(model, x, y):
    terms = [(lambda model, x, y: model(x) - y, (x, y))]
    LevenbergMarquardt(model).fit(terms, 60, tolerance=1e-4, progress=False)


def find_inside(kan, x, y):
    """Find d in y = h(u(x) + d(x)), for a KAN of two layers h(u(x))."""
    low, high = kan(x).detach().quantile(torch.tensor([0.005, 0.995]))
    valid = ((y > low) & (y < high))[:, 0]  # the base returns such y
    x, y, u = x[valid], y[valid], kan.layers[0](x[valid]).detach()
    config = LoTRAConfig(r=(1, 2, 2), target_modules=["layers.0"])
    train(get_peft_model(kan, config), x, y)
    hidden, h = kan.layers[0](x).detach(), kan.layers[1]
    for _ in range(2):
        z = hidden.clone().requires_grad_()
        (slope,) = torch.autograd.grad(h(z).sum(), z)
        slope *= (hidden > u.min()) & (hidden < u.max())  # h is known here
        change = slope * (hidden - u) + (y - h(hidden).detach()) * (slope != 0)
        formula = find_formula(x.numpy(), *change.T.numpy(), *slope.T.numpy())
        f = sympy.lambdify(sympy.symbols(f"x:{len(x.T)}"), formula.expression)
        hidden = u + torch.as_tensor(f(*x.T[:, :, None].numpy()))
    return formula


def load_base(source):
    """Return a base from a folder, the Hub, or a function module:name."""
    module, _, name = source.partition(":")
    if not name:
        return KAN.from_pretrained(source)
    sys.path.insert(0, "")  # a module in the working folder
    return getattr(import_module(module), name)()


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    for name in ("base", "adapter", "data"):
        parser.add_argument(name)
    args = parser.parse_args()

    with open(args.data, encoding="utf-8") as file:
        names = [name.strip() for name in file.readline().split(",")]
        x = np.loadtxt(file, delimiter=",", ndmin=2)
    model = PeftModel.from_pretrained(load_base(args.base), args.adapter)
    model = model.double().eval()
    rows = torch.tensor(x)
    with torch.no_grad():
        adapted = model(rows)
        with model.disable_adapter():
            change = (adapted - model(rows)).numpy()

    print(", ".join(f"x{i} = {name}" for i, name in enumerate(names)))
    for output, values in enumerate(change.T):
        shown = find_formula(x, values) if np.ptp(values) else "no change"
        print(f"output {output}: {shown}")


if __name__ == "__main__":
    main()
