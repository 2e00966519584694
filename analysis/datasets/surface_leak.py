"""Measure how well surface features separate harmful queries from their benign twins.

    python -m analysis.datasets.surface_leak [SET ...]

The paired leak is the share of pairs in which a linear model that was fitted on other pairs scores the
harmful query above its own twin; ties count half, and .5 is chance. A leak means that words or characters
alone tell the classes apart, so that a model may separate them without understanding the requests.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from analysis.datasets.loading import load_queries
from analysis.datasets.queries import Query, group_units
from defenses.errors import UserError

SURFACE_FEATURES: dict[str, dict[str, Any]] = {
    "words": {"ngram_range": (1, 2)},
    "characters": {"ngram_range": (2, 5), "analyzer": "char_wb"},
}
FOLDS, REPEATS, DRAWS = 10, 5, 2000


def measure_surface_leak(
    queries: Sequence[Query], features: str, repeats: int = REPEATS, seed: int = 0
) -> pd.DataFrame:
    """Return how well surface features separate harmful queries from twins.

    Args:
        queries: queries of a set with pairs and with the splits train and test.
        features: one of `SURFACE_FEATURES`: TF-IDF of words and word pairs, or of 2 to 5 characters in words.
        repeats: number of assignments of the pairs to the 10 folds; their results are averaged.
        seed: for the folds and the bootstrap.

    Returns:
        One row for the fit on the train pairs, evaluated on the test pairs, and one for all pairs in 10
        folds. The columns are `fit`, `n_pairs`, `paired_leak` and `auroc` (of all harmful queries against
        all twins), the latter two with the ends `_low` and `_high` of 95 % bootstrap intervals over pairs.

    Raises:
        UserError: if fewer than 10 pairs are in the train split or in the test split.
    """
    pairs = [sorted(unit, key=lambda query: not query.harmful) for unit in group_units(queries)]
    pairs = [pair for pair in pairs if len(pair) == 2]
    texts = np.array([[query.text for query in pair] for pair in pairs], dtype=object).reshape(-1, 2)
    splits = np.array([pair[0].split for pair in pairs], dtype=object)
    in_train, in_test = splits == "train", splits == "test"
    if min(in_train.sum(), in_test.sum()) < FOLDS:
        raise UserError(
            f"{in_train.sum()} train and {in_test.sum()} test pairs: at least {FOLDS} of each are needed to "
            "measure the surface leak; use a set with pairs, such as twins"
        )
    rng = np.random.default_rng(seed)
    test_wins = _compare_scores(score_pairs(texts, in_train, features)[in_test])
    fold_wins = np.zeros((len(pairs), len(pairs)))
    for _ in range(repeats):
        fold_of_pair = rng.permutation(len(pairs)) % FOLDS
        scores = np.zeros((len(pairs), 2))
        for fold in range(FOLDS):
            held_out = fold_of_pair == fold
            scores[held_out] = score_pairs(texts, ~held_out, features)[held_out]
        fold_wins += _compare_scores(scores) / repeats
    rows = {"train to test": test_wins, f"all pairs, {FOLDS} folds": fold_wins}
    return pd.DataFrame([{"fit": name, **_summarize_wins(wins, rng)} for name, wins in rows.items()])


def score_pairs(
    texts: np.ndarray, is_fitted: Bool[np.ndarray, " pairs"], features: str
) -> Float[np.ndarray, "pairs 2"]:
    """Return the scores of the harmful query and of the twin of each pair after a fit on some pairs."""
    vectorizer = TfidfVectorizer(**SURFACE_FEATURES[features])
    vectors = vectorizer.fit_transform(texts[is_fitted].ravel())
    model = LogisticRegression(max_iter=1000).fit(vectors, np.tile([True, False], is_fitted.sum()))
    return model.decision_function(vectorizer.transform(texts.ravel())).reshape(-1, 2)


def _compare_scores(scores: Float[np.ndarray, "pairs 2"]) -> Float[np.ndarray, "pairs pairs"]:
    """Return 1 where a harmful query (row) scores above a twin (column), ½ for a tie, else 0."""
    harmful, twin = scores[:, :1], scores[:, 1]
    return (harmful > twin) + 0.5 * (harmful == twin)


def _summarize_wins(wins: Float[np.ndarray, "pairs pairs"], rng: np.random.Generator) -> dict[str, float]:
    """Return the paired leak, the diagonal's mean, and the AUROC, the mean of all cells, with intervals."""
    n = len(wins)
    counts: Int[np.ndarray, "draws pairs"] = rng.multinomial(n, np.full(n, 1 / n), size=DRAWS)
    draws = {
        "paired_leak": counts @ np.diag(wins) / n,
        "auroc": ((counts @ wins) * counts).sum(axis=1) / n**2,
    }
    row: dict[str, float] = {"n_pairs": n}
    for name, value in (("paired_leak", np.diag(wins).mean()), ("auroc", wins.mean())):
        low, high = np.quantile(draws[name], [0.025, 0.975])
        row |= {name: float(value), f"{name}_low": float(low), f"{name}_high": float(high)}
    return row


def main() -> None:
    """Print the surface leak of the query sets that are named on the command line."""
    try:
        tables = [
            measure_surface_leak(load_queries(name).queries, features).assign(data=name, features=features)
            for name in sys.argv[1:] or ["twins", "contrast-v1"]
            for features in SURFACE_FEATURES
        ]
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    table = pd.concat(tables).set_index(["data", "features", "fit"])
    print(table.round(3).to_string())


if __name__ == "__main__":
    main()
