"""How people ask: for each form and number, templates whose slots a form fills in. Data only.

A leading ``~`` marks a phrasing that is held out: val and tests use it, train never does. It is
made only of words that training phrasings hold too. Groups are chosen by the form: ``one`` and
``many`` by number, ``any`` and ``thing`` where the number is left open, or the name of a use.
"""

from __future__ import annotations

HELD_OUT_MARK = "~"

DISCRIMINATIVE: dict[str, dict[str, tuple[str, ...]]] = {
    "described": {
        "one": (
            "the {one}",
            "Find the {one}.",
            "Show me the {one}.",
            "Where is the {one}?",
            "Point at the {one}.",
            "I need the {one}.",
            "Can you see the {one}?",
            "Please mark the {one}.",
            "~Please show me the {one}.",
            "~I want to see the {one}.",
        ),
        "many": (
            "all {many}",
            "every {one}",
            "Find all {many}.",
            "Show me every {one}.",
            "Where are the {many}?",
            "Mark all {many}, please.",
            "Are there any {many} here?",
            "Can you point at all {many}?",
            "~Please find every {one}.",
            "~Where are all the {many}?",
        ),
    },
    "negated": {
        "one": (
            "the {one} that is not {attr}",
            "Find the {one} that is not {attr}.",
            "Which {one} is not {attr}?",
            "Show me the {one} that is not {attr}.",
            "~Point at the {one} that is not {attr}.",
        ),
        "many": (
            "{many} that are not {attr}",
            "all {many} that are not {attr}",
            "Which {many} are not {attr}?",
            "Find every {one} that is not {attr}.",
            "Show me all {many} except the {attr} ones.",
            "~Mark every {one} that is not {attr}.",
        ),
    },
    "either": {
        "one": (
            "the {one} that is {attr} or {attr2}",
            "Find the {attr} or {attr2} {one}.",
            "Which {one} is {attr} or {attr2}?",
            "Show me the {one} that is either {attr} or {attr2}.",
            "~Point at the {attr} or {attr2} {one}.",
        ),
        "many": (
            "{many} that are {attr} or {attr2}",
            "all {attr} and {attr2} {many}",
            "Which {many} are {attr} or {attr2}?",
            "Find every {one} that is {attr} or {attr2}.",
            "Mark the {attr} {many} and the {attr2} {many}.",
            "~Show me all {attr} or {attr2} {many}.",
        ),
    },
    "both_kinds": {
        "many": (
            "all {many} and {many2}",
            "every {one} and every {one2}",
            "Find the {many} and the {many2}.",
            "Where are the {many} and {many2}?",
            "Show me anything that is {a} or {a2}.",
            "~Mark all {many} and all {many2}.",
        ),
    },
    "only": {
        "one": (
            "the only {one}",
            "Find the only {one}.",
            "Where is the only {one}?",
            "Show me the only {one} here.",
            "Point at the only {one} in the picture.",
            "~Mark the only {one} in the picture.",
        ),
    },
    "but_kind": {
        "one": (
            "the {one} that is not {a2}",
            "Find the {one} that is not {a2}.",
            "Which {one} is not {a2}?",
            "I need the {one}, but not {a2}.",
            "~Point at the {one} that is not {a2}.",
        ),
        "many": (
            "all {many} except the {many2}",
            "{many} that are not {many2}",
            "Find all {many} but no {many2}.",
            "Which {many} are not {many2}?",
            "Show me every {one} that is not {a2}.",
            "~Mark all {many} except the {many2}.",
        ),
    },
}

