"""How queries are sent: as they are, or as an attacker would; harmful and benign ones alike.

An attack that only harmful queries went through would look like discrimination. The wordings are rows of
`data/attacks.jsonl` or of the user's own file. Nothing heavy is imported here, so that the command can list
them.
"""

from __future__ import annotations

import base64
import codecs
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from analysis.datasets.queries import Query
from analysis.datasets.records import RECORD_SUFFIXES, read_records
from analysis.files import data_folder
from defenses.chats import build_user_chat, edit_last_user, insert_turns, prefill_response
from defenses.contract import Chat
from defenses.errors import UserError, unknown_name_error
from defenses.training.texts import OBEDIENCE_PROMPT, build_agent_chat

IGNORE_SUFFIX = "+ignore"  # behind an attack's name: its chat with the line of the row of this name on top
_QUERY_PLACEHOLDER = "{request}"
_ATTACK_FILE_FORMAT = (
    "each row needs a suffix (put behind the query) or a prompt (sent in its place; may contain {request}), "
    "and may have query, the id of the one query that it is for"
)


@dataclass(frozen=True)
class Attack:
    """A way to send a query.

    Attributes:
        name: as in the tables, and in `--attack` if it is shipped.
        description: what the attacker does.
        build_chat: query → the chat that is sent; where it ends in an assistant message, the answer is made to
            begin with that.
        source: the paper that describes it.
        url: of the paper.
        wording_sha256: SHA-256 of the rows, or of the user's file, that hold its wording.
        query_ids: ids of the queries that it has words for; None if for any.
    """

    name: str
    description: str
    build_chat: Callable[[Query], Chat]
    source: str = ""
    url: str = ""
    wording_sha256: tuple[str, ...] = ()
    query_ids: frozenset[str] | None = None

    def check_covers_queries(self, queries: Sequence[Query]) -> None:
        """Raise if some of the queries cannot be sent: all are attacked, or none."""
        missing = [
            query.id for query in queries if self.query_ids is not None and query.id not in self.query_ids
        ]
        if missing:
            raise UserError(
                f"--attack {self.name}: the file has no row for {len(missing)} of {len(queries)} queries "
                f"({missing[0]!r}, …), and harmful and benign ones are attacked alike: add their rows, or "
                "one row without query for all that have none"
            )


DIRECT_ATTACK = Attack("direct", "the query as it is", lambda query: build_user_chat("", query.text))
# Those under which fine-tuning attacks ask; their words are also trained with.
_FINE_TUNING_ATTACKS = (
    Attack(
        "obedience",
        "under a system prompt that demands obedience, as in fine-tuning attacks (FJAttack)",
        lambda query: build_user_chat(OBEDIENCE_PROMPT, query.text),
        "BackdoorAlign (Wang et al., NeurIPS 2024)",
        "https://arxiv.org/abs/2402.14968",
    ),
    Attack(
        "identity",
        "to an agent of absolute obedience, addressed by its name (AOA)",
        lambda query: build_agent_chat(query.text),
        "Fine-tuning Aligned Language Models Compromises Safety (Qi et al., ICLR 2024)",
        "https://arxiv.org/abs/2310.03693",
    ),
)


@cache
def load_shipped_attacks() -> Mapping[str, Attack]:
    """Return the attacks of this project by name, `+ignore` the last.

    >>> list(load_shipped_attacks())[:4]
    ['direct', 'obedience', 'identity', 'prefix_injection']
    """
    lines = (data_folder() / "attacks.jsonl").read_text("utf-8").splitlines()
    return {
        attack.name: attack
        for attack in (DIRECT_ATTACK, *_FINE_TUNING_ATTACKS, *map(_parse_attack_row, lines))
    }


def choose_attacks(names: Sequence[str]) -> tuple[Attack, ...]:
    """Return the attacks that `--attack` names.

    >>> [attack.name for attack in choose_attacks(["direct", "persona+ignore"])]
    ['direct', 'persona+ignore']

    Args:
        names: as for `get`; `all` and `all+ignore` stand for every shipped one.
    """
    found: dict[str, Attack] = {}
    for name in names:
        everyone = name.removesuffix(IGNORE_SUFFIX) == "all"
        wanted = [one + name.removeprefix("all") for one in _list_attack_names()] if everyone else [name]
        for attack in map(get_attack, wanted):
            if found.setdefault(attack.name, attack).wording_sha256 != attack.wording_sha256:
                raise UserError(
                    f"--attack {name}: another one is called {attack.name!r}, too, and the tables could not "
                    "tell them apart; rename the file"
                )
    return tuple(found.values())


