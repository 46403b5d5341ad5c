# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A page to play with: Burgers' equation at the viscosity of a slider, from a family of adapters.

python examples/space/app.py      # http://127.0.0.1:7860
"""

from __future__ import annotations

import base64
import io
import time
from pathlib import Path

import numpy as np
import torch
from burgers import HIGH, LOW, grid, network, residual, solution, terms_of
from PIL import Image
from safetensors.torch import load_file

from peft_lotra import ParametricAdapter
from peft_lotra.parametric import Prediction


try:
    import gradio as gr
except ModuleNotFoundError:
    raise SystemExit("app.py: error: gradio is not installed: pip install -r requirements.txt") from None

FOLDER = Path(__file__).parent / "family"
FIELD, RESIDUAL = grid(65), grid(33)  # points of the pictures
START = 0.045

# colors by their red, green and blue at equal distances: dark blue over white to dark red, and black to yellow
DIVERGING = np.array([(5, 48, 97), (67, 147, 195), (247, 247, 247), (214, 96, 77), (103, 0, 31)])
SEQUENTIAL = np.array([(0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191)])

STYLE = """
<style>
.field {display: grid; grid-template-columns: 1.2em 1fr; gap: 2px 6px; font-size: 0.85em}
.field img {width: 100%; aspect-ratio: 1; display: block}
.field .bar {height: 0.8em; border-radius: 2px}
.field .ends {display: flex; justify-content: space-between}
</style>
"""


def load() -> ParametricAdapter:
    """The family of the folder, on its base."""
    base = network()
    base.load_state_dict(load_file(FOLDER / "base.safetensors"))
    return ParametricAdapter.from_pretrained(base, FOLDER, terms_of)


family = load()
mode_bytes = 8 * len(family.parameters)  # a member is a number for each mode
file_bytes = sum(path.stat().st_size for path in FOLDER.glob("parametric_adapter.safetensors"))


def picture(
    values: torch.Tensor, low: float, high: float, colors: np.ndarray, title: str, ends: tuple[str, str]
) -> str:
    """HTML of values on a square grid, with axes and a color bar; inside of the page, so that nothing is fetched."""
    size = round(len(values) ** 0.5)
    levels = ((values.reshape(size, size).numpy() - low) / (high - low)).clip(0, 1) * 255
    image = Image.fromarray(levels.astype(np.uint8), mode="L").convert("P")
    stops = np.linspace(0, 255, len(colors))
    palette = np.stack([np.interp(np.arange(256), stops, channel) for channel in colors.T], axis=1)
    image.putpalette(palette.astype(np.uint8).tobytes())
    stream = io.BytesIO()
    image.save(stream, "png")
    data = base64.b64encode(stream.getvalue()).decode()
    gradient = ", ".join(f"rgb({r},{g},{b})" for r, g, b in colors)
    return (
        f'{STYLE}<div class="field"><b></b><b>{title}</b><span>t</span>'
        f'<img alt="{title}" src="data:image/png;base64,{data}"><span></span>'
        f'<div class="ends"><span>x = -1</span><span>x = 1</span></div>'
        f'<span></span><div class="bar" style="background: linear-gradient(90deg, {gradient})"></div>'
        f'<span></span><div class="ends"><span>{ends[0]}</span><span>{ends[1]}</span></div></div>'
    )


def show(prediction: Prediction, milliseconds: float, how: str) -> tuple[str, str, str]:
    """Field, residual map and numbers of a prediction."""
    nu = prediction.parameter
    with torch.no_grad():
        u = prediction.apply(solution, FIELD)
        r = prediction.apply(residual, RESIDUAL, torch.full_like(RESIDUAL[:, :1], nu)).abs()
    logarithms = r.clamp(min=1e-12).log10()
    text = (
        f"**nu = {nu:.4f}**, {how} in {milliseconds:.1f} ms. Residual: root mean square "
        f"{r.square().mean().sqrt():.1e}, largest {r.max():.1e}. The adapter is {len(family.parameters)} numbers "
        f"({mode_bytes} bytes) beside the {file_bytes / 1000:.0f} kB that all {len(family.parameters)} members share."
    )
    return (
        picture(u, -1, 1, DIVERGING, "u(x, t)", ("-1", "1")),
        picture(logarithms, -6, 0, SEQUENTIAL, "residual", ("1e-6", "1")),
        text,
    )


def predict(nu: float) -> tuple[str, str, str]:
    start = time.perf_counter()
    prediction = family.predict(nu)
    return show(prediction, 1e3 * (time.perf_counter() - start), "predicted without training")


def refine(nu: float) -> tuple[str, str, str]:
    start = time.perf_counter()
    prediction = family.refine(nu)
    return show(prediction, 1e3 * (time.perf_counter() - start), "refined by one step")


def build() -> gr.Blocks:
    field, residuals, text = predict(START)
    with gr.Blocks(title="A family of adapters that knows its parameter") as page:
        gr.Markdown(
            "## A family of adapters that knows its parameter\n"
            f"Burgers' equation u_t + u u_x = nu u_xx, u(x, 0) = -sin(pi x). {len(family.parameters)} LoTRA adapters "
            "of one Kolmogorov-Arnold network were fitted; between them, the adapter is interpolated as you drag."
        )
        slider = gr.Slider(LOW, HIGH, value=START, step=0.0005, label="viscosity nu", elem_id="viscosity")
        with gr.Row():
            left = gr.HTML(field, elem_id="field")
            right = gr.HTML(residuals, elem_id="residual")
        numbers = gr.Markdown(text, elem_id="numbers")
        button = gr.Button("One Levenberg-Marquardt step", elem_id="refine")
        outputs = [left, right, numbers]
        # without a queue an answer is one request; of many moves of the slider the last one counts
        slider.input(predict, slider, outputs, queue=False, show_progress="hidden", trigger_mode="always_last")
        button.click(refine, slider, outputs, show_progress="minimal")
    return page


if __name__ == "__main__":
    torch.set_num_threads(2)
    build().launch()