SPATIAL: dict[str, dict[str, tuple[str, ...]]] = {
    "extreme": {
        "one": (
            "the {pole} {one}",
            "Find the {pole} {one}.",
            "Which {one} is nearest to the {edge} edge?",
            "Where is the {pole} {one}?",
            "Of all {many}, show the {pole} one.",
            "Show me the {one} nearest to the {edge} edge.",
            "I want the {pole} {one}, please.",
            "~Point at the {pole} {one}.",
            "~Of all {many}, mark the {pole} one.",
        ),
    },
    "beside": {
        "one": (
            "the {one} {side} {ref}",
            "Find the {one} {side} {ref}.",
            "Which {one} is {side} {ref}?",
            "Where is the {one} {side} {ref}?",
            "I need the {one} {side} {ref}.",
            "~Show me the {one} {side} {ref}.",
        ),
        "many": (
            "all {many} {side} {ref}",
            "Which {many} are {side} {ref}?",
            "Find every {one} {side} {ref}.",
            "Are there any {many} {side} {ref}?",
            "Show me the {many} {side} {ref}.",
            "~Mark all {many} {side} {ref}.",
        ),
        "thing": (
            "What is {side} {ref}?",
            "everything {side} {ref}",
            "Is there anything {side} {ref}?",
            "~Find everything {side} {ref}.",
        ),
    },
    "half": {
        "one": (
            "the {one} in the {half} half",
            "Find the {one} in the {half} half of the picture.",
            "Which {one} is in the {half} half?",
            "Show me the {one} in the {half} half.",
            "~Point at the {one} in the {half} half of the picture.",
        ),
        "many": (
            "all {many} in the {half} half",
            "Which {many} are in the {half} half?",
            "Find every {one} in the {half} half.",
            "Look at the {half} half and mark all {many}.",
            "Are there any {many} in the {half} half?",
            "~Show me all {many} in the {half} half of the picture.",
        ),
    },
    "closest": {
        "one": (
            "the {one} closest to {ref}",
            "Which {one} is closest to {ref}?",
            "Find the {one} nearest to {ref}.",
            "Show me the {one} that is closest to {ref}.",
            "I stand at {ref}, which {one} is nearest?",
            "~Point at the {one} nearest to {ref}.",
        ),
        "thing": (
            "What is closest to {ref}?",
            "What stands right next to {ref}?",
            "~What is nearest to {ref}?",
        ),
    },
    "farthest": {
        "one": (
            "the {one} farthest from {ref}",
            "Which {one} is farthest from {ref}?",
            "Find the {one} farthest away from {ref}.",
            "Show me the {one} that is farthest from {ref}.",
            "I stand at {ref}, which {one} is farthest away?",
            "~Point at the {one} farthest from {ref}.",
        ),
    },
    "corner": {
        "one": (
            "the {one} in the {corner} corner",
            "Find the {one} in the {corner} corner.",
            "Which {one} is in the {corner} corner?",
            "Show me the {one} in the {corner} corner of the picture.",
            "~Where is the {one} in the {corner} corner?",
        ),
        "many": (
            "all {many} in the {corner} corner",
            "Find every {one} in the {corner} corner.",
            "Which {many} are in the {corner} corner?",
            "~Mark all {many} in the {corner} corner.",
        ),
        "thing": (
            "What is in the {corner} corner?",
            "Is there anything in the {corner} corner?",
            "~everything in the {corner} corner",
        ),
    },
}

