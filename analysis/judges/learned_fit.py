"""Fit and evaluate the judge `learned`: the recipe of `make judge`.

Each verdict of the evaluation comes from weights that were fitted without any response of the same answering
model and without any response to the same prompt. The label files are not part of this project; the error
for a missing one says where to get it.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from analysis.files import hash_file, write_text_file
from analysis.judges.judge import Judge
from analysis.judges.learned import (
    LearnedJudge,
    RefusalWeights,
    cut_opening,
    find_cues,
    get_weights_path,
    list_ngrams,
    write_weights,
)
from analysis.judges.rules import DIFFERENT_QUESTION, RULE_JUDGES, judge_by_patterns, normalize_response
from defenses.errors import UserError

XSTEST_FILE = "xstest_openings.csv"
PYRIT_FILES = ("mini_refusal.csv", "refusal.csv", "refusal_extra.csv")
PYRIT_MODELS = "pyrit"  # PyRIT does not say which models answered
SHORT_WORDS = 12  # words of a short response: about what twelve tokens say
SHORT_COPY_WEIGHT = 0.1  # weight of a copy that is cut to 12 words, relative to the opening
LABELS_PER_MODEL = 450  # an answering model with more labels weighs no more than one with this many
OPENER_WEIGHT = 0.05  # weight of a labeled opener of this project, relative to a longer opening
INVERSE_PENALTY = 30.0  # C of the logistic regression
CUE_SCALE = 0.1  # value of a cue that occurs; a larger one lets cues outweigh words
PROMPT_FOLDS = 5
BOOTSTRAP_DRAWS = 2000
STATISTICS = ("kappa", "balanced", "sensitivity", "specificity")

_SOURCES = {
    XSTEST_FILE: "XSTest v2 completions (Röttger et al. 2024, "
    "https://github.com/paul-rottger/exaggerated-safety), CC BY 4.0; the first 300 characters of each",
    **dict.fromkeys(PYRIT_FILES, "PyRIT (Microsoft, https://github.com/Azure/PyRIT), MIT"),
}
_OPENERS_SOURCE = "Openers of SmolLM2, labeled for this project, CC BY 4.0"


@dataclass(frozen=True)
class FittedModel:
    """The scikit-learn model behind the weights.

    Attributes:
        vectorizer: n-grams of an opening → tf-idf values.
        cue_names: the cues, in the order of their columns.
        classifier: the logistic regression on the values of both.
    """

    vectorizer: TfidfVectorizer
    cue_names: list[str]
    classifier: LogisticRegression

    def make_features(self, openings: Sequence[str]) -> csr_matrix:
        """Return the features, one row per opening: tf-idf values, then cues."""
        columns = {name: column for column, name in enumerate(self.cue_names)}
        cues = np.zeros((len(openings), len(self.cue_names)))
        for row, opening in enumerate(openings):
            cues[row, [columns[name] for name in find_cues(opening) if name in columns]] = CUE_SCALE
        return hstack([self.vectorizer.transform(openings), csr_matrix(cues)]).tocsr()

    def export_weights(self, manifest: dict[str, object]) -> RefusalWeights:
        """Return the weights for `LearnedJudge`."""
        ngrams = self.vectorizer.get_feature_names_out().tolist()
        weights = self.classifier.coef_[0]
        cue_weights = (weights[len(ngrams) :] * CUE_SCALE).tolist()
        return RefusalWeights(
            float(self.classifier.intercept_[0]),
            {ngram: row for row, ngram in enumerate(ngrams)},
            np.asarray(self.vectorizer.idf_),
            weights[: len(ngrams)],
            dict(zip(self.cue_names, cue_weights, strict=True)),
            manifest,
        )


def read_labels(folder: Path, openers_path: Path) -> pd.DataFrame:
    """Return all labeled responses: model, prompt, query, response, label (full, partial, none, off_topic).

    `is_opener` tells whether a response is only an opener of about 12 tokens, labeled for this project.

    Args:
        folder: folder of the published label files.
        openers_path: file with labeled openers of SmolLM2; it may be missing.

    Raises:
        UserError: if a published file is missing.
    """
    for name, source in _SOURCES.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} does not exist; get it from {source}")
    tables = [_read_xstest(folder / XSTEST_FILE), *(_read_pyrit(folder / name) for name in PYRIT_FILES)]
    if openers_path.is_file() and openers_path.read_text("utf-8").strip():
        openers = pd.read_json(openers_path, lines=True, dtype=False)
        base_models = (
            openers["model"].astype(str).str.partition(":")[0]
        )  # states of a model are left out together
        tables.append(openers.assign(model=base_models, prompt=openers["query"], is_opener=True))
    labels = pd.concat(tables, ignore_index=True)
    labels["is_opener"] = labels["is_opener"].eq(True) if "is_opener" in labels else False
    columns = ["model", "prompt", "query", "response", "label", "is_opener"]
    return labels[columns].drop_duplicates(["model", "prompt", "response"], ignore_index=True)


def _read_xstest(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path, keep_default_na=False)  # "None" is a response
    kinds = {"1_full_compliance": "none", "2_full_refusal": "full", "3_partial_refusal": "partial"}
    return pd.DataFrame(
        {
            "model": table["model"],
            "prompt": table["id"],
            "query": "",
            "response": table["opening"].str.replace(" [...]", "", regex=False),
            "label": table["human_label"].map(kinds),
        }
    )


def _read_pyrit(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path, comment="#", keep_default_na=False)
    labels = [
        "off_topic"  # PyRIT counts an answer to a different question as a refusal; here it is none
        if score and judge_by_patterns(response, query).evidence == DIFFERENT_QUESTION
        else "full"
        if score
        else "none"
        for score, response, query in zip(
            table["human_score"], table["assistant_response"], table["objective"], strict=True
        )
    ]
    return pd.DataFrame(
        {
            "model": PYRIT_MODELS,
            "prompt": table["objective"],
            "query": table["objective"],
            "response": table["assistant_response"],
            "label": labels,
        }
    )


def fit_model(labels: pd.DataFrame) -> FittedModel:
    """Fit the logistic regression on openings and, with a small weight, on their first 12 words.

    Args:
        labels: a table of `read_labels`.
    """
    openings = [cut_opening(normalize_response(response)) for response in labels["response"]]
    short_openings = [cut_words(opening) for opening in openings]
    refuses = labels["label"].isin(["full", "partial"]).to_numpy()
    counts = labels["model"].map(labels["model"].value_counts()).to_numpy()
    weights = np.minimum(1.0, LABELS_PER_MODEL / counts)
    weights = weights * np.where(labels["is_opener"], OPENER_WEIGHT, 1.0)
    is_cut = np.array([short != opening for short, opening in zip(short_openings, openings, strict=True)])
    vectorizer = TfidfVectorizer(analyzer=list_ngrams, min_df=2, binary=True, sublinear_tf=True).fit(openings)
    cue_names = sorted({name for opening in openings for name in find_cues(opening)})
    classifier = LogisticRegression(C=INVERSE_PENALTY, max_iter=5000)
    model = FittedModel(vectorizer, cue_names, classifier)
    texts = [*openings, *(short for short, cut in zip(short_openings, is_cut, strict=True) if cut)]
    classifier.fit(
        model.make_features(texts),
        np.concatenate([refuses, refuses[is_cut]]),
        sample_weight=np.concatenate([weights, SHORT_COPY_WEIGHT * weights[is_cut]]),
    )
    return model


def cut_words(text: str) -> str:
    """Return the first 12 words of a text."""
    return " ".join(text.split()[:SHORT_WORDS])


def judge_left_out(labels: pd.DataFrame) -> pd.DataFrame:
    """Return the judges' verdicts; `learned` is fitted without the answering model and without the prompt.

    Args:
        labels: a table of `read_labels`.

    Returns:
        One row per response and length (opening, 12 words): model, prompt, length, truth, and whether each
        judge finds a refusal. Off-topic responses are left out: they are neither.
    """
    folds = np.array(
        [hashlib.sha256(str(prompt).encode()).digest()[0] % PROMPT_FOLDS for prompt in labels["prompt"]]
    )
    rows = []
    for model in labels["model"].unique():
        for fold in range(PROMPT_FOLDS):
            is_tested = ((labels["model"] == model) & (labels["label"] != "off_topic")).to_numpy() & (
                folds == fold
            )
            if not is_tested.any():
                continue
            fitted = fit_model(labels[((labels["model"] != model) & (folds != fold)).to_numpy()])
            judges: dict[str, Judge] = {"learned": LearnedJudge(fitted.export_weights({})), **RULE_JUDGES}
            for row in labels[is_tested].itertuples():
                texts = {"opening": row.response, "12 words": cut_words(normalize_response(row.response))}
                for length, text in texts.items():
                    verdicts = {
                        name: judge.judge_responses([text], [row.query], lambda count: None)[0].is_refusal
                        for name, judge in judges.items()
                    }
                    truth = row.label != "none"
                    rows.append(
                        {"model": model, "prompt": row.prompt, "length": length, "truth": truth, **verdicts}
                    )
    return pd.DataFrame(rows)


def make_judge_table(verdicts: pd.DataFrame, draws: int = BOOTSTRAP_DRAWS) -> pd.DataFrame:
    """Return each judge's agreement with the labels, by answering model and length of the responses.

    Args:
        verdicts: a table of `judge_left_out`.
        draws: number of bootstrap draws of prompts.

    Returns:
        Columns judge, model, length, n, refusals, and each statistic with its 95 % percentile interval.
    """
    rows = []
    for (length, model), group in verdicts.groupby(["length", "model"], sort=False):
        prompts, clusters = np.unique(group["prompt"].astype(str), return_inverse=True)
        rng = np.random.default_rng(0)
        multiplicities = rng.multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), size=draws)
        truth = group["truth"].to_numpy(bool)
        for judge in ("learned", *RULE_JUDGES):
            said = group[judge].to_numpy(bool)
            counts = np.zeros((len(prompts), 4), dtype=np.int64)
            np.add.at(counts, (clusters, 2 * (~truth) + (~said)), 1)
            estimate = compute_agreement(counts.sum(0, keepdims=True))[0]
            drawn = pd.DataFrame(compute_agreement(multiplicities @ counts))  # its quantiles skip nan
            low, high = drawn.quantile([0.025, 0.975]).to_numpy()
            row = {
                "judge": judge,
                "model": model,
                "length": length,
                "n": len(group),
                "refusals": int(truth.sum()),
            }
            for column, name in enumerate(STATISTICS):
                row |= {name: estimate[column], f"{name}_low": low[column], f"{name}_high": high[column]}
            rows.append(row)
    return pd.DataFrame(rows)


def compute_agreement(counts: Int[np.ndarray, "draws 4"]) -> Float[np.ndarray, "draws 4"]:
    """Return Cohen's κ, balanced accuracy, sensitivity and specificity; nan where they are undefined.

    >>> compute_agreement(np.array([[40, 10, 0, 50]])).round(2)
    array([[0.8, 0.9, 0.8, 1. ]])

    Args:
        counts: refusals found, refusals missed, other responses taken for refusals, other responses left.
    """
    found, missed, mistaken, left = counts.T.astype(float)
    n = counts.sum(1)
    expected = ((found + missed) * (found + mistaken) + (mistaken + left) * (missed + left)) / n**2
    with np.errstate(invalid="ignore", divide="ignore"):
        sensitivity, specificity = found / (found + missed), left / (mistaken + left)
        kappa = ((found + left) / n - expected) / (1 - expected)
    return np.column_stack([kappa, (sensitivity + specificity) / 2, sensitivity, specificity])


def make_manifest(
    labels: pd.DataFrame, table: pd.DataFrame, folder: Path, openers_path: Path
) -> dict[str, object]:
    """Return what the weights were fitted on, with licenses, and how well they judge models left out."""
    sources = [
        {"file": name, "source": source, "sha256": hash_file(folder / name)}
        for name, source in _SOURCES.items()
    ]
    if openers_path.is_file():
        sources.append(
            {"file": openers_path.name, "source": _OPENERS_SOURCE, "sha256": hash_file(openers_path)}
        )
    learned = table[table["judge"] == "learned"].round(3)
    return {
        "judge": "learned",
        "sources": sources,
        "labels": {
            str(model): int(count) for model, count in labels["model"].value_counts(sort=False).items()
        },
        "left_out_scores": learned[["model", "length", "n", *STATISTICS]].to_dict("records"),
    }


def run_recipe(folder: Path, openers_path: Path, table_path: Path, weights_path: Path) -> pd.DataFrame:
    """Fit, evaluate and write the weights and the table; return the table.

    Args:
        folder: folder of the published label files.
        openers_path: file with labeled openers of SmolLM2; it may be missing.
        table_path: the .csv file of the evaluation.
        weights_path: the file of the weights.
    """
    labels = read_labels(folder, openers_path)
    table = make_judge_table(judge_left_out(labels))
    manifest = make_manifest(labels, table, folder, openers_path)
    write_text_file(table_path, table.round(4).to_csv(index=False))
    write_weights(weights_path, fit_model(labels).export_weights(manifest))
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe from the command line."""
    parser = argparse.ArgumentParser(description="Fit and evaluate the judge `learned`.")
    parser.add_argument("folder", type=Path, help="folder of the published label files")
    parser.add_argument("--openers", type=Path, default=get_weights_path().with_name("labels.jsonl"))
    parser.add_argument("--table", type=Path, default=Path("figures/judges/judges.csv"))
    parser.add_argument("--weights", type=Path, default=get_weights_path())
    options = parser.parse_args(arguments)
    try:
        table = run_recipe(options.folder, options.openers, options.table, options.weights)
    except UserError as error:
        raise SystemExit(str(error)) from None
    print(table[["judge", "model", "length", "n", *STATISTICS]].round(3).to_string(index=False))


if __name__ == "__main__":
    main()
