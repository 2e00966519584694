"""The main idea on one page: score a defended chat model as a refuse/comply classifier.

The steps carry the numbers of the README:

1. Queries: harmful and benign user requests (`analysis/datasets/`), sent as they are or through an attack
   (`analysis/attacks.py`), which may adapt to the defended model.
2. Defense: rewrites the chat, calls the model first, changes the model while it is applied, or refuses the
   request by itself (`defenses/`).
3. Chat template: chat → token ids (`analysis/models/chat_template.py`).
4. First token: token ids → logits of the first response token (`analysis/models/engine.py`).
5. Margin: logits → one number in nats, higher means refusal (`analysis/readouts/`).
6. Responses: their first tokens, judged (`analysis/studies/responses.py`, `analysis/judges/`).
7. Shift and discrimination: of refusal rates and of margins, defended minus undefended (`analysis/stats/`).
8. Figures (`analysis/plots/`).

`score_condition` does steps 1 to 5 for one condition; it calls `score_prompts`
(`analysis/readouts/prompt_scores.py`), which does steps 4 and 5, with a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import pandas as pd
from scipy.special import expit

from analysis.attacks import DIRECT_ATTACK, Attack
from analysis.datasets.queries import Query
from analysis.models.session import ModelSession, generate_responses
from analysis.readouts.prompt_scores import SCORE_NAMES, score_prompts
from analysis.readouts.readout import Readout
from analysis.stats.tables import SCORE_COLUMNS, UNDEFENDED
from defenses.contract import Defense, QueryChat


def score_condition(
    session: ModelSession,
    condition: str,
    defense: Defense,
    queries: Sequence[Query],
    readout: Readout,
    attack: Attack = DIRECT_ATTACK,
    on_progress: Callable[[int], None] = lambda n_queries: None,
) -> pd.DataFrame:
    """Return the margins of all queries under one defense, in the columns of scores.csv.

    Args:
        session: the model.
        condition: name of the defense in the tables.
        defense: prepared for this model.
        queries: harmful and benign user requests.
        readout: reduces first-token logits to a margin.
        attack: the attack through which the queries are sent.
        on_progress: called with the number of queries finished since the last call.
    """
    query_chats = build_condition_chats(session, defense, queries, readout, attack)
    scores = _score_chats(session, defense, query_chats, readout, on_progress)
    frame = pd.DataFrame(
        {
            "query": [query.id for query in queries],
            "pair": [query.pair for query in queries],
            "category": [query.category for query in queries],
            "harmful": [query.harmful for query in queries],
            "attack": attack.name,
            "defense": condition,
            "margin": scores["margin"],
            "p_refuse": expit(scores["margin"] - readout.threshold),
            "prompt_tokens": scores["prompt_tokens"],
            "coverage": scores["coverage"],
        },
        columns=list(SCORE_COLUMNS),
    )
    if any(query.image for query in queries):
        frame["image"] = [query.content[1] for query in queries]
    copies = ["readings", "vote"] if scores["readings"].max() > 1 else []
    return frame.join(scores.filter(["margin_low", "margin_high", "detector", *copies]))


def build_condition_chats(
    session: ModelSession, defense: Defense, queries: Sequence[Query], readout: Readout, attack: Attack
) -> list[QueryChat]:
    """Return the chats in which an attack sends the queries to the model with its defense.

    An adaptive attack asks the defended model first; what it finds is kept as long as the session.
    """
    if not attack.is_adaptive:
        return attack.build_query_chats(queries)
    key = attack.name, attack.wording_sha256, id(defense), readout.name
    _, known = session.adaptation.chats.setdefault(key, (defense, {}))  # held, so that its id stays its own
    new_queries = [query for query in queries if query not in known]
    on_prompts = session.adaptation.count_prompts(attack.n_adaptive_prompts * len(new_queries))

    def read_margins(query_chats: Sequence[QueryChat]) -> list[float]:
        return _score_chats(session, defense, query_chats, readout, on_prompts)["margin"].tolist()

    def read_responses(query_chats: Sequence[QueryChat]) -> list[str]:
        responses = generate_responses(session, defense, query_chats, readout.prefill, on_progress=on_prompts)
        return [first.text for first, *_ in responses]

    new_chats = attack.build_adapted_chats(new_queries, read_margins, read_responses)
    known |= zip(new_queries, new_chats, strict=True)
    return [known[query] for query in queries]


def _score_chats(
    session: ModelSession,
    defense: Defense,
    query_chats: Sequence[QueryChat],
    readout: Readout,
    on_progress: Callable[[int], None] = lambda n_queries: None,
) -> pd.DataFrame:
    """Return margin, coverage, vote, readings and prompt_tokens of each chat, and what a detector says."""
    n_questions = max(1, len(readout.questions))
    session = session.with_questions(readout.questions)

    # Steps 2 and 3: attacked chat → defended chats → prompts. A query has several prompts if the defense
    # reads several copies of it, or if the readout asks several questions about it.
    prompts_by_query = session.render_prompts(defense, query_chats)
    prefix = readout.response_prefix
    prompt_ids = [[prompt.append_prefix(prefix) for prompt in prompts] for prompts in prompts_by_query]
    flat_ids = [ids for query_ids in prompt_ids for ids in query_ids]
    member_ids = [prompt.list_member_ids(prefix) for prompts in prompts_by_query for prompt in prompts]
    flat_query = [row for row, query_ids in enumerate(prompt_ids) for _ in query_ids]

    # Steps 4 and 5: prompts → first-token logits → margins.
    on_prompts = _count_queries(on_progress, len(query_chats), len(flat_ids))
    model = session.loaded_model, session.engine
    values = score_prompts(*model, defense, flat_ids, readout, session.score_cache, on_prompts, member_ids)

    # Scores of prompts → scores of copies (mean over questions) → scores of queries (by the defense's rule).
    prompt_scores = pd.DataFrame(values.tolist(), columns=SCORE_NAMES[: values.shape[1]])
    margins = prompt_scores.columns.difference(["coverage"])
    copy_scores = prompt_scores.assign(query=flat_query).groupby(prompt_scores.index // n_questions).mean()
    copy_scores["vote"] = copy_scores["margin"] > readout.threshold
    pools = dict.fromkeys(margins, defense.pool) | {"coverage": "mean", "vote": "mean"}
    scores = copy_scores.groupby("query").agg(pools)

    # A detector refuses by itself: the system of both refuses if either does.
    log_odds = session.score_requests(defense, query_chats)
    if log_odds is not None:
        scores[margins] = scores[margins].clip(lower=pd.Series(log_odds) + readout.threshold, axis=0)
        scores["detector"] = log_odds
    scores["readings"] = [len(query_ids) // n_questions for query_ids in prompt_ids]
    scores["prompt_tokens"] = [sum(map(len, query_ids)) for query_ids in prompt_ids]
    return scores


def iterate_condition_scores(
    session: ModelSession,
    conditions: Mapping[str, Defense],
    queries: Sequence[Query],
    readout: Readout,
    attack: Attack = DIRECT_ATTACK,
    on_progress: Callable[[str, int], None] = lambda condition, n_queries: None,
    on_failure: Callable[[str, Exception], None] | None = None,
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield each condition and its margins once they are computed, so that an interrupted run keeps them.

    Args:
        session: the model.
        conditions: prepared defenses by their names in the tables, the undefended condition first.
        queries: harmful and benign user requests.
        readout: reduces first-token logits to a margin.
        attack: the attack through which the queries are sent.
        on_progress: called with a condition and the number of its queries finished since the last call.
        on_failure: called with a condition that failed and its exception; then the next one is scored, unless
            it was the undefended one. None raises the exception.
    """
    for condition, defense in conditions.items():
        on_queries = partial(on_progress, condition)
        try:
            frame = score_condition(session, condition, defense, queries, readout, attack, on_queries)
        except Exception as error:
            if on_failure is None:
                raise
            on_failure(condition, error)
            if condition == UNDEFENDED:
                return
        else:
            yield condition, frame


def build_conditions(defenses: Sequence[Defense]) -> dict[str, Defense]:
    """Return the conditions to score by their names in the tables: each defense, followed by its ablations.

    Conditions whose requirements the model does not meet, such as tuned weights, are left out.

    >>> from defenses.catalog import get_defense
    >>> list(build_conditions([get_defense("none"), get_defense("backdoor")]))
    ['none', 'backdoor/no_weights', 'backdoor/neither']
    """
    conditions: dict[str, Defense] = {}
    for defense in defenses:
        ablations = {f"{defense.name}/{name}": part for name, part in defense.build_ablations().items()}
        conditions |= {defense.name: defense} | ablations
    return {name: defense for name, defense in conditions.items() if not defense.missing_requirements()}


def _count_queries(report: Callable[[int], None], n_queries: int, n_prompts: int) -> Callable[[int], None]:
    """Return a callback that takes numbers of finished prompts and reports numbers of finished queries."""
    finished_prompts = 0

    def report_queries(more_prompts: int) -> None:
        nonlocal finished_prompts
        before, finished_prompts = finished_prompts, finished_prompts + more_prompts
        report(finished_prompts * n_queries // n_prompts - before * n_queries // n_prompts)

    return report_queries
