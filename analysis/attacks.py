"""Jailbreak attacks: each turns a query into the chat that is sent to the model.

Harmful and benign queries are attacked alike, because an attack on harmful queries alone would look like
discrimination. The wordings are rows of `data/attacks.jsonl` or of the user's own file. This module imports
nothing heavy, so that the command can list attacks quickly.
"""

from __future__ import annotations

import base64
import codecs
import hashlib
import json
import random
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from analysis.datasets.queries import Query
from analysis.datasets.records import RECORD_FORMATS, expand_path, names_record_file, read_records
from analysis.files import data_folder
from analysis.image_attacks import (
    build_image_request_chat,
    build_image_strip_chat,
    build_typographic_chat,
    describe_image_wording,
)
from defenses.chats import build_user_chat, edit_last_user, insert_turns, prefill_response
from defenses.contract import Chat, Message, QueryChat
from defenses.errors import UserError, unknown_name_error
from defenses.images import replace_last_image
from defenses.training.texts import OBEDIENCE_PROMPT, build_agent_chat

# Suffix of an attack's name: adds the line of the attack row of this name on top of the user's message.
IGNORE_SUFFIX = "+ignore"
_QUERY_PLACEHOLDER = "{request}"
_ATTACK_FILE_FORMAT = (
    "each row needs a suffix (appended to the query) or a prompt (sent in its place; may contain {request}), "
    "and may have query, the id of the only query that it applies to"
)


@dataclass(frozen=True)
class Attack:
    """A transformation of a query into an attacked chat.

    Attributes:
        name: as in the tables, and in `--attack` for a shipped attack.
        description: what the attacker does.
        build_chat: query → the chat that is sent; a final assistant message is a prefill of the response.
        source: the paper that describes it.
        url: of the paper.
        wording_sha256: SHA-256 of each row, or of the user's file, that contains its wording.
        query_ids: ids of the queries that it has strings for; None if it applies to every query.
        path: the user's file with its strings; None for a shipped attack.
        needs_images: whether its chats have images, which a model must be able to read.
        variants: attacks of which the attacker keeps, for each query, the one that the defended model is
            least likely to refuse; `build_chat` builds the chat of the first. Empty for any other attack.
        asks_model: whether the earlier assistant turns are the defended model's own responses; `build_chat`
            has a placeholder in the place of each.
    """

    name: str
    description: str
    build_chat: Callable[[Query], Chat]
    source: str = ""
    url: str = ""
    wording_sha256: tuple[str, ...] = ()
    query_ids: frozenset[str] | None = None
    path: Path | None = None
    needs_images: bool = False
    variants: tuple[Attack, ...] = ()
    asks_model: bool = False

    @property
    def is_adaptive(self) -> bool:
        """Whether the chats depend on the model and its defense."""
        return bool(self.variants) or self.asks_model

    @property
    def cost(self) -> str:
        """What each query costs the attacker: `static`, N prompts that are scored, or N responses."""
        if not self.is_adaptive:
            return "static"
        return f"{self.n_adaptive_prompts} {'prompts' if self.variants else 'responses'}"

    @property
    def n_adaptive_prompts(self) -> int:
        """The number of prompts for each query that the defended model reads while the attack adapts."""
        if self.variants or not self.asks_model:
            return len(self.variants)
        chat = self.build_chat(Query("cost", "Hi", harmful=False))
        return sum(turn["role"] == "assistant" for turn in chat)

    @property
    def option(self) -> str:
        """What `--attack` takes to choose this attack."""
        if self.path is None:
            return self.name
        return f"{self.path}{IGNORE_SUFFIX if self.name.endswith(IGNORE_SUFFIX) else ''}"

    def build_query_chats(self, queries: Sequence[Query]) -> list[QueryChat]:
        """Return the chat in which each query is sent, with the query's id.

        The query's image stands in the last user turn, unless the attack has put an image into the chat.
        """
        return [QueryChat(query.id, _attach_image(self.build_chat(query), query)) for query in queries]

    def build_adapted_chats(
        self,
        queries: Sequence[Query],
        read_margins: Callable[[Sequence[QueryChat]], Sequence[float]],
        read_responses: Callable[[Sequence[QueryChat]], Sequence[str]],
    ) -> list[QueryChat]:
        """Return the chat in which an adaptive attack sends each query, with the query's id.

        Args:
            queries: of both classes, which are attacked alike.
            read_margins: returns the margin of each chat (nats; positive refuses), from the defended model.
            read_responses: returns the defended model's response to each chat.
        """
        if not queries:
            return []
        if self.variants:
            candidates = [variant.build_query_chats(queries) for variant in self.variants]
            margins = read_margins([chat for chats in candidates for chat in chats])
            rows = range(len(queries))
            best = [
                min(range(len(candidates)), key=lambda v: margins[v * len(queries) + row]) for row in rows
            ]
            return [candidates[variant][row] for row, variant in enumerate(best)]
        query_chats = self.build_query_chats(queries)
        positions = [number for number, turn in enumerate(query_chats[0].chat) if turn["role"] == "assistant"]
        for position in positions:
            responses = read_responses([QueryChat(name, chat[:position]) for name, chat in query_chats])
            query_chats = [
                QueryChat(name, [*chat[:position], _answer_turn(chat[position], text), *chat[position + 1 :]])
                for (name, chat), text in zip(query_chats, responses, strict=True)
            ]
        return query_chats

    def check_covers_queries(self, queries: Sequence[Query]) -> None:
        """Raise a UserError unless the attack applies to every query."""
        missing = [
            query.id for query in queries if self.query_ids is not None and query.id not in self.query_ids
        ]
        if missing:
            raise UserError(
                f"--attack {self.name}: the file has no row for {len(missing)} of {len(queries)} queries "
                f"({missing[0]!r}, …), but harmful and benign queries have to be attacked alike: add their "
                "rows, or one row without query that applies to all others"
            )


