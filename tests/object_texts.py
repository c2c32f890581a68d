"""Objects as answers spell them: what has to be read, and what has to be refused, and why."""

from __future__ import annotations

from segcompass.reasoning.object_answers import MOST_OBJECTS, TextObject

MUG = TextObject((10, 20, 30, 40), ((15, 25),))
BARE = TextObject((10, 20, 30, 40))
HAT = TextObject((1, 2, 3, 4), ((2, 3),))
ONE = '{"bbox_2d":[10,20,30,40],"point_2d":[15,25]}'

VARIANTS = {
    "none": ("[]", []),
    "VisionReasoner": (f"[{ONE}]", [MUG]),
    "two": (f'[{ONE}, {{"bbox_2d": [1, 2, 3, 4], "point_2d": [2, 3]}}]', [MUG, HAT]),
    "Seg-Zero": (
        "{'bbox': [10, 20, 30, 40], 'points_1': [15, 25], 'points_2': [18, 28]}",
        [TextObject((10, 20, 30, 40), ((15, 25), (18, 28)))],
    ),
    "one object without a list": (ONE, [MUG]),
    "box and point": ('[{"box": [10, 20, 30, 40], "point": [15, 25]}]', [MUG]),
    "no point": ('[{"bbox_2d": [10, 20, 30, 40]}]', [BARE]),
    "a label": ('[{"bbox_2d": [10, 20, 30, 40], "label": "a dog\'s [red] {mug}"}]', [BARE]),
    "a code fence": (f"```json\n[{ONE}]\n```", [MUG]),
    "text around": (f"The objects are: [{ONE}]. That is all", [MUG]),
    "fractions": ('[{"bbox_2d": [10.5, 2e1, 30.25, 40], "point_2d": [15.0, 25]}]',
                  [TextObject((10.5, 20, 30.25, 40), ((15, 25),))]),
    "corners swapped": ('[{"bbox_2d": [30, 40, 10, 20], "point_2d": [15, 25]}]', [MUG]),
    "one pair of corners swapped": ('[{"bbox_2d": [30, 20, 10, 40]}]', [BARE]),
    "beyond the canvas": ('[{"bbox_2d": [-5, 0, 9999, 40]}]', [TextObject((-5, 0, 9999, 40))]),
    "no area": ('[{"bbox_2d": [7, 7, 7, 7]}]', [TextObject((7, 7, 7, 7))]),
}  # fmt: skip

WRONG = {
    "nothing": ("", "no list"),
    "words": ("the red mug", "no list"),
    "numbers without a list": ("10, 20, 30, 40", "no list"),
    "bare coordinates": ("[10, 20, 30, 40]", "among them int"),
    "a list in a list": (f"[[{ONE}]]", "among them list"),
    "a text in the list": ('["mug"]', "among them str"),
    "nothing in the list": ("[null]", "among them NoneType"),
    "not closed": (f"[{ONE}", "no JSON"),
    "object not closed": ('[{"bbox_2d": [1, 2, 3, 4]', "no JSON"),
    "comma missing": ('[{"bbox_2d": [1 2 3 4]}]', "no JSON"),
    "comma too many": (f"[{ONE},]", "no JSON"),
    "key without quotes": ("[{bbox_2d: [1, 2, 3, 4]}]", "no JSON"),
    "calculated": ('[{"bbox_2d": [1, 2, 1+2, 4]}]', "no JSON"),
    "leading zeros": ('[{"bbox_2d": [01, 2, 3, 4]}]', "no JSON"),
    "code": ("[{'bbox_2d': list(range(4))}]", "no JSON"),
    "two lists": (f"[{ONE}] [{ONE}]", "more than one"),
    "objects without a list": (f"{ONE}, {ONE}", "more than one"),
    "closed twice": (f"[{ONE}]]", "more than one"),
    "no box": ('[{"point_2d": [15, 25]}]', "want one of bbox_2d"),
    "empty object": ("[{}]", "want one of bbox_2d"),
    "two boxes": ('[{"bbox_2d": [1, 2, 3, 4], "box": [1, 2, 3, 4]}]', "want one of bbox_2d"),
    "another key": ('[{"bounding_box": [1, 2, 3, 4]}]', "want one of bbox_2d"),
    "three coordinates": ('[{"bbox_2d": [1, 2, 3]}]', "want 4 coordinates"),
    "five coordinates": ('[{"bbox_2d": [1, 2, 3, 4, 5]}]', "want 4 coordinates"),
    "two corners": ('[{"bbox_2d": [[1, 2], [3, 4]]}]', "want 4 coordinates"),
    "box as text": ('[{"bbox_2d": "1, 2, 3, 4"}]', "want 4 coordinates"),
    "box by name": ('[{"bbox_2d": {"x0": 1, "y0": 2, "x1": 3, "y1": 4}}]', "want 4 coordinates"),
    "box of nothing": ('[{"bbox_2d": null}]', "want 4 coordinates"),
    "point of three": ('[{"bbox_2d": [1, 2, 3, 4], "point_2d": [1, 2, 3]}]', "want 2 coordinates"),
    "point of nothing": ('[{"bbox_2d": [1, 2, 3, 4], "point_2d": null}]', "want 2 coordinates"),
    "a number as text": ('[{"bbox_2d": [1, 2, 3, "4"]}]', "want 4 numbers"),
    "a number missing": ('[{"bbox_2d": [1, 2, 3, null]}]', "want 4 numbers"),
    "truth as a number": ('[{"bbox_2d": [1, 2, 3, true]}]', "want 4 numbers"),
    "not a number": ('[{"bbox_2d": [1, 2, 3, NaN]}]', "NaN"),
    "infinite": ('[{"bbox_2d": [1, 2, 3, Infinity]}]', "Infinity"),
    "minus infinity": ('[{"bbox_2d": [1, 2, 3, -Infinity]}]', "-Infinity"),
    "an exponent": ('[{"bbox_2d": [1, 2, 3, 1e999]}]', "out of all bounds"),
    "huge": ('[{"bbox_2d": [1, 2, 3, 10000001]}]', "out of all bounds"),
    "thousands of digits": (f'[{{"bbox_2d": [1, 2, 3, {"9" * 6000}]}}]', "no JSON"),
    "deep": ("[" * 5000 + "]" * 5000, "5000 brackets deep"),
    "long": ("[" + " " * 30_000 + "]", "30002 characters"),
    "too many": ("[" + ",".join([ONE] * (MOST_OBJECTS + 1)) + "]", "at most 64 objects, got 65"),
}
