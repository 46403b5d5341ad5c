# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The command line: peft-lotra find | inspect | merge | extract | slim | card | push."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
import os
import re
import secrets
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast


try:
    import typer
except ImportError as error:
    raise SystemExit(f"peft-lotra needs typer and rich ({error}): pip install typer rich") from error

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, load_model, save_model
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import logging

from ._version import __version__
from .approximation.compression import SlimReport
from .approximation.compression import slim as compress
from .approximation.extraction import extract_lotra
from .families.registry import find_kan_layers
from .hub.base_code import hub_id
from .hub.card import README, write_model_card
from .hub.contents import AdapterContents, adapter_folders, read_adapter, table_of_tensors
from .hub.push import push_to_hub
from .kan import modeling_kan  # noqa: F401  (registers KANModel with AutoModel)
from .parametric.report import FamilyContents
from .parametric.storage import FILE
from .report import printable


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
_FILES = (README, CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, FILE)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of ADAPTER on the Hub.")]
Subfolder = Annotated[str | None, typer.Option(help="Subfolder of ADAPTER: the name of one that is not `default`.")]
Factory = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:CALLABLE",
        help="Builds the network of a model that is not a transformers model; the model is then a .safetensors file "
        "of the state dict. The module is also searched in the current folder.",
    ),
]
Adapter = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="A folder that `save_pretrained` wrote, or USER/REPO on the Hub.")
]
Out = Annotated[str, typer.Argument(metavar="OUT", help="The folder to write. It must not exist, or be empty.")]
_MODEL = (
    "A transformers model such as KANModel, as a folder or USER/REPO on the Hub; with --factory a .safetensors file."
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    # no progress bars and no log messages of the libraries
    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _say(text: str) -> None:
    """Prints a message on stderr, as one line."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    line = re.sub(r"(?<![.:;,!?])\n", "; ", "\n".join(lines)).replace("\n", " ")
    print(printable(line), file=sys.stderr)


def _command(function: Callable) -> Callable:
    """Registers a command. Its errors and warnings are one line on stderr; PEFT_LOTRA_DEBUG=1 shows the traceback."""

    @app.command(name=function.__name__)
    @functools.wraps(function)
    def wrapper(**kwargs):
        given = {name: value if isinstance(value, list) else [value] for name, value in kwargs.items()}
        empty = [name for name, values in given.items() if any(isinstance(v, str) and not v.strip() for v in values)]
        if empty:  # as from a variable of the shell that is not set
            raise typer.BadParameter(f"{empty[0].upper()} is empty.")
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                return function(**kwargs)
            except typer.BadParameter:
                raise
            except Exception as error:
                if os.environ.get("PEFT_LOTRA_DEBUG"):
                    raise
                meant_for_users = isinstance(error, (ValueError, OSError, ImportError)) and str(error)
                _say(f"error: {error}" if meant_for_users else f"error: {type(error).__name__}: {error}")
                raise typer.Exit(1) from error

    return wrapper


def _show_warning(message, category, *args, **kwargs) -> None:
    if issubclass(category, UserWarning):
        _say(f"warning: {message}")


@_command
def find(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="MODULE:CALLABLE that builds a network, also searched in the current folder; or a transformers "
            "model, as a folder or USER/REPO on the Hub.",
        ),
    ],
    as_json: Json = False,
) -> None:
    """Show the KAN layers of a model, and what else may be one, with a registration to paste."""
    network = _call_factory(model) if ":" in model and not Path(model).exists() else _load_model(model, None)
    found = find_kan_layers(network, candidates=True)
    _report(found.as_dict(), str(found), as_json)


@_command
def inspect(adapter: Adapter, revision: Revision = None, subfolder: Subfolder = None, as_json: Json = False) -> None:
    """Show the layers, ranks, sizes and norms of an adapter, or the members of a family (ParametricAdapter)."""
    if (path := _folder(adapter, revision) / FILE).is_file():
        family = FamilyContents(path)
        return _report(family.as_dict(), f"Family of LoTRA adapters {printable(adapter)}\n\n{family}", as_json)
    contents = AdapterContents.of(adapter, *read_adapter(_one_adapter(adapter, revision, subfolder)))
    info = contents.as_dict()
    for row in info["layers"]:  # JSON has neither NaN nor infinity
        row.update({k: None for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)})
    base = contents.base_model or f"a {contents.base_class or 'model'} that is not on the Hub"
    _report(info, f"LoTRA adapter {printable(adapter)}, for {printable(base)}\n\n{contents}", as_json)


@_command
def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help=_MODEL)],
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
    with _new_folder(out) as new:
        folder = _one_adapter(adapter, revision, subfolder)
        config, tensors = read_adapter(folder)
        model = PeftModel.from_pretrained(_load_model(base, factory), str(folder))
        merged = cast(Callable[..., nn.Module], model.merge_and_unload)(safe_merge=True)
        if hasattr(merged, "save_pretrained"):
            cast(PreTrainedModel, merged).save_pretrained(new)
        else:
            save_model(merged, str(new / "model.safetensors"), metadata={"format": "pt"})
    rows = table_of_tensors(config, tensors)
    layers, replaced = ([row.name for row in rows if bool(row.ranks) is adapted] for adapted in (True, False))
    also = f" and replaced {printable(', '.join(replaced))}" if replaced else ""
    _report(
        {"out": out, "class": type(merged).__name__, "merged": layers, "replaced": replaced},
        f"merged {len(layers)} layers of {adapter} into a {type(merged).__name__}{also}: {out}",
        as_json,
    )


@_command
def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help=_MODEL)],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="BASE after full fine-tuning, in the same form.")],
    out: Out,
    energy: Annotated[float | None, typer.Option(help="Share of each update's energy to keep, 0 to 1.")] = None,
    rank: Annotated[str | None, typer.Option(help="Ranks: a number, or three (out,in,basis), as 8,8,4.")] = None,
    budget: Annotated[int | None, typer.Option(help="Number of parameters of the adapter.")] = None,
    factory: Factory = None,
    as_json: Json = False,
) -> None:
    """Make an adapter from a base model before and after full fine-tuning.

    Give one of --energy, --rank and --budget.
    """
    if [energy, rank, budget].count(None) != 2:
        raise typer.BadParameter("Give one of --energy, --rank and --budget.")
    with _new_folder(out) as new:
        models = (_load_model(source, factory) for source in (base, tuned))
        model = extract_lotra(*models, r=_ranks(rank), energy=energy, budget=budget)
        model.save_pretrained(str(new))
        write_model_card(model, new)
    report = model.extraction_report
    _report({"out": out, **asdict(report)}, f"{report}\nadapter: {out}", as_json)


@_command
def slim(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL)],
    out: Out,
    energy: Annotated[float | None, typer.Option(help="Share of the energy to keep, 0 to 1.")] = None,
    rank: Annotated[str | None, typer.Option(help="Ranks: a number, or three (out,in,basis), as 8,8,4.")] = None,
    budget: Annotated[int | None, typer.Option(help="Number of parameters of all coefficients.")] = None,
    inputs: Annotated[
        str | None,
        typer.Option(help="A .safetensors file with one tensor, a thousand samples of the input. Pass it if you can."),
    ] = None,
    factory: Factory = None,
    as_json: Json = False,
) -> None:
    """Compress a trained KAN: the coefficients of each layer become a core and three factors.

    Give one of --energy, --rank and --budget. With --factory, the state dict is that of
    `slim(build(), ranks=...)` with the ranks that are printed.
    """
    if [energy, rank, budget].count(None) != 2:
        raise typer.BadParameter("Give one of --energy, --rank and --budget.")
    with _new_folder(out) as new:
        samples = None if inputs is None else _read_inputs(Path(inputs))
        dense = _load_model(model, factory)
        small = compress(dense, ranks=_ranks(rank), energy=energy, budget=budget, inputs=samples)
        if hasattr(small, "save_pretrained"):
            cast(PreTrainedModel, small).save_pretrained(new)
        else:
            save_model(small, str(new / "model.safetensors"), metadata={"format": "pt"})
    report = cast(SlimReport, small.slim_report)
    _report({"out": out, **report.as_dict()}, f"{report}\nSlim model: {out}", as_json)


def _read_inputs(path: Path) -> torch.Tensor:
    if path.suffix != ".safetensors" or not path.is_file():
        raise ValueError(f"--inputs {path} is no .safetensors file.")
    tensors = load_file(path)
    if len(tensors) != 1:
        raise ValueError(f"--inputs {path} holds {len(tensors)} tensors, expected one: samples of the input.")
    return next(iter(tensors.values()))


@_command
def card(
    folder: Annotated[str, typer.Argument(metavar="ADAPTER", help="A folder that `save_pretrained` wrote.")],
    metric: Annotated[list[str] | None, typer.Option(help="A result, as accuracy=0.85; may be repeated.")] = None,
    base_model: Annotated[str | None, typer.Option(help="The base model on the Hub, USER/REPO.")] = None,
    license: Annotated[str | None, typer.Option(help="The license of the adapter, such as apache-2.0.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="An additional tag; may be repeated.")] = None,
    as_json: Json = False,
) -> None:
    """Write the model card of a saved adapter, README.md; text by a person stays."""
    metrics = {}
    for text in metric or ():
        name, _, value = text.partition("=")
        try:
            metrics[name] = float(value if name.strip() else "")
        except ValueError:
            raise typer.BadParameter(f"--metric is {text!r}, expected NAME=NUMBER, such as accuracy=0.85.") from None
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is no folder here: the card of a repository is written by `peft-lotra push`.")
    write_model_card(None, folder, base_model=base_model, license=license, tags=tag or (), metrics=metrics or None)
    path = Path(folder) / README
    _report({"card": str(path)}, f"card: {path}", as_json)


@_command
def push(
    adapter: Adapter,
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="The repository to push to, USER/REPO; created if it does not exist.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch of REPO to commit to; created if missing.")] = None,
    message: Annotated[str | None, typer.Option(help="The message of the commit.")] = None,
    pull_request: Annotated[bool, typer.Option("--pr", help="Open a pull request instead.")] = False,
    base_model: Annotated[str | None, typer.Option(help="The base model on the Hub, USER/REPO.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="An additional tag; may be repeated.")] = None,
    as_json: Json = False,
) -> None:
    """Push a saved adapter to the Hub, in one commit, with a model card that says how to load it."""
    info = push_to_hub(
        _adapter_folder(adapter),
        repo,
        private=private or None,
        revision=revision,
        commit_message=message,
        create_pr=pull_request,
        base_model=base_model,
        tags=tag or (),
    )
    found = {"repo": repo, "commit": info.oid, "url": info.pr_url or info.commit_url}
    _report(found, f"pushed {adapter}: {found['url']}", as_json)


def _folder(source: str, revision: str | None = None) -> Path:
    """The folder of adapters, or of a family of them; a repository is downloaded."""
    folder = Path(source)
    if not folder.exists():
        if hub_id(source) is None:
            raise ValueError(f"{source} is no folder, and cannot be a repository on the Hub (USER/REPO) either.")
        files = [start + name for start in ("", "*/") for name in _FILES]
        try:
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=files))
        except RepositoryNotFoundError as error:
            raise ValueError(
                f"{source} is neither a folder here nor a repository on the Hub that you may read (`hf auth login`)."
            ) from error
        except LocalEntryNotFoundError as error:
            raise ValueError(f"{source} is no folder here, and the Hub cannot be asked: {error}") from error
    elif revision is not None:
        raise ValueError(f"--revision is for adapters on the Hub, and {source} is a folder here.")
    return folder


def _adapter_folder(source: str, revision: str | None = None) -> Path:
    """The folder of adapters, at least one."""
    folder = _folder(source, revision)
    if not adapter_folders(folder):
        why = "is a family of them (ParametricAdapter)" if (folder / FILE).is_file() else f"has no {CONFIG_NAME}"
        raise ValueError(f"{source} is no adapter: it {why}.")
    return folder


def _one_adapter(source: str, revision: str | None, subfolder: str | None) -> Path:
    """The folder of one adapter of a source."""
    found = adapter_folders(_adapter_folder(source, revision))
    name = subfolder or ("default" if "default" in found or len(found) > 1 else next(iter(found)))
    if name not in found:
        raise ValueError(f"{source} has no adapter `{name}`, only {list(found)}: choose one by --subfolder.")
    return found[name]


def _load_model(source: str, factory: str | None) -> nn.Module:
    """Loads a model by its name on the command line, from safetensors only."""
    path = Path(source)
    if factory is not None:
        model = _call_factory(factory)
        if path.suffix != ".safetensors" or not path.is_file():
            raise ValueError(f"With --factory, {path} must be a .safetensors file with the state dict of the network.")
        try:
            load_model(model, source)
        except RuntimeError as error:
            raise ValueError(f"{source} is no state dict of what {factory} builds: {error}") from error
        return model
    if path.is_file():
        raise ValueError(f"{source} is a file: say by --factory MODULE:CALLABLE what network it belongs to.")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{source} is no model: it has no config.json.")
    if not path.exists() and hub_id(source) is None:
        raise ValueError(f"{source} is no folder, and cannot be a repository on the Hub (USER/REPO) either.")
    # with the configuration, since AutoModel would load an adapter as a model
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    return AutoModel.from_pretrained(
        source, config=config, dtype="auto", use_safetensors=True, trust_remote_code=False
    )


def _call_factory(factory: str) -> nn.Module:
    """What MODULE:CALLABLE returns; the module is also searched in the current folder."""
    module, _, name = factory.partition(":")
    if not module or not name:
        raise ValueError(f"{factory!r} is no factory, expected MODULE:CALLABLE, such as my_nets:build.")
    sys.path.insert(0, os.getcwd())
    try:
        build = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"The factory {factory} was not found: {error}") from error
    finally:
        sys.path.pop(0)
    try:
        model = build()
    except Exception as error:  # of the user's code
        raise ValueError(f"The factory {factory} raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"The factory {factory} returns a {type(model).__name__}, expected a torch.nn.Module.")
    return model


@contextlib.contextmanager
def _new_folder(name: str) -> Iterator[Path]:
    """A temporary folder beside the one of this name. It is renamed at the end, and removed on an error."""
    out = Path(name).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already: choose another name, or remove it.")
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent} is no folder: make it first.")
    new = out.with_name(f".{out.name}-{secrets.token_hex(8)}")
    new.mkdir()
    try:
        yield new
        if out.exists():
            out.rmdir()
        new.rename(out)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _ranks(text: str | None) -> int | tuple[int, ...] | None:
    if text is None:
        return None
    try:
        ranks = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--rank is {text!r}, expected a number, or three such as 8,8,4.") from None
    return ranks[0] if len(ranks) == 1 else ranks  # extract_lotra checks the length


def _report(info: dict[str, Any], text: str, as_json: bool) -> None:
    print(json.dumps(info, indent=2, allow_nan=False) if as_json else "\n".join(map(printable, text.split("\n"))))


if __name__ == "__main__":
    main()
