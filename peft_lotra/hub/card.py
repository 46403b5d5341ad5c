# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The model card of an adapter: what it adapts, how to load it, and what it contains for each layer."""

from __future__ import annotations

import math
import numbers
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel, __version__
from peft.utils import CONFIG_NAME
from torch import Tensor

from ..report import printable
from .base_code import check_base_code, hub_id, literal, source_of_base
from .contents import COLUMNS, adapter_folders, read_adapter, size_cells, table_of_tensors


README = "README.md"
_MOST = 20  # the adapters of a folder that a card lists, since each save of one adapter reads all of these
_BEGIN = "<!-- From here on written by peft_lotra.write_model_card, which replaces this part. -->"
_END = "<!-- The part that peft_lotra.write_model_card wrote ends here. -->"
_SECTION = re.compile(re.escape(_BEGIN) + ".*?" + re.escape(_END), re.DOTALL)
# the code between the imports and the adapter in the snippet of a card, and how the code that we make is known
_BASE_CODE = re.compile(r"from peft import PeftModel\n(.*?)\n\nmodel = PeftModel", re.DOTALL)
_OUR_CODE = re.compile(r"^# now load into `base`|^base = \.\.\.|^base = \w+\.from_pretrained\([^()]*\)$", re.MULTILINE)
_BY_TOOLS = re.compile(r"|### Framework versions|- PEFT \S+|.*has been automatically generated\.")

_CARD = """{begin}

An adapter of {base}, a Kolmogorov-Arnold network (KAN), by low tensor-rank adaptation
([LoTRA](https://arxiv.org/abs/2502.06153)), a method for [PEFT](https://github.com/huggingface/peft).

## Use it

```sh
pip install "peft-lotra @ git+https://github.com/peft-lotra/peft-lotra"
```

```python
import peft_lotra  # registers LOTRA with PEFT; without it PEFT says KeyError: 'LOTRA'
from peft import PeftModel
{code}

model = PeftModel.from_pretrained(base, {arguments}
```

{notes}## Layers

{layers}

## Cite

Y. Gao, M. K. Ng, V. Y. F. Tan, "Low Tensor-Rank Adaptation of Kolmogorov-Arnold Networks", IEEE Transactions on Signal
Processing 73 (2025), [arXiv:2502.06153](https://arxiv.org/abs/2502.06153).

### Framework versions

- PEFT {peft}

{end}"""
_NO_BASE = "The base model is not on the Hub under a name that the card knows. Other weights than its own are no base."


def write_model_card(
    model: PeftModel | None,
    folder: str | os.PathLike,
    *,
    repo_id: str | None = None,
    revision: str | None = None,
    base_model: str | None = None,
    base_code: str | None = None,
    tags: Iterable[str] = (),
    metrics: Mapping[str, float] | Iterable[EvalResult] | None = None,
    license: str | None = None,
) -> None:
    """Writes the model card of saved LoTRA adapters, README.md, into their folder.

    The card says how to get the base model, how to load the adapter, and what the adapter contains for each layer. It
    replaces an earlier card by this function, and the unfilled template of PEFT. Other text in README.md stays, and
    the card follows it. `save_pretrained` writes a card without the results and the code of the base.

    Args:
        model: The model, which tells how to build the base; None if it is not in memory.
        folder: The folder of the saved adapters, at most 20 of which are listed.
        repo_id: The repository that the snippet loads the adapter from, by default the folder that it runs in.
        revision: The branch of `repo_id`, if it is not the main one.
        base_model: The base model on the Hub, by default the one that the base was loaded from.
        base_code: Python code that assigns the base to the variable `base`, if `from_pretrained` cannot load it. By
            default that of the existing card, else the code that makes a `peft_lotra.kan.KAN` of the same shape.
        tags: Tags besides "lotra", "kan" and "peft-plugin".
        metrics: Results for the model-index: values by name, or complete results. By default the existing ones stay.
        license: The identifier of the adapter's license, such as "apache-2.0". By default that of the existing card.

    Raises:
        ValueError: The folder contains no LoTRA adapter, the front matter of its README.md is broken, or an argument
            is invalid. The README.md is then unchanged.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from peft import get_peft_model
        >>> from peft_lotra import LoTRAConfig, write_model_card
        >>> from peft_lotra.kan import KAN
        >>> model = get_peft_model(KAN([2, 8, 1]), LoTRAConfig(r=2))
        >>> with TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     write_model_card(model, folder, base_model="user/kan", metrics={"accuracy": 0.853})
        ...     print("accuracy | 0.853" in Path(folder, "README.md").read_text())
        True
    """
    if not (model is None or hasattr(model, "get_base_model")):
        raise ValueError(f"`model` is of type {type(model).__name__}, expected a PeftModel or None.")
    if base_model is not None:
        validate_repo_id(base_model)
    check_base_code(base_code)
    results, card, found = _eval_results(metrics), load_card(Path(folder, README)), adapter_folders(folder)
    if not found:
        raise ValueError(f"{folder} is no adapter: it has no {CONFIG_NAME}. Save the adapter there first.")
    adapters = {name: read_adapter(path) for name, path in islice(found.items(), _MOST)}
    config, _ = next(iter(adapters.values()))
    data, title = card.data, (repo_id or "LoTRA adapter").rpartition("/")[2]
    # PEFT also writes local folders there, which the Hub refuses
    named = [base_model, hub_id(config.get("base_model_name_or_path")), *map(hub_id, _as_list(data.base_model))]
    source = next(filter(None, named), None)
    base = None if model is None else model.get_base_model()
    code = base_code or (None if base_model else written_code(card))
    data.library_name, data.license = "peft", license or data.license
    data.base_model = data.base_model if source in _as_list(data.base_model) else source
    kept = (tag for tag in [*_as_list(data.tags), *_as_list(tags)] if not tag.startswith("base_model:adapter:"))
    data.tags = sorted({*kept, "kan", "lotra", "peft-plugin", *(["base_model:adapter:" + source] if source else [])})
    if results:
        data.model_name, data.eval_results = title, results
        data.metrics = sorted({*_as_list(data.metrics), *(result.metric_type for result in results)})
    arguments = literal(repo_id or ".") + (f", revision={literal(revision)}" if revision else "")
    built = source_of_base(config, base, source, code)
    section = _section(adapters, len(found), source, *built, arguments, data.eval_results or [])
    text = f"\n# {title}" if is_generated(card.text) else card.text.rstrip()
    text = _SECTION.sub(lambda _: section, card.text) if _BEGIN in card.text else f"{text}\n\n{section}"
    card.text = text.rstrip() + "\n"
    card.save(Path(folder, README))


