# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The command line: peft-lotra find | inspect | merge | extract | slim."""

from __future__ import annotations

import functools
import json
import os
import pkgutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub import snapshot_download
from huggingface_hub.utils import disable_progress_bars
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, load_model, save_model
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.utils import logging

from ._version import __version__
from .compress.extract import extract_lotra
from .compress.slim import slim as compress
from .hub.contents import AdapterContents, adapter_folders, read_adapter
from .kan import modeling_kan  # noqa: F401  (registers KANModel with AutoModel)
from .layers.registry import find_kan_layers
from .modules.report import printable
from .parametric.storage import FILE, read_family


app = typer.Typer(
    help="Low tensor-rank adapters (LoTRA) of Kolmogorov-Arnold networks (KANs).\n\n"
    "Models and adapters are folders or repositories on the Hugging Face Hub (log in by `hf auth login` for private "
    "ones). Only safetensors are read, nothing is unpickled. Exit codes: 0 done, 1 failed, 2 wrong usage.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
main = app  # the entry point
# of adapters, in subfolders too, and of a family of them
_FILES = [f"*{name}" for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, FILE)]


def _ranks(text: str) -> Any:
    ranks = tuple(mode if mode == "full" else int(mode) for mode in text.split(","))
    return ranks[0] if len(ranks) == 1 else ranks


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of ADAPTER on the Hub.")]
Subfolder = Annotated[str | None, typer.Option(help="Name of the adapter, if it is not `default`: its subfolder.")]
Energy = Annotated[float | None, typer.Option(help="Share of the squared norm to keep in each layer, 0 to 1.")]
Rank = Annotated[Any, typer.Option(help="Ranks: a number or full, or out,in,basis.", parser=_ranks, metavar="RANKS")]
Budget = Annotated[int | None, typer.Option(help="Number of parameters of the result.")]
Inputs = Annotated[str | None, typer.Option(help="A .safetensors file with one tensor: samples of the input.")]
Factory = Annotated[str | None, typer.Option(help="MODULE:CALLABLE that builds the network of a state dict.")]
Adapter = Annotated[str, typer.Argument(help="A folder that `save_pretrained` wrote, or USER/REPO on the Hub.")]
Model = Annotated[str, typer.Argument(help="Folder or USER/REPO of a transformers model; or .safetensors, --factory.")]
Network = Annotated[str, typer.Argument(help="MODULE:CALLABLE that builds a network; or a transformers model.")]
Out = Annotated[str, typer.Argument(help="The folder to write. It must not exist, or be empty.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit()


Version = Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")]


@app.callback()
def _options(version: Version = False) -> None:
    # no progress bars and no log messages of the libraries
    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _say(text: str) -> None:
    """Prints a message as one line on stderr."""
    print(printable(" ".join(text.split())), file=sys.stderr)


def _command(function: Callable) -> Callable:
    """Registers a command. Its errors and warnings are one line on stderr."""

    @app.command(name=function.__name__)
    @functools.wraps(function)
    def wrapper(**kwargs):
        if [kwargs.get(name) for name in ("energy", "rank", "budget")].count(None) != 2 and "energy" in kwargs:
            raise typer.BadParameter("Give one of --energy, --rank and --budget.")
        with warnings.catch_warnings():
            warnings.showwarning = lambda text, kind, *_: issubclass(kind, UserWarning) and _say(f"warning: {text}")
            try:
                out = kwargs.get("out", "")
                if os.path.isfile(out) or (os.path.isdir(out) and os.listdir(out)):
                    raise ValueError(f"{out} exists already: choose another name, or remove it.")
                return function(**kwargs)
            except Exception as error:
                kind = "" if isinstance(error, (ValueError, OSError, ImportError)) else f"{type(error).__name__}: "
                _say(f"error: {kind}{error}")
                raise typer.Exit(1) from error

    return wrapper


@_command
def find(model: Network, as_json: Json = False) -> None:
    """Show the KAN layers of a model, and modules that may be KAN layers, with a registration to paste."""
    network = _call_factory(model) if ":" in model and not Path(model).exists() else _load_model(model, None)
    found = find_kan_layers(network)
    _report(found.as_dict(), str(found), as_json)


@_command
def inspect(adapter: Adapter, revision: Revision = None, subfolder: Subfolder = None, as_json: Json = False) -> None:
    """Show the layers, ranks, sizes and norms of an adapter, or the members of a family (ParametricAdapter)."""
    if (path := _folder(adapter, _FILES, revision) / FILE).is_file():
        family = read_family(path).report
        return _report(family.as_dict(), f"Family of LoTRA adapters {adapter}\n\n{family}", as_json)
    contents = AdapterContents.of(adapter, *read_adapter(_one_adapter(adapter, revision, subfolder)))
    base = contents.base_model or f"a {contents.base_class or 'model'}"
    _report(contents.as_dict(), f"LoTRA adapter {adapter}, for {base}\n\n{contents}", as_json)


@_command
def merge(
    base: Model,
    adapter: Adapter,
    out: Out,
    factory: Factory = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base model.

    Saves the merged model, which has the class of BASE and no trace of the adapter.
    """
    folder = _one_adapter(adapter, revision, subfolder)
    contents = AdapterContents.of(adapter, *read_adapter(folder))
    model: Any = PeftModel.from_pretrained(_load_model(base, factory), str(folder))
    merged = model.merge_and_unload(safe_merge=True)
    _save(merged, out)
    kind = type(merged).__name__
    info = {"out": out, "class": kind, "layers": contents.as_dict()["layers"]}
    _report(info, f"{contents}\nmerged into a {kind}, saved in {out}", as_json)


@_command
def extract(
    base: Model,
    tuned: Model,
    out: Out,
    energy: Energy = None,
    rank: Rank = None,
    budget: Budget = None,
    factory: Factory = None,
    as_json: Json = False,
) -> None:
    """Make an adapter from a model before (BASE) and after (TUNED) full fine-tuning.

    Give one of --energy, --rank and --budget.
    """
    before, after = _load_model(base, factory), _load_model(tuned, factory)
    model = extract_lotra(before, after, r=rank, energy=energy, budget=budget)
    model.save_pretrained(out)
    report = model.extraction_report
    _report({"out": out, **report.as_dict()}, f"{report}\nadapter saved in {out}", as_json)


@_command
def slim(
    model: Model,
    out: Out,
    energy: Energy = None,
    rank: Rank = None,
    budget: Budget = None,
    inputs: Inputs = None,
    factory: Factory = None,
    as_json: Json = False,
) -> None:
    """Compress a trained KAN: the coefficients of each layer become a core and three factors.

    Give one of --energy, --rank and --budget. With --factory, the state dict is that of
    `slim(build(), ranks=...)` with the ranks that are printed.
    """
    (x,) = load_file(inputs).values() if inputs else (None,)
    small: Any = compress(_load_model(model, factory), ranks=rank, energy=energy, budget=budget, inputs=x)
    _save(small, out)
    _report({"out": out, **small.slim_report.as_dict()}, f"{small.slim_report}\nSlim model saved in {out}", as_json)


def _folder(source: str, files: list[str], revision: str | None = None) -> Path:
    """The file or folder; of a repository, one with these files."""
    if Path(source).exists():
        return Path(source)
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=files))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"There is no file or folder {source}, and no repository of that name could be read from the Hub. {error}"
        ) from error


def _one_adapter(source: str, revision: str | None, subfolder: str | None) -> Path:
    """The folder of one adapter of a source."""
    found = adapter_folders(_folder(source, _FILES, revision))
    name = subfolder or (next(iter(found)) if len(found) == 1 else "default")
    if name not in found:
        raise ValueError(f"{source} has no adapter `{name}`, only {list(found)}: choose one by --subfolder.")
    return found[name]


def _load_model(source: str, factory: str | None) -> nn.Module:
    """Loads a model by its name on the command line, from safetensors only."""
    if factory is not None:
        model = _call_factory(factory)
        load_model(model, source)
        return model
    if not (_folder(source, ["config.json"]) / "config.json").is_file():  # AutoConfig would ask the Hub five times
        raise ValueError(
            f"{source} is no transformers model: it has no config.json. Other networks: `find MODULE:CALLABLE`, or a "
            "file of weights and the function that builds its network, `--factory MODULE:CALLABLE`."
        )
    # without the configuration, AutoModel would load an adapter as a model
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    return AutoModel.from_pretrained(
        source, config=config, dtype="auto", use_safetensors=True, trust_remote_code=False
    )


def _call_factory(factory: str) -> nn.Module:
    """The network that MODULE:CALLABLE returns; the module may lie in the current folder."""
    sys.path.insert(0, os.getcwd())
    try:
        return pkgutil.resolve_name(factory)()
    except Exception as error:
        raise ValueError(f"The factory {factory} failed ({type(error).__name__}: {error}).") from error


def _save(model: Any, out: str) -> None:
    if hasattr(model, "save_pretrained"):
        return model.save_pretrained(out)
    os.makedirs(out, exist_ok=True)
    save_model(model, os.path.join(out, "model.safetensors"), metadata={"format": "pt"})


def _report(info: dict[str, Any], text: str, as_json: bool) -> None:
    print(json.dumps(info, indent=2, allow_nan=False) if as_json else "\n".join(map(printable, text.split("\n"))))
