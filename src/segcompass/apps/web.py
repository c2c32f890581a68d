"""The web page (extra ``web``): ask, watch the thought being written, look at the way, change it.

Gradio carries pictures, queue and downloads; what an answer looks like is ``web_frames.py``, what
happens behind it ``web_desk.py``, and what the browser may load ``web_guard.py``.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from segcompass.apps import web_frames as frames
from segcompass.apps.runs import demo_jobs
from segcompass.apps.web_desk import Answer, Desk
from segcompass.apps.web_guard import Guard
from segcompass.io.assets import MissingAssetError
from segcompass.io.errors import SegCompassError
from segcompass.types import Prediction

# Before gradio is imported: it reads them then.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
try:
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
except ImportError as error:
    raise MissingAssetError(
        f"the web page needs gradio ({error}); install it with: pip install 'segcompass[web]'"
    ) from error

LOOPBACK = ("127.0.0.1", "localhost")
LONGEST_INSTRUCTION = 2000  # characters; the policy has its own limit in tokens
KEPT = 3600  # seconds that pictures and answers are kept after their last use
EXPECTED = (SegCompassError, ValueError, TimeoutError)  # errors that are told to whoever asked

_FRAME_JS = """
window.addEventListener("message", ({ source, data }) => {
  if (source !== element.querySelector("iframe")?.contentWindow) return;
  if (data.height) element.style.setProperty("--height", `${data.height}px`);
  if (data.edits) trigger("rerun", { edits: data.edits });
});
"""
_INTO_VIEW_JS = """
watch("value", () => props.value && element.scrollIntoView({ block: "nearest" }));
"""


class Page:
    """What is on the page, and what its buttons do; made inside of ``gr.Blocks``."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.answer = gr.State(None, time_to_live=KEPT, delete_callback=_forget)
        gr.HTML(_text("masthead.html"), elem_classes="top")
        self.picture, self.instruction, self.ask, self.stop = _question()
        self.said = gr.HTML(elem_classes="said")
        self.shown = gr.HTML(elem_classes="frame", js_on_load=_FRAME_JS + _INTO_VIEW_JS)
        self.compared = gr.HTML(elem_classes="frame", js_on_load=_FRAME_JS + _INTO_VIEW_JS)
        with gr.Column(visible=False, elem_classes="downloads") as self.downloads:
            self.kept = gr.File(label="Downloads", file_count="multiple", interactive=False)

    def connect(self) -> None:
        """Let the buttons do it; the model answers one at a time, and can always be stopped."""
        only_one = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
        asked = gr.on(
            [self.ask.click, self.instruction.submit],
            self.find,
            [self.picture, self.instruction],
            [self.said, self.shown, self.compared, self.downloads, self.answer, self.kept],
            show_progress="hidden",
            preprocess=False,  # gradio would open the picture with every decoder that Pillow has
            **only_one,
        )
        alone: dict[str, Any] = {"api_visibility": "private", "queue": False}
        stopped = self.stop.click(None, cancels=[asked], **alone)
        # Not before its last word.
        stopped.then(lambda: frames.note("Stopped."), None, self.said, **alone)
        self.shown.rerun(
            self.change,
            [self.answer],
            [self.compared, self.said],
            show_progress="minimal",
            **only_one,
        )

    def find(self, upload: dict[str, Any] | None, text: str | None) -> Iterator[dict[Any, Any]]:
        """Answer a question, and tell on the way how far it is."""
        yield {
            self.said: frames.note("Reading the picture …", busy=True),
            self.compared: "",
            self.downloads: gr.Column(visible=False),
        }
        if upload is None:
            told = frames.note("Choose a picture first: upload one, or take an example.")
            yield {self.said: told}
            return
        try:
            for word in self.desk.ask(self.desk.uploaded(upload.get("path")), text or ""):
                if isinstance(word, Prediction):
                    yield from self._explained(word)
                else:
                    yield {self.said: frames.thinking(word)}
        except EXPECTED as error:
            yield {self.said: frames.problem(error)}

    def _explained(self, prediction: Prediction) -> Iterator[dict[Any, Any]]:
        """The answer at once; what it was made of, and its files, when they are there."""
        verdict = frames.verdict(prediction)
        traceable = frames.can_be_changed(prediction)
        after = "Tracing which concepts made it" if traceable else "Saving it"
        yield {
            self.said: frames.note(f"{verdict} {after} …", busy=True),
            self.shown: frames.answer_frame(prediction),
        }
        finished, traced = self.desk.keep(prediction), self.desk.trace(prediction)
        yield {
            self.said: frames.note(verdict),
            self.shown: frames.answer_frame(prediction, traced) if traced else gr.skip(),
            self.answer: finished,
            self.kept: [str(path) for path in finished.files],
            self.downloads: gr.Column(visible=True),
        }

    def change(self, finished: Answer | None, event: gr.EventData) -> dict[Any, Any]:
        """Run the head again with the concepts changed, and compare."""
        try:
            if finished is None:
                raise ValueError("this answer is no longer kept; ask again")
            changed = self.desk.change(finished.prediction, event.edits)
            return {self.compared: frames.comparison_frame(changed)}
        except EXPECTED as error:
            return {self.said: frames.problem(error)}