def _answer_turn(placeholder: Message, text: str) -> Message:
    """Return the assistant turn with a response; an empty response leaves the placeholder."""
    return Message(role="assistant", content=text.strip() or placeholder["content"])


def _attach_image(chat: Chat, query: Query) -> Chat:
    """Return the chat with the query's image in its last user turn, unless it holds an image already."""
    if query.image is None or any("image" in message for message in chat):
        return chat
    return replace_last_image(chat, query.image)


DIRECT_ATTACK = Attack("direct", "the query as it is", lambda query: build_user_chat("", query.text))
# The prompts of fine-tuning attacks; the same texts are used for training.
_FINE_TUNING_ATTACKS = (
    Attack(
        "obedience",
        "a system prompt that demands obedience, as in fine-tuning attacks (FJAttack)",
        lambda query: build_user_chat(OBEDIENCE_PROMPT, query.text),
        "BackdoorAlign (Wang et al., NeurIPS 2024)",
        "https://arxiv.org/abs/2402.14968",
    ),
    Attack(
        "identity",
        "an absolutely obedient agent, addressed by its name (AOA)",
        lambda query: build_agent_chat(query.text),
        "Fine-tuning Aligned Language Models Compromises Safety (Qi et al., ICLR 2024)",
        "https://arxiv.org/abs/2310.03693",
    ),
)
# Attacks that draw an image; their wordings and layouts are in `analysis/image_attacks.py`.
_IMAGE_ATTACKS = tuple(
    Attack(
        name,
        description,
        build_chat,
        source,
        url,
        (hashlib.sha256(describe_image_wording(name).encode()).hexdigest(),),
        needs_images=True,
    )
    for name, description, build_chat, source, url in (
        (
            "typographic",
            "draws the request as the title of an empty list, to be filled in",
            build_typographic_chat,
            "FigStep (Gong et al., AAAI 2025)",
            "https://arxiv.org/abs/2311.05608",
        ),
        (
            "image_strip",
            "draws the request below the query's image, or below a white one",
            build_image_strip_chat,
            "MM-SafetyBench (Liu et al., ECCV 2024)",
            "https://arxiv.org/abs/2311.17600",
        ),
        (
            "image_request",
            "draws the request, and asks a harmless question about the image",
            build_image_request_chat,
            "FigStep (Gong et al., AAAI 2025)",
            "https://arxiv.org/abs/2311.05608",
        ),
    )
)


_BEST_OF_N = "best_of_n"
_DEFAULT_N_VARIANTS = 8
_MAX_N_VARIANTS = 1000
_AUGMENTATION_STRENGTH = 0.4  # sigma of the paper


