"""Scoring protocols: what each counts, matches and averages, as data and in words."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from refsam.errors import UserError


@dataclass(frozen=True)
class Protocol:
    """Rules by which predicted masks are scored against the truth.

    `per_expression`: one binary mask per expression, else one map of object numbers per video. `matching`: predicted
    objects are assigned to true ones by the best mean J&F, else by their numbers. `void`: pixels of value 255 in the truth
    are left out, else they are background. `inner_frames`: the first and the last frame are not scored. `most_objects`: the
    highest object number that a prediction may hold, None for the number of true objects. `rules`: the same in words.
    """

    name: str
    rules: tuple[str, ...]
    per_expression: bool = False
    matching: bool = False
    void: bool = False
    inner_frames: bool = False
    most_objects: int | None = None


_OBJECT_AVERAGE = (
    "Scores: mean over the frames of each object, then mean over all objects of all videos."
)
_OBJECT_COUNT = "True objects: numbers 1 to the highest one in the first frame; an object never predicted scores as empty."

PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        protocol.name: protocol
        for protocol in (
            Protocol(
                name="davis-unsupervised",
                rules=(
                    "Masks: one map of object numbers per frame; as the DAVIS 2017 unsupervised evaluation.",
                    _OBJECT_COUNT,
                    "Matching: Hungarian, on the mean of J and F, so that swapped object numbers cost nothing.",
                    "Frames: all, first and last included. Void pixels (255 in the truth) are left out.",
                    "At most object number 20 may be predicted.",
                    _OBJECT_AVERAGE,
                ),
                matching=True,
                void=True,
                most_objects=20,
            ),
            Protocol(
                name="davis-semi-supervised",
                rules=(
                    "Masks: one map of object numbers per frame; as the DAVIS 2017 semi-supervised evaluation.",
                    _OBJECT_COUNT,
                    "Matching: none, object numbers must agree; there may be no more numbers than in the truth.",
                    "Frames: all but the first and the last. Void pixels (255 in the truth) are background.",
                    _OBJECT_AVERAGE,
                ),
                inner_frames=True,
            ),
            Protocol(
                name="per-expression",
                rules=(
                    "Masks: one binary mask per expression and frame, any value but 0 is the object; as MeViS' evaluation "
                    "(the order of averages on the closed Ref-YouTube-VOS server is not known).",
                    "Matching: none, each expression is scored by itself; masks of different expressions may overlap.",
                    "Frames: all that the truth lists, first and last included. No void pixels.",
                    "A frame without the object counts 1 if nothing is predicted, 0 otherwise.",
                    "Scores: mean over the frames of each expression, then mean over all expressions of all videos.",
                ),
                per_expression=True,
            ),
        )
    }
)


def find_protocol(name: str) -> Protocol:
    """The protocol of that name; UserError if there is none."""
    if name not in PROTOCOLS:
        raise UserError(f"protocol: got {name!r}, want one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
