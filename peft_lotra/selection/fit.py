# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The adaptation that data ask for: a scaled base, a linear path, or an adapter on top."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..compress.updates import check_without_adapters
from ..modules.calls import check_loaded, evaluating_without_trace, generators_kept, set_mode, unwrap
from ..modules.checks import check_count, check_function
from ..tuner.config import LoTRAConfig
from ..tuner.gradients import compute_losses
from ..tuner.linear_path import LinearPath
from .data import assign_folds, read_rows
from .path_solver import PathFit, fit_scale, solve_paths
from .report import AdapterFit, advise
from .starts import adapt, start_adapter, start_all
from .training import CHUNK, Loss, Task, is_better, weigh_rows


# Without a path, the adapter alone carries the new task, at a higher rate and in more steps.
# `create_lotra_optimizer` gives components 0.3 of its rate of 3e-3.
_RATES_ON_PATH, _STEPS_ON_PATH = {"adapter": 1e-3, "full": 1e-3}, 100
_RATES_ALONE, _STEPS_ALONE = {"adapter": 1e-2, "full": 3e-3}, 300
_BLOCKS = 10  # of successive rows, which are taken as independent of each other
_MANY_ROWS = 20_000  # above which one tenth of the rows is held out
_FEW_ROWS, _REPEATS = 100, 2  # below which the losses of one assignment of folds depend too much on chance