def _make_best_of_n(n_variants: int) -> Attack:
    """Return the attack that sends the best of N random variants of each request.

    Args:
        n_variants: N, the number of variants.
    """

    def make_variant(number: int) -> Attack:
        def build_chat(query: Query) -> Chat:
            return build_user_chat(
                "", augment_text(query.text, random.Random(f"{_BEST_OF_N}/{number}/{query.id}"))
            )

        return Attack(f"variant {number}", "a random variant of the request", build_chat)

    variants = tuple(make_variant(number) for number in range(n_variants))
    return Attack(
        _BEST_OF_N if n_variants == _DEFAULT_N_VARIANTS else f"{_BEST_OF_N}:{n_variants}",
        f"sends the least refused of {n_variants} random variants of the request",
        variants[0].build_chat,
        "Best-of-N Jailbreaking (Hughes et al., 2024)",
        "https://arxiv.org/abs/2412.03556",
        variants=variants,
    )


def augment_text(text: str, rng: random.Random) -> str:
    """Return the text with scrambled words, changed capitals, and a few characters replaced by neighbors.

    A word of four characters or more has its inner characters shuffled with probability sqrt(s); the case of
    each letter is changed with probability sqrt(s); each printable ASCII character is replaced by the one
    before or after it in ASCII with probability s cubed. The strength s is 0.4.

    >>> augment_text("How do I bake bread?", random.Random(0))
    'hOw DO i bake BrEAE?'

    Args:
        text: the request.
        rng: the only source of randomness.

    Source: https://arxiv.org/abs/2412.03556
    """
    frequent, rare = _AUGMENTATION_STRENGTH**0.5, _AUGMENTATION_STRENGTH**3

    def scramble_word(match: re.Match[str]) -> str:
        word = match[0]
        if rng.random() >= frequent:
            return word
        return word[0] + "".join(rng.sample(word[1:-1], len(word) - 2)) + word[-1]

    def change_character(character: str) -> str:
        if rng.random() < frequent:
            character = character.swapcase()
        if "!" <= character <= "~" and rng.random() < rare:
            character = chr(min(max(ord(character) + rng.choice((-1, 1)), ord("!")), ord("~")))
        return character

    scrambled = re.sub(r"\w{4,}", scramble_word, text)
    return "".join(map(change_character, scrambled))


@cache
def load_shipped_attacks() -> Mapping[str, Attack]:
    """Load the attacks of this project, by name; the row for `+ignore` is the last.

    >>> list(load_shipped_attacks())[:4]
    ['direct', 'obedience', 'identity', 'typographic']
    """
    lines = (data_folder() / "attacks.jsonl").read_text("utf-8").splitlines()
    return {
        attack.name: attack
        for attack in (
            *(DIRECT_ATTACK, *_FINE_TUNING_ATTACKS, *_IMAGE_ATTACKS),
            *(_make_best_of_n(_DEFAULT_N_VARIANTS), *map(_parse_attack_row, lines)),
        )
    }


def choose_attacks(names: Sequence[str]) -> tuple[Attack, ...]:
    """Return the attacks named by `--attack`, each once.

    >>> [attack.name for attack in choose_attacks(["direct", "persona+ignore"])]
    ['direct', 'persona+ignore']

    Args:
        names: as for `get_attack`; `all` and `all+ignore` select every shipped attack that draws no image,
            which models without images read as well, and that is not adaptive, which would cost much more.
    """
    chosen: dict[str, Attack] = {}
    shipped = load_shipped_attacks()
    text_attacks = [
        name
        for name in _list_attack_names()
        if not shipped[name].needs_images and not shipped[name].is_adaptive
    ]
    for name in names:
        is_all = name.removesuffix(IGNORE_SUFFIX) == "all"
        expanded = [base + name.removeprefix("all") for base in text_attacks] if is_all else [name]
        for attack in map(get_attack, expanded):
            if chosen.setdefault(attack.name, attack).wording_sha256 != attack.wording_sha256:
                raise UserError(
                    f"--attack {name}: another attack is also called {attack.name!r}, and the tables "
                    "could not tell them apart; rename the file"
                )
    return tuple(chosen.values())


