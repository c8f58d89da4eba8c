"""The demo page, made with gradio: image and classes on the left, panels on the right.

Pictures are embedded in the page as PNG, small ones enlarged without interpolation. The page needs
no network: fonts are those of the system, and gradio's analytics are off.
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ebmkit.demo import compute
from ebmkit.energy import EnergyModel, ScoreModel, classifies
from ebmkit.errors import UserError
from ebmkit.plots import around_gray
from ebmkit.terminal import clean

MAX_CLASSES = 10
"""Number of classes that are listed."""

CSS = """
.gradio-container {width: 100%; max-width: 1320px !important; margin: 0 auto;}
#image img, #examples img {image-rendering: pixelated;}
#image img {width: 100%; height: 100%; object-fit: contain;}
.eb-row {display: flex; flex-wrap: wrap; gap: 14px;}
.eb-row figure {margin: 0; flex: 1 1 120px; max-width: 300px; min-width: 96px;}
.eb-row.small figure {flex: 0 1 90px; min-width: 72px;}
.eb-row img {width: 100%; border-radius: 6px; display: block; margin: 0;
  border: 1px solid var(--border-color-primary);}
.eb-row img.pixels {image-rendering: pixelated;}
.eb-row figcaption {font-size: 13px; line-height: 1.35; margin-top: 5px;}
.eb-row figcaption span, .eb-note {color: var(--body-text-color); opacity: 0.75;}
.eb-note {font-size: 13px; margin-top: 8px;}
.eb-classes {width: 100%; border-collapse: collapse; font-size: 14px;}
.eb-classes, .eb-classes :is(tr, th, td) {border: 0 !important;}
.eb-classes :is(th, td) { padding: 2px 4px !important; text-align: right;
  white-space: nowrap; font-variant-numeric: tabular-nums;}
