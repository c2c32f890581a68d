"""Text from outside, made safe to look at on a page or a terminal."""

from __future__ import annotations

import re

# What a reader should not be fooled by: controls, and marks that reorder the text around them.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Text in which nothing acts unseen: control and reordering characters become symbols."""

    def symbol(match: re.Match[str]) -> str:
        code = ord(match[0])
        if code < 0x20:
            return chr(0x2400 + code)
        return f"⟨U+{code:04X}⟩" if 0x2000 <= code < 0x2100 else "\ufffd"

    return _HIDDEN.sub(symbol, text)