def get_attack(name: str) -> Attack:
    """Return a shipped attack by name, or the attack in a file.

    Args:
        name: of a shipped attack, or the path of a file; the suffix `+ignore` adds a line
            that tells the model to disregard earlier safety instructions. `best_of_n:25` has 25 variants.
    """
    base = name.removesuffix(IGNORE_SUFFIX)
    if base.startswith(f"{_BEST_OF_N}:"):
        attack = _make_best_of_n(_parse_n_variants(base))
    elif base in _list_attack_names():
        attack = load_shipped_attacks()[base]
    elif names_record_file(base):
        attack = _load_attack_file(expand_path(base))
    else:
        hint = f" (each also with the suffix {IGNORE_SUFFIX}; or the path of a {RECORD_FORMATS})"
        raise unknown_name_error("attack", name, [*_list_attack_names(), "all"], hint)
    return attack if name == base else _add_ignore_line(attack)


def _parse_n_variants(name: str) -> int:
    """Return N of the name `best_of_n:N`."""
    number = name.removeprefix(f"{_BEST_OF_N}:")
    if not (number.isascii() and number.isdigit() and 1 <= int(number) <= _MAX_N_VARIANTS):
        raise UserError(
            f"--attack {name}: it takes a number of variants from 1 to {_MAX_N_VARIANTS}, as in "
            f"{_BEST_OF_N}:25"
        )
    return int(number)


def check_not_adaptive(attacks: Sequence[Attack], reason: str) -> None:
    """Raise a UserError if one of the attacks is adaptive.

    Args:
        attacks: as chosen by the user.
        reason: why the study needs the same chats in every condition, and what to do.
    """
    if adaptive := next((attack.name for attack in attacks if attack.is_adaptive), None):
        raise UserError(
            f"--attack {adaptive}: it adapts its chats to each condition, and {reason}; or leave this attack "
            "out"
        )


def _list_attack_names() -> list[str]:
    return [name for name in load_shipped_attacks() if name != IGNORE_SUFFIX]


def _add_ignore_line(attack: Attack) -> Attack:
    """Add a line on top of the user's message that revokes the instructions of a prompt defense."""
    ignore_row = load_shipped_attacks()[IGNORE_SUFFIX]

    def build_chat(query: Query) -> Chat:
        return edit_last_user(
            attack.build_chat(query),
            lambda text: ignore_row.build_chat(replace(query, text=text))[0]["content"],
        )

    return replace(
        attack,
        name=attack.name + IGNORE_SUFFIX,
        build_chat=build_chat,
        variants=tuple(map(_add_ignore_line, attack.variants)),
        wording_sha256=(*attack.wording_sha256, *ignore_row.wording_sha256),
    )


def _parse_attack_row(line: str) -> Attack:
    """Build the attack of a row of `data/attacks.jsonl`."""
    row: dict[str, Any] = json.loads(line)

    def build_chat(query: Query) -> Chat:
        request = QUERY_TRANSFORMS[row["transform"]](query.text) if "transform" in row else query.text
        shots = [
            (earlier.replace("{topic}", _extract_topic(query.text)), response)
            for earlier, response in row.get("shots", ())
        ]
        chat = insert_turns(build_user_chat("", row["template"].replace(_QUERY_PLACEHOLDER, request)), shots)
        return prefill_response(chat, row["prefill"]) if "prefill" in row else chat

    digests = (hashlib.sha256(line.encode()).hexdigest(),)
    asks_model = row.get("asks_model", False)
    return Attack(
        row["name"], row["what"], build_chat, row["source"], row["url"], digests, asks_model=asks_model
    )


def append_suffix(text: str, suffix: str) -> str:
    """Return a query's text with the suffix of an attack."""
    return f"{text} {suffix}"


def make_suffix_attack(name: str, suffix: str) -> Attack:
    """Return the attack that sends every query with one suffix, as a file of it would.

    Args:
        name: as in the tables.
        suffix: the suffix, which follows the query after a space.
    """
    return Attack(
        name,
        "appends a suffix to the request",
        lambda query: build_user_chat("", append_suffix(query.text, suffix)),
    )


