"""Self-contained HTML pages: one file each, which asks nothing of the network and runs one script.

Pictures go in as data URIs, style and script inline; the content policy forbids any request and any
script but the page's own, whose digest it states. Text from outside goes through jinja2's
autoescape.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from segcompass.apps.visible import visible


def render(template: str, *, styles: Sequence[str], scripts: Sequence[str], **context: Any) -> str:
    """Fill a template of ``apps/templates``.

    Args:
        template: name of the template; it places ``style``, ``script`` and ``policy``.
        styles: names of its style sheets, in order.
        scripts: names of its scripts, in order; they run as one.
        context: what else the template says.
    """
    style, code = ("".join(map(_asset, names)) for names in (styles, scripts))
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    return (
        _environment()
        .get_template(template)
        .render(
            **context,
            style=Markup(style),  # our own files, not input
            script=Markup(code),
            policy="default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
            f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        )
    )


def duration(seconds: float) -> str:
    """A time span as a person reads it: 12 ms, 1.3 s."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"


def data_uri(image: Image.Image, kind: str, **options: object) -> str:
    """A picture as text that stands in a page; ``kind`` is one of Pillow's formats."""
    out = io.BytesIO()
    image.save(out, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("segcompass.apps"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"visible": visible, "duration": duration}
    return environment


def _asset(name: str) -> str:
    return (files("segcompass.apps") / "templates" / name).read_text(encoding="utf-8")
