"""The page itself: its components, and what each button does."""

import base64
import html
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import FileData

from refsam.errors import UserError
from refsam.model.text_encoder import explain_unknown
from refsam.ui.jobs import Job, Progress, first_frame
from refsam.ui.sample import EXPRESSIONS
from refsam.ui.uploads import Limits
from refsam.ui.visitors import Visitors
from refsam.video.overlay import expression_colour

STYLE = """
#view { min-height: 320px; }
#view img { width: 100%; border-radius: 8px; }
#status { font-size: 1.05em; }
#status .error { color: #c62828; font-weight: 600; }
#legend span { display: inline-block; margin: 2px 6px 2px 0; padding: 2px 10px; border-radius: 12px;
               background: #18181c; font-weight: 600; }
"""
_INTRODUCTION = """# refsam
Say what you want segmented in a video; get its masks, frame by frame. Choose a clip, write one object per line, press the button.
"""
_CAMERA = {"video": {"width": {"ideal": 1280}, "height": {"ideal": 720}}}
_IDLE = "Choose a clip and say what to segment."


def build_page(visitors: Visitors) -> gr.Blocks:
    """The page with all its events. It is the same for all visitors, whose files are kept separate."""
    with gr.Blocks(title="refsam", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(_INTRODUCTION)
        model = gr.HTML(elem_id="model")
        with gr.Row():
            with gr.Column(scale=2):
                upload, webcam, sample = _clip_choices(visitors.limits)
                text = gr.Textbox(
                    label="What to segment, one object per line",
                    placeholder="the red car\nthe blue thing on the left",
                    lines=3,
                    max_lines=visitors.limits.expressions,
                    elem_id="expressions",
                )
                legend = gr.HTML(elem_id="legend")
                with gr.Row():
                    run = gr.Button("Segment", variant="primary", elem_id="run")
                    stop = gr.Button("Cancel", interactive=False, elem_id="cancel")
            with gr.Column(scale=3):
                status = gr.HTML(_IDLE, elem_id="status")
                view = gr.HTML(elem_id="view")
                frame = gr.Slider(
                    0, 1, 0, step=1, label="Frame", visible=False, elem_id="frame", buttons=[]
                )
                with gr.Row():
                    downloads = [
                        gr.DownloadButton(label, visible=False, elem_id=name)
                        for label, name in (
                            ("Masks (PNG, zip)", "download-masks"),
                            ("Masks (COCO RLE, JSON)", "download-json"),
                            ("Overlay (MP4)", "download-overlay"),
                        )
                    ]
        actions = Actions(visitors, view, status, frame, run, stop, downloads)
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        chosen = [view, status]
        upload.change(actions.choose, upload, chosen, **quiet)
        webcam.change(actions.choose, webcam, chosen, **quiet)
        sample.click(actions.choose_sample, None, [*chosen, text], **quiet)
        text.change(actions.name_colours, text, legend, queue=False, **quiet)
        shown = [view, status, frame, run, stop, *downloads]
        run.click(actions.run, text, shown, concurrency_limit=None, **quiet)
        stop.click(actions.cancel, None, status, queue=False, **quiet)
        frame.change(
            actions.show, frame, view, trigger_mode="always_last", concurrency_limit=None, **quiet
        )
        page.load(actions.name_model, None, model, concurrency_limit=None, **quiet)
        page.unload(actions.leave)
    return page


def _clip_choices(limits: Limits) -> tuple[gr.File, gr.Video, gr.Button]:
    with gr.Tab("Upload"):
        upload = gr.File(
            label=f"A video or an image: at most {limits.megabytes} MB and {limits.frames} frames",
            elem_id="upload",
        )
    with gr.Tab("Webcam"):
        webcam = gr.Video(
            label="Record a clip",
            sources=["webcam"],
            webcam_options=gr.WebcamOptions(mirror=False, constraints=_CAMERA),
            elem_id="webcam",
        )
        # gradio would run the program ffmpeg to remove the sound of a recorded clip that has none. In a subclass
        # this would make it write a stub file beside this one.
        webcam.preprocess = _recorded_file
    with gr.Tab("Sample"):
        sample = gr.Button("Take the generated sample clip", elem_id="sample")
    return upload, webcam, sample


def _recorded_file(recording: FileData | None) -> str | None:
    return recording.path if recording else None


@dataclass(frozen=True)
class Actions:
    """The page's events: each method handles one, and returns what its outputs show.

    Attributes:
        visitors: who has the page open.
        view, status, frame, run_button, stop_button, downloads: the components that are written to.
    """

    visitors: Visitors
    view: gr.HTML
    status: gr.HTML
    frame: gr.Slider
    run_button: gr.Button
    stop_button: gr.Button
    downloads: list[gr.DownloadButton]

    def name_model(self) -> Iterator[str]:
        """Say which model there is, as soon as it is loaded."""
        if not self.visitors.ready:
            yield "The model is being loaded."
        engine = self.visitors.wait_for_engine()
        yield _escape(f"Model: {engine.name}, on {engine.model.device}.")

    def choose(self, path: str | None, request: gr.Request) -> tuple[str, str]:
        """Take a clip that was uploaded or recorded, and show its first frame."""
        visitor = self.visitors.of(request.session_hash)
        visitor.clip = None
        if path is None:
            return "", _IDLE
        return self._take(Path(path), request)

    def choose_sample(self, request: gr.Request) -> tuple[str, str, str]:
        """Take the sample clip, and show its first frame and expressions about it."""
        return *self._take(self.visitors.sample(), request), "\n".join(EXPRESSIONS)

    def _take(self, path: Path, request: gr.Request) -> tuple[str, str]:
        try:
            picture, what = first_frame(path, self.visitors.folder, self.visitors.limits)
        except UserError as error:
            return "", _error(error)
        self.visitors.of(request.session_hash).clip = path
        return _picture(picture), _escape(what)

    def name_colours(self, text: str) -> str:
        """The expressions in their colours."""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return "".join(
            f'<span style="color: rgb{expression_colour(index)}">{_escape(line)}</span>'
            for index, line in enumerate(lines[: self.visitors.limits.expressions])
        )

    def run(self, text: str, request: gr.Request) -> Iterator[dict[Any, Any]]:
        """Segment the visitor's clip; the overlay plays while it is computed."""
        if not self.visitors.ready:
            yield {self.status: "The model is being loaded; then the work begins."}
        try:
            job = self.visitors.begin(request.session_hash, text)
        except UserError as error:
            yield {self.status: _error(error)}
            return
        yield self._started()
        try:
            for progress in job.updates():
                picture = _picture(job.preview(progress.frames - 1))
                yield {self.view: picture, self.status: _say(job, progress)}
            yield self._ended(job)
        except FileNotFoundError:  # the visitor has left meanwhile, so the files are removed
            return

    def _started(self) -> dict[Any, Any]:
        hidden = {button: gr.DownloadButton(visible=False) for button in self.downloads}
        return hidden | {
            self.status: "Waiting for its turn ...",
            self.frame: gr.Slider(visible=False),
            self.run_button: gr.Button(interactive=False),
            self.stop_button: gr.Button(interactive=True),
        }

    def _ended(self, job: Job) -> dict[Any, Any]:
        buttons: dict[Any, Any] = {
            self.run_button: gr.Button(interactive=True),
            self.stop_button: gr.Button(interactive=False),
        }
        if job.downloads is None:
            message = _error(job.error) if job.error else "Cancelled before the first frame."
            return buttons | {self.status: message}
        files = (job.downloads.masks, job.downloads.run_lengths, job.downloads.overlay)
        for button, file in zip(self.downloads, files, strict=True):
            buttons[button] = gr.DownloadButton(value=str(file), visible=True)
        last = job.progress.frames - 1
        return buttons | {
            self.status: _say(job, job.progress),
            self.view: _picture(job.preview(last)),
            self.frame: gr.Slider(maximum=max(1, last), value=last, visible=last > 0),
        }

    def cancel(self, request: gr.Request) -> str:
        """Stop the visitor's job; the finished frames are kept."""
        job = self.visitors.of(request.session_hash).job
        if job is None or not job.running:
            return "Nothing is running."
        job.cancel()
        return "Cancelling ..."

    def show(self, index: int, request: gr.Request) -> str | dict[str, Any]:
        """The overlay of one frame."""
        job = self.visitors.of(request.session_hash).job
        if job is None or not 0 <= index < job.progress.frames:
            return gr.skip()
        return _picture(job.preview(int(index)))

    def leave(self, request: gr.Request) -> None:
        """The page was closed."""
        self.visitors.leave(request.session_hash)


def _say(job: Job, progress: Progress) -> str:
    of = f" of {progress.expected}" if progress.expected and job.running else ""
    parts = [f"{progress.frames}{of} frames, {progress.rate:.1f} frames/s."]
    if not job.running and job.stopped_by:
        parts.append(f"Stopped by: {job.stopped_by}.")
    parts += [f"Note: {note}." for note in job.notes]
    for expression, words in zip(job.expressions, progress.unknown, strict=False):
        if words:
            told = explain_unknown(expression, words)
            parts.append(f"{told[0].upper()}{told[1:]}.")
    return "<br>".join(map(_escape, parts))


def _error(error: UserError | str) -> str:
    return f'<span class="error">{_escape(str(error))}</span>'


def _picture(jpeg: bytes) -> str:
    return f'<img alt="overlay" src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'


def _escape(text: str) -> str:
    """A visitor's text as HTML that gradio's templates do not change."""
    return html.escape(text).replace("{", "&#123;").replace("$", "&#36;")
