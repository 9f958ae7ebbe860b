"""The page: three tabs, their controls, and what happens when a button is pressed.

Results go into gradio's store: a folder of this process alone, with names that nobody can guess, emptied as it ages and
when the app ends.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
# it keeps a record of every job, and looks through all of them after each, for a page that is off
os.environ |= {"GRADIO_ANALYTICS_MAX_EVENTS": "1", "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(10**9)}

import gradio as gr
from gradio import processing_utils, route_utils, routes
from starlette.middleware import Middleware

from ..models.video_processing_evatok import HOLD
from ..tokenize.memory import PreparedVideo
from ..tokenize.video_tokenizer import VideoTokenizer
from . import controls, jobs, results
from .about import ABOUT, CSS, INTRO
from .examples import example_videos
from .handlers import Visit, spoken
from .hosts import HostGuard, answered_names
from .incoming import IncomingLimits, UploadParser
from .limits import Limits
from .masks import FolderMask
from .silence import closing_silent_connections
from .store import Store
from .uploads import UploadedVideo

TITLE = "EVATok: adaptive-length video tokens"
BY_QUALITY, BY_BUDGET = "Quality", "Token budget"
FROM_START, FROM_END = "After its first frames", "After its end"
DEFAULT_FPS = 12.0  # where the generator does not say at what rate to play
_LIMITS = Limits()
_AT_ONCE = 4  # uploads that are read at once; models run one after the other
_WAITING = 32
_CHECK_EVERY, _KEPT = 300, 1800  # seconds
_SESSIONS = 20  # visitors whose page is kept in memory; one that comes back later starts afresh


def launch(
    model: str | None = None,
    device: str = "auto",
    host: str | None = None,
    port: int | None = None,
    share: bool = False,
    open_browser: bool = False,
    ready: Callable[[str, str | None], None] = lambda url, public: None,
    allow_hosts: Sequence[str] = (),
) -> None:
    """Loads the models and serves the app until the process is told to stop.

    Args:
        model: folder or Hub id of a checkpoint; None for bundled ones, see `jobs.load`.
        device: as for `VideoTokenizer.from_pretrained`.
        host, port: where to listen; None for GRADIO_SERVER_NAME and GRADIO_SERVER_PORT or gradio's defaults. The
            package's `launch` takes port 0, too, for any that is free.
        share: also a public address.
        open_browser: open the app in a browser.
        ready: called with the address, and the public one if there is one, once the app answers.
        allow_hosts: names to answer to, besides those of this machine for itself, `host`, and those of a Space.

    Raises:
        ValueError: a checkpoint that cannot be loaded, an address that cannot be listened at, a name that is none.
    """
    names = answered_names([*allow_hosts, host or os.environ.get("GRADIO_SERVER_NAME") or "localhost"])
    made = tempfile.TemporaryDirectory(prefix="evatok_demo_", ignore_cleanup_errors=True)
    folder = Path(made.name)
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "files")
    os.environ["GRADIO_EXAMPLES_CACHE"] = str(folder / "examples")
    processing_utils.async_ssrf_protected_download = _no_download
    routes.GradioMultiPartParser = route_utils.GradioMultiPartParser = UploadParser
    store = Store(folder / "files", _LIMITS.store * 10**6)
    jobs.load(model, device)
    with contextlib.redirect_stdout(sys.stderr):  # gradio tells where examples are kept, and the public address
        app = build(example_videos(folder / "samples")).queue(max_size=_WAITING)
        try:
            _, url, public = app.launch(
                server_name=host,
                server_port=port,
                share=share,
                inbrowser=open_browser,
                prevent_thread_lock=True,
                quiet=True,
                show_error=True,
                max_file_size=_LIMITS.megabytes * 10**6,
                ssr_mode=False,
                run_history=False,
                enable_monitoring=False,
                footer_links=["api"],
                theme=_theme(),
                css=CSS,
                state_session_capacity=_SESSIONS,
                app_kwargs={
                    "lifespan": closing_silent_connections,
                    "middleware": [
                        Middleware(HostGuard, names),
                        Middleware(IncomingLimits, _LIMITS, store),
                        Middleware(FolderMask, folder),
                    ],
                },
            )
        except OSError as error:
            raise ValueError(f"cannot listen there ({error}); choose another --host or --port.") from error
    if public:
        names.add(urlsplit(public).hostname)
    store.keep()
    try:
        ready(url, public)
        app.block_thread()
    finally:
        app.close(verbose=False)
        made.cleanup()


def build(examples: dict[str, str]) -> gr.Blocks:
    """The page over the models that `jobs` has loaded, with videos to try (label -> path)."""
    pipe, name, config = jobs.pipeline(), jobs.tokenizer().name, jobs.tokenizer().model.config
    lengths, fixed = ", ".join(map(str, config.block_lengths)), jobs.fixed_length(config)
    about = ABOUT.format(checkpoint=name, config=config, lengths=lengths, fixed=fixed, limits=_LIMITS)
    models = f"Model: `{name}`"
    if pipe.name != name:
        models += f"; `{pipe.name}` generates and continues"
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(_CHECK_EVERY, _KEPT)) as app:
        gr.Markdown(INTRO.format(models=models))
        with gr.Tabs():
            with gr.Tab("Reconstruct"):
                _reconstruct_tab(examples)
            if pipe.generator is not None:
                with gr.Tab("Generate"):
                    _generate_tab()
                with gr.Tab("Continue"):
                    _continue_tab(examples)
            with gr.Tab("About"):
                gr.Markdown(about)
    return app


# --- reconstruct ------------------------------------------------------------------------------------------------------


def _reconstruct_tab(examples: dict[str, str]) -> None:
    tokenizer = jobs.tokenizer()
    config, router = tokenizer.model.config, tokenizer.router
    # a router may be trained for one quality, and only one for every quality can keep to a budget
    free = router is not None and router.config.quality is None
    usual = 32 * config.num_blocks * config.block_lengths[0]  # twice the least of 16 clips

    @spoken
    def reconstruct(
        video: str | None,
        choose_by: str = BY_QUALITY,
        quality: float = 1.2,
        budget: float = usual,
        measure_fixed: bool = False,
        progress=gr.Progress(),  # noqa: B008 - gradio looks for it here
    ) -> tuple[Any, ...]:
        """Takes a video to tokens and back: a side-by-side video, a picture, a summary, the tokens, and all numbers."""
        by_budget = choose_by == BY_BUDGET
        told = {"budget": _whole(budget, "the token budget")} if by_budget else {"quality": quality}
        if not free:
            told = {}
        prepared = _read(video, progress, tokenizer)
        done = jobs.reconstruct(
            prepared, told.get("quality"), told.get("budget"), bool(measure_fixed), progress=progress
        )
        progress(1, "Drawing the pictures")
        return results.reconstruction(progress.folder, done, Path(video).name, told)

    with gr.Row():
        with gr.Column(scale=2, min_width=300) as left:
            video = controls.video_input()
            choose_by = gr.Radio([BY_QUALITY, BY_BUDGET], value=BY_QUALITY, label="Choose lengths by", visible=free)
            quality = gr.Slider(0, 2, value=1.2, step=0.1, label="Quality", info="0: few tokens, 2: many", visible=free)
            budget = gr.Number(
                usual, label="Token budget", info="For the whole video, at most", precision=0, minimum=1, visible=False
            )
            fixed = gr.Checkbox(False, label="Measure the fixed length, too", info="Takes twice as long")
            button = gr.Button("Reconstruct", variant="primary")
        with gr.Column(scale=3, min_width=300):
            summary = controls.summary("Tokens, what was saved, PSNR and distance appear here.")
            shown = controls.video_output("Original and reconstruction, side by side")
            kept = gr.File(label="Tokens, for evatok decode", interactive=False, height=90)
    picture = controls.picture_output(
        "Frames and the tokens of their blocks",
        "Frames of the original above those of the reconstruction, a bar of the tokens of each block under them",
    )
    numbers = controls.numbers()
    inputs, outputs = [video, choose_by, quality, budget, fixed], [summary, shown, picture, kept, numbers]
    with left:
        gr.Examples(
            [[path, BY_QUALITY, 1.2, usual, False] for path in examples.values()],
            inputs,
            outputs,
            reconstruct,
            cache_examples=True,
            cache_mode="lazy",
            example_labels=list(examples),
            label="Or try one of these",
        )
    choose_by.change(
        lambda how: (gr.update(visible=how == BY_QUALITY), gr.update(visible=how == BY_BUDGET)),
        choose_by,
        [quality, budget],
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    button.click(reconstruct, inputs, outputs, api_name="reconstruct", concurrency_limit=_AT_ONCE)


# --- generate ---------------------------------------------------------------------------------------------------------


def _generate_tab() -> None:
    fps = jobs.pipeline().fps or DEFAULT_FPS

    @spoken
    def generate(
        class_name: str = controls.NO_CLASS,
        count: float = 4,
        seed: float = 0,
        guidance: float = 1.25,
        temperature: float = 1.0,
        progress=gr.Progress(),  # noqa: B008
    ) -> tuple[Any, ...]:
        """Draws clips of a class: a video of all of them, a picture, a summary, and all numbers."""
        number, first = _whole(count, "the number of clips"), _whole(seed, "the seed")
        name = None if class_name == controls.NO_CLASS else class_name
        started = time.perf_counter()
        progress(0, "Drawing tokens")
        samples = jobs.generate(name, number, first, guidance, temperature, progress=progress)
        seconds = time.perf_counter() - started
        progress(1, "Drawing the pictures")
        told = {"seed": first, "guidance": guidance if name else 1.0, "temperature": temperature}
        return results.generation(progress.folder, samples, told, fps, seconds)

    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            class_name = controls.class_input(first=0)
            count = gr.Slider(1, 8, value=4, step=1, label="Number of clips")
            seed, guidance, temperature = controls.sampling_inputs(1.25)
            button = gr.Button("Generate", variant="primary")
        with gr.Column(scale=3, min_width=300):
            summary = controls.summary("The lengths that the generator chose appear here.")
            shown = controls.video_output("Generated clips")
    picture = controls.picture_output(
        "Frames and the tokens that the generator gave their blocks",
        "A row of frames of each generated clip, a bar of the tokens of each block under them",
    )
    numbers = controls.numbers()
    button.click(
        generate,
        [class_name, count, seed, guidance, temperature],
        [summary, shown, picture, numbers],
        api_name="generate",
        concurrency_limit=_AT_ONCE,
    )


# --- continue ---------------------------------------------------------------------------------------------------------


def _continue_tab(examples: dict[str, str]) -> None:
    pipe = jobs.pipeline()
    known = pipe.generator.config.known_frames
    step = pipe.tokenizer.config.num_frames - known  # frames of one round of prediction

    @spoken
    def predict(
        video: str | None,
        where: str = FROM_START,
        count: float = step,
        class_name: str = controls.NO_CLASS,
        seed: float = 0,
        guidance: float = 1.0,
        temperature: float = 1.0,
        hold: float = HOLD,
        progress=gr.Progress(),  # noqa: B008
    ) -> tuple[Any, ...]:
        """Predicts how a video goes on: a video, a picture, a summary, and all numbers."""
        number, first = _whole(count, "the number of frames"), _whole(seed, "the seed")
        name = None if class_name == controls.NO_CLASS else class_name
        prepared = _read(video, progress, VideoTokenizer.from_pipe(pipe), pipe.fps)
        frames = jobs.frames_of(prepared)
        started = time.perf_counter()
        sampling = (name, first, guidance, temperature, hold)
        done = jobs.predict(frames, where == FROM_END, number, *sampling, progress=progress)
        seconds = time.perf_counter() - started
        progress(1, "Drawing the pictures")
        told = {"seed": first, "guidance": guidance if name else 1.0, "temperature": temperature, "hold": hold}
        told["fps"] = prepared.fps
        return results.continuation(progress.folder, done, name, told, seconds)

    with gr.Row():
        with gr.Column(scale=2, min_width=300) as left:
            video = controls.video_input()
            where = gr.Radio(
                [FROM_START, FROM_END],
                value=FROM_START,
                label="Continue the video",
                info=f"{known} frames are known; after the first ones, the prediction is compared with the truth",
            )
            count = gr.Slider(1, 4 * step, value=step, step=1, label="Frames to predict")
            class_name = controls.class_input(first=None)
            seed, guidance, temperature = controls.sampling_inputs(1.0)
            hold = gr.Slider(
                0,
                1,
                value=HOLD,
                step=0.1,
                label="Hold on to the last known frame",
                info="0 moves more, and is further from the truth",
            )
            button = gr.Button("Continue", variant="primary")
        with gr.Column(scale=3, min_width=300):
            summary = controls.summary(
                "What is known, what is predicted and how near it comes to the truth appears here."
            )
            shown = controls.video_output("Known frames framed in grey, predicted ones in blue")
    picture = controls.picture_output(
        "Known and predicted frames",
        "The last known frame and predicted ones in a row, true ones above them where there are any",
    )
    numbers = controls.numbers()
    with left:
        paths, labels = [[path] for path in examples.values()], list(examples)
        gr.Examples(paths, [video], example_labels=labels, label="Or take one of these")
    button.click(
        predict,
        [video, where, count, class_name, seed, guidance, temperature, hold],
        [summary, shown, picture, numbers],
        api_name="continue",
        concurrency_limit=_AT_ONCE,
    )


def _read(video: str | None, progress: Visit, tokenizer: VideoTokenizer, fps: float | None = None) -> PreparedVideo:
    """The upload as the tokenizer's preprocessed clips, at `fps` or the rate that it has; no model runs."""
    progress(0, "Reading the video")
    if video is None:
        raise ValueError("there is no video yet: upload one, or take an example")
    with UploadedVideo(video, _LIMITS, progress.check) as upload:
        return tokenizer.prepare(upload, fps)


async def _no_download(url: str, cache_dir: str) -> str:
    """In place of what gradio has for a file that is given by its address: it has no limit, and nobody need fetch."""
    raise gr.Error("Videos are not fetched from addresses: upload the file itself.", print_exception=False)


def _whole(value: float | None, what: str) -> int:
    """A number whose bounds the page has checked."""
    if value is None or value != int(value):
        raise ValueError(f"{what} is {value}: give a whole number")
    return int(value)


def _theme() -> gr.themes.Base:
    """gradio's plain theme in blue and slate, with the fonts that the visitor's system has."""
    theme = gr.themes.Base(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    # the theme's own greys and blue are too pale to read on their grounds
    return theme.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_600",
        block_title_text_color="*neutral_700",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_700",
    )
