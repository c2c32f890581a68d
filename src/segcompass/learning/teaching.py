"""Which teacher an interface has, by the form of its answers."""

from __future__ import annotations

from segcompass.grounding.image_encoder import ImageEncoder
from segcompass.interfaces.base import Interface
from segcompass.learning.object_teacher import ObjectTeacher
from segcompass.learning.segmentation import PlaceHead
from segcompass.learning.stages import JointStage
from segcompass.learning.teachers import MaskTeacher, Teacher
from segcompass.reasoning.policy import Policy


def teacher_of(
    policy: Policy,
    encoder: ImageEncoder,
    interface: Interface,
    stage: JointStage,
    place: PlaceHead | None,
) -> Teacher:
    """The teacher of an interface; arguments as of `teachers.MaskTeacher`."""
    kind = ObjectTeacher if interface.form == "objects" else MaskTeacher
    return kind(policy, encoder, interface, stage, place)
