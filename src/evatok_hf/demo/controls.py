"""The parts of the page that its tabs share."""

from __future__ import annotations

import gradio as gr

from . import jobs

NO_CLASS = "no class"


def video_input() -> gr.Video:
    return gr.Video(label="Video", sources=["upload"], buttons=[], height=280, elem_classes="upload")


def video_output(label: str) -> gr.Video:
    return gr.Video(
        label=label, interactive=False, autoplay=True, loop=True, buttons=["download"], elem_classes="result"
    )


def picture_output(label: str, description: str) -> gr.Image:
    return gr.Image(
        label=label,
        interactive=False,
        format="png",
        type="filepath",
        buttons=["download", "fullscreen"],
        alt_text=description,
        elem_classes=["result", "picture"],
    )


def summary(placeholder: str) -> gr.HTML:
    return gr.HTML(f'<p class="note">{placeholder}</p>', label="Result", elem_classes="summary")


def numbers() -> gr.JSON:
    with gr.Accordion("All numbers, as JSON", open=False):
        return gr.JSON(label="Numbers")


def class_input(first: int | None) -> gr.Dropdown:
    """Names of the classes; `first` is the number of the one that is chosen at first, None for no class."""
    names = jobs.pipeline().classes
    value = names[first] if names and first is not None else NO_CLASS
    return gr.Dropdown([*names, NO_CLASS], value=value, label="Class", visible=bool(names))


def sampling_inputs(guidance: float) -> tuple[gr.Number, gr.Slider, gr.Slider]:
    return (
        gr.Number(0, label="Seed", info="The same seed draws the same clips", precision=0, minimum=0, maximum=2**53),
        gr.Slider(1, 4, value=guidance, step=0.05, label="Guidance", info="Towards the class; 1 is none"),
        gr.Slider(0, 2, value=1.0, step=0.05, label="Temperature", info="0 takes the most likely token every time"),
    )
