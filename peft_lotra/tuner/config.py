# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import MISSING, asdict, dataclass, fields
from types import SimpleNamespace
from typing import Any, Literal
from weakref import WeakMethod

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, PeftType

from ..files.checkpoint import HASHES, RECORD, Checkpoint, Shape
from ..files.fingerprint import digest_of
from ..files.format import (
    PENDING_CONFIG,
    check_size,
    config_digest,
    find_weights,
    keep_own_tensors,
    read_weights,
    write_atomically,
)
from ..files.patterns import check_lengths, exact_pattern, find_key, pattern_key, refuse_pattern
from ..tucker import KernelTucker, Ranks, cap_ranks, check_ranks
from .arguments import (
    BOOL,
    CHECK_BASE_OF_LOAD,
    INDICES,
    NAMES,
    NUMBER,
    NUMBERS,
    PATTERN,
    PROBABILITY,
    START,
    TRAIN,
    check_values,
    clear_errors,
    compile_patterns,
    option,
    patterns_of,
    refuse_names_of_lora,
    regexes_of,
    with_help,
)


ALL_KAN = "all-kan"
CHECK_BASE = ("error", "warn", "ignore")
_TARGETING = ("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform")


@refuse_names_of_lora
@with_help
@dataclass
class LoTRAConfig(PeftConfig):
    """
    This is the configuration class to store the configuration of a [`LoTRAModel`].

    The update of a coefficient tensor (out, in, basis) is `alpha * core x1 factor_out x2 factor_in x3 factor_basis`.
    A convolutional layer has a fourth mode, the positions of its kernel, and a `factor_kernel`. Unlike LoRA's, the
    update is scaled by `alpha` alone: the initialization normalizes it for any rank.

    Args:
        r (`int` or `tuple[int, ...]`):
            The ranks (out, in, basis) of the update, or (out, in, basis, kernel), of which the last counts for
            convolutional layers alone. An int counts for all modes; of three ranks, the kernel has its full rank. A
            rank above the size of its mode is capped.
        alpha (`float`):
            The factor that the update is multiplied by.
        target_modules (`Optional[Union[list[str], str]]`):
            The names of the KAN layers to adapt, exactly or as suffixes; a string is a regex. `"all-kan"`, which
            `None` (the default) stands for, takes every KAN layer that is recognized (see `find_kan_layers`).
        exclude_modules (`Optional[Union[list[str], str]]`):
            The names of the modules to leave alone, exactly or as suffixes; a string is a regex.
        layers_to_transform (`Optional[Union[list[int], int]]`):
            The indices of the layers to adapt. Among the layers that `"all-kan"` finds, those with one of these
            indices in their name are adapted.
        layers_pattern (`Optional[Union[list[str], str]]`):
            The name of the `nn.ModuleList` that `layers_to_transform` counts in, if it has an unusual name.
        rank_pattern (`dict`):
            The mapping from layer names or regexes to ranks that differ from `r`.
        alpha_pattern (`dict`):
            The mapping from layer names or regexes to factors that differ from `alpha`.
        modules_to_save (`Optional[list[str]]`):
            The modules apart from the adapted layers that are trained and saved whole, for instance a new head.
        rank_dropout (`float`):
            The probability with which each rank component of the out mode is dropped in a training step. The others
            are scaled up, so that the expected update is unchanged.
        module_dropout (`float`):
            The probability with which the adapter of a whole layer is skipped in a training step.
        init_weights (`bool`, `"gradient"` or `"hosvd"`):
            How the adapter starts. `True` draws random factors, `"gradient"` takes them from the gradient that
            [`preprocess_lotra`] gathered, and `"hosvd"` from the leading singular vectors of the base layer's own
            coefficients; each time the update is zero, so that the adapted model equals its base. `False` draws an
            update at random, which is for tests only.
        train (`Optional[list[str]]`):
            The components that are trained, of `"core"`, `"factor_out"`, `"factor_in"`, `"factor_basis"` and
            `"factor_kernel"`; `None` (the default) trains all. The others are saved with the adapter, but keep the
            values that they start with. `train=["core"], init_weights="hosvd"` trains a core on fixed factors.
        adapt_residual (`bool`):
            Whether the weights of the residual branch are adapted too, as one more slice of the basis mode.
        save_norm_stats (`bool`):
            Whether running statistics (of batch norms, for instance) belong to the adapter: those that it has moved
            are saved and loaded with it, and those of the base are back while it is disabled, and after `unload`.
            With several active adapters, the statistics are those of the first. A merged model keeps the adapter's.
            `False` leaves them to the base, which training then changes.
        check_base (`Optional[str]`):
            What happens when an adapter is loaded into another base than it was saved with:
            `PeftModel.from_pretrained(base, folder, check_base="error")`. By default (`None`) another grid is an
            error, and other coefficients are a warning; `"error"`, `"warn"` and `"ignore"` hold for both. Another
            family or shape is always an error. The choice is not saved.
        base_layers (`Optional[dict[str, dict]]`):
            Internal. The family and the shape of each adapted layer, and, in a file, the hashes of its grid and its
            frozen parameters. Compared with the model when the adapter is loaded.
        base_digest (`Optional[str]`):
            Internal. In a file, one digest of all `base_layers`.
        integrity (`Optional[dict[str, str]]`):
            Internal. In a file, the digests of the config and of the tensors. Remove the entry from a file that was
            changed on purpose.

    Raises:
        TypeError: An argument is unknown. For arguments of LoRA, the message names the one to use.
        ValueError: A value cannot be used, or the config comes from a file that was changed after it was saved.

    Example:
        >>> from peft_lotra import LoTRAConfig
        >>> LoTRAConfig(r=(4, 4, 3), rank_pattern={"layers.0": 2}).ranks_and_alpha("layers.0")
        (2, 1.0)
    """

    r: int | tuple[int, ...] = option(4)
    alpha: float = option(1.0, NUMBER)
    target_modules: list[str] | set[str] | str | None = option(None, NAMES)
    exclude_modules: list[str] | set[str] | str | None = option(None, NAMES)
    layers_to_transform: list[int] | int | None = option(None, INDICES)
    layers_pattern: list[str] | str | None = option(None, NAMES)
    rank_pattern: dict = option(dict, PATTERN)
    alpha_pattern: dict = option(dict, NUMBERS)
    modules_to_save: list[str] | None = option(None, NAMES)
    rank_dropout: float = option(0.0, PROBABILITY)
    module_dropout: float = option(0.0, PROBABILITY)
    init_weights: bool | Literal["gradient", "hosvd"] = option(True, START)
    train: list[str] | tuple[str, ...] | str | None = option(None, TRAIN)
    adapt_residual: bool = option(True, BOOL)
    save_norm_stats: bool = option(True, BOOL)
    base_layers: dict[str, dict[str, Any]] | None = option(None, RECORD)
    check_base: Literal["error", "warn", "ignore"] | None = option(
        None, (lambda value: value in CHECK_BASE, f"None or one of {CHECK_BASE}")
    )
    base_digest: str | None = option(None, (lambda value: isinstance(value, str), HASHES[1]))
    integrity: dict[str, str] | None = option(None, HASHES)

    def __post_init__(self):
        super().__post_init__()
        from_file = type(self.peft_type) is str  # a copy of a config has the enum
        self.peft_type = PeftType["LOTRA"]
        check_values(self)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self.r = check_ranks(self.r)
        self.rank_pattern = {key: check_ranks(r) for key, r in (self.rank_pattern or {}).items()}
        self.alpha_pattern = self.alpha_pattern or {}
        if self.train is not None:
            named = [self.train] if isinstance(self.train, str) else self.train
            names = [name for name in KernelTucker._fields if name in named]
            self.train = None if len(names) == len(KernelTucker._fields) else names
        if isinstance(self.target_modules, str) and self.target_modules != ALL_KAN:
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")
        # The next four are no fields, so neither saved nor compared.
        # Adding an adapter writes the names of its layers into `target_modules`; the object may serve another model.
        self.targets_all_kan = self.target_modules in (None, ALL_KAN)
        self.checkpoint = Checkpoint(self.base_layers, (self.integrity or {}).get("weights"))
        self._record_base: WeakMethod | None = None
        self._unresolved: dict[str, str] = {}
        self._check_integrity()
        self.base_digest = self.integrity = None
        if isinstance(self.modules_to_save, str):
            self.modules_to_save = [self.modules_to_save]
        if from_file:
            self._set_regexes_aside()
        else:
            compile_patterns(self)
        mapping = self.auto_mapping
        if isinstance(mapping, dict) and mapping.get("parent_library") == "peft_lotra.kan.slim":  # where SlimKAN was
            self.auto_mapping = {**mapping, "parent_library": "peft_lotra.kan"}
        if self.base_layers is not None:  # the hashes are left to the file
            self.base_layers = {
                name: {key: layer[key] for key in ("family", "shape", "has_residual", "description") if key in layer}
                for name, layer in self.base_layers.items()
            }

    def __getstate__(self) -> dict[str, Any]:
        # a weak reference is not pickled, and a copy belongs to no model yet
        return {**vars(self), "_record_base": None}

    def ranks_and_alpha(self, layer_name: str) -> tuple[Ranks, float]:
        """The ranks of a layer, before they are capped by the sizes of its modes, and its `alpha`."""
        r_key, alpha_key = (find_key(patterns, layer_name) for patterns in (self.rank_pattern, self.alpha_pattern))
        # torch multiplies by no int above 64 bits
        return self.rank_pattern.get(r_key, self.r), float(self.alpha_pattern.get(alpha_key, self.alpha))

    def frozen_and_zero(self, components: Collection[str]) -> tuple[tuple[str, ...], str]:
        """Which of the components of a layer are not trained, and which one starts at zero: one that is trained."""
        frozen = tuple(name for name in components if self.train is not None and name not in self.train)
        first = ("core", "factor_out") if self.init_weights == "hosvd" else ("factor_out", "core")
        return frozen, next((name for name in (*first, *components) if name not in frozen), "factor_out")

    def _set_regexes_aside(self) -> None:
        """Takes the regexes out of a config from a file, so that none is ever matched; see `resolve`."""
        names = {*(self.target_modules or ()), *(self.exclude_modules or ())}  # letters of a string do no harm
        check_lengths(itertools.chain(*patterns_of(self).values()), names)
        self._unresolved = regexes_of(self)
        for field in self._unresolved.keys() & {"alpha_pattern", "modules_to_save"}:
            refuse_pattern(field, self._unresolved[field])
        if self._unresolved.keys() & set(_TARGETING):
            self.target_modules, self.targets_all_kan = set(), False
            self.exclude_modules = self.layers_pattern = self.layers_to_transform = None
        if "rank_pattern" in self._unresolved:
            self.rank_pattern = {}

    def refuse_unresolved(self) -> None:
        """Raises a ValueError if the config comes from a file with regexes, and the tensors were not read with it."""
        for field, pattern in self._unresolved.items():
            refuse_pattern(field, pattern)

    def resolve(self, shapes: Mapping[str, Shape]) -> None:
        """Replaces regexes, which files of older versions have, by what the names and shapes of the tensors say."""
        cores = {n.removesuffix(".lotra_core"): shape for n, shape in shapes.items() if n.endswith(".lotra_core")}
        layers = self.base_layers or cores
        check_lengths((), {*layers, *cores})
        if not cores:
            self.refuse_unresolved()
        unresolved, self._unresolved = self._unresolved.keys(), {}
        if unresolved & set(_TARGETING):
            self.target_modules = exact_pattern(layers)
            check_lengths([self.target_modules], ())
        if "rank_pattern" in unresolved:
            self.rank_pattern = {
                pattern_key(n): shape for n, shape in cores.items() if len(shape) in (3, 4) and min(shape) > 0
            }

    def _resolved(self, names: Collection[str]) -> dict[str, Any]:
        """What a file has in the place of the user's regexes, once the adapted layers are known."""
        regexes = set(regexes_of(self) if names else ())
        values: dict[str, Any] = {}
        if regexes & set(_TARGETING):
            values = {**dict.fromkeys(_TARGETING), "target_modules": exact_pattern(names)}
        elif (
            self.targets_all_kan and names and isinstance(self.target_modules, str)
        ):  # which already says which layers
            values.update(dict.fromkeys(_TARGETING[1:]))
        elif self.targets_all_kan and names and isinstance(self.target_modules, set):
            values = {"target_modules": set(names)}  # PEFT has shortened many names to fewer, common endings
        for index, (field, default) in enumerate((("rank_pattern", self.r), ("alpha_pattern", self.alpha))):
            if field in regexes:
                by_name = {name: self.ranks_and_alpha(name)[index] for name in names}
                values[field] = {pattern_key(name): value for name, value in by_name.items() if value != default}
        return values

    def check_loadable(self) -> dict[str, Any]:
        """The values of the config in a file, apart from the records; a ValueError if a file may not have them."""
        self.refuse_unresolved()
        values = {**self.to_dict(), **self._resolved(self.base_layers or ())}
        written = SimpleNamespace(**values)
        regexes = regexes_of(written)
        if self.base_layers and "modules_to_save" in regexes:  # which has no other form, and a model to be loaded into
            refuse_pattern("modules_to_save", regexes["modules_to_save"])
        names = {*(values["target_modules"] or ()), *(values["exclude_modules"] or ()), *(self.base_layers or ())}
        check_lengths(itertools.chain(*patterns_of(written).values()), names)
        return values

    def __repr__(self) -> str:
        """What was chosen: `r`, and what differs from the defaults. `to_dict()` has everything."""
        hidden = {"base_layers", "base_digest", "integrity", "auto_mapping", "peft_version", "peft_type"}
        shown = []
        for field in fields(self):
            default = field.default if field.default_factory is MISSING else field.default_factory()
            value = getattr(self, field.name)
            if field.name == "r" or (field.name not in hidden and value != default):
                shown.append(f"{field.name}={sorted(value) if isinstance(value, set) else value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def record_base_by(self, method: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Sets the bound method, referenced weakly, that adds the hashes of the base to `base_layers` for a file.

        PEFT saves the config without passing it the model, so the config needs a way to the model.
        """
        self._record_base = WeakMethod(method)

    @contextmanager
    def handed_over(self, peft_config: Mapping[str, Any], adapter: str) -> Iterator[None]:
        """Leaves a copy to the adapters that have this config already: what a new one finds is written into it.

        PEFT wants a model to have the very config that it is given.

        Args:
            peft_config: The configs of the new adapter's tuner.
            adapter: Its name there.
        """
        method = self._record_base and self._record_base()
        former = getattr(getattr(method, "__self__", None), "peft_config", {})
        names = [name for name, it in former.items() if it is self and not (former is peft_config and name == adapter)]
        former.update(dict.fromkeys(names, copy(self)))
        try:
            yield
        except BaseException:
            former.update(dict.fromkeys(names, self))
            raise

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Saves the config, with a record of the base and the digest of the tensors that lie in the folder.

        The file is replaced in one step; `save_adapter` replaces config and tensors in one.

        Args:
            save_directory (`str`): The folder, which is made if there is none.

        Raises:
            AssertionError: It is a file.
            ValueError: The tensors in the folder are damaged, or not finite.
        """
        if os.path.isfile(save_directory):
            raise AssertionError(f"Provided path ({save_directory}) should be a directory, not a file")
        os.makedirs(save_directory, exist_ok=True)
        weights = os.path.join(save_directory, SAFETENSORS_WEIGHTS_NAME)
        digest = None
        if os.path.exists(weights):
            keep_own_tensors(weights)
            digest = read_weights(weights)[1]
        values = self.check_loadable()
        record = self._record_base() if self._record_base is not None else None
        if record is None:  # no model, or one that is gone
            values["base_layers"] = self.checkpoint.layers or self.base_layers
        elif self.base_layers is not None:
            values["base_layers"] = record(self.base_layers)
        if values["base_layers"] is not None:
            values["base_digest"] = digest_of(values["base_layers"])
        values["integrity"] = {"config": self._digest(values, digest)}
        if digest is not None:
            values["integrity"]["weights"] = digest
        del values["check_base"]
        # older versions do not know these fields, and read the file
        if self.save_norm_stats:
            del values["save_norm_stats"]
        if self.train is None:
            del values["train"]
        if kwargs.get("auto_mapping_dict") is not None:
            values["auto_mapping"] = kwargs["auto_mapping_dict"]
        values = {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
        write_atomically(os.path.join(save_directory, CONFIG_NAME), json.dumps(values, indent=2, sort_keys=True))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs):
        """Reads the config of an adapter, and checks the file of its tensors, before any model is touched.

        Args:
            pretrained_model_name_or_path (`str`): A folder, or a repository on the Hub.
            subfolder (`str`, *optional*): The folder in it.
            kwargs: Those of `huggingface_hub.hf_hub_download`, and `check_base`.

        Raises:
            ValueError: There is no config; the config or the tensors are damaged, do not belong together, or are not
                finite; there is a pickle instead of a safetensors file; a pattern in the config is no name.
        """
        hub_kwargs, own_kwargs, _ = cls._split_kwargs(kwargs)
        folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        check_size(os.path.join(folder, CONFIG_NAME))
        with clear_errors(folder):
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        assert isinstance(config, LoTRAConfig)
        weights = find_weights(pretrained_model_name_or_path, subfolder, hub_kwargs)
        if weights is not None:
            shapes, digest = read_weights(weights)
            pending = os.path.join(folder, PENDING_CONFIG)
            if not config.checkpoint.has_digest(digest) and os.path.isfile(pending):
                # `save_adapter` was interrupted between its last two steps: this is the config of these tensors
                check_size(pending)
                with clear_errors(folder):
                    config = cls.from_peft_type(**cls.from_json_file(pending))
                assert isinstance(config, LoTRAConfig)
            config.checkpoint = config.checkpoint.with_tensors(shapes, digest, folder)
        config.resolve(config.checkpoint.tensors or {})
        if weights is not None:
            config.checkpoint.check_shapes(config._component_shapes())
        # which is no choice of the file's
        config.check_base = own_kwargs.get("check_base", CHECK_BASE_OF_LOAD.get())
        if config.check_base not in (None, *CHECK_BASE):
            raise ValueError(f"`check_base` must be None or one of {CHECK_BASE}, got {config.check_base!r}.")
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs) -> dict[str, Any]:
        """The values of a config in a file, which has the type LOTRA, or none: PEFT then says that it is missing."""
        try:
            values = super().from_json_file(path_json_file, **kwargs)
        except ValueError as error:  # of the parser, which does not name the file
            raise ValueError(f"{path_json_file} is broken, it must be JSON in UTF-8: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path_json_file} is broken: expected a JSON object, got {values!r:.200}.")
        kind = values.get("peft_type", "LOTRA")
        if kind != "LOTRA":
            raise ValueError(f"The adapter in {path_json_file} is of the type {kind!s:.200}, and not LOTRA.")
        return values

    def _component_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes that the components of the recorded layers have by this config, by name."""
        shapes = {}
        for name, layer in (self.checkpoint.layers or {}).items():
            out, in_, basis, *kernel = layer["shape"]
            sizes = (out, in_, basis + (layer["has_residual"] and self.adapt_residual), *kernel)
            ranks = cap_ranks(self.ranks_and_alpha(name)[0], sizes)
            parts = (ranks, *zip(sizes, ranks, strict=True))
            shapes |= {f"{name}.lotra_{part}": shape for part, shape in zip(KernelTucker._fields, parts, strict=False)}
        return shapes

    def _check_integrity(self) -> None:
        if self.integrity is not None and self.integrity.get("config") != self._digest(
            asdict(self), self.checkpoint.digest
        ):
            raise ValueError(
                "The config of the adapter was changed after it was saved, or it was saved by a later version of this "
                "package: its digest does not fit. If you changed it on purpose remove its entry `integrity`; "
                "otherwise get the file anew."
            )
        if self.base_digest is not None and self.base_layers and self.base_digest != digest_of(self.base_layers):
            raise ValueError(
                "`base_digest` does not fit `base_layers`: the config of the adapter was changed after it was saved. "
                "Get the file anew."
            )

    def _digest(self, values: dict[str, Any], weights: str | None) -> str:
        defaults = {
            entry.name: entry.default if entry.default_factory is MISSING else entry.default_factory()
            for entry in fields(self)
        }
        return config_digest(values, defaults, weights)
