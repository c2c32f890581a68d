"""Provenance as a graph, slot -> concept -> token or patch: nodes and edges, or Graphviz DOT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from segcompass.explain.provenance import SlotProvenance, token_groups, token_label
from segcompass.io.outputs import slot_colour

PAIRS_PER_CONCEPT = 3  # tokens drawn under a concept of a slot
_FILLS = {
    "question": "#dbe9ff",
    "thought": "#fff1cc",
    "instance": "#d5f0df",
    "background": "#eceef2",
    "template": "#eceef2",
}


def graph(slots: Sequence[SlotProvenance], top: int = 6) -> dict[str, list[dict[str, Any]]]:
    """The heaviest concepts of each slot, and the tokens that each of them fires on.

    Args:
        slots: of one prediction.
        top: concepts of a slot.

    Returns:
        ``nodes`` with id, kind (slot, concept, token) and label; ``edges`` with source, target and
        weight, in logits of the slot's confidence. Edges to tokens also name the slot they are for.
    """
    nodes: dict[str, dict[str, Any]] = {}
    edges: list[dict[str, Any]] = []
    for slot in slots:
        codes, prediction = slot.codes, slot.prediction
        groups = token_groups(prediction, slot.slot)
        head = f"slot-{slot.slot}"
        score = float(prediction.slot_scores[slot.slot])
        nodes[head] = {"id": head, "kind": "slot", "label": f"slot {slot.slot}", "score": score}
        for weight in slot.concepts(top):
            concept = f"concept-{weight.number}"
            nodes[concept] = {"id": concept, "kind": "concept", "label": f"concept {weight.number}"}
            edges.append({"source": head, "target": concept, "weight": weight.confidence})
            pairs = np.flatnonzero(codes.columns.numpy() == weight.number)
            order = np.argsort(-np.abs(slot.confidence.weights[pairs]), kind="stable")
            for pair in pairs[order[:PAIRS_PER_CONCEPT]]:
                position = int(codes.rows[pair])
                token = f"token-{position}"
                nodes[token] = {
                    "id": token,
                    "kind": "token",
                    "label": token_label(prediction, position),
                    "group": str(groups[position]),
                }
                pull = float(slot.confidence.weights[pair])
                edges.append(
                    {"source": concept, "target": token, "slot": slot.slot, "weight": pull}
                )
    return {"nodes": list(nodes.values()), "edges": edges}


def to_dot(slots: Sequence[SlotProvenance], top: int = 6) -> str:
    """The same graph for Graphviz (``dot -Tsvg``); dashed edges speak against their slot."""
    drawn = graph(slots, top)
    heaviest = max((abs(edge["weight"]) for edge in drawn["edges"]), default=1.0) or 1.0
    lines = ["digraph provenance {", "  rankdir=LR;", '  node [fontname="sans-serif"];']
    for node in drawn["nodes"]:
        shape = {"slot": "ellipse", "concept": "box", "token": "note"}[node["kind"]]
        fill = _FILLS[node["group"]] if node["kind"] == "token" else "#ffffff"
        lines.append(
            f"  {_quoted(node['id'])} [label={_quoted(node['label'])}, shape={shape}, "
            f'style=filled, fillcolor="{fill}"];'
        )
    for edge in drawn["edges"]:
        slot = edge.get("slot", edge["source"].removeprefix("slot-"))
        colour = "#{:02x}{:02x}{:02x}".format(*slot_colour(int(slot)))
        style = "solid" if edge["weight"] >= 0 else "dashed"
        width = 0.5 + 4.5 * abs(edge["weight"]) / heaviest
        lines.append(
            f"  {_quoted(edge['source'])} -> {_quoted(edge['target'])} "
            f'[label="{edge["weight"]:+.3f}", color="{colour}", style={style}, '
            f"penwidth={width:.2f}];"
        )
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(text: str) -> str:
    """A DOT string: quotes and backslashes escaped, and nothing that could end the line."""
    plain = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return '"' + plain.replace("\\", "\\\\").replace('"', '\\"') + '"'
