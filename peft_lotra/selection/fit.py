# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""An adapter whose ranks come from a budget, and whose learning rate is chosen by data."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..bank.bank import AdapterBank
from ..compress.updates import check_without_adapters
from ..modules.calls import PREFIX, check_loaded, evaluating_without_trace, generators_kept, unwrap
from ..modules.checks import check_count, check_function
from ..tuner.gradients import compute_losses
from ..tuner.layer import lotra_layers
from .data import assign_folds, read_rows
from .report import AdapterFit, Chosen, advise
from .starts import Size, adapt, choose_ranks, file_size, make_references, start_adapter, stored_tensors
from .training import CHUNK, Task, weigh_rows


_USUAL_RATE = 1e-2
_BUDGET = 0.12
_HEADER_ROOM = 100  # bytes for longer numbers in the header of a file, by layer
_MANY_COEFFICIENTS, _MANY_ROWS = 1_000_000, 20_000  # above which one tenth of the rows is held out
_FEW_ROWS, _REPEATS = 100, 3  # below which the losses of one assignment of folds depend too much on chance


def fit_adapter(
    base: nn.Module,
    data: tuple[Tensor, Tensor] | Dataset | DataLoader,
    loss: Callable[[Any, Tensor], Tensor],
    *,
    budget: float | None = None,
    max_bytes: int | None = None,
    storage: Literal["float16", "bfloat16"] | None = None,
    steps: int = 300,
    folds: int = 5,
    groups: Sequence[Any] | Tensor | None = None,
    blocked: bool = False,
    ensemble: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> AdapterFit:
    r"""Adapt a base to a new task: choose ranks and learning rate, and compare the adapter with rivals.

    1. The rows are divided into folds, in three ways if there are fewer than 100. Each fold trains on the other rows,
       and its own rows measure the loss.
    2. Adapters with the ranks that the budget allows (see [`LoTRAConfig`]) start by [`start_from_gradient`], and are
       trained for all folds at once, at the rates 3e-3, 1e-2 and 3e-2.
    3. The references are trained in the same way: a linear model of the inputs, only the last layer, all parameters
       (full fine-tuning), and all parameters from scratch. The unchanged base counts too.
    4. One adapter is trained again, on all rows, at a rate of 1e-2, unless another rate has less loss on held-out rows
       by more than one standard error. If the base has less loss, `model` has an update of zero.
    5. `advice` names the model to use: the smallest one whose loss is within one standard error of the least. With
       `max_bytes`, larger ones are left out.

    Classes are integers, one for each row, whose loss does not change if all outputs rise alike, such as
    `cross_entropy`. Their losses are measured after the outputs are divided by a temperature, the best one for all
    held-out rows. Bases with more than a million coefficients, and more than 20,000 rows, hold out one
    tenth instead.

    Like `get_peft_model`, the function adapts `base` in place. After an error `base` is unchanged. A base of half
    precision stays as it is, and its adapter is in float32: a copy of the base in float32 is trained and measured.

    Args:
        base: The trained network, without adapters. It returns a tensor with one entry for each row.
        data: The labeled rows of the new task: inputs and targets as tensors, or a Dataset or a DataLoader of such
            pairs.
        loss: The loss of outputs and targets, a mean or a sum over the rows, such as
            `torch.nn.functional.cross_entropy`. The scores are means of the losses of single rows, with the weights of
            their classes if the loss has such.
        budget: The number of parameters of the adapter, as a share of the coefficients of the KAN layers. By default
            0.12, or what ranks of 1 take in smaller networks.
        max_bytes: The size of adapter_model.safetensors, at most; also of the model that is advised.
        storage: The dtype of the adapter in its file, see [`LoTRAConfig`]. The losses are measured before rounding.
        steps: The number of training steps, of up to 128 rows each.
        folds: The number of folds of one division, at least 2. A class is spread over the folds; the only row of a
            class is never held out.
        groups: A label for each row. Rows with the same label are held out together.
        blocked: Whether a fold is a block of successive rows, as it should be for time series.
        ensemble: Whether to return a bank of the adapters of all folds of one division too. The mean of their outputs
            is more accurate than the model.
        seed: The seed of the random numbers. The state of the global generators is kept.
        progress: Whether to show a progress bar.

    Returns:
        An [`AdapterFit`] with `model`, `advice`, `reason`, `scores` and `chosen`, which prints as a table.

    Raises:
        ValueError: Before training: there are no rows, fewer rows or groups than folds, a fold without a class, or
            values that are not finite; a DataLoader shuffles the rows, despite `groups` or `blocked`; the loss is no
            scalar, not finite for a single row, or does not take all outputs (it needs probabilities, or their
            logarithms); the budget is above 1, or it or `max_bytes` is below what ranks of 1 take; `base` has
            adapters.

    Example:
        >>> from peft_lotra import fit_adapter
        >>> from peft_lotra.kan import KAN
        >>> x = torch.rand(40, 2)
        >>> y, mse = x.prod(dim=1, keepdim=True), torch.nn.functional.mse_loss
        >>> report = fit_adapter(
        ...     KAN([2, 4, 1]), (x, y), mse, budget=0.3, steps=5, folds=2, progress=False
        ... )
        >>> sorted(report.scores)
        ['adapter', 'base', 'full', 'last layer', 'linear', 'scratch']
        >>> report.advice in report.scores
        True
    """
    begin = time.perf_counter()
    original = unwrap(base)
    check_without_adapters(original, "base")
    check_loaded(original, "base")
    check_function(loss, "loss", 2)
    check_count(steps, "steps")
    check_count(folds, "folds", 2)
    if max_bytes is not None:
        check_count(max_bytes, "max_bytes")
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
        network, output, are_classes = _copy_checked(original, x[:CHUNK], y[:CHUNK], loss)
        x, y = _in_single(x), _in_single(y)

        smallest = adapt(deepcopy(network), r=1, storage=storage)
        layers = [layer for _, layer in lotra_layers(smallest)]
        coefficients = sum(layer.get_base_weight().numel() for layer in layers)
        tensors = stored_tensors(smallest)
        size = file_size(tensors)
        if budget is None:
            least = (size.parameters + 0.5) / coefficients
            budget = max(_BUDGET, min(least, 1.0))
        limit = "the budget"
        if max_bytes is not None:
            needed = size.bytes + _HEADER_ROOM * len(layers)
            if max_bytes < needed:
                raise ValueError(f"`max_bytes` is {max_bytes}, but ranks of 1 and the header may take {needed} bytes.")
            added = (max_bytes - needed) // next(iter(tensors.values())).itemsize
            share = (size.parameters + added) / coefficients
            if share < budget:
                budget, limit = share, "`max_bytes`"
        if groups is not None:
            groups = groups.tolist() if isinstance(groups, Tensor) else list(groups)

        is_large = coefficients > _MANY_COEFFICIENTS or len(x) > _MANY_ROWS
        if is_large:
            folds = min(10, len(x) // 2)
            if groups is not None:
                folds = min(folds, len(set(groups)))
        is_single = blocked or is_large or len(x) >= _FEW_ROWS
        repeats = 1 if is_single else _REPEATS

        fold = assign_folds(y, folds, groups, blocked, are_classes, repeats)
        if is_large:
            fold = torch.where(fold == folds - 1, 0, -1)
            folds = 1

        has_weights = are_classes and output.dim() == 2 and y.min() >= 0
        weights = weigh_rows(loss, y, output) if has_weights else None
        task = Task(x, y, loss, fold, are_classes, steps, bar, weights)

        ranks = choose_ranks(network, task, budget)
        references = make_references(network, task)
        bar.total = steps * (len(references) + 2)
        fits = {"base": task._replace(steps=0).compare(references["full"])._replace(rate=0.0)}
        if not fits["base"].losses.isfinite().all():
            raise ValueError("`loss` of single rows is not finite. It must be a mean over rows: remove those without.")
        for name, start in references.items():
            fits[name] = task.compare(start)

        fits["adapter"] = fits["base"]
        if ranks is not None:
            start = start_adapter(network, task, ranks, task.rows)
            fit = task.compare(start, usual=_USUAL_RATE)
            # on time series, where rows are not independent, an adapter may do harm
            if fit.losses.mean() < fits["base"].losses.mean():
                fits["adapter"] = fit
        rate, values_of_folds, _ = fits["adapter"]

        config: dict[str, Any] = {"r": 1}
        init_weights: bool | str = True
        values = {}
        bank = None
        if ranks is not None and rate:
            config = {"rank_pattern": ranks}
            every_row = [torch.arange(len(x))]
            start = start_adapter(network, task, ranks, every_row)
            values = task.train(start, [rate], every_row)
            init_weights = "gradient"
            if ensemble:
                bank = _make_bank(network, values_of_folds, folds)

        # the base changes from here
        model = adapt(original, storage=storage, **config)
        # `create_lotra_optimizer` goes on at the rates of this start
        model.peft_config["default"].init_weights = init_weights
        for name, value in values.items():
            original.get_parameter(name).data.copy_(value[0, 0])

        forms = {name: layer.get_components("default").form for name, layer in lotra_layers(original)}
        sizes = {"base": Size(0, 0), "adapter": file_size(stored_tensors(model))}
        for name, start in references.items():
            buffers = dict(start.network.named_buffers())
            trained = {key: value for key, value in start.values[0].items() if key not in buffers}
            sizes[name] = file_size(trained)

    notes = []
    if are_classes:
        notes.append("losses after the outputs of each model are divided by its best temperature")
    if ranks is None:
        notes.append("the gradient of the loss is zero at the base: no adapter was trained")
    elif any(of_layer[:2] != ("full", "full") for of_layer in ranks.values()):
        notes.append(f"full matrices exceed {limit}: lower ranks were taken instead")

    losses = {name: fit.losses for name, fit in fits.items()}
    advice, reason, scores, errors = advise(losses, sizes, max_bytes or math.inf)
    return AdapterFit(
        model=model,
        bank=bank,
        chosen=Chosen(forms, rate),
        advice=advice,
        reason=reason,
        scores=scores,
        errors=errors,
        rates={name: fit.rate for name, fit in fits.items() if fit.rate},
        sizes=sizes,
        notes=notes,
        seconds=time.perf_counter() - begin,
    )


def _make_bank(
    network: nn.Module,
    values: Mapping[str, Tensor],
    folds: int,
) -> AdapterBank:
    """Return a bank of the adapters of the first folds, given the components (folds, ...) of all."""
    bank = AdapterBank(network)
    for number in range(folds):
        state = {f"{PREFIX}{name}".removesuffix(".default"): value[number] for name, value in values.items()}
        bank.add(f"fold {number}", state)
    return bank


def _in_single(tensor: Tensor) -> Tensor:
    """Return a tensor of half precision, in which losses overflow and small steps are lost, in float32."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor


def _copy_checked(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Callable[[Any, Tensor], Tensor],
) -> tuple[nn.Module, Tensor, bool]:
    """Return a copy without half precision, the output of the first row, and whether targets are classes.

    Raises:
        ValueError: The network returns no tensor by rows, or the loss cannot train all models.
    """
    with evaluating_without_trace(network):
        outputs = network(x)
        network = deepcopy(network)  # what a network keeps of a pass with gradients could not be copied
    if not isinstance(outputs, Tensor) or outputs.shape[:1] != x.shape[:1]:
        raise ValueError(f"`base` must return a tensor with one entry for each row, not a {type(outputs).__name__}.")
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = _in_single(tensor.data)
    y = _in_single(y)
    outputs = _in_single(outputs).requires_grad_()
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
    return network, outputs[:1].detach(), bool(is_invariant and are_integers and y.max() < width)