def _load_attack_file(path: Path) -> Attack:
    """Build the attack whose strings are in a user's file."""
    if path.stem in load_shipped_attacks():
        raise UserError(f"{path}: the name {path.stem!r} is taken by a shipped attack; rename the file")
    rows, content = read_records(path, (), _ATTACK_FILE_FORMAT, ("query", "suffix", "prompt"))
    strings = _parse_attack_strings(rows, path)

    def build_chat(query: Query) -> Chat:
        column, text = strings.get(query.id) or strings[""]
        if column == "suffix":
            return build_user_chat("", append_suffix(query.text, text))
        return build_user_chat("", text.replace(_QUERY_PLACEHOLDER, query.text))

    digests = (hashlib.sha256(content).hexdigest(),)
    query_ids = None if "" in strings else frozenset(strings)
    description = f"the strings in {path.name}"
    return Attack(path.stem, description, build_chat, "", "", digests, query_ids, path)


def _parse_attack_strings(rows: Sequence[Mapping[str, Any]], path: Path) -> dict[str, tuple[str, str]]:
    """Parse the rows of an attack file: query id, or "" for all other queries → (column, text)."""
    strings: dict[str, tuple[str, str]] = {}
    for number, row in enumerate(rows, 1):
        filled = [
            (column, row[column]) for column in ("suffix", "prompt") if row.get(column) not in (None, "")
        ]
        place = f"{path}, row {number}"
        if len(filled) != 1:
            count = "both suffix and prompt" if filled else "neither suffix nor prompt"
            raise UserError(f"{place} has {count}; {_ATTACK_FILE_FORMAT}")
        ((column, text),) = filled
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{place}: the {column} is {text!r}; it takes a string that is not blank")
        query_id = "" if row.get("query") is None else str(row["query"])
        if query_id in strings:
            scope = f"for the query {query_id!r}" if query_id else "without a query"
            raise UserError(f"{place} is the second one {scope}; keep one of them")
        if column == "prompt" and not query_id and _QUERY_PLACEHOLDER not in text:
            raise UserError(
                f"{place}: a prompt for every query must contain {_QUERY_PLACEHOLDER}, which stands for the "
                "query's text; without it, all queries would be the same"
            )
        strings[query_id] = column, text
    return strings


_LEETSPEAK_TABLE = str.maketrans("aeiostAEIOST", "431057" * 2)


def _split_into_assignments(text: str) -> str:
    r"""Return the text as three assignments of about equal length.

    >>> print(_split_into_assignments("Sing!"))
    a = "S"
    b = "in"
    c = "g!"
    """
    ends = [len(text) * part // 3 for part in range(4)]
    parts = zip("abc", ends, ends[1:], strict=False)
    return "\n".join(
        f"{name} = {json.dumps(text[start:end], ensure_ascii=False)}" for name, start, end in parts
    )


_CAESAR_SHIFT = 3


def _shift_letters(text: str) -> str:
    """Return the text with each Latin letter replaced by the one three places further in the alphabet.

    >>> _shift_letters("Sing, xyz!")
    'Vlqj, abc!'
    """
    letters = string.ascii_lowercase
    shifted = letters[_CAESAR_SHIFT:] + letters[:_CAESAR_SHIFT]
    return text.translate(str.maketrans(letters + letters.upper(), shifted + shifted.upper()))


# Words of requests that do not name a subject.
_COMMON_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        a about all an and any are as at be but by can could did do does explain for from get give has
        have help how i if in into is it its list make me my need no not of off on one or our out over
        please provide should show so some someone step steps tell than that the their them there these
        they this those to up use using want was way ways we what when where which who why will with
        without would write you your
        """,
    )
)


def _extract_topic(text: str) -> str:
    """Return the words of a request that name its subject, in their order; all words if there are none.

    >>> _extract_topic("How do I bake rye bread without yeast?")
    'bake, rye, bread, yeast'
    """
    words = re.findall(r"[^\W_]+(?:['\u2019-][^\W_]+)*", text)
    return ", ".join([word for word in words if word.lower() not in _COMMON_WORDS] or words) or text


# Transformations of the request's text, by their names in data/attacks.jsonl.
QUERY_TRANSFORMS: Mapping[str, Callable[[str], str]] = {
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "rot13": lambda text: codecs.encode(text, "rot13"),
    "caesar": _shift_letters,
    "leetspeak": lambda text: text.translate(_LEETSPEAK_TABLE),
    "split": _split_into_assignments,
}