def _question() -> tuple[gr.Image, gr.Textbox, gr.Button, gr.Button]:
    """Where a question is put: picture, instruction, and buttons to ask and to stop."""
    jobs = demo_jobs()
    with gr.Row(elem_classes="asking"):
        picture = gr.Image(
            str(jobs[0].source),
            label="Picture",
            type="filepath",
            sources=["upload", "clipboard"],
            height=340,
            buttons=[],
        )
        with gr.Column():
            instruction = gr.Textbox(
                jobs[0].instruction,
                label="Instruction",
                info="What to find, in your own words.",
                max_length=LONGEST_INSTRUCTION,
                lines=2,
            )
            with gr.Row():
                ask = gr.Button("Find it", variant="primary")
                stop = gr.Button("Stop", variant="secondary")
            gr.Examples(
                [[str(job.source), job.instruction] for job in jobs],
                [picture, instruction],
                label="Examples",
                example_labels=[job.instruction for job in jobs],
                api_visibility="private",
            )
    return picture, instruction, ask, stop


def build(desk: Desk) -> gr.Blocks:
    """Lay out the page and connect it with the desk."""
    blocks = gr.Blocks(title="SegCompass", analytics_enabled=False, delete_cache=(KEPT, KEPT))
    with blocks:
        Page(desk).connect()
    return blocks


def serve(
    desk: Desk,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    upload_mb: int = 20,
    waiting: int = 16,
    block: bool = True,
) -> gr.Blocks:
    """Open the page.

    Args:
        desk: answers.
        host: address to listen at; others than the loopback ones let other machines in.
        port: by default the first free one from 7860 on.
        upload_mb: largest file that is taken, in MB.
        waiting: questions that may wait; further ones are turned away.
        block: return when the server ends, not when it is up.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(desk.uploads)
    page = build(desk)
    page.queue(max_size=waiting, default_concurrency_limit=1, api_open=False)
    middleware = [Middleware(Guard)]
    if host in LOOPBACK:  # a page elsewhere must not reach this one under a name of its own
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK]))
    page.launch(
        server_name=host,
        server_port=port,
        max_file_size=upload_mb * 10**6,
        state_session_capacity=4 * waiting,
        app_kwargs={"middleware": middleware, "openapi_url": None},
        theme=_theme(),
        css=_text("web.css"),
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        share=False,
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
    )
    if host not in LOOPBACK:
        print(
            f"warning: every machine that reaches {host} can use this page; it asks no password",
            file=sys.stderr,
        )
    print(page.local_url, flush=True)
    if block:
        page.block_thread()
    return page


def run(model: Any, **options: Any) -> None:
    """Serve a model until interrupted; what was uploaded and written is gone afterwards."""
    limits = {name: options.pop(name) for name in ("timeout", "max_new_tokens")}
    with tempfile.TemporaryDirectory(prefix="segcompass-", ignore_cleanup_errors=True) as folder:
        serve(Desk(model, Path(folder), **limits), **options)


def _forget(answer: Answer | None) -> None:
    if answer is not None:
        shutil.rmtree(answer.files[0].parent, ignore_errors=True)


def _text(name: str) -> str:
    return (files("segcompass.apps") / "templates" / name).read_text(encoding="utf-8")


def _theme() -> gr.themes.Base:
    """The report's colours, and fonts that are on the reader's machine."""
    sans = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
    light, dark = {}, {}
    for name, (by_day, by_night) in {
        "body_background_fill": ("#f6f4ef", "#161513"),
        "body_text_color": ("#23211d", "#ece8df"),
        "body_text_color_subdued": ("#6c675e", "#a49d90"),
        "background_fill_primary": ("#fffefb", "#1e1d1a"),
        "background_fill_secondary": ("#efebe3", "#2a2824"),
        "block_background_fill": ("#fffefb", "#1e1d1a"),
        "block_label_background_fill": ("#fffefb", "#1e1d1a"),
        "block_label_text_color": ("#6c675e", "#a49d90"),
        "block_title_text_color": ("#23211d", "#ece8df"),
        "block_info_text_color": ("#6c675e", "#a49d90"),
        "border_color_primary": ("#e5e0d6", "#35322c"),
        "block_border_color": ("#e5e0d6", "#35322c"),
        "input_background_fill": ("#fffefb", "#161513"),
        "button_primary_background_fill": ("#23211d", "#ece8df"),
        "button_primary_background_fill_hover": ("#45413a", "#fffefb"),
        "button_primary_text_color": ("#fffefb", "#161513"),
        "button_secondary_background_fill": ("#efebe3", "#2a2824"),
        "button_secondary_background_fill_hover": ("#e5e0d6", "#35322c"),
        "button_secondary_text_color": ("#23211d", "#ece8df"),
    }.items():
        light[name], dark[f"{name}_dark"] = by_day, by_night
    base = gr.themes.Base(font=sans, font_mono=["ui-monospace", "Consolas", "monospace"])
    return base.set(**light, **dark)
