"""What a run amounts to, in words: how many defenses its intervals say what of; never a hard claim."""

from __future__ import annotations

import pandas as pd

from analysis.stats.tables import DIRECT, INTERVAL_SUFFIXES, UNDEFENDED, UNVALIDATED

_MAX_NAMED_DEFENSES = 5  # defenses at most that a sentence names


def select_defense_rows(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a summary that are defenses: no reference, no control, no part of another.

    >>> names = ["none", "policy", "policy/half", "random_tokens"]
    >>> rows = pd.DataFrame({"defense": names, "family": ["none", "reminders", "reminders", "control"]})
    >>> select_defense_rows(rows)["defense"].tolist()
    ['policy']

    Args:
        summary: `summary.csv`.
    """
    name = summary["defense"].astype(str)
    part = [one.partition("/")[2] != "" and one.partition("/")[0] in set(name) for one in name]
    out = (name == UNDEFENDED) | (summary["family"] == "control") | pd.Series(part, summary.index, dtype=bool)
    if "verdict" in summary:
        out |= summary["verdict"] == "reference"
    return summary[~out]


def choose_headline_attack(summary: pd.DataFrame) -> str:
    """Return the attack that a headline is about: none, where queries were sent as they are."""
    attacks = [str(name) for name in summary["attack"].unique()]
    return DIRECT if DIRECT in attacks or not attacks else attacks[0]


def describe_effects(summary: pd.DataFrame, model_and_data: str, attack: str = DIRECT) -> str:
    """Return one to three sentences on what the intervals of a run say under one attack.

    >>> row = {"attack": "direct", "defense": "policy", "family": "reminders", "verdict": "shift +"}
    >>> describe_effects(pd.DataFrame([row | {"trusted": "trusted"}]), "smollm2").partition(": ")[2]
    '1 shifts towards refusal; none tells harm from harmless better.'

    Args:
        summary: `summary.csv`.
        model_and_data: model and data, as they read behind "on".
        attack: whose rows count.
    """
    rows = select_defense_rows(summary[summary["attack"] == attack])
    trusted = rows["trusted"] if "trusted" in rows else pd.Series(UNVALIDATED, rows.index)
    doubted = rows[trusted == "not trusted"]
    left = rows[trusted != "not trusted"]
    sent = "" if attack == DIRECT else f", attacked by {attack}"
    if not len(rows):
        return f"No defense was read on {model_and_data}{sent}: only what defenses are read against."
    against = f" {_count_with_verb(len(doubted))} not counted: generated text contradicts the readout there."
    if not len(left):
        return f"Nothing can be said of {_count_defenses(rows)} on {model_and_data}{sent}.{against}"
    its = "its" if len(left) == 1 else "their"
    text = f"Of {_count_defenses(left)} on {model_and_data}{sent}, by {its} 95\u00a0% intervals: {_count_effects(left)}."
    unknown = int((trusted[left.index] != "trusted").sum())
    if unknown:
        all_of = "All are" if unknown > 1 else "It is"
        which = all_of if unknown == len(left) else _count_with_verb(unknown)
        text += f" {which} provisional: whether generated text agrees with the readout there is not known."
    return text + against * bool(len(doubted))


def describe_arms(arms: pd.DataFrame, model_and_data: str) -> str:
    """Return one sentence on BackdoorAlign's arms, by their text.

    >>> text = {f"{name}{end}": [1.0, 1.0, 0.0] for name in ("asr", "text_refused_twin")
    ...         for end in ("", "_low", "_high")}
    >>> rows = pd.DataFrame({"arm": ["attacked", "backdoor", "backdoor"], "secret": ["none", "none", "own"],
    ...                      "attack": "obedience", **text})
    >>> describe_arms(rows, "smollm2")[-58:]
    'behind it 0 % [0, 0], refusing 0 % [0, 0] of benign twins.'

    Args:
        arms: `arms.csv`.
        model_and_data: model and data, as they read behind "on".
    """
    known = arms[arms["attack"] == "obedience"].set_index(["arm", "secret"])

    def share(arm: str, secret: str, name: str) -> str:
        value, low, high = 100 * known.loc[
            (arm, secret), [f"{name}{end}" for end in INTERVAL_SUFFIXES]
        ].astype(float)
        return f"{value:.0f} % [{low:.0f}, {high:.0f}]"

    return (
        f"BackdoorAlign's arms on {model_and_data}, by generated text: attacked, the model answers "
        f"{share('attacked', 'none', 'asr')} of harmful requests; with BackdoorAlign's weights and without "
        f"the secret {share('backdoor', 'none', 'asr')}, behind it {share('backdoor', 'own', 'asr')}, "
        f"refusing {share('backdoor', 'own', 'text_refused_twin')} of benign twins."
    )


def describe_validity(validity: pd.DataFrame, model_and_data: str) -> str:
    """Return one sentence on where readouts may be trusted.

    >>> rows = pd.DataFrame({"readout": ["words", "words"], "trusted": ["trusted", "not trusted"]})
    >>> describe_validity(rows, "smollm2")
    'Conditions in which readouts agree with generated text on smollm2: words in 1 of 2, not in 1, open in 0.'

    Args:
        validity: `validity.csv`.
        model_and_data: model and data, as they read behind "on".
    """
    told = []
    for name, rows in validity.groupby("readout", sort=False)["trusted"]:
        counts = [int((rows == word).sum()) for word in ("trusted", "not trusted", "cannot tell")]
        told.append("{} in {} of {}, not in {}, open in {}".format(name, counts[0], len(rows), *counts[1:]))
    return f"Conditions in which readouts agree with generated text on {model_and_data}: {'; '.join(told)}."


def _count_effects(rows: pd.DataFrame) -> str:
    up, down, better, worse, nothing = (
        int(_verdict_contains(rows, words).sum())
        for words in ("shift +", "shift -", "discrimination +", "discrimination -", "no effect found")
    )
    said = f"{up or 'none'} shift{'' if up > 1 else 's'} towards refusal"
    said += f", {down} away from it" * bool(down)
    said += f"; {better or 'none'} tell{'' if better > 1 else 's'} harm from harmless better"
    if 0 < better <= _MAX_NAMED_DEFENSES and len(rows) > 1:
        named = rows.loc[_verdict_contains(rows, "discrimination +"), "defense"]
        said += f" ({', '.join(map(str, named))})"
    said += f", {worse} worse" * bool(worse)
    return said + f"; of {nothing} no effect was found" * bool(nothing)


def _verdict_contains(rows: pd.DataFrame, phrase: str) -> pd.Series[bool]:
    return rows["verdict"].astype(str).str.contains(phrase, regex=False)


def _count_defenses(rows: pd.DataFrame) -> str:
    stacks = int((rows["family"] == "ensemble").sum())
    single = len(rows) - stacks
    named = [(single, "defense"), (stacks, "ensemble")]
    return " and ".join(f"{count} {noun}{'s' * (count != 1)}" for count, noun in named if count)


def _count_with_verb(count: int) -> str:
    return f"{count} {'is' if count == 1 else 'are'}"