GEOMETRIC: dict[str, dict[str, tuple[str, ...]]] = {
    "sized": {
        "one": (
            "the {size} {one}",
            "Which {one} is {size}?",
            "Find the {one} that is {size}.",
            "Show me the {size} {one}.",
            "I need the {one} of {size} size.",
            "~Where is the {one} that is {size}?",
        ),
        "many": (
            "all {size} {many}",
            "Which {many} are {size}?",
            "Find every {size} {one}.",
            "{many} of {size} size",
            "Show me {many} that are {size}.",
            "~Mark every {one} of {size} size.",
        ),
    },
    "biggest": {
        "one": (
            "the {most} {one}",
            "Find the {most} {one}.",
            "Which {one} is the {most}?",
            "Of all {many}, which one is the {most}?",
            "Show me the {most} of the {many}.",
            "Compare the {many} and mark the {most} one.",
            "~Point at the {most} of the {many}.",
        ),
    },
    "bigger": {
        "one": (
            "the {one} {than} {ref}",
            "Which {one} is {than} {ref}?",
            "Find the {one} that is {than} {ref}.",
            "Show me the {one} {than} {ref}.",
            "~Point at the {one} that is {than} {ref}.",
        ),
        "many": (
            "all {many} {than} {ref}",
            "Which {many} are {than} {ref}?",
            "Find every {one} that is {than} {ref}.",
            "Are there any {many} {than} {ref}?",
            "Compare all {many} and show those {than} {ref}.",
            "~Mark all {many} that are {than} {ref}.",
        ),
        "thing": (
            "What is {than} {ref}?",
            "Is anything {than} {ref}?",
            "~everything that is {than} {ref}",
        ),
    },
    "shaped": {
        "one": (
            "the {form} {one}",
            "Which {one} is {form}?",
            "Find the {one} with a {form} shape.",
            "Show me the {one} that is {form}.",
            "~Where is the {one} with a {form} shape?",
        ),
        "many": (
            "all {form} {many}",
            "Which {many} are {form}?",
            "Find every {form} {one}.",
            "{many} with a {form} shape",
            "Which {many} have a {form} shape?",
            "~Mark all {many} that are {form}.",
        ),
    },
    "shaped_not": {
        "one": (
            "the {form} {one} that is not {attr}",
            "Which {form} {one} is not {attr}?",
            "Find the {form} {one} that is not {attr}.",
            "I want a {form} {one}, but not {an_attr} one.",
            "~Show me the {form} {one} that is not {attr}.",
        ),
        "many": (
            "{form} {many} that are not {attr}",
            "all {form} {many} except the {attr} ones",
            "Which {form} {many} are not {attr}?",
            "Find every {form} {one} that is not {attr}.",
            "~Mark all {form} {many} that are not {attr}.",
        ),
    },
    "same_size": {
        "one": (
            "the {one} of the same size as {ref}",
            "Which {one} is as big as {ref}?",
            "Find the {one} that is as big as {ref}.",
            "Show me the {one} that has the size of {ref}.",
            "~Point at the {one} that is as big as {ref}.",
        ),
        "many": (
            "all {many} of the same size as {ref}",
            "Which {many} are as big as {ref}?",
            "Find every {one} that has the size of {ref}.",
            "Compare the {many} and mark those as big as {ref}.",
            "~Show me all {many} as big as {ref}.",
        ),
    },
}

MULTI_STEP: dict[str, dict[str, tuple[str, ...]]] = {
    "same_colour": {
        "one": (
            "the {one} of the same colour as {ref}",
            "Which {one} has the colour of {ref}?",
            "Find the {one} that matches the colour of {ref}.",
            "Show me the {one} with the same colour as {ref}.",
            "Look at {ref} and find the {one} of that colour.",
            "~Point at the {one} that has the colour of {ref}.",
        ),
        "many": (
            "all {many} of the same colour as {ref}",
            "Which {many} have the colour of {ref}?",
            "Find every {one} that matches the colour of {ref}.",
            "Look at {ref} and mark all {many} of that colour.",
            "{many} that have the same colour as {ref}",
            "~Show me all {many} with the colour of {ref}.",
        ),
    },
    "kind_of_closest": {
        "many": (
            "other things of the same kind as the one closest to {ref}",
            "What else is like the thing closest to {ref}?",
            "Find more things like the one nearest to {ref}.",
            "Look at the thing closest to {ref} and mark others like it.",
            "Which other things are like the one nearest to {ref}?",
            "~Find other things like the one closest to {ref}.",
        ),
    },
    "colour_of_closest": {
        "many": (
            "other things with the colour of the one closest to {ref}",
            "Find more things in the colour of the one nearest to {ref}.",
            "What else has the colour of the thing closest to {ref}?",
            "Which other things match the colour of the thing nearest to {ref}?",
            "~Mark other things in the colour of the thing closest to {ref}.",
        ),
    },
    "colour_of_extreme": {
        "one": (
            "the {one} in the colour of {ref}",
            "First look at {ref}, then find the {one} of that colour.",
            "Which {one} matches {ref} in colour?",
            "Show me the {one} in the same colour as {ref}.",
            "~Find the {one} in the colour of {ref}.",
        ),
        "many": (
            "all {many} in the colour of {ref}",
            "First look at {ref}, then find all {many} of that colour.",
            "Which {many} match {ref} in colour?",
            "Show me all {many} in the colour of {ref}.",
            "~Mark all {many} in the same colour as {ref}.",
        ),
    },
    "beside_extreme": {
        "one": (
            "the {one} that is {side} {ref}",
            "First find {ref}, then the {one} {side} it.",
            "Look for {ref} and show the {one} {side} it.",
            "Which {one} can you see {side} {ref}?",
            "~First look for {ref}, then find the {one} {side} it.",
        ),
        "many": (
            "{many} that are {side} {ref}",
            "First find {ref}, then all {many} {side} it.",
            "Look for {ref} and show the {many} {side} it.",
            "Which {many} can you see {side} {ref}?",
            "~First look for {ref}, then mark all {many} {side} it.",
        ),
        "thing": (
            "First find {ref}, what is {side} it?",
            "What can you see {side} {ref}?",
            "Look for {ref} and show everything {side} it.",
        ),
    },
    "closest_of": {
        "one": (
            "of the {many}, the one closest to {ref}",
            "Which of the {many} is closest to {ref}?",
            "Of all {many}, find the one nearest to {ref}.",
            "Compare the {many} and mark the one closest to {ref}.",
            "Look at the {many} and find the one nearest to {ref}.",
            "~Of the {many}, which one is nearest to {ref}?",
        ),
    },
    "two_sides": {
        "one": (
            "the {one} {side} {ref} and {side2} {ref2}",
            "Which {one} is {side} {ref} and {side2} {ref2}?",
            "Find the {one} {side} {ref} and {side2} {ref2}.",
            "~Show me the {one} {side} {ref} and {side2} {ref2}.",
        ),
        "many": (
            "all {many} {side} {ref} and {side2} {ref2}",
            "Which {many} are {side} {ref} and {side2} {ref2}?",
            "~Find all {many} {side} {ref} and {side2} {ref2}.",
        ),
        "thing": (
            "What is {side} {ref} and {side2} {ref2}?",
            "Find everything {side} {ref} and {side2} {ref2}.",
        ),
    },
}