def fit_adapter(
    base: nn.Module,
    data: tuple[Tensor, Tensor] | Dataset | DataLoader,
    loss: Callable[[Any, Tensor], Tensor],
    *,
    storage: Literal["float16", "bfloat16"] | None = None,
    steps: int | None = None,
    folds: int = 5,
    groups: Sequence[Any] | Tensor | None = None,
    blocked: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> AdapterFit:
    r"""Adapt a base to a new task by as much as the data ask for. There is nothing to tune.

    A ladder of models is compared by the losses of rows that were held out:

    1. `base`: s * network(x), the base times the best scale s from 0 to 1.
    2. `path`: s * network(x) + W x + b, fitted in closed form, see [`fit_path`].
    3. `adapter`: on the path, an adapter of one learned shape, (full, full, 1), starts from the gradient and is
       trained by Adam at 1e-3.

    The highest rung with less loss than the base is chosen, unless the path has less loss than the adapter by two
    standard errors. With `groups` or `blocked`, the loss must be less by one standard error, which counts groups, or
    ten blocks of successive rows. The chosen rung is fitted again to all rows, in `model`. As a reference, `full`
    trains all parameters on the path, at 1e-3: `advice` says if that is better by more than one standard error.

    The rows are divided into folds, in two ways if there are fewer than 100. Each fold trains on the other rows, and
    its own rows measure the loss. Of more than 20,000 rows, one tenth is held out instead.

    A path needs inputs (rows, in), outputs (rows, out), and a loss that is convex in the outputs. Without one, as for
    images or tokens, the ladder has the unchanged base and the adapter, at a rate of 1e-2. `advice` says why.

    Like `get_peft_model`, the function adapts `base` in place: the result is an adapted [`LinearPath`] around it.
    After an error `base` is unchanged. A base of half precision stays as it is, and its adapter is in float32: a copy
    of the base in float32 is trained and measured.

    Args:
        base: The trained network, without adapters. It returns a tensor with one entry for each row.
        data: The labeled rows of the new task: inputs and targets as tensors, or a Dataset or a DataLoader of such
            pairs.
        loss: The loss of outputs and targets, a mean or a sum over the rows, such as
            `torch.nn.functional.cross_entropy`. The scores are means of the losses of single rows, with the weights of
            their classes if the loss has such.
        storage: The dtype of the adapter in its file, see [`LoTRAConfig`]. The losses are measured before rounding.
        steps: The number of training steps, of up to 128 rows each. By default 100, and 300 without a path.
        folds: The number of folds of one division, at least 2. A class is spread over the folds; the only row of a
            class is never held out.
        groups: A label for each row. Rows with the same label are held out together.
        blocked: Whether a fold is a block of successive rows, as it should be for time series.
        seed: The seed of the random numbers. The state of the global generators is kept.
        progress: Whether to show a progress bar.

    Returns:
        An [`AdapterFit`] with `model`, `chosen`, `advice`, `scores` and `errors`, which prints as a table.

    Raises:
        ValueError: Before training: there are no rows, fewer rows or groups than folds, a fold without a class, or
            values that are not finite; a DataLoader shuffles the rows, despite `groups` or `blocked`; the loss is no
            scalar, not finite for a single row, or does not take all outputs (it needs probabilities, or
            their logarithms); `base` has adapters.

    Example:
        >>> from peft_lotra import fit_adapter
        >>> from peft_lotra.kan import KAN
        >>> x = torch.rand(40, 2)
        >>> y, mse = x.sum(dim=1, keepdim=True) + 3, torch.nn.functional.mse_loss
        >>> report = fit_adapter(KAN([2, 4, 1]), (x, y), mse, steps=5, folds=2, progress=False)
        >>> report.chosen in report.scores
        True
        >>> sorted(report.scores)
        ['adapter', 'base', 'full', 'path']
    """
    begin = time.perf_counter()
    original = unwrap(base)
    check_without_adapters(original, "base")
    check_loaded(original, "base")
    check_function(loss, "loss", 2)
    if steps is not None:
        check_count(steps, "steps")
    check_count(folds, "folds", 2)
    LoTRAConfig(storage=storage)  # refuses other dtypes
    device = next(original.parameters()).device
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        generators_kept(original),
        tqdm(desc="fit_adapter", unit="step", disable=not progress) as bar,
    ):
        torch.manual_seed(seed)
        rows = read_rows(data, needs_order=blocked or groups is not None)
        x, y = (tensor.detach().to(device) for tensor in rows)
        torch.manual_seed(seed)  # a loader draws numbers too
        network, outputs, are_classes = _copy_checked(original, x, y, loss)
        x, y = _in_single(x), _in_single(y)
        if groups is not None:
            groups = groups.tolist() if isinstance(groups, Tensor) else list(groups)

        is_large = len(x) > _MANY_ROWS
        if is_large:
            folds = min(10, len(x) // 2)
            if groups is not None:
                folds = min(folds, len(set(groups)))
        is_single = blocked or is_large or len(x) >= _FEW_ROWS
        fold = assign_folds(y, folds, groups, blocked, are_classes, 1 if is_single else _REPEATS)
        if is_large:
            fold = torch.where(fold == folds - 1, 0, -1)

        has_weights = are_classes and outputs.dim() == 2 and y.min() >= 0
        weights = weigh_rows(loss, y, outputs[:1]) if has_weights else None
        clusters = None
        if blocked:
            clusters = torch.arange(len(x)) * _BLOCKS // len(x)
        elif groups is not None:
            clusters = torch.tensor([groups.index(label) for label in groups])
        task = Task(x, y, loss, fold, steps or _STEPS_ON_PATH, bar, weights, clusters)
        every_row = torch.arange(len(x))

        reason = "paths take inputs (rows, in) and outputs (rows, out)."
        has_path = x.is_floating_point() and x.dim() == 2 and outputs.dim() == 2
        paths = []
        path = None
        if has_path:
            memberships = torch.ones(len(task.rows) + 1, len(x))
            for membership, of_fold in zip(memberships, task.rows, strict=False):
                membership.zero_()[of_fold] = 1
            try:
                *paths, path = solve_paths(x, outputs, y, loss, memberships)
            except ValueError as error:  # the adapter may take this loss, and these targets
                has_path = False
                reason = str(error)
        if not has_path:
            task = task._replace(steps=steps or _STEPS_ALONE)
        bar.reset(3 * task.steps)
        if has_path and not isinstance(network, LinearPath):
            network = LinearPath(network, x.shape[1], outputs.shape[1])
        losses = _compare(task, network, outputs, paths)
        if not losses["base"].isfinite().all():
            raise ValueError("`loss` of single rows is not finite. It must be a mean over rows: remove those without.")
        # One standard error for each rung would keep the base too often: with few rows it is larger than most gains.
        # Blocks of time and groups are fewer still, and what is fitted to them may extrapolate.
        errors = 0 if clusters is None else 1
        higher = [rung for rung in ("adapter", "path") if rung in losses]
        if len(higher) == 2 and is_better(losses["path"], losses["adapter"], 2):
            higher = ["path"]
        better = [rung for rung in higher if is_better(losses[rung], losses["base"], errors)]
        chosen = better[0] if better else "base"

        if chosen == "base" and has_path:
            scale = fit_scale(loss, outputs, y)
            path = PathFit.of_scale(scale, x.shape[1], outputs.shape[1])
        values = {}
        if chosen == "adapter":
            start = start_adapter(network, task, [every_row], [path])
            trained = task.train(start, _rates(has_path)["adapter"], [every_row])
            (values,) = trained.values

        # the base changes from here
        if has_path and not isinstance(original, LinearPath):
            original = LinearPath(original, x.shape[1], outputs.shape[1])
        model = adapt(original, path, storage=storage)
        for name, value in values.items():
            original.get_parameter(name).data.copy_(value)

    advice, scores, errors = advise(losses, chosen)
    if not has_path:
        advice += f" There is no path: {reason}"
    return AdapterFit(
        model=model,
        chosen=chosen,
        advice=advice,
        scores=scores,
        errors=errors,
        seconds=time.perf_counter() - begin,
    )


def _rates(has_path: bool) -> dict[str, float]:
    return _RATES_ON_PATH if has_path else _RATES_ALONE


def _compare(
    task: Task,
    network: nn.Module,
    outputs: Tensor,
    paths: Sequence[PathFit],
) -> dict[str, Tensor]:
    """Return the losses of held-out rows, (rows,), of all rungs and of full fine-tuning.

    Args:
        task: The rows and folds.
        network: A `LinearPath` if there are paths.
        outputs: The outputs of the base, for all rows.
        paths: The paths of the folds; none for inputs that have no path.
    """
    rows = task.rows
    scales = [1.0] * len(rows)
    if paths:
        scales = [fit_scale(task.loss, outputs[of_fold], task.y[of_fold]) for of_fold in rows]
    losses = {"base": task.held_out_losses(lambda fold, index: scales[fold] * outputs[index])}
    if paths:
        losses["path"] = task.held_out_losses(lambda fold, index: paths[fold].predict(task.x[index], outputs[index]))
    rates = _rates(bool(paths))
    of_folds = paths or [None] * len(rows)
    starts = {"adapter": start_adapter(network, task, rows, of_folds), "full": start_all(network, of_folds)}
    for name, start in starts.items():
        trained = task.train(start, rates[name], rows)
        set_mode(trained.network, False)
        losses[name] = task.held_out_losses(lambda fold, index, trained=trained: trained.predict(fold, task.x[index]))
    return losses


def _in_single(tensor: Tensor) -> Tensor:
    """Return a tensor of half precision, in which losses overflow and small steps are lost, in float32."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor


def _copy_checked(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Loss,
) -> tuple[nn.Module, Tensor, bool]:
    """Return a copy without half precision, its outputs without a path, and whether targets are classes.

    Raises:
        ValueError: The network returns no tensor by rows, or the loss cannot train all models.
    """
    with evaluating_without_trace(network):
        network(x[:1])
        network = deepcopy(network)  # what a network keeps of a pass with gradients could not be copied
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = _in_single(tensor.data)
    inner = network.network if isinstance(network, LinearPath) else network
    with evaluating_without_trace(network):
        chunks = [inner(_in_single(chunk)) for chunk in x.split(CHUNK)]
    if not isinstance(chunks[0], Tensor) or len(chunks[0]) != len(x[:CHUNK]):
        raise ValueError(f"`base` must return a tensor with one entry for each row, not a {type(chunks[0]).__name__}.")
    all_outputs = torch.cat(chunks).detach()
    outputs = all_outputs[:CHUNK].clone().requires_grad_()
    y = _in_single(y[:CHUNK])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Using a target size")
        try:
            (value,) = compute_losses(lambda: loss(outputs, y), None)
        except UserWarning as error:
            raise ValueError(
                f"`loss` broadcasts outputs {tuple(outputs.shape)} and targets {tuple(y.shape)}."
            ) from error

    with torch.no_grad():
        try:
            raised = loss(outputs + 1, y)
        except Exception as error:
            raise ValueError(
                "`loss` does not take all outputs. Let `base` return logits, without a sigmoid."
            ) from error
        is_invariant = torch.isclose(raised, value, rtol=1e-3, atol=1e-3).item()
        width = 1 if outputs.dim() == 1 else outputs.shape[1]
        is_normalized = width > 1 and outputs.logsumexp(1).abs().max() < 1e-2
    if is_normalized and not is_invariant and raised < value:
        raise ValueError(
            "`base` returns logarithms of probabilities, and a linear model does not. Pass `cross_entropy` instead of "
            "`nll_loss`: for such outputs they are equal."
        )
    are_integers = y.dim() == 1 and not y.is_floating_point()
    return network, all_outputs, bool(is_invariant and are_integers and y.max() < width)
