"""Matched controls: a defense with meaningless content of the same size in the place of its own.

Any text in a prompt moves the margin, and a text in the system turn also replaces the model's default system
prompt. What a defense does beyond its matched control is due to what it says. Texts are replaced by neutral
sentences, secrets by other random tokens, steering directions by random ones of the same norm, and tuned
weights by weights that were tuned as long on the model's own responses to ordinary requests.

Noise and query refactoring have no matched control. Random changes of the request or the image are the whole
of a noise defense, and a rewritten request without its meaning would be another request. The opening of a
response (prefill) has none either: a neutral opening would answer another question. Defenses that add what is
in an image in words have one, because they keep the request: neutral sentences of the caption's length.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, final

from defenses.chats import copy_chat, get_last_user_text
from defenses.contract import (
    Chat,
    Consultation,
    Defense,
    MatchedControl,
    Message,
    ModelInfo,
    Source,
    check_chats,
)
from defenses.images import QueryImage
from defenses.tokens import cut_text, encode_plain_text

if TYPE_CHECKING:
    from PIL.Image import Image

NEUTRAL_TEXT = "neutral text"
_MARK = "\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}{}\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}"
_MARK_PATTERN = re.compile(_MARK.format(r"(\d+)"))
_NEUTRAL_SENTENCES = (
    "The river is widest where the two valleys meet.",
    "A loaf of bread takes about forty minutes in a hot oven.",
    "The museum opens at ten and closes at five on weekdays.",
    "Most maple leaves turn red or orange in the fall.",
    "The northern platform has two benches and a clock.",
    "Copper is a good conductor of heat.",
    "The library moved its maps to the second floor last spring.",
    "A week has seven days, and a leap year has one more day than others.",
    "Wool is often washed in cold water.",
    "The old bridge has nine arches of gray stone.",
    "In early summer the days are long and the evenings mild.",
    "Swallows build their nests under the roof of the barn.",
    "The bakery on the corner sells rye bread on Thursdays.",
    "Chess is played on a board of sixty-four squares.",
    "The train to the coast stops at four small stations.",
    "Clouds formed over the hills in the afternoon and were gone by night.",
    "A violin has four strings, and so does a viola.",
    "The garden behind the house has three apple trees and a pear tree.",
    "Paper was once made from rags and is now mostly made from wood.",
    "The lighthouse stands on a low rock west of the harbor.",
    "Tea is grown on terraces in the hills.",
    "The hall seats two hundred people and has a wooden floor.",
    "Glaciers move slowly, often less than a meter in a day.",
    "The second chapter describes the village and its market.",
    "Cork floats because it is full of air.",
    "On clear nights the tower can be seen from the other shore.",
    "The recipe asks for two onions, a carrot and some celery.",
    "Geese fly south in the shape of a wide letter V.",
    "The path follows the stream and then turns toward the mill.",
    "Blue paint was expensive for a long time.",
    "The desk has three drawers on the left side and a shelf on the right.",
    "Salt dissolves faster in warm water than in cold water.",
    "The orchestra rehearses on Tuesdays in the town hall.",
    "Bamboo can grow by more than half a meter in one day.",
    "The map shows roads in yellow and railways in black.",
    "A dozen is twelve, and a score is twenty.",
    "The carpet in the hallway is green with a narrow border.",
    "Oranges ripen in winter on the south side of the island.",
    "The ferry crosses the lake in twenty-five minutes.",
    "Granite is harder than limestone.",
    "The calendar on the wall shows a different tree for every month.",
    "Snow stays on the northern slopes until April.",
    "The shop on the square repairs bicycles and umbrellas.",
    "Honey keeps for years in a closed jar.",
    "The photograph shows a street with tall houses and a tram.",
    "An octave spans eight notes of the scale.",
    "The wind usually comes from the west in this part of the country.",
    "Two ponds lie behind the station, one of them with an island.",
    "Cotton is spun into thread before it is woven.",
    "The lamp by the window has a paper shade.",
    "Every second house in the row has a blue door.",
    "Pumpkins are planted in May and picked in October.",
    "The atlas lists rivers by their length.",
    "A sundial shows no time on a cloudy day.",
    "The choir sang three songs and took a short break.",
    "Pine needles cover the ground between the cabins.",
    "The kettle on the stove holds two liters.",
    "Most of the island is covered with grass and heather.",
    "The stamp shows a sailing ship with four masts.",
    "The road to the summit has eleven bends.",
    "Marble is often polished until it shines.",
    "The fountain in the courtyard is turned off in winter.",
    "A quarter of an hour is fifteen minutes.",
    "The ceiling of the waiting room is painted white.",
)


@final
@dataclass(frozen=True)
class NeutralText(Defense):
    """Applies a defense with neutral sentences of the same number of tokens in the place of its texts.

    Attributes:
        defense: the defense whose texts are replaced.
        tokenizer: the model's tokenizer.
        draw: selects the sentences.
        passages: the passages made so far, by place and length, because every query has the same.
    """

    family = "control"
    source = Source("control of this project", wording="ours")

    defense: Defense
    tokenizer: Any
    draw: str
    passages: dict[tuple[str, int], str] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Take over the name, which seeds the defense's random choices."""
        object.__setattr__(self, "name", self.defense.name)

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return the defended chat with each text that the defense adds replaced."""
        return self._replace_texts(self.defense.rewrite(_mark_texts(chat), rng), chat)

    def consult_model(self, chat: Chat, rng: random.Random) -> Consultation:
        """Make the calls of the defense with the texts of the chat; replace what it adds in the end."""
        consultation = self.defense.consult_model(_mark_texts(chat), rng)
        responses: Any = None  # a generator is started with None
        while True:
            try:
                calls = consultation.send(responses)
            except StopIteration as stop:
                return [self._replace_texts(new_chat, chat) for new_chat in stop.value]
            responses = yield [replace(call, chat=_insert_texts(call.chat, chat)) for call in calls]

    def _replace_texts(self, new_chat: Chat, chat: Chat) -> Chat:
        """Return a rewritten chat of marks with the texts of the chat, and neutral texts around them."""
        new_chat = copy_chat(new_chat)
        for place, turn in enumerate(new_chat):
            turn["content"] = self._replace_added_texts(turn["content"], chat, place)
        return new_chat

    def _replace_added_texts(self, text: str, chat: Chat, place: int) -> str:
        """Return the text of a turn with neutral sentences around the marks, which become texts again."""
        pieces = _MARK_PATTERN.split(text)  # added text, number of a mark, added text, ...
        return "".join(
            chat[int(piece)]["content"] if number % 2 else self._neutralize(piece, f"{place}/{number}")
            for number, piece in enumerate(pieces)
        )

    def _neutralize(self, text: str, place: str) -> str:
        """Return neutral sentences with as many tokens as a text, and with its surrounding white space."""
        core = text.strip()
        if not core:
            return text
        length = len(encode_plain_text(self.tokenizer, core))
        start = text.index(core)
        if (place, length) not in self.passages:
            rng = random.Random(f"{self.draw}/{place}")
            self.passages[place, length] = make_neutral_passage(self.tokenizer, length, rng)
        return text[:start] + self.passages[place, length] + text[start + len(core) :]


def _mark_texts(chat: Chat) -> Chat:
    """Return the chat with a mark in the place of each text, so that a defense's own texts can be told."""
    marked = copy_chat(chat)
    for number, turn in enumerate(marked):
        turn["content"] = _MARK.format(number)
    return marked