COMMONSENSE: dict[str, dict[str, tuple[str, ...]]] = {
    "use": {
        "any": (
            "something {todo}",
            "I need something {todo}.",
            "Find something {todo}.",
            "Is there anything {todo}?",
            "all things {todo}",
            "Show me everything {todo}.",
            "~I want something {todo}.",
            "~Where can I find something {todo}?",
        ),
        "drink": (
            "I am thirsty.",
            "I am thirsty, what can I drink from?",
            "What could hold my drink?",
            "~What can I drink from?",
        ),
        "eat": (
            "I am hungry.",
            "I am hungry, what can I eat?",
            "What could I eat here?",
            "~Can I eat any of these?",
        ),
        "read": (
            "What could I read?",
            "I am bored and like to read.",
            "Which of these tell a story?",
            "~I like to read a story.",
        ),
        "time": (
            "What time is it?",
            "How late is it now?",
            "What tells me the time?",
            "~What time is it now?",
        ),
        "light": (
            "It is getting dark.",
            "It is too dark to read.",
            "What could give me light?",
            "~It is too dark here.",
        ),
        "sit": (
            "I am tired and must sit down.",
            "Where could I sit down?",
            "My legs are tired.",
            "~Where can I sit down?",
        ),
        "cut": (
            "How could I cut the bread?",
            "What is sharp enough to cut?",
            "The bread must be cut.",
            "~What could cut the bread?",
        ),
        "carry": (
            "How do I carry my things home?",
            "What can hold my shopping?",
            "I go shopping, what do I take?",
            "~What can carry my shopping?",
        ),
        "wear": (
            "What could I wear?",
            "I get dressed, what can I wear?",
            "Which of these are clothes?",
            "~Which of these can I wear?",
        ),
        "play": (
            "The children want to play.",
            "What could the children play with?",
            "Which of these is a toy?",
            "~What can I play with?",
        ),
        "open": (
            "The door is locked.",
            "How do I open the locked door?",
            "What opens a lock?",
            "~What opens the door?",
        ),
        "rain": (
            "It is raining.",
            "It is raining, what do I take?",
            "What keeps me dry outside?",
            "~It is raining, what keeps me dry?",
        ),
        "pour": (
            "What could I pour from?",
            "Pour me a drink, please.",
            "Which of these can pour?",
            "~What can I pour a drink from?",
        ),
        "grow": (
            "What must be watered?",
            "Which of these are alive?",
            "What needs water to grow?",
            "~What needs water here?",
        ),
    },
    "use_not": {
        "any": (
            "something {todo} that is not {attr}",
            "I need something {todo}, but not {an_attr} one.",
            "Find everything {todo} that is not {attr}.",
            "Is there anything {todo} that is not {attr}?",
            "things {todo}, but no {attr} ones",
            "~Show me something {todo} that is not {attr}.",
        ),
    },
    "use_colour": {
        "any": (
            "something {attr} {todo}",
            "I need something {attr} {todo}.",
            "Find {attr} things {todo}.",
            "Is there anything {attr} {todo}?",
            "all {attr} things {todo}",
            "~Show me something {attr} {todo}.",
        ),
    },
    "use_extreme": {
        "one": (
            "the {pole} thing {todo}",
            "Find the {pole} thing {todo}.",
            "Which thing {todo} is nearest to the {edge} edge?",
            "I want the {pole} thing {todo}.",
            "~Show me the {pole} thing {todo}.",
        ),
    },
    "use_half": {
        "any": (
            "something {todo} in the {half} half",
            "In the {half} half, find something {todo}.",
            "Is there anything {todo} in the {half} half?",
            "Find everything {todo} in the {half} half.",
            "~Show me something {todo} in the {half} half.",
        ),
    },
    "part": {
        "one": (
            "the thing with {part}",
            "Which thing has {part}?",
            "Find the thing that has {part}.",
            "~Show me the thing that has {part}.",
        ),
        "many": (
            "all things with {part}",
            "Which things have {part}?",
            "Find everything with {part}.",
            "What has {part}?",
            "Is there anything with {part}?",
            "~Show me everything that has {part}.",
        ),
    },
    "part_colour": {
        "one": (
            "the {attr} thing with {part}",
            "Which {attr} thing has {part}?",
            "Find the {attr} thing that has {part}.",
            "~Show me the {attr} thing with {part}.",
        ),
        "many": (
            "all {attr} things with {part}",
            "Which {attr} things have {part}?",
            "Find every {attr} thing that has {part}.",
            "Show me something {attr} with {part}.",
            "~Is there anything {attr} with {part}?",
        ),
    },
    "part_not": {
        "one": (
            "the thing with {part} that is not {a2}",
            "Which thing has {part}, but is not {a2}?",
            "Find the thing with {part} that is not {a2}.",
            "~Show me the thing with {part} that is not {a2}.",
        ),
        "many": (
            "things with {part} that are not {many2}",
            "Which things have {part}, but are not {many2}?",
            "Find everything with {part} except the {many2}.",
            "Show me all things with {part}, but no {many2}.",
            "~all things with {part} except the {many2}",
        ),
    },
}