.eb-classes th {font-weight: 500; font-size: 12px; color: var(--body-text-color);}
.eb-classes :is(th, td):first-child {text-align: left;}
.eb-classes td:nth-child(2) {width: 45%;}
.eb-bar {background: var(--primary-500); height: 10px; border-radius: 3px; min-width: 2px;}
"""


def picture(image: Tensor, title: str, caption: str = "") -> str:
    """HTML figure of an image (C, H, W) in [0, 1]."""
    levels = (image.detach().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(np.squeeze(rearrange(levels, "c h w -> h w c"))).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    kind = "pixels" if max(image.shape[-2:]) < 150 else ""
    title, caption = html.escape(title), html.escape(caption)
    return (
        f'<figure><img class="{kind}" alt="{title}" src="data:image/png;base64,{data}">'
        f"<figcaption>{title}<br><span>{caption}</span></figcaption></figure>"
    )


def row(pictures: Sequence[str], note: str = "", small: bool = False) -> str:
    """HTML of pictures side by side, with a note below."""
    below = f'<div class="eb-note">{html.escape(note)}</div>' if note else ""
    return f'<div class="eb-row{" small" if small else ""}">{"".join(pictures)}</div>{below}'


def class_table(found: compute.Classes, names: Sequence[str]) -> str:
    """HTML table of the likeliest classes, with p and log p."""
    values, order = found.log_posterior.sort(descending=True)
    lines = [
        f"<tr><td>{html.escape(clean(names[c]))}</td>"
        f'<td><div class="eb-bar" style="width: {100 * np.exp(value):.1f}%"></div></td>'
        f"<td>{100 * np.exp(value):.1f} %</td><td>{value + 0.0:.2f}</td></tr>"
        for value, c in zip(
            values.round(decimals=3).tolist()[:MAX_CLASSES], order.tolist(), strict=False
        )
    ]
    heads = "<tr><th>class c</th><th></th><th>p(c|x)</th><th>log p(c|x)</th></tr>"
    note = f"log p(x) = {found.log_density:.1f} nats, up to a constant of the model"
    table = f'<table class="eb-classes">{heads}{"".join(lines)}</table>'
    return f'{table}<div class="eb-note">{note}</div>'


def signed(gradient: Tensor) -> Tensor:
    """A gradient (C, H, W) as an image: gray is 0; the largest entry is black or white."""
    return around_gray(gradient)


def example_images(model: ScoreModel) -> list[Any]:
    """Images to begin with, from data that scikit-learn contains: digits or photographs."""
    if model.card is not None and model.card.dataset == "digits":
        from ebmkit.data import ImageSet, load_dataset

        digits = load_dataset("digits", None, "test")
        assert isinstance(digits, ImageSet)
        return [Image.fromarray(image) for image in digits.images[:5, 0].numpy()]
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(image) for image in load_sample_images().images]


def build(model: ScoreModel, name: str, other: EnergyModel | None = None) -> Any:
    """The page of ``model``, a `gradio.Blocks`; ``other`` guides its samples."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    labelled = classifies(model)
    names = compute.class_names(other or model)
    choices = [(clean(label), c) for c, label in enumerate(names)]
    examples = example_images(model)

    def shown(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def fitted(pixels: Any) -> Tensor | None:
        return None if pixels is None else shown(compute.fit_image, model, pixels)

    def show_classes(pixels: Any) -> Any:
        x = fitted(pixels)
        if x is None:
            return "", gr.skip()
        assert isinstance(model, EnergyModel)
        found = compute.classify(model, x)
        order = found.log_posterior.argsort(descending=True).tolist()
        return class_table(found, names), order[1 if len(order) > 1 else 0]

    def show_denoising(pixels: Any, level: float, c: int | None) -> str:
        x = fitted(pixels)
        if x is None:
            return ""
        if level <= 0:
            return row([picture(x, "Image", "no noise to remove")])
        c = None if c is None or c < 0 else c
        found = shown(compute.denoise, model, x, level / 255, c)
        db = [f"PSNR {value:.1f} dB" for value in found.psnr]
        pictures = [
            picture(x, "Image x"),
            picture(found.noisy, f"Noisy y, sigma {level:g}/255", db[0]),
            picture(found.plain, "Denoised, D_u = E[x|y]", db[1]),
        ]
        if found.by_label is not None and c is not None:
            title = f"Denoised as {clean(names[c])}, D_c = E[x|y, c]"
            pictures.append(picture(found.by_label, title, db[2]))
        note = ""
        if found.sigma is not None:
            note = f"The model estimated the noise level: {255 * found.sigma:.1f}/255."
        return row(pictures, note)

    def show_attack(pixels: Any, epsilon: float, c: int | None) -> str:
        x = fitted(pixels)
        if x is None or c is None:
            return ""
        assert isinstance(model, EnergyModel)
        found = compute.attack(model, x, c, epsilon)
        target, after = clean(names[c]), compute.classify(model, found.image)
        best = int(after.log_posterior.argmax())
        largest = float(found.gradient.abs().max())
        pictures = [
            picture(x, "Image x", f"log p({target}|x) = {found.before:.2f}"),
            picture(
                signed(found.gradient),
                "Adversarial gradient, (D_c - D_u) / sigma^2",
                f"gray: 0; white or black: {largest:.3g} nats per image unit",
            ),
            picture(
                signed(found.image - x) if epsilon else torch.full_like(x, 0.5),
                "Change, attacked - x",
                f"largest {255 * float((found.image - x).abs().max()):.1f}/255",
            ),
            picture(found.image, "Attacked image", f"log p({target}|x) = {found.after:.2f}"),
        ]
        probability = float(after.log_posterior[best].exp())
        return row(pictures, f"Now classified as {clean(names[best])} ({probability:.0%}).")

    def show_samples(bar: Any, c: int, count: float, scale: float, seed: float) -> str:
        guided = shown(compute.guide, model, other, scale)
        images = shown(
            partial(compute.sample, progress=lambda done, total: bar((done, total))),
            guided, c, int(count), int(seed),
        )  # fmt: skip
        captions = [f"no. {n + 1}" for n in range(len(images))]
        if isinstance(model, EnergyModel) and labelled:
            found = [float(compute.classify(model, one).log_posterior[c].exp()) for one in images]
            captions = [f"p(c|x) = {value:.0%}" for value in found]
        label = clean(names[c])
        return row([picture(*one) for one in zip(images, [label] * len(images), captions,
                                                 strict=True)], small=True)  # fmt: skip

    def pick(event: Any) -> Any:
        return examples[event.index]

    with gr.Blocks(title="ebmkit demo", analytics_enabled=False) as page:
        gr.Markdown(f"## ebmkit: one model, four uses\n{_describe(model, name)}")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                image = gr.Image(
                    value=examples[0],
                    type="pil",
                    sources=["upload", "clipboard"],
                    label="Drop, paste or upload an image",
                    height=260,
                    elem_id="image",
                )
                gallery = gr.Gallery(
                    examples, show_label=False, columns=5, height=112, allow_preview=False,
                    interactive=False, buttons=[], elem_id="examples",
                )  # fmt: skip
                classes = gr.HTML(label="Classes", visible=labelled, elem_id="classes")
            with gr.Column(scale=5, min_width=300), gr.Tabs():
                if compute.denoises(model):
                    with gr.Tab("Denoise"):
                        with gr.Row():
                            level = gr.Slider(
                                0, 100, 50, step=1, elem_id="noise",
                                label="Noise level sigma, in units of 1/255",
                            )  # fmt: skip
                            given = gr.Dropdown(
                                [("no label", -1), *choices], value=-1, visible=labelled,
                                label="Label for D_c",
                            )  # fmt: skip
                        denoised = gr.HTML(elem_id="denoised")
                if labelled:
                    with gr.Tab("Attack"):
                        with gr.Row():
                            epsilon = gr.Slider(
                                0, 3, 0.5, step=0.05, elem_id="epsilon",
                                label="Size of the attack, l2 norm (image units)",
                            )  # fmt: skip
                            target = gr.Dropdown(
                                choices, value=0, label="Attack towards", elem_id="target"
                            )
                        attacked = gr.HTML(elem_id="attacked")
                if compute.can_sample(model) and choices:
                    with gr.Tab("Sample"):
                        with gr.Row():
                            label = gr.Dropdown(choices, value=0, label="Class")
                            scale = gr.Slider(0, 10, 1, step=0.5, label="Guidance scale")
                        with gr.Row():
                            count = gr.Slider(1, 16, 8, step=1, label="Number of samples")
                            seed = gr.Number(0, precision=0, minimum=0, label="Seed")
                        button = gr.Button("Draw samples", variant="primary", elem_id="draw")
                        samples = gr.HTML(elem_id="samples")

        quick: Any = {"show_progress": "hidden", "trigger_mode": "always_last"}
        pick.__annotations__ = {"event": gr.SelectData}
        gallery.select(pick, None, image)
        for event in (page.load, image.change):
            if labelled:
                event(show_classes, image, [classes, target], **quick)
        if compute.denoises(model):
            own: list[Any] = [image, level, given]
            gr.on([page.load, *(o.change for o in own)], show_denoising, own, denoised, **quick)
        if labelled:
            own = [image, epsilon, target]
            gr.on([o.change for o in own], show_attack, own, attacked, **quick)
        if compute.can_sample(model) and choices:
            inputs = [label, count, scale, seed]

            def draw(*values: Any, bar: Any = gr.Progress()) -> str:  # noqa: B008
                return show_samples(bar, *values)

            button.click(draw, inputs, samples)
    return page


def serve(page: Any, host: str, port: int) -> tuple[str, Callable[[], None]]:
    """Start a server of ``page`` in threads of this process; return its address, and a function
    that waits until the server ends.
    """
    import gradio as gr

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    _, address, _ = page.launch(
        server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True,
        inbrowser=False, theme=theme, css=CSS, footer_links=[],
    )  # fmt: skip
    return address, page.block_thread


def _describe(model: ScoreModel, name: str) -> str:
    """A line about the model."""
    facts = [f"{sum(p.numel() for p in model.parameters()):,} parameters"]
    if model.card is not None:
        card = model.card
        facts.append(f"objective {card.objective or 'unknown'} on {card.dataset or 'own data'}")
        facts += ["images of {}x{}".format(*card.image_size)] if card.image_size else []
        facts += [f"attacks in training: {card.attack}"] if card.attack else []
    return f"`{clean(name)}`: {', '.join(facts)}"
