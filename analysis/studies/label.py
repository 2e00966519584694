"""The study of `analyze label`: labels by people on a sample of a run's judged responses.

No text of a response is stored, so the sampled responses are generated again, with the options in run.json.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from analysis.datasets.records import read_records
from analysis.judges.judge import judge_queries
from analysis.models.cache import SCORING_SOURCES, hash_code
from analysis.models.chat_template import redact_secrets
from analysis.models.session import Response, generate_responses
from analysis.progress import make_notifier, make_progress_bar
from analysis.report.folder import add_tables, read_run
from analysis.run import build_condition_chats
from analysis.stats.judge_correction import ANSWERS, REFUSES, CorrectedRates, correct_refusal_rates
from analysis.stats.tables import ResponseVerdict, read_table
from analysis.studies.judge_file import JudgeOptions
from analysis.studies.manifest import describe_attacks, describe_inputs
from analysis.studies.responses import RESPONSE_COLUMNS, name_verdict
from analysis.studies.run_spec import RunSpec, build_run_spec
from analysis.studies.setup import RunSetup, prepare_setup
from defenses.contract import Defense
from defenses.errors import UserError

DEFAULT_LABELS = 60
MIN_LABELS = 10  # five for each verdict
KEY_COLUMNS = ("query", "attack", "defense")
LABEL_COLUMNS = (*KEY_COLUMNS, "verdict", "label")
SHEET_COLUMNS = (*KEY_COLUMNS, "request", "response", "label")
_SHEET_FORMAT = (
    f"it needs the columns {', '.join(KEY_COLUMNS)} and label, as `analyze label --csv` writes them"
)
_SKIPPED = "skip"
_LABEL_BY_TEXT = {"refuses": REFUSES, "r": REFUSES, "answers": ANSWERS, "a": ANSWERS, "": "", "s": ""}
_LABEL_BY_TEXT[_SKIPPED] = ""
_JUDGED_VERDICTS = (ResponseVerdict.REFUSED.value, ResponseVerdict.NOT_REFUSED.value)
_MIN_VERDICT_SHARE = 3  # at least a third of the labels go to each verdict
_MAX_CHANGED_SHARE = 0.05  # of the regenerated responses may have another verdict than in the run

ResponseKey = tuple[str, str, str]  # query, attack and defense


@dataclass(frozen=True)
class JudgedRun:
    """A run with judged responses, and the labels that people gave to them.

    Attributes:
        folder: of the run.
        record: contents of its `run.json`.
        responses: the columns `RESPONSE_COLUMNS` and `label`: refuses, answers, or empty without a label.
    """

    folder: Path
    record: Mapping[str, Any]
    responses: pd.DataFrame

    @property
    def labels(self) -> pd.DataFrame:
        """The labeled responses, in the columns `LABEL_COLUMNS`."""
        return self.responses.loc[self.responses["label"] != "", list(LABEL_COLUMNS)].reset_index(drop=True)

    @property
    def judge_name(self) -> str:
        """Name of the judge of the responses."""
        return str(self.record["responses"]["judge"]["name"])

    @property
    def n_tokens(self) -> int:
        """Number of tokens of each response that the judge read, and that people read."""
        return int(self.record["responses"]["new_tokens"])

    def add_labels(self, labels: Mapping[ResponseKey, str]) -> JudgedRun:
        """Return the run with more labels; an empty text removes the label of a response."""
        keys = _list_keys(self.responses)
        label = [labels.get(key, old) for key, old in zip(keys, self.responses["label"], strict=True)]
        return replace(self, responses=self.responses.assign(label=label))

    def correct_rates(self) -> CorrectedRates:
        """Return the refusal rates of the run, corrected for the errors of the judge."""
        return correct_refusal_rates(self.responses, abs(int(self.record["seed"])))

    def save_labels(self) -> None:
        """Write `labels.csv` into the folder of the run."""
        add_tables(self.folder, {"labels": self.labels})


@dataclass(frozen=True)
class LabelSheet:
    """Responses to label.

    Attributes:
        rows: one row per response in the columns `SHEET_COLUMNS`, without those that have a label.
        n_sampled: number of responses in the sample.
        n_changed: number of responses that are left out, because the text is not the one that was judged.
    """

    rows: pd.DataFrame
    n_sampled: int
    n_changed: int = 0


@dataclass(frozen=True)
class LabeledRun:
    """What people's labels say about a run.

    Attributes:
        sheet: the responses to label, in the columns `SHEET_COLUMNS`; empty where labels were given.
        labels: the labels, in the columns `LABEL_COLUMNS`.
        corrected_rates: refusal rates by the judge and corrected, a row per condition and class; empty
            without labels.
        judge_accuracy: one row with agreement, κ, sensitivity and specificity of the judge; empty as long as
            one of its verdicts has fewer than five labels.
    """

    sheet: pd.DataFrame
    labels: pd.DataFrame
    corrected_rates: pd.DataFrame
    judge_accuracy: pd.DataFrame

    @classmethod
    def from_run(cls, run: JudgedRun, sheet: pd.DataFrame | None = None) -> LabeledRun:
        """Return what the labels of a run say.

        Args:
            run: the run.
            sheet: the responses to label, if there are any.
        """
        if sheet is None:
            sheet = pd.DataFrame(columns=list(SHEET_COLUMNS))
        corrected = run.correct_rates()
        accuracy = corrected.accuracy
        rows = [] if accuracy is None else [{"judge": run.judge_name} | accuracy.make_columns()]
        rates = corrected.rates if len(run.labels) else corrected.rates.iloc[:0]
        return cls(sheet, run.labels, rates, pd.DataFrame(rows))

    def save_tables(self, folder: Path) -> LabeledRun:
        """Write `corrected_rates.csv` and `judge_accuracy.csv` into a run, as far as there are labels."""
        tables = {"corrected_rates": self.corrected_rates, "judge_accuracy": self.judge_accuracy}
        add_tables(folder, tables)
        return self


def read_judged_run(folder: Path) -> JudgedRun:
    """Read a run with judged responses, and the labels in its folder.

    Args:
        folder: of a run of `analyze --responses`.

    Raises:
        UserError: if the folder holds no such run, or its labels belong to other responses.
    """
    run = read_run(folder, lambda name: ({}, ""))
    if run.model_runs:
        first = run.record["models"][0]["folder"]
        raise UserError(
            f"{folder} holds the runs of several models: label one of them, such as {folder / first}"
        )
    if "responses.csv" not in run.files or "responses" not in run.record:
        raise UserError(f"{folder} holds no judged responses: repeat the run with --responses all")
    responses = _read_text_table(folder / "responses.csv", run.files["responses.csv"], RESPONSE_COLUMNS)
    responses["harmful"] = responses["harmful"] == "True"
    judged_run = JudgedRun(folder, run.record, responses.assign(label=""))
    if not responses["verdict"].isin(_JUDGED_VERDICTS).any():
        raise UserError(f"{folder}: no response has a verdict, so there is nothing to label: repeat the run")
    path = folder / "labels.csv"  # also if it is of an earlier run, for it may be of the same responses
    if not path.is_file():
        return judged_run
    labels = _read_text_table(path, path.read_bytes(), LABEL_COLUMNS)
    verdicts = dict(zip(_list_keys(responses), responses["verdict"], strict=True))
    for key, verdict in zip(_list_keys(labels), labels["verdict"], strict=True):
        if verdicts.get(key) != verdict:
            raise UserError(
                f"{path} belongs to other responses than responses.csv (query {key[0]!r}, "
                f"defense {key[2]!r}): the run was repeated; move labels.csv away to label its new responses"
            )
    return judged_run.add_labels(parse_labels(judged_run, labels.to_dict("records"), "labels.csv"))


def build_label_sheet(run: JudgedRun, n: int, console: Console, offline: bool = False) -> LabelSheet:
    """Draw a sample of the judged responses and generate those again that have no label yet.

    Args:
        run: the run.
        n: number of responses in the sample.
        console: shows progress.
        offline: whether the network may not be used.

    Raises:
        UserError: if the responses cannot be generated again.
    """
    sample = draw_label_sample(run.responses, n, int(run.record["seed"]))
    wanted = sample[sample["label"] == ""]
    if wanted.empty:
        return LabelSheet(pd.DataFrame(columns=list(SHEET_COLUMNS)), len(sample))
    regenerated = regenerate_responses(run, wanted, console, offline)
    is_same = regenerated["verdict"].to_numpy() == wanted["verdict"].to_numpy()
    n_changed = int((~is_same).sum())
    if n_changed > max(1, _MAX_CHANGED_SHARE * len(wanted)):
        raise UserError(
            f"{n_changed} of {len(wanted)} responses that were generated again have another verdict than in "
            f"{run.folder}, so they are not the responses of the run ({_explain_difference(run, console)}): "
            "repeat the run with --responses, then label it"
        )
    rows = regenerated[is_same].assign(label="")[list(SHEET_COLUMNS)].reset_index(drop=True)
    return LabelSheet(rows, len(sample), n_changed)


def draw_label_sample(responses: pd.DataFrame, n: int, seed: int) -> pd.DataFrame:
    """Return a random sample of the judged responses, in random order.

    Each verdict has its share of the sample, but at least a third, as far as there are as many; within a
    verdict, every response has the same chance, and conditions and classes have their shares. A larger
    sample contains a smaller one.

    Args:
        responses: the columns `RESPONSE_COLUMNS`.
        n: size of the sample.
        seed: of the run.
    """
    if n < MIN_LABELS:
        raise UserError(f"--n {n}: it takes at least {MIN_LABELS}, some for each verdict of the judge")
    judged = responses[responses["verdict"].isin(_JUDGED_VERDICTS)]
    rng = random.Random(f"{seed}/labels")
    rows_by_cell: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    cell_columns = ["attack", "defense", "harmful", "verdict"]
    for row, cell in zip(judged.index, judged[cell_columns].itertuples(index=False, name=None), strict=True):
        rows_by_cell[cell].append(row)
    # A response's position is uniform between 0 and 1; those of one cell are evenly spread.
    position_by_row: dict[int, float] = {}
    for rows in rows_by_cell.values():
        shuffled = rng.sample(rows, len(rows))
        position_by_row |= {row: (rank + rng.random()) / len(rows) for rank, row in enumerate(shuffled)}
    order_by_row = {row: rng.random() for row in judged.index}
    chosen: list[int] = []
    rows_by_verdict = {
        verdict: sorted(judged.index[judged["verdict"] == verdict], key=position_by_row.__getitem__)
        for verdict in _JUDGED_VERDICTS
    }
    n_refused = allocate_refused_labels(n, *map(len, rows_by_verdict.values()))
    for verdict, size in zip(_JUDGED_VERDICTS, (n_refused, n - n_refused), strict=True):
        chosen += rows_by_verdict[verdict][:size]
    return judged.loc[sorted(chosen, key=order_by_row.__getitem__)]


def allocate_refused_labels(n: int, n_refused: int, n_others: int) -> int:
    """Return how many of n labels go to responses that the judge calls refusals.

    >>> allocate_refused_labels(60, 50, 50), allocate_refused_labels(60, 30, 270)
    (30, 20)
    >>> allocate_refused_labels(60, 4, 296), allocate_refused_labels(60, 70, 20)
    (4, 40)

    Args:
        n: number of labels.
        n_refused: number of responses that the judge calls refusals.
        n_others: number of other responses.
    """
    minimum = -(-n // _MIN_VERDICT_SHARE)
    share = min(max(round(n * n_refused / (n_refused + n_others)), minimum), n - minimum)
    return min(max(share, n - n_others), n_refused)


def regenerate_responses(
    run: JudgedRun, rows: pd.DataFrame, console: Console, offline: bool = False
) -> pd.DataFrame:
    """Generate responses of a run again.

    Args:
        run: the run.
        rows: the responses, in the columns `KEY_COLUMNS`.
        console: shows progress.
        offline: whether the network may not be used.

    Returns:
        The columns of `rows`, `request` (without the attack), `response`, and the judge's new `verdict`.

    Raises:
        UserError: if run.json does not suffice, or the model, the data or a defense has changed.
    """
    options = _get_options(run)
    spec = _build_spec(options, offline)
    if varied := next((attack.name for attack in spec.attacks if attack.variants), None):
        raise UserError(
            f"{run.folder}: the responses under {varied} cannot be generated again without the margins that "
            f"chose their variants: repeat the run without --attack {varied}, then label it"
        )
    judge = JudgeOptions(run.judge_name).load_judge(offline, make_notifier(console))
    names = sorted(set(rows["defense"]))

    def check_inputs(setup: RunSetup) -> None:
        _check_unchanged(run, setup, spec, [name for name in names if name in setup.conditions])

    setup = prepare_setup(
        spec,
        options["defenses"],
        options["settings"],
        console,
        with_threshold=False,
        check_inputs=check_inputs,
    )
    _check_unchanged(run, setup, spec, names)
    queries_by_id = {query.id: query for query in setup.query_set.queries}
    attacks = {attack.name: attack for attack in setup.attacks}
    prefill = tuple(run.record["readout"]["answers_begin"])
    texts: dict[ResponseKey, tuple[str, str, str]] = {}
    with make_progress_bar(console) as bar:
        task = bar.add_task("generating responses again", total=len(rows))
        for (attack, name), group in rows.groupby(["attack", "defense"], sort=False):
            defense = setup.conditions[str(name)]
            queries = [queries_by_id[query] for query in group["query"]]
            requests = [query.text for query in queries]
            # To the last token, although the judge may have known earlier: a short text would give its
            # verdict away.
            responses = generate_responses(
                setup.session,
                defense,
                build_condition_chats(setup.session, defense, queries, setup.readout, attacks[str(attack)]),
                prefill,
                run.n_tokens,
            )
            verdicts = judge_queries(judge, requests, responses, defense)
            for query, copies, verdict in zip(queries, responses, verdicts, strict=True):
                text = format_copies(copies, defense)
                texts[query.id, str(attack), str(name)] = query.text, text, name_verdict(verdict)
            bar.advance(task, len(group))
    found = [texts[key] for key in _list_keys(rows)]
    request, response, verdict_names = zip(*found, strict=True)
    return rows.assign(request=list(request), response=list(response), verdict=list(verdict_names))


def format_copies(copies: Sequence[Response], defense: Defense) -> str:
    """Return the text to label: the response, or those to all copies of the query with the pooling rule.

    Args:
        copies: the responses to each copy of a query.
        defense: its secrets are redacted.
    """
    texts = [redact_secrets(copy.text, defense.secret_texts()).strip() for copy in copies]
    if len(texts) == 1:
        return texts[0]
    rule = "any of them refuses" if defense.pool == "max" else "more than half of them refuse"
    numbered = [f"({number}) {text}" for number, text in enumerate(texts, 1)]
    return "\n".join([f"[{len(texts)} responses, which together refuse if {rule}]", *numbered])


def read_labels(run: JudgedRun, path: Path) -> dict[ResponseKey, str]:
    """Return the labels in a filled-in file.

    Args:
        run: the run.
        path: a `.csv` file with the columns `KEY_COLUMNS` and `label`.

    Raises:
        UserError: if a label or a row is not valid, or no label is filled in.
    """
    columns = (*KEY_COLUMNS, "label")
    records, _ = read_records(path, columns, _SHEET_FORMAT, columns)
    labels = parse_labels(run, records, str(path))
    if not any(labels.values()):
        raise UserError(
            f"{path} exists, and its column label is empty: fill in refuses or answers (empty or skip: no "
            "label), or choose another file for --csv"
        )
    return labels


def parse_labels(run: JudgedRun, records: Sequence[Mapping[Any, Any]], source: str) -> dict[ResponseKey, str]:
    """Return the label of each response that rows name; empty for a response that was skipped.

    Rows without a label are left out, so that they remove no earlier label.

    Args:
        run: the run.
        records: rows with the columns `KEY_COLUMNS` and `label`.
        source: name of the rows in errors.

    Raises:
        UserError: if a label or a row is not valid.
    """
    is_judged = run.responses["verdict"].isin(_JUDGED_VERDICTS)
    known_keys = set(_list_keys(run.responses[is_judged]))
    number_by_key: dict[ResponseKey, int] = {}
    labels: dict[ResponseKey, str] = {}
    for number, record in enumerate(records, 1):
        if missing := [name for name in (*KEY_COLUMNS, "label") if name not in record]:
            raise UserError(f"{source} lacks the column {missing[0]}; {_SHEET_FORMAT}")
        key: ResponseKey = (str(record["query"]), str(record["attack"]), str(record["defense"]))
        place = f"{source}, row {number}"
        if key not in known_keys:
            raise UserError(
                f"{place}: {run.folder} has no judged response to query {key[0]!r} under attack {key[1]!r} "
                f"and defense {key[2]!r}: leave these columns as they were written (a spreadsheet changes "
                "ids such as 001 unless the columns are imported as text; so does pandas without dtype=str)"
            )
        if key in number_by_key:
            raise UserError(
                f"{place} is the same response as row {number_by_key[key]} (query {key[0]!r}): keep one "
                "of them"
            )
        number_by_key[key] = number
        value = record["label"]
        text = "" if value is None or value != value else str(value).strip().lower()
        if text not in _LABEL_BY_TEXT:
            raise UserError(
                f"{place} (query {key[0]!r}): the label is {value!r}; it takes {REFUSES}, {ANSWERS}, "
                f"{_SKIPPED}, or nothing"
            )
        if text:
            labels[key] = _LABEL_BY_TEXT[text]
    return labels


def _list_keys(table: pd.DataFrame) -> list[ResponseKey]:
    """Return query, attack and defense of each row."""
    return list(table[list(KEY_COLUMNS)].itertuples(index=False, name=None))


def _read_text_table(path: Path, content: bytes, columns: Sequence[str]) -> pd.DataFrame:
    """Return a CSV table whose values are all text, empty where they are missing."""
    try:
        table = read_table(content).astype(object).fillna("").astype(str)
    except ValueError as error:
        raise UserError(f"{path} is not a CSV table ({str(error).splitlines()[0]}); repair it") from error
    if missing := [name for name in columns if name not in table]:
        raise UserError(f"{path} lacks the column {missing[0]}; repeat the run")
    return table


def _get_options(run: JudgedRun) -> Mapping[str, Any]:
    """Return the options of a run, if they suffice to generate its responses again."""
    options = run.record.get("options")
    if not isinstance(options, dict):
        raise UserError(
            f"{run.folder}: the responses cannot be generated again, because run.json lacks the options of "
            "the run (an earlier version wrote it): repeat the run with --responses, then label it"
        )
    if options["not_repeatable"]:
        raise UserError(
            f"{run.folder}: the responses cannot be generated again: {options['not_repeatable']}, repeat the "
            "run with it, then label it"
        )
    return options


def _build_spec(options: Mapping[str, Any], offline: bool) -> RunSpec:
    """Return the options with which the responses are generated again.

    The readout does not matter for them, except its prefill, which the record has.
    """
    return build_run_spec(
        options["model"],
        options["data"],
        options["split"],
        options["limit"],
        options["batch_size"],
        options["device"],
        options["dtype"],
        options["seed"],
        offline,
        options["attacks"],
        "words",
        responses=options["responses"],
        share_prefix=options.get("share_prefix", True),
        template=options.get("template"),  # absent from runs of earlier versions
        answer_prefix=options.get("answer_prefix"),
    )


def _check_unchanged(run: JudgedRun, setup: RunSetup, spec: RunSpec, conditions: Sequence[str]) -> None:
    """Raise if the model, the data, an attack or a defense is not the one of the run."""
    rebuilt = {name: setup.conditions[name] for name in conditions if name in setup.conditions}
    described = describe_inputs(setup.session, rebuilt, setup.query_set, setup.split, spec.limit)
    described |= describe_attacks(setup.attacks)
    now, then = json.loads(json.dumps(described)), run.record
    changed = [
        f"the {subject} ({now_value} now, {then_value} in the run)"
        for subject, section, entry in (
            ("weights of the model", "model", "sha256"),
            ("state of the model", "model", "state_sha256"),
            ("data", "data", "sha256"),
        )
        if (now_value := str(now[section].get(entry))[:12])
        != (then_value := str(then[section].get(entry))[:12])
    ]
    for entry, subject in (("dtype", "precision"), ("attacks_sha256", "wording of an attack")):
        if now[entry] != then.get(entry):
            changed.append(f"the {subject}")
    # Runs of earlier versions do not tell their template.
    if now["chat_template"] != then.get("chat_template", now["chat_template"]):
        changed.append("the chat template")
    for name in conditions:
        if name not in rebuilt:
            changed.append(f"the defense {name!r}, which this model now lacks something for,")
        elif now["defenses"][name] != then["defenses"][name]:
            changed.append(f"the defense {name!r} (its code, settings, secret or weights)")
    if changed:
        raise UserError(
            f"{run.folder}: the responses cannot be generated again: {changed[0]} changed since the run; "
            "restore it, or repeat the run with --responses and label that"
        )


def _explain_difference(run: JudgedRun, console: Console) -> str:
    """Return what differs from the time of the run, if anything known does."""
    from analysis.studies.manifest import collect_versions

    versions = run.record.get("versions", {})
    packages = [name for name in versions if name != "python"]
    now = collect_versions(*packages)
    reasons = [
        f"{name} was {versions[name]}, is {now[name]}" for name in packages if versions[name] != now[name]
    ]
    if run.record["options"]["code_sha256"] != hash_code(*SCORING_SOURCES):
        reasons.append("the code of refusalscope has changed")
    judge = JudgeOptions(run.judge_name).load_judge(True, make_notifier(console))
    if json.loads(json.dumps(judge.manifest_entry)) != run.record["responses"]["judge"]:
        reasons.append(f"the judge {run.judge_name} has changed")
    return ", ".join(reasons) or f"it was run on {run.record['device']}"