PHRASINGS: dict[str, dict[str, tuple[str, ...]]] = {
    **DISCRIMINATIVE,
    **SPATIAL,
    **GEOMETRIC,
    **MULTI_STEP,
    **COMMONSENSE,
}

SIDES: dict[str, tuple[str, ...]] = {  # the first is the canonical one
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "higher than"),
    "below": ("below", "lower than"),
}
LARGEST: tuple[str, ...] = ("largest", "biggest")
BIGGER: tuple[str, ...] = ("bigger than", "larger than")
PURPOSES: dict[str, str] = {  # keys of catalog.USES
    "drink": "to drink from",
    "eat": "to eat",
    "read": "to read",
    "time": "to tell the time",
    "light": "to give light",
    "sit": "to sit on",
    "cut": "to cut with",
    "carry": "to carry shopping with",
    "wear": "to wear",
    "play": "to play with",
    "open": "to open a lock",
    "rain": "to keep the rain off",
    "pour": "to pour from",
    "grow": "to water",
}
PARTS: dict[str, str] = {  # parts that a person would grant to these categories and to no others
    "handle": "a handle",
    "cap": "a cap",
    "spout": "a spout",
    "lid": "a lid",
    "pages": "pages",
    "hands": "hands",
    "shade": "a shade",
    "flame": "a flame",
    "legs": "legs",
    "blade": "a blade",
    "brim": "a brim",
    "laces": "laces",
    "teeth": "teeth",
}
