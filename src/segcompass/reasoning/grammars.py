"""What may be written after a thought, token by token, for each form of answer.

A grammar is a generator of choices: it yields the token rows that may come next, and is sent the
index of the one that was written. No row may begin with another one.
"""

from __future__ import annotations

from collections.abc import Generator

from segcompass.reasoning.prompts import ANSWER_CLOSE, ANSWER_OPEN, Prompt

Choices = list[list[int]]
Grammar = Generator[Choices, int, None]

_DIGITS = "0123456789"
_FIRST, _NOTHING = ANSWER_OPEN + '[{"bbox_2d":[', f"{ANSWER_OPEN}[]{ANSWER_CLOSE}"
_COMMA, _POINT, _ANOTHER = ",", '],"point_2d":[', ']},{"bbox_2d":['
_LAST = "]}]" + ANSWER_CLOSE


class Writer:
    """Follows a grammar while tokens are chosen one by one."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._open: dict[int, list[int]] = dict(enumerate(next(grammar)))
        self.done = False

    def allowed(self) -> list[int]:
        """The tokens of which one must come next."""
        return list(dict.fromkeys(row[0] for row in self._open.values()))

    def take(self, token: int) -> None:
        """Go on behind ``token``, one of :meth:`allowed`."""
        self._open = {i: row[1:] for i, row in self._open.items() if row[0] == token}
        written = [i for i, row in self._open.items() if not row]
        if not written:
            return
        try:
            self._open = dict(enumerate(self._grammar.send(written[0])))
        except StopIteration:
            self.done = True


def conclude(prompt: Prompt, room: int) -> Grammar:
    """The grammar of the configured form, in at most ``room`` tokens."""
    if prompt.config.form == "objects":
        yield from _objects(prompt, room)
    else:
        yield _whole(prompt)


def least_room(prompt: Prompt) -> int:
    """Tokens that any conclusion of the configured form has room in; of objects, one."""
    if prompt.config.form == "objects":
        first, _, last = _object_tokens(prompt)
        return first + last
    return max(map(len, _whole(prompt)))


def _whole(prompt: Prompt) -> Choices:
    """All conclusions of a form that has only a few."""
    if prompt.config.form == "slots":
        return [prompt.slot_ids]
    return [prompt.encode_inner(f"{ANSWER_OPEN}{digit}{ANSWER_CLOSE}") for digit in _DIGITS]


def _objects(prompt: Prompt, room: int) -> Grammar:
    """Objects with box and point, as `object_answers.write_objects` writes them."""
    first, another, last = _object_tokens(prompt)
    most = min(prompt.config.slots, 1 + (room - first - last) // another)
    comma, point = prompt.encode_inner(_COMMA), prompt.encode_inner(_POINT)
    ends = [prompt.encode_inner(_LAST), prompt.encode_inner(_ANOTHER)]
    if (yield [prompt.encode_inner(_FIRST), prompt.encode_inner(_NOTHING)]) == 1:
        return
    for count in range(1, most + 1):
        for separator in (comma, comma, comma, point, comma):
            yield from _number(prompt, [separator])
        if (yield from _number(prompt, ends if count < most else ends[:1])) == 0:
            return


def _number(prompt: Prompt, ends: Choices) -> Generator[Choices, int, int]:
    """A coordinate on the canvas, and the index of what was written behind it."""
    text = ""
    while True:
        more = [d for d in _DIGITS if text != "0" and int(text + d) < prompt.config.canvas_side]
        chosen = yield [prompt.encode_inner(d) for d in more] + (ends if text else [])
        if chosen >= len(more):
            return chosen - len(more)
        text += more[chosen]


def _object_tokens(prompt: Prompt) -> tuple[int, int, int]:
    """Most tokens of the first object, of another one, and of the end."""
    first, another, last, comma, point = (
        len(prompt.encode_inner(text)) for text in (_FIRST, _ANOTHER, _LAST, _COMMA, _POINT)
    )
    digit = max(len(prompt.encode_inner(d)) for d in _DIGITS)
    inside = 4 * comma + point + 6 * digit * len(str(prompt.config.canvas_side - 1))
    return first + inside, another + inside, last
