"""The web page (extra ``web``): ask, watch the thought being written, look at the way, change it.

Gradio carries pictures, queue and downloads; what an answer looks like is ``web_frames.py``, what
happens behind it ``web_desk.py``. The page asks nothing of any other machine.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segcompass.apps import web_frames as frames
from segcompass.apps.runs import demo_jobs
from segcompass.apps.web_desk import Answer, Desk
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

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "localhost")
LONGEST_INSTRUCTION = 2000  # characters; the policy has its own limit in tokens
KEPT = 3600  # seconds that pictures and answers are kept after their last use
EXPECTED = (SegCompassError, ValueError, TimeoutError)  # errors that are told to whoever asked

# Gradio's own page runs inline scripts and builds functions from text. Whatever it loads comes from
# here: no outside font, script, picture or connection.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self' data: blob:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
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


class Guard:
    """Adds the page's content policy to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and its response with the headers."""

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message["headers"] = [*message["headers"], *headers]
            await send(message)

        await self.app(scope, receive, guarded)


def build(desk: Desk) -> gr.Blocks:
    """Lay out the page and connect it with the desk."""
    jobs = demo_jobs()
    page = gr.Blocks(title="SegCompass", analytics_enabled=False, delete_cache=(KEPT, KEPT))
    with page:
        answer = gr.State(None, time_to_live=KEPT, delete_callback=_forget)
        gr.HTML(_text("masthead.html"), elem_classes="top")
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
        said = gr.HTML(elem_classes="said")
        shown = gr.HTML(elem_classes="frame", js_on_load=_FRAME_JS + _INTO_VIEW_JS)
        compared = gr.HTML(elem_classes="frame", js_on_load=_FRAME_JS + _INTO_VIEW_JS)
        with gr.Column(visible=False, elem_classes="downloads") as downloads:
            kept = gr.File(label="Downloads", file_count="multiple", interactive=False)

        def find(upload: dict[str, Any] | None, text: str | None) -> Iterator[dict[Any, Any]]:
            yield {
                said: frames.note("Reading the picture …", busy=True),
                compared: "",
                downloads: gr.Column(visible=False),
            }
            if upload is None:
                yield {said: frames.note("Choose a picture first: upload one, or take an example.")}
                return
            try:
                yield from found(desk.uploaded(upload.get("path")), text or "")
            except EXPECTED as error:
                yield {said: frames.problem(error)}

        def found(path: Path, text: str) -> Iterator[dict[Any, Any]]:
            for word in desk.ask(path, text):
                if isinstance(word, Prediction):
                    yield from explained(word)
                else:
                    yield {said: frames.thinking(word)}

        def explained(prediction: Prediction) -> Iterator[dict[Any, Any]]:
            verdict = frames.verdict(prediction)
            traceable = frames.can_be_changed(prediction)
            after = "Tracing which concepts made it" if traceable else "Saving it"
            yield {
                said: frames.note(f"{verdict} {after} …", busy=True),
                shown: frames.answer_frame(prediction),
            }
            finished, traced = desk.keep(prediction), desk.trace(prediction)
            yield {
                said: frames.note(verdict),
                shown: frames.answer_frame(prediction, traced) if traced else gr.skip(),
                answer: finished,
                kept: [str(path) for path in finished.files],
                downloads: gr.Column(visible=True),
            }

        def change(finished: Answer | None, event: gr.EventData) -> dict[Any, Any]:
            try:
                if finished is None:
                    raise ValueError("this answer is no longer kept; ask again")
                return {
                    compared: frames.comparison_frame(desk.change(finished.prediction, event.edits))
                }
            except EXPECTED as error:
                return {said: frames.problem(error)}

        only_one = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
        asked = gr.on(
            [ask.click, instruction.submit],
            find,
            [picture, instruction],
            [said, shown, compared, downloads, answer, kept],
            show_progress="hidden",
            preprocess=False,  # gradio would open the picture with every decoder that Pillow has
            **only_one,
        )
        alone: dict[str, Any] = {"api_visibility": "private", "queue": False}
        stopped = stop.click(None, cancels=[asked], **alone)
        # Not before its last word.
        stopped.then(lambda: frames.note("Stopped."), None, said, **alone)
        shown.rerun(change, [answer], [compared, said], show_progress="minimal", **only_one)
    return page


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
