"""Summarize a run in a few sentences: how many defenses have which verdict, without hard claims."""

from __future__ import annotations

import pandas as pd

from analysis.stats.agreement import RESPONSES_READOUT
from analysis.stats.format import Interval
from analysis.stats.kinds import list_kinds
from analysis.stats.tables import DIRECT, INTERVAL_SUFFIXES, Trust, find_defense_rows, has_judged_rates
from analysis.stats.verdicts import EFFECT_NAMES, EQUIVALENT, INCONCLUSIVE, NOT_JUDGED

_MAX_NAMED_DEFENSES = 5  # a sentence names at most this many defenses
_HEADLINE_TOKENS = 5  # tokens of a complying opener, after which a headline names the shift
_FINDING_PHRASES = {
    "holds": "the same sign on all models",
    "opposite signs": "opposite signs",
    "some models": "shown on some models and equivalent on others",
    "shown on some": "shown on some models only",
    "equivalent": "equivalent to none on all models",
    "shown on none": "shown on none",
}
_NOT_FOUND = "no effect found"  # what older runs say of anything without a sign


def select_defense_rows(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a summary that are defenses: no reference, no control, no ablation of a defense.

    >>> names = ["none", "policy", "policy/half", "random_tokens"]
    >>> rows = pd.DataFrame({"defense": names, "family": ["none", "reminders", "reminders", "control"]})
    >>> select_defense_rows(rows)["defense"].tolist()
    ['policy']

    Args:
        summary: `summary.csv`.
    """
    chosen = find_defense_rows(summary["defense"].astype(str), summary["family"])
    if "verdict" in summary:
        chosen &= summary["verdict"] != "reference"
    return summary[chosen]


def choose_headline_attack(summary: pd.DataFrame) -> str:
    """Return the attack that a headline covers: no attack if the run has it, else the first attack."""
    attacks = [str(name) for name in summary["attack"].unique()]
    return DIRECT if DIRECT in attacks or not attacks else attacks[0]


def describe_effects(summary: pd.DataFrame, model_and_data: str, attack: str = DIRECT) -> str:
    """Return one to three sentences on the verdicts of a run under one attack.

    Verdicts from responses count as they are. Of verdicts from margins, those whose readout generated text
    contradicts do not count.

    >>> row = {"attack": "direct", "defense": "policy", "family": "reminders", "based_on": "responses"}
    >>> verdict = {"verdict": "shift +, discrimination inconclusive"}
    >>> describe_effects(pd.DataFrame([row | verdict]), "smollm2").partition(": ")[2]
    '1 shifts toward refusal; none separates harmful from benign queries better, 1 inconclusive.'

    Args:
        summary: `summary.csv`.
        model_and_data: model and data set, as a noun phrase.
        attack: the attack whose rows are counted.
    """
    rows = select_defense_rows(summary[summary["attack"] == attack])
    is_judged = has_judged_rates(rows)
    trusted = rows["trusted"] if "trusted" in rows else pd.Series(Trust.NOT_VALIDATED, rows.index)
    if is_judged:
        trusted = pd.Series(Trust.TRUSTED, rows.index)
    excluded = rows[trusted == Trust.NOT_TRUSTED]
    counted = rows[trusted != Trust.NOT_TRUSTED]
    place = model_and_data + ("" if attack == DIRECT else f" under the attack {attack}")
    if not len(rows):
        return f"No defense was evaluated on {place}, only references and controls."
    exclusion = (
        f" {_count_with_verb(len(excluded))} not counted, because generated text contradicts the readout."
    )
    if not len(counted):
        return f"No conclusion is possible about {_count_defenses(rows)} on {place}.{exclusion}"
    source = "judged responses" if is_judged else "first-token margins"
    text = f"Results for {_count_defenses(counted)} on {place}, from {source}: {_count_effects(counted)}."
    n_provisional = int((trusted[counted.index] != Trust.TRUSTED).sum())
    if n_provisional:
        if n_provisional < len(counted):
            subject = _count_with_verb(n_provisional)
        else:
            subject = "All are" if n_provisional > 1 else "It is"
        text += (
            f" {subject} provisional, because it is unknown whether generated text agrees with the readout."
        )
    return text + exclusion * bool(len(excluded))


def describe_arms(arms: pd.DataFrame, model_and_data: str) -> str:
    """Return one sentence on BackdoorAlign's arms, from generated text.

    >>> text = {f"{name}{end}": [1.0, 1.0, 0.0] for name in ("asr", "text_refused_twin")
    ...         for end in ("", "_low", "_high")}
    >>> rows = pd.DataFrame({"arm": ["attacked", "backdoor", "backdoor"], "secret": ["none", "none", "own"],
    ...                      "attack": "obedience", **text})
    >>> describe_arms(rows, "smollm2").partition("; ")[2]
    'with it, it answers 0 % [0, 0] and refuses, of benign requests, 0 % [0, 0] (twin).'

    Args:
        arms: `arms.csv`.
        model_and_data: model and data set, as a noun phrase.
    """
    rows = arms[arms["attack"] == "obedience"].set_index(["arm", "secret"])

    def format_share(arm: str, secret: str, name: str) -> str:
        value, low, high = 100 * rows.loc[
            (arm, secret), [f"{name}{suffix}" for suffix in INTERVAL_SUFFIXES]
        ].astype(float)
        return f"{value:.0f} % [{low:.0f}, {high:.0f}]"

    refused = [
        f"{format_share('backdoor', 'own', f'text_refused_{kind}')} ({kind})"
        for kind in list_kinds(arms.columns, "text_refused_{}_low")
    ]
    return (
        f"BackdoorAlign's arms on {model_and_data}, from generated text: the attacked model answers "
        f"{format_share('attacked', 'none', 'asr')} of harmful requests. With BackdoorAlign's weights, it "
        f"answers {format_share('backdoor', 'none', 'asr')} without the secret prompt; with it, it "
        f"answers {format_share('backdoor', 'own', 'asr')} and refuses, of benign requests, "
        f"{', '.join(refused)}."
    )


def describe_validity(validity: pd.DataFrame, model_and_data: str) -> str:
    """Return one sentence on the conditions in which each readout is trusted, and for what.

    >>> trust = {"trusted": ["trusted", "cannot tell"], "rate_trusted": ["not trusted", "trusted"]}
    >>> text = describe_validity(pd.DataFrame({"readout": "words", **trust}), "smollm2")
    >>> text.partition(" single queries ")[2]
    'in 1 of 2 conditions (contradicted in 0), for rates in 1 (contradicted in 1).'

    Args:
        validity: `validity.csv`.
        model_and_data: model and data set, as a noun phrase.
    """
    counts = "; ".join(describe_readout_trust(validity))
    return f"Agreement of readouts with generated text on {model_and_data}: {counts}."


def describe_depth(depth: pd.DataFrame, model_and_data: str) -> str:
    """Return one sentence on what is left of the shift of each defense after complying tokens.

    >>> row = {"attack": "direct", "defense": "policy", "prefix": "complying", "tokens": [0, 5]}
    >>> row |= {"response_shift": [40.0, 5.0], "response_shift_low": [30.0, -5.0]}
    >>> depth = pd.DataFrame(row | {"response_shift_high": [50.0, 15.0]})
    >>> describe_depth(depth, "smollm2")
    'Shift on smollm2, points, after 0 and after 5 complying tokens: policy +40 [+30, +50] and +5 [-5, +15].'

    Args:
        depth: `depth.csv`.
        model_and_data: model and data set, as a noun phrase.
    """
    attack = choose_headline_attack(depth)
    rows = depth[(depth["attack"] == attack) & (depth["prefix"] == "complying")].dropna(
        subset="response_shift"
    )
    if not len(rows):
        return f"Responses after the first tokens of openers on {model_and_data}; no defense is compared."
    shown = [0, max(tokens for tokens in rows["tokens"] if tokens <= _HEADLINE_TOKENS)]
    names = list(dict.fromkeys(rows["defense"]))
    clauses = []
    for name in names[:_MAX_NAMED_DEFENSES]:
        by_tokens = {row["tokens"]: row for row in rows[rows["defense"] == name].to_dict("records")}
        texts = [
            Interval.from_row(by_tokens[tokens], "response_shift").format_text("+.0f")
            for tokens in shown
            if tokens in by_tokens
        ]
        clauses.append(f"{name} {' and '.join(texts)}")
    more = f" ({len(names) - len(clauses)} more: depth.csv)" if len(names) > len(clauses) else ""
    place = model_and_data + ("" if attack == DIRECT else f" under the attack {attack}")
    return (
        f"Shift on {place}, points, after 0 and after {shown[1]} complying tokens: "
        f"{'; '.join(clauses)}{more}."
    )


def describe_rank_agreement(agreement: pd.DataFrame, model: str) -> str:
    """Return one sentence on how alike each pair of data sets orders the defenses, under the first attack.

    >>> row = {"attack": "direct", "first": "a", "second": "b", "measure": "shift", "n_defenses": 9}
    >>> values = {"rank_correlation": 0.5, "rank_correlation_low": 0.25, "rank_correlation_high": 0.75}
    >>> describe_rank_agreement(pd.DataFrame([row | values | {"ceiling": 0.875}]), "smollm2")
    'Order of the defenses on smollm2, rank correlation: a and b, shift +0.50 [+0.25, +0.75] (ceiling 0.88).'

    Args:
        agreement: `agreement.csv`.
        model: name of the model.
    """
    rows = agreement[agreement["attack"] == agreement["attack"].iloc[0]]
    clauses = []
    for (first, second), pair_rows in rows.groupby(["first", "second"], sort=False):
        shown = pair_rows[pair_rows["measure"].isin(["shift", "discrimination"])]
        texts = [
            f"{row['measure']} {Interval.from_row(row, 'rank_correlation').format_text('+.2f')} "
            f"(ceiling {Interval(row['ceiling']).format_text('.2f')})"
            for row in shown.to_dict("records")
        ]
        clauses.append(f"{first} and {second}, {', '.join(texts)}")
    return f"Order of the defenses on {model}, rank correlation: {'; '.join(clauses)}."


def describe_model_findings(findings: pd.DataFrame, models_and_data: str) -> str:
    """Return one sentence on which findings hold on all models, under the first attack.

    >>> row = {"attack": "direct", "defense": ["a", "b"], "n_models": 2}
    >>> outcomes = {"shift": ["holds", "shown on some"], "discrimination": "shown on none"}
    >>> describe_model_findings(pd.DataFrame(row | outcomes), "x and y").partition(", ")[0]
    'Comparison of 2 defenses on x and y. Shift: 1 has the same sign on all models (a)'

    Args:
        findings: `findings.csv`.
        models_and_data: models and data set, as a noun phrase.
    """
    attack = choose_headline_attack(findings)
    rows = findings[findings["attack"] == attack]
    if not len(rows):
        return f"No defense was evaluated on {models_and_data}, only references and controls."
    texts = []
    for effect in EFFECT_NAMES:
        clauses = []
        for outcome, phrase in _FINDING_PHRASES.items():
            names = rows.loc[rows[effect] == outcome, "defense"].astype(str).tolist()
            if not names:
                continue
            listed = (
                f" ({', '.join(names)})" if outcome == "holds" and len(names) <= _MAX_NAMED_DEFENSES else ""
            )
            verb = (
                f"{'has' if len(names) == 1 else 'have'} " if outcome in ("holds", "opposite signs") else ""
            )
            clauses.append(f"{len(names)} {verb}{phrase}{listed}")
        texts.append(f"{effect.capitalize()}: {', '.join(clauses)}.")
    under = "" if attack == DIRECT else f" under the attack {attack}"
    noun = "defense" if len(rows) == 1 else "defenses"
    return f"Comparison of {len(rows)} {noun} on {models_and_data}{under}. {' '.join(texts)}"


def describe_readout_trust(validity: pd.DataFrame) -> list[str]:
    """Return a clause for each readout: in how many conditions text validates or contradicts it.

    In the remaining conditions, one cannot tell.

    Args:
        validity: `validity.csv`; older files have no verdict on rates.
    """
    clauses = []
    for name, rows in validity.groupby("readout", sort=False):
        clause = (
            f"{_name_readout(str(name))} trusted for single queries in "
            f"{_count_trusted(rows['trusted'], f' of {len(rows)} condition' + 's' * (len(rows) != 1))}"
        )
        if "rate_trusted" in rows:
            clause += f", for rates in {_count_trusted(rows['rate_trusted'])}"
        clauses.append(clause)
    return clauses


def _name_readout(name: str) -> str:
    """Return the subject of a clause on a readout, with its verb."""
    return "judged first tokens of responses are" if name == RESPONSES_READOUT else f"{name} is"


def _count_trusted(trust: pd.Series, total: str = "") -> str:
    n_trusted, n_untrusted = (int((trust == value).sum()) for value in (Trust.TRUSTED, Trust.NOT_TRUSTED))
    return f"{n_trusted}{total} (contradicted in {n_untrusted})"


def _count_effects(rows: pd.DataFrame) -> str:
    """Return how many defenses have each outcome, for shift and for discrimination."""
    shift, discrimination = (
        rows["verdict"].astype(str).map(lambda verdict, effect=effect: _find_outcome(verdict, effect))
        for effect in EFFECT_NAMES
    )
    up, better = (outcomes == "+" for outcomes in (shift, discrimination))
    text = f"{int(up.sum()) or 'none'} shift{'' if up.sum() > 1 else 's'} toward refusal"
    if down := int((shift == "-").sum()):
        text += f", {down} away from it"
    text += _count_other_outcomes(shift)
    text += f"; {int(better.sum()) or 'none'} separate{'' if better.sum() > 1 else 's'} harmful from benign "
    text += "queries better"
    if 0 < better.sum() <= _MAX_NAMED_DEFENSES and len(rows) > 1:
        text += f" ({', '.join(map(str, rows.loc[better, 'defense']))})"
    if worse := int((discrimination == "-").sum()):
        text += f", {worse} worse"
    return text + _count_other_outcomes(discrimination)


def _find_outcome(verdict: str, effect: str) -> str:
    """Return the outcome of one effect in a verdict; of older runs, an effect that is not named has none."""
    for outcome in ("+", "-", EQUIVALENT, INCONCLUSIVE):
        if f"{effect} {outcome}" in verdict:
            return outcome
    return verdict if verdict in (EQUIVALENT, INCONCLUSIVE, NOT_JUDGED) else _NOT_FOUND


def _count_other_outcomes(outcomes: pd.Series) -> str:
    """Return the counts of the outcomes without a sign, after a comma; an empty text if there is none."""
    phrases = [
        f"{count} {outcome}"
        for outcome in (EQUIVALENT, INCONCLUSIVE, NOT_JUDGED, _NOT_FOUND)
        if (count := int((outcomes == outcome).sum()))
    ]
    return "".join(f", {phrase}" for phrase in phrases)


def _count_defenses(rows: pd.DataFrame) -> str:
    n_ensembles = int((rows["family"] == "ensemble").sum())
    counts = [(len(rows) - n_ensembles, "defense"), (n_ensembles, "ensemble")]
    return " and ".join(f"{count} {noun}{'s' * (count != 1)}" for count, noun in counts if count)


def _count_with_verb(count: int) -> str:
    return f"{count} {'is' if count == 1 else 'are'}"