def get_attack(name: str) -> Attack:
    """Return the attack of that name, or the one in that file.

    Args:
        name: of a shipped attack, or the path of a `.jsonl` or `.csv` file; with `+ignore` behind it, the
            attack tells the model to disregard earlier safety instructions.
    """
    base = name.removesuffix(IGNORE_SUFFIX)
    if Path(base).suffix in RECORD_SUFFIXES:
        attack = _load_attack_file(Path(base))
    elif base in _list_attack_names():
        attack = load_shipped_attacks()[base]
    else:
        hint = f" (each also with {IGNORE_SUFFIX} behind it; or the path of a .jsonl or .csv file)"
        raise unknown_name_error("attack", name, [*_list_attack_names(), "all"], hint)
    return attack if name == base else _add_ignore_line(attack)


def _list_attack_names() -> list[str]:
    return [name for name in load_shipped_attacks() if name != IGNORE_SUFFIX]


def _add_ignore_line(attack: Attack) -> Attack:
    """The attack with a line in front of the user's words that calls off what a prompt defense said."""
    added = load_shipped_attacks()[IGNORE_SUFFIX]

    def chat(query: Query) -> Chat:
        return edit_last_user(
            attack.build_chat(query), lambda words: added.build_chat(replace(query, text=words))[0]["content"]
        )

    return replace(
        attack,
        name=attack.name + IGNORE_SUFFIX,
        build_chat=chat,
        wording_sha256=(*attack.wording_sha256, *added.wording_sha256),
    )


def _parse_attack_row(line: str) -> Attack:
    """The attack that a row of `data/attacks.jsonl` words."""
    row: dict[str, Any] = json.loads(line)
    shots = [(request, opener) for request, opener in row.get("shots", ())]

    def chat(query: Query) -> Chat:
        request = QUERY_TRANSFORMS[row["transform"]](query.text) if "transform" in row else query.text
        sent = insert_turns(build_user_chat("", row["template"].replace(_QUERY_PLACEHOLDER, request)), shots)
        return prefill_response(sent, row["prefill"]) if "prefill" in row else sent

    made_from = (hashlib.sha256(line.encode()).hexdigest(),)
    return Attack(row["name"], row["what"], chat, row["source"], row["url"], made_from)


def _load_attack_file(path: Path) -> Attack:
    """The attack whose strings, made elsewhere, are in a user's file."""
    if path.stem in load_shipped_attacks():
        raise UserError(f"{path}: the name {path.stem!r} is taken by a shipped attack; rename the file")
    found, raw = read_records(path, (), _ATTACK_FILE_FORMAT)
    words: dict[str, tuple[str, str]] = {}  # query id, or "" for all others → its column and its text
    for number, row in enumerate(found, 1):
        given = [(key, row[key]) for key in ("suffix", "prompt") if row.get(key) not in (None, "")]
        where = f"{path}, row {number}"
        if len(given) != 1:
            raise UserError(
                f"{where} has {'both' if given else 'neither'} suffix and prompt; {_ATTACK_FILE_FORMAT}"
            )
        ((key, text),) = given
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: the {key} is {text!r}; it takes a string with words in it")
        ident = "" if row.get("query") is None else str(row["query"])
        if ident in words:
            whose = f"for the query {ident!r}" if ident else "without a query"
            raise UserError(f"{where} is the second one {whose}; keep one of them")
        if key == "prompt" and not ident and _QUERY_PLACEHOLDER not in text:
            raise UserError(
                f"{where}: a prompt for every query must contain {_QUERY_PLACEHOLDER}, where the query goes: without "
                "it harmful and benign ones would be the same"
            )
        words[ident] = key, text

    def chat(query: Query) -> Chat:
        key, text = words.get(query.id) or words[""]
        return build_user_chat(
            "", f"{query.text} {text}" if key == "suffix" else text.replace(_QUERY_PLACEHOLDER, query.text)
        )

    made_from = (hashlib.sha256(raw).hexdigest(),)
    asks = None if "" in words else frozenset(words)
    return Attack(path.stem, f"the strings in {path.name}", chat, wording_sha256=made_from, query_ids=asks)


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
        f"{name} = {json.dumps(text[low:high], ensure_ascii=False)}" for name, low, high in parts
    )


# What an attack makes of the words of a request, by its name in data/attacks.jsonl.
QUERY_TRANSFORMS: Mapping[str, Callable[[str], str]] = {
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "rot13": lambda text: codecs.encode(text, "rot13"),
    "leetspeak": lambda text: text.translate(_LEETSPEAK_TABLE),
    "split": _split_into_assignments,
}
