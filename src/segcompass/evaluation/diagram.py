"""The reliability diagram as SVG text, fit for a page or a file of its own."""

from __future__ import annotations

from html import escape

from segcompass.evaluation.calibration import Bin, Reliability

SIDE, MARGIN = 240, 44  # px
INK, BAR, IDEAL = "#333333", "#4477aa", "#999999"


def reliability_svg(reliability: Reliability, title: str) -> str:
    """Draw how often each confidence came true; on the diagonal they can be taken at their word.

    A bar spans its bin and is as high as the share that came true; it is the darker, the more
    confidences lie in it, and a dot marks their mean.
    """
    error = "no confidences" if reliability.error is None else f"ECE {reliability.error:.3f}"
    most = max(bin_.count for bin_ in reliability.bins)
    size = SIDE + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {size}" width="{size}" '
        f'font-family="sans-serif" font-size="11" fill="{INK}">',
        f'<rect width="{size}" height="{size}" fill="white"/>',
        *(_bar(bin_, most) for bin_ in reliability.bins if bin_.count),
        _line(0, 0, 1, 1, f'stroke="{IDEAL}" stroke-dasharray="4 3"'),
        _line(0, 0, 1, 0, f'stroke="{INK}"'),
        _line(0, 0, 0, 1, f'stroke="{INK}"'),
        *(_text(t, -0.06, f"{t:g}") + _text(-0.06, t, f"{t:g}") for t in (0, 0.5, 1)),
        _text(0.5, -0.14, "confidence"),
        _text(0.5, 1.06, f"{title}: share that came true, {error}"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _bar(bin_: Bin, most: int) -> str:
    assert bin_.confidence is not None and bin_.frequency is not None
    (x0, y0), (x1, y1) = _px(bin_.low, bin_.frequency), _px(bin_.high, 0)
    x, y = _px(bin_.confidence, bin_.frequency)
    about = f"{bin_.count} at {bin_.confidence:.3f}, {bin_.frequency:.3f} came true"
    return (
        f'<rect x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}" '
        f'fill="{BAR}" fill-opacity="{0.2 + 0.8 * bin_.count / most:.2f}">'
        f"<title>{about}</title></rect>"
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>'
    )


def _line(x0: float, y0: float, x1: float, y1: float, look: str) -> str:
    (left, top), (right, bottom) = _px(x0, y0), _px(x1, y1)
    return f'<line x1="{left:.1f}" y1="{top:.1f}" x2="{right:.1f}" y2="{bottom:.1f}" {look}/>'


def _text(x: float, y: float, text: str) -> str:
    left, top = _px(x, y)
    return f'<text x="{left:.1f}" y="{top + 4:.1f}" text-anchor="middle">{escape(text)}</text>'


def _px(x: float, y: float) -> tuple[float, float]:
    """From shares, origin bottom left, to the picture's pixels."""
    return MARGIN + SIDE * x, MARGIN + SIDE * (1 - y)
