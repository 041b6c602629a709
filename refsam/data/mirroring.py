"""Expressions about a mirrored picture."""

import re

# Whole words only: bright, upright and copyright stay as they are.
_SIDE = re.compile(r"\b(left|right)(?=(?:most|wards?|hand|side)?\b)", re.IGNORECASE)
# Phrases in which the words do not mean a side; they stay as they are.
_NO_SIDE = re.compile(
    r"""\b(?: right\ (?:now|away|then|angles?|side\ up) | all\ right
      | left\ (?:over|behind|alone|open|out)
      | (?:is|are|being|has|have|was|were)\ left (?!\ (?:of|side|hand)\b) )\b""",
    re.IGNORECASE | re.VERBOSE,
)
# Phrases that no rule can mirror. "Right behind the car" may mean a side or only "directly", unless an article or "far", say,
# makes it a side. Clockwise is reversed, too, and abbreviations could mean anything.
_AMBIGUOUS = re.compile(
    r"""(?<!\bthe\ )(?<!\bfar\ )(?<!\btop\ )(?<!\bbottom\ )(?<!\bupper\ )(?<!\blower\ )(?<!\bfront\ )(?<!\bback\ )
      \bright\ (?:next|behind|besides?|above|below|under|underneath|before|after|in\ front|in\ the\ (?:middle|cent\w+)
        |at|by|near|on\ top|up|there|here|against|outside|inside)\b
      | \b(?:anti-?|counter-?)?clockwise\b
      | \b(?:lft|lf|rt|rght|rite|rigth|letf)\b""",
    re.IGNORECASE | re.VERBOSE,
)


def mirrored(text: str) -> str | None:
    """The expression that is true of the picture flipped left to right; None where that cannot be told.

    Left and right, leftmost, left-hand, leftward and so on are exchanged, as whole words only and with their case kept.
    Phrases such as "right now" and "left behind" stay as they are. Mirroring twice gives the expression back.
    """
    swapped = _swap(text)
    told = not _AMBIGUOUS.search(text) and not _AMBIGUOUS.search(swapped)
    # "Left now" would become "right now", which is no side.
    return swapped if told and _swap(swapped) == text else None


def _swap(text: str) -> str:
    kept = [match.span() for match in _NO_SIDE.finditer(text)]

    def other(match: re.Match[str]) -> str:
        word = match.group()
        if any(begin <= match.start() < end for begin, end in kept):
            return word
        opposite = "right" if word.lower() == "left" else "left"
        if word.isupper():
            return opposite.upper()
        return opposite.capitalize() if word[0].isupper() else opposite

    return _SIDE.sub(other, text)