def write_card(folder: str | os.PathLike) -> None:
    """Writes the card of an adapter that PEFT saved, in the place of PEFT's template or of an earlier card.

    PEFT writes its template once, into the folder above those of adapters that are not named "default": so does this.
    README.md is left alone if a person wrote it. A card that cannot be written is a warning.
    """
    place = Path(folder) if Path(folder, README).is_file() else Path(folder).absolute().parent
    try:
        if (place / README).is_file() and (_BEGIN in (text := load_card(place / README).text) or is_generated(text)):
            write_model_card(None, place)
    except Exception as error:  # no reason for a save to fail
        warnings.warn(f"The adapter is saved, its model card is not written: {error}", stacklevel=2)


def load_card(path: Path) -> Any:
    """The `ModelCard` in a file, empty if there is none."""
    try:
        text = path.read_text(encoding="utf-8-sig") if path.is_file() else ""
        return ModelCard(text if text.lstrip().startswith("---") else f"---\n{{}}\n---\n{text}")
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"The front matter of {path} is broken: {error}. Mend it, or delete it.") from error


def written_code(card: ModelCard) -> str | None:
    """The code of the base that a user gave to a card; None for the code that this package makes."""
    found = _BASE_CODE.search(card.text)
    return found[1].strip("\n") if found and not _OUR_CODE.search(found[1]) else None


def is_generated(text: str) -> bool:
    """Whether no person wrote in the text of a card: it is PEFT's template, or our part below a title."""
    rest, template = _SECTION.sub("", text), ModelCard.from_template(ModelCardData()).text
    known = {line.strip() for line in template.splitlines()}
    lines = [line.strip() for line in rest.splitlines() if rest == text or not line.startswith("# ")]
    return all(line in known or _BY_TOOLS.fullmatch(line) for line in lines)


def _as_list(value: str | Iterable[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _eval_results(metrics: Any) -> list[EvalResult]:
    if not isinstance(metrics, Mapping):
        return list(metrics or [])
    if wrong := {k: v for k, v in metrics.items() if not isinstance(v, numbers.Real) or not math.isfinite(v)}:
        raise ValueError(f"`metrics` must map names to finite numbers, got {wrong}.")
    return [EvalResult("other", "unknown", "Unknown", name, float(value)) for name, value in metrics.items()]


def _section(
    adapters: Mapping[str, tuple[dict[str, Any], dict[str, Tensor]]],
    count: int,
    model: str | None,
    cls: str | None,
    code: str,
    arguments: str,
    results: Iterable[EvalResult],
) -> str:
    """The part of a card that is written here."""
    first = next(iter(adapters))
    arguments += f", subfolder={literal(first)}" if first != "default" else ""
    notes, rows = [] if model else [_NO_BASE], []
    for name, adapter in adapters.items():
        prefix = f"{_plain(name)}: " if count > 1 else ""
        table = table_of_tensors(*adapter)
        rows += [[f"{prefix}`{_plain(row.name)}`", *map(_plain, row.cells())] for row in table]
        rows.append([f"**{prefix}total**", *5 * [""], *size_cells(table)])
    if count > 1:
        listed = ", ".join(map(_plain, adapters)) + f" and {count - len(adapters)} more" * (count > len(adapters))
        which = "All but default" if first == "default" else "They"
        notes.append(f"The adapters here: {listed}. {which} are loaded by their name as `subfolder`.")
    lines = []
    for it in results:
        value = f"{it.metric_value:.4g}" if isinstance(it.metric_value, float) else it.metric_value
        lines.append([_plain(cell) for cell in (it.metric_name or it.metric_type, value, it.dataset_name)])
    if lines:
        notes += ["## Results", _markdown(["metric", ">value", "data"], lines)]
    base = f"[{model}](https://huggingface.co/{model})" if model else f"a `{cls}`" if cls else "a model"
    code = code if code.startswith(("from ", "import ")) else f"\n{code}"
    arguments += ")  # run it in this folder" if arguments.startswith('"."') else ")"
    facts = {"base": base, "code": code, "arguments": arguments, "notes": "".join(f"{note}\n\n" for note in notes)}
    return _CARD.format(begin=_BEGIN, end=_END, peft=__version__, layers=_markdown(COLUMNS, rows), **facts)


def _plain(text: object) -> str:
    """Text of a file for a line of the card: without line breaks, and with escapes for what would be markup."""
    return re.sub(r"[`|<&\[]", lambda found: f"\\x{ord(found[0]):x}", printable(str(text)))


def _markdown(columns: list[str], rows: list[list[str]]) -> str:
    rules = ["--:" if column.startswith(">") else "---" for column in columns]
    lines = [[column.removeprefix(">") for column in columns], *rows]
    head, *body = (f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in line)}|" for line in lines)
    return "\n".join([head, f"|{'|'.join(rules)}|", *body])
