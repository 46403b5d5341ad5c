# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What the two files of an adapter say, compared with each other and with the model that the adapter is for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ..families.description import is_description
from ..families.registry import PREFIX, short_name
from ..tucker import KernelTucker


T = TypeVar("T")
Shape = tuple[int, ...]
OF_THE_BASE = "to save a part of the base, such as embeddings, name the module in `modules_to_save`"
TRAINED_ON = "Load it into the base model that it was trained on."
_MAX_LINES = 20  # that an error shows
# The buffers of a normalization that are saved behind "lotra_" where an adapter has moved them; the last one counts.
NORM_STATS = ("running_mean", "running_var", "num_batches_tracked")
_STORED = tuple(f"lotra_{part}" for part in (*KernelTucker._fields, *NORM_STATS))


@dataclass(frozen=True)
class Checkpoint:
    """What the files of an adapter say. All of it is `None` for an adapter that does not come from a file."""

    # the record of the base by layer: `family`, `shape`, `has_residual`, the `description` of a user's family, and the
    # hashes of `grid` and `parameters`
    layers: Mapping[str, Mapping[str, Any]] | None = None
    digest: str | None = None  # of the tensors, as the config has it
    tensors: Mapping[str, Shape] | None = None  # the shape of each tensor by its name in the base model

    def has_digest(self, digest: str) -> bool:
        """Whether tensors of this digest belong to the config; a config without a digest takes any."""
        return self.digest in (None, digest)

    def with_tensors(self, shapes: Mapping[str, Shape], digest: str, folder: str) -> Checkpoint:
        """The checkpoint with the tensors of a file, as `read_weights` returned them, if they belong to the config."""
        if not self.has_digest(digest):
            raise ValueError(
                f"The config and the tensors in {folder} do not belong together: the file of the tensors was "
                "changed or exchanged, or saving was interrupted. Get both files anew."
            )
        return replace(self, tensors=by_short_name(shapes))

    def check_shapes(self, expected: Mapping[str, Shape]) -> None:
        """Raises a ValueError if a tensor is missing or has another shape than the config gives it."""
        found = self.tensors or {}
        refuse(
            "The tensors of the adapter do not fit its config:",
            [
                f"{name}: {found.get(name, 'nothing')} in the checkpoint, {shape} by its config"
                for name, shape in expected.items()
                if found.get(name) != shape
            ],
        )

    def check_names(self, expected: Iterable[str], allowed: Iterable[str]) -> None:
        """Raises a ValueError if the file lacks an expected name, or has one that is neither expected nor allowed.

        PEFT would pass over a missing tensor, and write a superfluous one wherever its name leads, into the base too.
        """
        found, expected = set(self.tensors or ()), set(expected)
        wrong = [f"{name} is missing" for name in sorted(expected - found)]
        superfluous = sorted(found - expected.union(allowed))
        wrong += [f"{name} is nothing that this adapter has ({OF_THE_BASE})" for name in superfluous]
        refuse_for_model(wrong)


def by_short_name(tensors: Mapping[str, T]) -> dict[str, T]:
    """What a file has by the names in the base model; a ValueError if the prefix is in front of some of them only."""
    bare = sorted(name for name in tensors if not name.startswith(PREFIX))
    if len(bare) not in (0, len(tensors)):  # one could hide another, and PEFT loads those with the prefix alone
        refuse(
            f"These names of tensors do not begin with {PREFIX!r}, as others in the file do:",
            bare,
            "The file was changed, or put together out of two. Get it anew.",
        )
    return {short_name(name): tensor for name, tensor in tensors.items()}


def is_of_another_adapter(name: str) -> bool:
    """Whether a tensor of a file, of these names, is of an adapter that PEFT 0.19 saved along with the file's own."""
    return name.rpartition(".")[0].endswith(_STORED)


def own_tensors(tensors: Mapping[str, T]) -> dict[str, T]:
    """The tensors of a file without those of other adapters."""
    return {name: tensor for name, tensor in tensors.items() if not is_of_another_adapter(name)}


def refuse(headline: str, problems: list[str], remedy: str = "") -> None:
    """Raises a ValueError that lists the problems, if there are any."""
    if problems:
        lines = [*problems[:_MAX_LINES], *(["..."] if len(problems) > _MAX_LINES else [])]
        raise ValueError("\n  ".join([headline, *lines]) + (f"\n{remedy}" if remedy else ""))


def refuse_for_model(problems: list[str]) -> None:
    """Raises a ValueError that lists why an adapter does not fit a model, if there are reasons."""
    refuse("The adapter does not fit the model, nothing was loaded:", problems, TRAINED_ON)


def _is_record(value: Any) -> bool:
    """Whether a value that was read has the form of `Checkpoint.layers`."""
    return isinstance(value, dict) and all(
        isinstance(name, str)
        and isinstance(layer, dict)
        and isinstance(layer.get("family"), str)
        and isinstance(layer.get("has_residual"), bool)
        and isinstance(layer.get("shape"), (list, tuple))
        and len(layer["shape"]) in (3, 4)
        and all(isinstance(size, int) and size > 0 for size in layer["shape"])
        and all(_is_hashes(layer.get(hashes, {})) for hashes in ("grid", "parameters"))
        and ("description" not in layer or is_description(layer["description"]))
        for name, layer in value.items()
    )


def _is_hashes(value: Any) -> bool:
    """Whether a value that was read is a dict of strings."""
    return isinstance(value, dict) and all(isinstance(entry, str) for pair in value.items() for entry in pair)


# what a field of a config accepts, with the words for it
RECORD, HASHES = ((check, "None, or what a saved config has") for check in (_is_record, _is_hashes))
