"""Names of the families of defenses, as readers see them."""

from __future__ import annotations

# Abbreviations of the four families of https://arxiv.org/abs/2502.14486; it has no other.
PAPER_FAMILIES = {
    "reminders": "SR",  # system reminders
    "tuning": "MO",  # model optimization
    "refactoring": "QR",  # query refactoring
    "noise": "NI",  # noise injection
    "image_noise": "NI",
}


def format_family(family: str) -> str:
    """Return the name of a family as readers see it, with its abbreviation in the paper if it has one.

    >>> format_family("reminders"), format_family("steering")
    ('reminders (SR)', 'steering')
    """
    abbreviation = PAPER_FAMILIES.get(family)
    return f"{family} ({abbreviation})" if abbreviation else family
