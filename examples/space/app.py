# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Burgers' equation at the viscosity of a slider, from a family of adapters.

python examples/space/app.py      # http://127.0.0.1:7860
"""

from __future__ import annotations

import base64
import io
import time
from pathlib import Path

import numpy as np
import torch
from burgers import (
    MEMBERS,
    grid,
    network,
    reference,
    residual,
    solution,
    terms_of,
)
from PIL import Image
from safetensors.torch import load_file

from peft_lotra import ParametricAdapter


try:
    import gradio as gr
except ModuleNotFoundError:
    raise SystemExit(
        "app.py: error: gradio is not installed: "
        "pip install -r requirements.txt"
    ) from None

FOLDER = Path(__file__).parent / "family"
POINTS = grid(65)  # of the pictures
START = 0.04  # between two members

# colors by their red, green and blue at equal distances: dark blue over white
# to dark red, and white over red to black
DIVERGING = np.array(
    [(5, 48, 97), (67, 147, 195), (247, 247, 247), (214, 96, 77), (103, 0, 31)]
)
SEQUENTIAL = np.array(
    [(255, 255, 255), (253, 187, 132), (227, 74, 51), (127, 0, 0), (20, 0, 0)]
)

STYLE = """
<style>
.field {display: grid; grid-template-columns: 3em 1fr; gap: 2px 6px}
.field {font-size: 0.85em}
#numbers :is(td, th) {word-break: normal; padding: 6px 10px}
.field img {width: 100%; aspect-ratio: 1; display: block}
.field img {border: 1px solid #888}
.field .bar {height: 0.8em; border: 1px solid #888}
.field .ends {display: flex; justify-content: space-between}
.field .up {display: flex; flex-direction: column}
.field .up {justify-content: space-between; text-align: right}
</style>
"""


def load() -> ParametricAdapter:
    """The family of the folder, on its base."""
    base = network()
    base.load_state_dict(load_file(FOLDER / "base.safetensors"))
    return ParametricAdapter.from_pretrained(base, FOLDER, terms_of)


family = load()


def picture(
    values: torch.Tensor,
    low: float,
    high: float,
    colors: np.ndarray,
    title: str,
    ends: tuple[str, str, str],
) -> str:
    """HTML of values on a square grid, with axes and a color bar.

    The image is inside of the page, so that nothing is fetched.
    """
    size = round(len(values) ** 0.5)
    levels = ((values.reshape(size, size).numpy() - low) / (high - low)).clip(
        0, 1
    ) * 255
    image = Image.fromarray(levels.astype(np.uint8)).convert("P")
    stops = np.linspace(0, 255, len(colors))
    palette = np.stack(
        [np.interp(np.arange(256), stops, channel) for channel in colors.T],
        axis=1,
    )
    image.putpalette(palette.astype(np.uint8).tobytes())
    stream = io.BytesIO()
    image.save(stream, "png")
    data = base64.b64encode(stream.getvalue()).decode()
    gradient = ", ".join(f"rgb({r},{g},{b})" for r, g, b in colors)
    bar = "".join(f"<span>{end}</span>" for end in ends)
    return (
        f'{STYLE}<div class="field"><b></b><b>{title}</b>'
        '<div class="up"><span>t = 1</span><span>t = 0</span></div>'
        f'<img alt="{title}" src="data:image/png;base64,{data}"><span></span>'
        '<div class="ends"><span>x = -1</span><span>x = 0</span>'
        '<span>x = 1</span></div><span></span><div class="bar" '
        f'style="background: linear-gradient(90deg, {gradient})"></div>'
        f'<span></span><div class="ends">{bar}</div></div>'
    )


def show(nu: float, rows: list[str]) -> tuple[list[str], str, str, str, str]:
    """The rows of the table with one more, the pictures, and the table.

    The first row is predicted; each other has one more step.
    """
    steps, start = len(rows), time.perf_counter()
    prediction = family.refine(nu, steps) if steps else family.predict(nu)
    milliseconds = 1e3 * (time.perf_counter() - start)
    with torch.no_grad():
        u = prediction.apply(solution, POINTS)
        r = prediction.apply(
            residual, POINTS, torch.full_like(POINTS[:, :1], nu)
        )
    exact = reference(POINTS, nu)
    error = u - exact
    how = f"{steps} step{'s' * (steps > 1)}" if steps else "interpolated"
    share = (error.norm() / exact.norm()).item()
    rows = [
        *rows,
        f"| {how} | {share:.3%} | {r.square().mean().sqrt():.1e} "
        f"| {milliseconds:.0f} |",
    ]
    head = (
        f"| viscosity {nu:.4f} | error | residual | ms |\n|---|--:|--:|--:|\n"
    )
    logarithms = error.abs().clamp(min=1e-12).log10()
    return (
        rows,
        picture(
            u, -1, 1, DIVERGING, "u(x, t), adapted network", ("-1", "0", "1")
        ),
        picture(exact, -1, 1, DIVERGING, "u(x, t), exact", ("-1", "0", "1")),
        picture(
            logarithms,
            -5,
            -1,
            SEQUENTIAL,
            "difference",
            ("1e-5", "1e-3", "0.1"),
        ),
        head + "\n".join(rows),
    )


def build() -> gr.Blocks:
    rows, *shown = show(START, [])
    with gr.Blocks(
        title="A family of adapters that knows its parameter"
    ) as page:
        gr.Markdown(
            "## A family of adapters that knows its parameter\n"
            "Burgers' equation u_t + u u_x = nu u_xx, u(x, 0) = -sin(pi x). "
            "LoTRA adapters of one Kolmogorov-Arnold network were fitted at "
            f"nu = {', '.join(map(str, MEMBERS))}. Drag the slider: between "
            "these, the adapter is interpolated. Press the button: the error "
            "falls."
        )
        slider = gr.Slider(
            MEMBERS[0],
            MEMBERS[-1],
            value=START,
            step=0.0005,
            label="viscosity nu",
            elem_id="viscosity",
        )
        button = gr.Button(
            "One Levenberg-Marquardt step", elem_id="refine", variant="primary"
        )
        table = gr.Markdown(shown.pop(), elem_id="numbers")
        with gr.Row():
            fields = []
            for field in shown:
                with gr.Column(min_width=280):  # below each other on a phone
                    fields.append(gr.HTML(field))
        state = gr.State(rows)
        outputs = [state, *fields, table]
        # without a queue an answer is one request; of many moves of the slider
        # the last one counts
        moved = {
            "queue": False,
            "show_progress": "hidden",
            "trigger_mode": "always_last",
        }
        slider.input(lambda nu: show(nu, []), slider, outputs, **moved)
        button.click(show, [slider, state], outputs, show_progress="minimal")
    return page


if __name__ == "__main__":
    torch.set_num_threads(2)
    build().launch()
