"""Colors, markers and fonts of the figures, distinguishable for color-blind readers and in grey print."""

from typing import Any

# Okabe and Ito's colors, https://jfly.uni-koeln.de/color/ ; their yellow is too light for paper.
BLUE, VERMILION, GREEN, SKY, PURPLE, ORANGE = "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#CC79A7", "#E69F00"
VIOLET = "#542788"  # dark, to be distinguishable from their purple
BROWN = "#8C510A"
BLACK, DARK, GREY = "#000000", "#666666", "#9A9A9A"
TEXT_SIZE = 7.5  # font size of names and numbers inside a figure

CLASS_STYLES = (
    (True, "harmful", VERMILION, 1),
    (False, "benign", BLUE, -1),
)  # benign is drawn below its line
FAMILY_STYLES = {
    "reminders": (BLUE, "o"),
    "backdoor": (VERMILION, "D"),
    "refactoring": (GREEN, "s"),
    "noise": (SKY, "^"),
    "image_noise": (SKY, "<"),
    "tuning": (PURPLE, "v"),
    "steering": (ORANGE, "P"),
    "decoding": (VIOLET, "h"),
    "detection": (BROWN, "8"),
    "ensemble": (BLACK, "p"),
    "control": (GREY, "X"),
}
OTHER_FAMILY_STYLE = (BLACK, "*")  # a user-defined family
LINE_STYLES: tuple[tuple[str, Any, str], ...] = (
    (BLUE, "-", "s"),
    (VERMILION, (0, (5, 1.5)), "D"),
    (GREEN, (0, (7, 1.5, 1.5, 1.5)), "^"),
    (PURPLE, (0, (1.5, 0.8)), "v"),
    (ORANGE, (0, (7, 1.2, 1.2, 1.2, 1.2, 1.2)), "P"),
    (SKY, (0, (11, 1.2)), "X"),
)

FONT_FAMILY = "DejaVu Sans"  # comes with matplotlib, so figures have the same size on every machine

RC_PARAMS: Any = {
    "font.family": FONT_FAMILY,
    "font.size": 8,
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.grid": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": TEXT_SIZE,
    "legend.title_fontsize": TEXT_SIZE,
    "text.usetex": False,
    "text.parse_math": False,  # a "$" in a name is not math
}
