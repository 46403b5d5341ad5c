# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The pages of docs/tutorials and docs/recipes, from the percent scripts beside them.

python docs/render.py [SCRIPT ...]      # runs them (default: all), writes pages and pictures; minutes
python docs/render.py --check           # runs nothing: do the pages have the words and the code of the scripts?

A page has the cells of its script, each followed by what it prints, shows as its last value, and draws. Scripts run in
a process and a folder of their own, beside a stand-in for the Hub, without bars of progress.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path


DOCS = Path(__file__).resolve().parent
PICTURES = "assets/pages"
OUTPUT = re.compile(
    rf"^(?:(`{{3,}})output\n.*?\n\1|!\[[^\n]*\]\(\.\./{PICTURES}/[^\n]*)\n\n?",
    re.DOTALL | re.MULTILINE,
)


def scripts() -> list[Path]:
    """The scripts with cells; others are imported by them."""
    return sorted(
        path
        for folder in ("tutorials", "recipes")
        for path in (DOCS / folder).glob("*.py")
        if "\n# %%\n" in path.read_text(encoding="utf-8")
    )


def cells(script: Path) -> list[tuple[bool, str, int]]:
    """Is it code, its text, and the line before it, for each cell of a percent script."""
    text = script.read_text(encoding="utf-8")
    marks = [*re.finditer(r"^# %%(.*)\n", text, re.MULTILINE)]
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    found = []
    for mark, end in zip(marks, ends, strict=True):
        body, code = text[mark.end() : end], "[markdown]" not in mark[1]
        body = body if code else re.sub(r"^# ?", "", body, flags=re.MULTILINE)
        found.append((code, body.strip("\n"), text[: mark.end()].count("\n")))
    return found


def shown(
    body: str, line: int, script: Path, namespace: dict
) -> tuple[str, list[bytes]]:
    """What a cell prints, its last value included, and the PNGs that it draws."""
    tree = ast.increment_lineno(ast.parse(body), line)
    last = (
        tree.body.pop().value
        if tree.body and isinstance(tree.body[-1], ast.Expr)
        else ast.Constant(None)
    )
    printed, drawn = io.StringIO(), []
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, script, "exec"), namespace)
        value = eval(
            compile(
                ast.fix_missing_locations(ast.Expression(last)), script, "eval"
            ),
            namespace,
        )
        if hasattr(value, "_repr_png_"):
            drawn.append(value._repr_png_())
        elif value is not None and "matplotlib" not in str(type(value)):
            print(value)
    if "matplotlib.pyplot" in sys.modules:
        from matplotlib import pyplot

        for number in pyplot.get_fignums():
            stream = io.BytesIO()
            pyplot.figure(number).savefig(stream, dpi=150)
            drawn.append(stream.getvalue())
        pyplot.close("all")
    return re.sub(
        r"127\.0\.0\.1:\d+", "127.0.0.1:PORT", printed.getvalue()
    ).strip("\n"), drawn


def page(script: Path, run: bool) -> tuple[str, dict[str, bytes]]:
    """The Markdown of a script and its pictures by name; without outputs if it does not run."""
    namespace, pictures, title = {"__name__": "__main__"}, {}, script.stem
    parts = [
        f"<!-- Made from {script.name} by docs/render.py: change that, and run it again. -->"
    ]
    for code, body, line in cells(script):
        if not code:
            title = [title, *re.findall(r"^#+ (.*)", body, re.MULTILINE)][-1]
            parts.append(body)
            continue
        parts.append(f"```python\n{body}\n```")
        if run and body:
            text, drawn = shown(body, line, script, namespace)
            fence = max(
                ["```", *(found + "`" for found in re.findall("`{3,}", text))],
                key=len,
            )
            parts += [f"{fence}output\n{text}\n{fence}"] if text else []
            for picture in drawn:
                name = f"{script.stem}_{len(pictures) + 1}.png"
                pictures[name] = picture
                parts.append(f"![{title}](../{PICTURES}/{name})")
    folder = script.parent.name
    parts.append(
        f"The code of this page is one script: [{script.name}](../../docs/{folder}/{script.name}).\n"
    )
    return "\n\n".join(parts), pictures


def write(script: Path) -> None:
    """Runs a script in this process, in a folder that goes away, and writes its page."""
    os.environ |= {"TQDM_DISABLE": "1", "MPLBACKEND": "Agg"}
    sys.path += [str(DOCS.parent / "tests" / "support"), str(script.parent)]
    from hub_server import start_hub

    start_hub("user")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        text, pictures = page(script, run=True)
    (DOCS / PICTURES).mkdir(exist_ok=True)
    for old in (DOCS / PICTURES).glob(f"{script.stem}_*.png"):
        old.unlink()
    for name, picture in pictures.items():
        (DOCS / PICTURES / name).write_bytes(picture)
    script.with_suffix(".md").write_text(text, encoding="utf-8")


def stale() -> list[Path]:
    """The scripts whose page is missing, or has other words or code, or pictures that are not there."""
    found = []
    for script in scripts():
        made = script.with_suffix(".md")
        text = made.read_text(encoding="utf-8") if made.exists() else ""
        links = re.findall(rf"\]\(\.\./({PICTURES}/[^)]*)", text)
        if OUTPUT.sub("", text) != page(script, run=False)[0] or not all(
            (DOCS / link).exists() for link in links
        ):
            found.append(script)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__.partition("\n")[0]
    )
    parser.add_argument("scripts", nargs="*", type=Path)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    if given.check:
        names = [str(path.relative_to(DOCS.parent)) for path in stale()]
        sys.exit(
            f"The page is not that of its script. Run `python docs/render.py {' '.join(names)}`."
            if names
            else 0
        )
    if len(given.scripts) == 1:
        return write(given.scripts[0].resolve())
    for script in given.scripts or scripts():
        print(script.resolve().relative_to(DOCS.parent), flush=True)
        subprocess.run([sys.executable, __file__, script], check=True)


if __name__ == "__main__":
    main()
