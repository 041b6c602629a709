"""Problems of masks to score, collected and listed in full."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from refsam.errors import UserError

_KINDS = {  # in words; {s} makes the plural
    "video missing": "video{s} missing",
    "video extra": "video{s} not in the truth",
    "expression missing": "expression{s} missing",
    "expression extra": "expression{s} not in the truth",
    "expression refused": "expression{s} that the model cannot take",
    "frame missing": "frame{s} missing",
    "frame extra": "frame{s} not in the truth",
    "unreadable": "unreadable PNG{s}",
    "mode": "PNG{s} neither palette nor grey",
    "size": "mask{s} of another size than the truth",
    "values": "mask{s} not binary",
    "objects": "mask{s} with too high an object number",
    "truth": "fault{s} in the truth",
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `kind` (a key of the table above), `where` (a video, or video/expression), `what` in it."""

    kind: str
    where: str
    what: str

    @property
    def in_truth(self) -> bool:
        """Whether the truth itself is wrong, which no option can correct."""
        return self.kind == "truth"


class MaskProblemsError(UserError):
    """Masks that cannot be scored as they are; `problems` holds every reason, `advice` says what to do."""

    def __init__(self, problems: Sequence[Problem], advice: str = "") -> None:
        self.problems = tuple(problems)
        self.advice = (
            advice or "put them right, or score what cannot be used as empty with --missing zero"
        )
        if any(problem.in_truth for problem in problems):
            self.advice = "those of the truth must be put right"
        super().__init__(f"{'; '.join(describe(problems))}; {self.advice}")


def describe(problems: Iterable[Problem]) -> list[str]:
    """One line for each place and kind of problem, with everything it concerns."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for problem in problems:
        groups[problem.where, problem.kind].append(problem.what)
    lines = []
    for (where, kind), whats in groups.items():
        place = f"{where}: " if where else ""
        words = _KINDS[kind].format(s="s" if len(whats) > 1 else "")
        lines.append(f"{place}{len(whats)} {words}: {', '.join(whats)}")
    return lines