def _insert_texts(marked: Chat, chat: Chat) -> Chat:
    """Return a chat of marks with the texts of the chat in their places."""
    new_chat = copy_chat(marked)
    for turn in new_chat:
        turn["content"] = _MARK_PATTERN.sub(lambda mark: chat[int(mark[1])]["content"], turn["content"])
    return new_chat


def make_neutral_passage(tokenizer: Any, length: int, rng: random.Random) -> str:
    """Return neutral sentences in random order, truncated to `length` tokens.

    Args:
        tokenizer: transformers tokenizer.
        length: number of tokens, at least 1.
        rng: shuffles the sentences.
    """
    text = " ".join(rng.sample(_NEUTRAL_SENTENCES, len(_NEUTRAL_SENTENCES)))
    # The truncated text may encode to another number of tokens than it was truncated to.
    passages = [cut_text(tokenizer, text, size) for size in (length, length + 1, length - 1) if size > 0]
    return min(passages, key=lambda passage: abs(len(encode_plain_text(tokenizer, passage)) - length))


def build_matched_control(defense: Defense, model_info: ModelInfo, draw: int) -> MatchedControl | None:
    """Return a defense with other content of the same size, or None if it has no matched control.

    Args:
        defense: prepared for the model.
        model_info: the model.
        draw: number of the control; each has other content.
    """
    control = defense.build_control(model_info, draw)
    if control is None and _only_adds_text(defense):
        control = build_neutral_control(defense, model_info, draw)
    return control


def build_neutral_control(defense: Defense, model_info: ModelInfo, draw: int) -> MatchedControl:
    """Return a defense with neutral sentences in the place of the texts that it adds.

    Args:
        defense: prepared for the model; it keeps each text of a chat whole, wherever it puts it.
        model_info: the model.
        draw: number of the control; each has other sentences.
    """
    neutral = NeutralText(defense, model_info.tokenizer, f"{model_info.seed}/{draw}")
    return MatchedControl(neutral, NEUTRAL_TEXT)


def _draw_white_image() -> Image:
    """Return a white image."""
    from PIL import Image as image_module

    return image_module.new("RGB", (64, 64), "white")


def _only_adds_text(defense: Defense) -> bool:
    """Return whether a defense does nothing but add texts to the chat, before the response."""
    other_methods = (
        *("rewrite_copies", "consult_model", "retokenize", "apply_to"),
        *("logit_blend", "score_requests"),
    )
    if defense.family in ("control", "noise", "image_noise", "refactoring") or any(
        getattr(type(defense), name) is not getattr(Defense, name) for name in other_methods
    ):
        return False
    request = _MARK.format(0)
    query = Message(role="user", content=request)
    if defense.needs_images:
        query["image"] = QueryImage("a white image", "white", _draw_white_image)
    rewritten = defense.rewrite([query], random.Random(0))
    (chat,) = check_chats(defense.name, [rewritten])
    adds_text = any(turn["content"] != request for turn in chat)
    return adds_text and chat[-1]["role"] == "user" and request in get_last_user_text(chat)
