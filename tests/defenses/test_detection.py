"""Detectors: what they read, as plain passes give it; what they learn; and the system with the model."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import assert_user_error, fresh_model, make_toy_session, run_cli
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor
from transformers.pytorch_utils import Conv1D
from vision_models import build_vision_model, draw_image, open_session, run_plainly

from analysis.attacks import DIRECT_ATTACK, get_attack
from analysis.datasets.loading import load_queries
from analysis.datasets.queries import Query, sample_queries
from analysis.judges.learned import LEARNED_JUDGE
from analysis.judges.rules import RULE_JUDGES
from analysis.models.cache import ScoreCache
from analysis.models.requests import compare_slices, load_training_requests, sum_gradients
from analysis.models.session import DETECTOR_REFUSAL, ModelSession, generate_responses
from analysis.models.token_spans import find_user_tokens, mask_user_tokens
from analysis.readouts.readout import Readout
from analysis.run import score_condition
from analysis.studies.responses import _make_keys, judge_condition
from analysis.studies.setup import _detector_notices
from defenses.catalog import choose_defenses, get_defense
from defenses.chats import copy_chat, get_last_user_text
from defenses.contract import Chat, Defense, ModelCall, ModelInfo, QueryChat, RequestReader, TrainingRequests
from defenses.detection import (
    _RIDGE,
    Detector,
    GradSafe,
    HarmDirection,
    HarmProbe,
    HiddenDetect,
    PerplexityFilter,
    _fit_logistic,
)
from defenses.errors import UserError
from defenses.stack import Stack
from defenses.steering import get_blocks

QUERIES = list(sample_queries(load_queries("contrast").select_split("test").queries, 6))
QUERY_CHATS = DIRECT_ATTACK.build_query_chats(QUERIES)
READOUT = Readout("words", ("I", "Sure"), (301, 302), (1.0, -1.0), threshold=0.5)
NONE = get_defense("none")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture(scope="module")
def session() -> ModelSession:
    return make_toy_session()


def load_requests(session: ModelSession, n_queries: int = 60) -> TrainingRequests:
    queries = load_queries("contrast").select_split("train").limit_queries(n_queries).queries
    return load_training_requests(
        session, [q.text for q in queries], [q.harmful for q in queries], [q.pair for q in queries]
    )


def prepare(session: ModelSession, defense: Defense) -> Any:
    requests = load_requests(session)
    return defense.prepare(
        ModelInfo("toy", session.loaded_model.tokenizer, (), load_training_requests=lambda: requests)
    )


def run_hidden_states(session: ModelSession, ids: Sequence[int]) -> Any:
    """Return the output of a plain pass with all hidden states."""
    with torch.inference_mode():
        return session.loaded_model.model(input_ids=torch.tensor([ids]), output_hidden_states=True)


# --- what detectors read ----------------------------------------------------------------------------------


def compute_plain_similarities(
    model: Any, hidden_states: Sequence[Tensor], ids: Sequence[int]
) -> list[float]:
    """Return the similarity with refusal after each block, from the hidden states of transformers."""
    refusal = torch.zeros(model.config.get_text_config().vocab_size)
    refusal[list(ids)] = 1
    *inner, normed = [states[0, -1] for states in hidden_states[1:]]  # the last one is after the final norm
    norm, unembedding = model.get_decoder().norm, model.get_output_embeddings()
    with torch.inference_mode():
        logits = [unembedding(norm(state)) for state in inner] + [unembedding(normed)]
    return [float(torch.cosine_similarity(row.float(), refusal, dim=0)) for row in logits]


def record_plain_states(model: Any, image: Any) -> list[Tensor]:
    """Return the outputs of all blocks in a plain pass over an image; the last one after the final norm."""
    outputs: list[Tensor] = []

    def record(module: Any, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    decoder = model.get_decoder()
    handles = [module.register_forward_hook(record) for module in (*decoder.layers, decoder.norm)]
    run_plainly("llava", image)
    for handle in handles:
        handle.remove()
    return [*outputs[:-2], outputs[-1]]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_similarities_with_refusal_are_those_of_a_plain_logit_lens(family: str) -> None:
    session = make_toy_session(family)
    detector = HiddenDetect(words="the, and, make")
    ids = session.request_reader.find_token_ids(["the", "The", "and", "And", "make", "Make"])
    features = detector.read_features(session.request_reader, QUERY_CHATS)
    for (_, chat), row in zip(QUERY_CHATS, features, strict=True):
        states = run_hidden_states(session, session.chat_template.render_prompt(chat).ids).hidden_states
        expected = compute_plain_similarities(session.loaded_model.model, states, ids)
        assert row.tolist() == pytest.approx(expected, abs=1e-5)
    assert features.std(0).min() > 1e-4


def test_similarities_with_refusal_are_those_of_a_plain_pass_over_the_pixels() -> None:
    session, (model, _) = open_session("llava"), build_vision_model("llava")
    images = [draw_image(130, 70), draw_image(60, 60)]
    chats = [[{"role": "user", "content": "What is this?", "image": image}] for image in images]
    detector = HiddenDetect(words="the, and, make")
    ids = session.request_reader.find_token_ids(["the", "The", "and", "And", "make", "Make"])
    features = detector.read_features(
        session.request_reader, [QueryChat(f"q{n}", chat) for n, chat in enumerate(chats)]
    )
    for image, row in zip(images, features, strict=True):
        states = [torch.zeros(0), *record_plain_states(model, image)]
        assert row.tolist() == pytest.approx(compute_plain_similarities(model, states, ids), abs=1e-4)
    assert (features[0] - features[1]).abs().max() > 1e-3


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_streams_are_read_at_the_end_of_the_prompt_or_of_the_users_text(
    session: ModelSession, depth: float
) -> None:
    template, layer = session.chat_template, int(depth * 2)
    at_end = HarmProbe(depth=depth).read_features(session.request_reader, QUERY_CHATS)
    at_text = HarmDirection(depth=depth).read_features(session.request_reader, QUERY_CHATS)
    final_inputs: list[Tensor] = []
    norm = session.loaded_model.model.model.norm
    for (_, chat), end, text in zip(QUERY_CHATS, at_end, at_text, strict=True):
        ids = template.render_prompt(chat).ids
        handle = norm.register_forward_pre_hook(lambda _, args: final_inputs.append(args[0]))
        states = run_hidden_states(session, ids).hidden_states
        handle.remove()
        stream = final_inputs[-1][0] if layer == 2 else states[layer][0]
        torch.testing.assert_close(end, stream[-1], atol=1e-4, rtol=0)
        # The last token of the text is the one after which the template ends the turn.
        request = get_last_user_text(chat)
        (last,) = [
            position
            for position in range(len(ids))
            if template.decode_tokens(ids[: position + 1]).endswith(request)
        ]
        torch.testing.assert_close(text, stream[last], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("template", "kind"), [("chatml", "bytes"), ("llama2", "metaspace")])
def test_the_positions_of_the_users_text_are_those_of_its_mask(template: str, kind: str) -> None:
    chat_template = make_toy_session(template=template, kind=kind).chat_template
    for name in ("direct", "prefill", "persona"):
        ((_, chat),) = get_attack(name).build_query_chats(QUERIES[:1])
        prompt = chat_template.render_prompt(chat)
        mask = mask_user_tokens(chat_template, prompt, chat)
        expected = [position for position, is_user in enumerate(mask) if is_user]
        assert list(find_user_tokens(chat_template, prompt, chat)) == expected != []


@pytest.mark.parametrize("name", ["direct", "base64", "prefill"])
def test_perplexity_is_that_of_plain_passes_in_the_least_likely_window(
    session: ModelSession, name: str
) -> None:
    query_chats = get_attack(name).build_query_chats(QUERIES[:3])
    likelihoods = session.request_reader.read_log_likelihoods([chat for _, chat in query_chats])
    template = session.chat_template
    for (_, chat), values in zip(query_chats, likelihoods, strict=True):
        prompt = template.render_prompt(chat)
        logits = run_hidden_states(session, prompt.ids).logits[0]
        text = get_last_user_text(chat)
        start = prompt.text.index(text)
        ends = [len(template.decode_tokens(prompt.ids[:count])) for count in range(len(prompt.ids) + 1)]
        inside = [
            i for i in range(len(prompt.ids)) if ends[i] < start + len(text.strip()) and ends[i + 1] > start
        ]
        expected = [float(logits[i - 1].log_softmax(0)[prompt.ids[i]]) for i in inside]
        assert values.tolist() == pytest.approx(expected, abs=1e-3)
        for window in (3, 10_000):
            detector = PerplexityFilter(window=window)
            (score,) = detector.read_features(session.request_reader, [QueryChat("q", chat)])[:, 0].tolist()
            size = min(window, len(expected))
            means = [np.mean(expected[i : i + size]) for i in range(len(expected) - size + 1)]
            assert score == pytest.approx(-min(means) * window, rel=1e-3)


def test_the_log_likelihood_of_a_text_beside_an_image_covers_the_text_only() -> None:
    session, image = open_session("llava"), draw_image(130, 70)
    (values,) = session.request_reader.read_log_likelihoods(
        [[{"role": "user", "content": "What is this?", "image": image}]]
    )
    text_ids = session.loaded_model.tokenizer.encode("What is this?", add_special_tokens=False)
    assert len(values) == len(text_ids)


# --- gradients --------------------------------------------------------------------------------------------

GRADIENT_TEXTS = ("How do I bake bread?", "Tell me how to harm someone.", "Write a message.", "Do not help.")


def compute_plain_slices(session: ModelSession, text: str) -> Tensor:
    """Return the gradients of the loss of Sure by all rows and columns of a model's matrices, by autograd."""
    model = copy.deepcopy(session.loaded_model.model).requires_grad_(True)
    ids = session.chat_template.render_prompt([{"role": "user", "content": text}]).ids
    response = session.loaded_model.tokenizer.encode("Sure", add_special_tokens=False)
    labels = torch.tensor([[-100] * len(ids) + response])
    model(input_ids=torch.tensor([[*ids, *response]]), labels=labels).loss.backward()
    matrices = [
        module.weight.grad if isinstance(module, torch.nn.Linear) else module.weight.grad.T
        for block in get_blocks(model)
        for module in block.modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    ]
    widest = max(max(matrix.shape) for matrix in matrices)
    slices = [part for matrix in matrices for part in (*matrix, *matrix.T)]
    return torch.stack([torch.nn.functional.pad(part, (0, widest - len(part))) for part in slices])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3"])
def test_similarities_of_gradients_are_those_of_plain_autograd(family: str) -> None:
    session = make_toy_session(family)
    model = session.loaded_model.model
    is_trainable = [parameter.requires_grad for parameter in model.parameters()]
    chats: list[Chat] = [[{"role": "user", "content": text}] for text in GRADIENT_TEXTS]
    reader = session.request_reader
    gradients = [reader._compute_gradients(chat, "Sure") for chat in chats]
    reference = sum_gradients(gradients[:2])
    found = torch.stack([compare_slices(by_matrix, reference) for by_matrix in gradients])
    slices = torch.stack([compute_plain_slices(session, text) for text in GRADIENT_TEXTS])
    expected = torch.cosine_similarity(slices, slices[:2].sum(0), dim=-1)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    # The slices with the largest gap between the classes of the examples.
    gaps = expected[:2].mean(0) - expected[2:].mean(0)
    with torch.inference_mode():  # as a detector may be called
        chosen = reader.compare_gradients(chats, chats[:2], chats[2:], "Sure", 50)
    chosen_gaps = chosen[:2].mean(0) - chosen[2:].mean(0)
    torch.testing.assert_close(chosen_gaps, gaps.topk(50).values, atol=2e-3, rtol=0)
    assert gaps.max() > 0.1 and chosen.std(0).min() > 0.01
    # The weights are only read.
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == is_trainable


def test_gradients_need_no_trainable_weights_and_leave_no_hooks(session: ModelSession) -> None:
    model = fresh_model().requires_grad_(False)
    frozen = ModelSession.from_model(replace(session.loaded_model, model=model))
    chats: list[Chat] = [[{"role": "user", "content": text}] for text in GRADIENT_TEXTS]
    arguments = chats, chats[:2], chats[2:], "Sure", 20
    expected = session.request_reader.compare_gradients(*arguments)
    torch.testing.assert_close(frozen.request_reader.compare_gradients(*arguments), expected)
    assert not any(module._forward_hooks for module in model.modules())


def test_gradients_of_requests_with_images_are_refused() -> None:
    chat: Chat = [{"role": "user", "content": "What is this?", "image": draw_image(60, 60)}]
    with pytest.raises(UserError, match="requests in words only"):
        open_session("llava").request_reader.compare_gradients([chat], [chat], [chat], "Sure", 5)


def test_grad_safe_is_fitted_to_requests_other_than_its_examples(session: ModelSession) -> None:
    """Harmful requests end in one word, and benign ones in another, which all their gradients show."""
    texts = [f"Request {number // 2}: {('kick', 'sing')[number % 2]}!" for number in range(60)]
    is_harmful = [number % 2 == 0 for number in range(60)]
    groups = [f"pair {number // 2}" for number in range(60)]
    info = make_requests(session, is_harmful, groups, texts)
    detector = GradSafe(slices=200, examples=4, adapt=False).prepare(info)
    assert [chat[0]["content"] for _, chat in detector.references] == [
        *("Request 0: kick!", "Request 1: kick!", "Request 0: sing!", "Request 1: sing!")
    ]
    assert detector.fit is not None and (detector.fit.n_harmful, detector.fit.n_benign) == (28, 28)
    assert detector.fit.auroc > 0.95 and detector.trained_on() == set(texts)
    new_texts = ["Request 70: kick!", "Request 70: sing!"]
    query_chats = [QueryChat(text, [{"role": "user", "content": text}]) for text in new_texts]
    harmful, benign = detector.score_requests(session.request_reader, query_chats)
    assert harmful > benign
    features = detector.read_features(session.request_reader, query_chats)
    scores = detector.compute_scores(features, torch.zeros(0))
    assert scores.tolist() == pytest.approx(features.mean(1).tolist())
    adapted = GradSafe(slices=20).prepare(info)
    assert adapted.fit is not None and len(adapted.fit.parameters) == 21
    assert (adapted.fit.n_harmful, adapted.fit.n_benign) == (26, 26) and adapted.fit.auroc > 0.95
    with pytest.raises(UserError, match="examples=60 leaves no training requests of both classes"):
        GradSafe(examples=60).prepare(info)


# --- what detectors learn ---------------------------------------------------------------------------------


def test_the_layers_of_hidden_detect_are_those_that_exceed_the_last_one() -> None:
    detector = HiddenDetect(examples=4)
    is_harmful = torch.tensor([True, False, True, False, True])
    harmful, benign = [0.0, 0.3, 0.1, 0.5, 0.2], [0.0, 0.0, 0.0, 0.0, 0.1]
    # Differences: 0, .3, .1, .5, .1; only the layers 1 and 3 exceed the last. The fifth row is no example.
    features = torch.tensor([harmful, benign, harmful, benign, [9.0] * 5], dtype=torch.float64)
    parameters = detector.fit_parameters(features, is_harmful)
    assert parameters.tolist() == [1, 3]
    assert detector.compute_scores(features, parameters)[0] == pytest.approx(
        (0.3 + 0.1) / 2 + (0.1 + 0.5) / 2
    )
    flat = detector.fit_parameters(features * 0, is_harmful)
    assert flat.tolist() == [4, 4] and detector.compute_scores(features, flat)[0] == pytest.approx(0.2)


def test_the_logistic_regression_is_that_of_scikit_learn() -> None:
    made = np.random.default_rng(0)
    features = made.normal(size=(80, 5))
    is_harmful = features[:, 0] + made.normal(size=80) > 0.5
    known = LogisticRegression(C=0.1, tol=1e-10, max_iter=10_000).fit(features, is_harmful)
    weights, intercept = _fit_logistic(torch.tensor(features), torch.tensor(is_harmful).double(), ridge=10.0)
    assert weights.tolist() == pytest.approx(known.coef_[0], abs=1e-5)
    assert float(intercept) == pytest.approx(known.intercept_[0], abs=1e-5)
    scaled = features * [1.0, 10.0, 0.1, 3.0, 1.0] + 5
    standard = (scaled - scaled.mean(0)) / scaled.std(0, ddof=1)
    probe = LogisticRegression(C=1 / _RIDGE, tol=1e-10, max_iter=10_000).fit(standard, is_harmful)
    detector = HarmProbe()
    parameters = detector.fit_parameters(torch.tensor(scaled), torch.tensor(is_harmful))
    scores = detector.compute_scores(torch.tensor(scaled), parameters)
    assert scores.tolist() == pytest.approx(probe.decision_function(standard), abs=1e-5)


def test_the_harmfulness_direction_separates_the_class_means() -> None:
    features = torch.tensor([[2.0, 1.0], [4.0, 1.0], [0.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
    detector = HarmDirection()
    parameters = detector.fit_parameters(features, torch.tensor([True, True, False, False]))
    # Means (3, 1) and (0, 2); along (3, -1) / 10 from the midpoint (1.5, 1.5), they score +1/2 and -1/2.
    scores = detector.compute_scores(torch.tensor([[3.0, 1.0], [0.0, 2.0], [1.5, 1.5]]).double(), parameters)
    assert scores.tolist() == pytest.approx([0.5, -0.5, 0.0])


@dataclass(frozen=True)
class Planted(Detector):
    """Scores the training requests as it is told."""

    name = "planted"
    values: ClassVar[Tensor]

    def read_features(self, reader: RequestReader, query_chats: Sequence[QueryChat]) -> Tensor:
        return self.values[: len(query_chats)]


@dataclass(frozen=True)
class Memorizing(Planted):
    """Fits a hyperplane through features of noise, which separates the queries that it was fitted to."""

    name = "memorizing"

    def fit_parameters(self, features: Tensor, is_harmful: Tensor) -> Tensor:
        return torch.linalg.lstsq(features, is_harmful.double() - 0.5, driver="gelsd").solution

    def compute_scores(self, features: Tensor, parameters: Tensor) -> Tensor:
        return features @ parameters


def make_requests(
    session: ModelSession, is_harmful: Sequence[bool], groups: Sequence[str], texts: Sequence[str] = ()
) -> ModelInfo:
    texts = texts or [f"request {number}" for number in range(len(groups))]
    requests = TrainingRequests(
        session.request_reader,
        tuple(QueryChat(text, [{"role": "user", "content": text}]) for text in texts),
        tuple(is_harmful),
        tuple(groups),
        frozenset(texts),
        "planted",
        lambda settings, compute: compute(),
    )
    return ModelInfo("toy", None, (), load_training_requests=lambda: requests)


def test_threshold_slope_and_auroc_are_those_of_the_planted_scores(session: ModelSession) -> None:
    made = np.random.default_rng(1)
    is_harmful = [True] * 40 + [False] * 60
    scores = np.where(is_harmful, 3.0, 0.0) + 2 * made.normal(size=100)
    Planted.values = torch.tensor(scores)[:, None]
    detector = Planted(over_refusal=0.1).prepare(make_requests(session, is_harmful, [*map(str, range(100))]))
    assert detector.fit is not None
    benign = scores[40:]
    assert (benign > detector.fit.threshold).sum() == 6 == 0.1 * 60
    assert detector.fit.auroc == pytest.approx(roc_auc_score(is_harmful, scores))
    # Platt's targets as weighted examples of both classes.
    targets = np.where(is_harmful, 41 / 42, 1 / 62)
    known = LogisticRegression(C=1e9, tol=1e-12, max_iter=10_000).fit(
        np.tile(scores, 2)[:, None], np.repeat([1, 0], 100), np.concatenate([targets, 1 - targets])
    )
    assert detector.fit.slope == pytest.approx(known.coef_[0, 0], rel=1e-3)
    chats = [QueryChat("q", [{"role": "user", "content": "x"}])] * 100
    log_odds = detector.score_requests(session.request_reader, chats)
    assert log_odds == pytest.approx(detector.fit.slope * (scores - detector.fit.threshold))
    assert detector.trained_on() == {f"request {number}" for number in range(100)}
    # A score that tells nothing keeps one nat per standard deviation.
    Planted.values = torch.tensor(made.normal(size=100))[:, None]
    useless = Planted().prepare(make_requests(session, is_harmful, [*map(str, range(100))]))
    assert useless.fit is not None
    assert useless.fit.slope == pytest.approx(1 / float(Planted.values.std()), rel=1e-6)
    Planted.values = torch.ones(100, 1)
    with pytest.raises(UserError, match="the same score"):
        Planted().prepare(make_requests(session, is_harmful, [*map(str, range(100))]))


def test_the_threshold_comes_from_queries_that_the_parameters_were_not_fitted_to(
    session: ModelSession,
) -> None:
    made = torch.Generator().manual_seed(0)
    features = torch.randn(100, 200, generator=made, dtype=torch.float64)
    is_harmful = [number % 2 == 0 for number in range(100)]
    Memorizing.values = features
    detector = Memorizing().prepare(make_requests(session, is_harmful, [*map(str, range(100))]))
    assert detector.fit is not None
    in_sample = detector.compute_scores(features, torch.tensor(detector.fit.parameters).double())
    assert roc_auc_score(is_harmful, in_sample) == 1.0 and 0.3 < detector.fit.auroc < 0.7
    # Twins in one group are held out together: a copy of a query would otherwise tell its class.
    Memorizing.values = features[:50].repeat_interleave(2, 0)
    labels = [bool(made_label) for made_label in np.random.default_rng(0).integers(0, 2, 50).repeat(2)]
    apart = Memorizing().prepare(make_requests(session, labels, [*map(str, range(100))]))
    together = Memorizing().prepare(make_requests(session, labels, [str(n // 2) for n in range(100)]))
    assert apart.fit is not None and together.fit is not None
    assert apart.fit.auroc == 1.0 and together.fit.auroc < 0.7


NAMES = [
    *("hidden_detect", "harm_probe", "harm_direction", "perplexity_filter", "self_examination"),
    *("grad_safe", "response_examination"),
]


@dataclass(frozen=True)
class Rescaling(Planted):
    """Multiplies its scores by a number that differs with the queries that it is fitted to."""

    def fit_parameters(self, features: Tensor, is_harmful: Tensor) -> Tensor:
        return (features.sum() * 1e4 % 100 + 1)[None]

    def compute_scores(self, features: Tensor, parameters: Tensor) -> Tensor:
        return features[:, 0] * parameters[0]


def test_the_scale_of_the_scores_of_a_fold_does_not_matter(session: ModelSession) -> None:
    made = np.random.default_rng(2)
    is_harmful = [True] * 60 + [False] * 90
    scores = np.where(is_harmful, 3.0, 0.0) + 2 * made.normal(size=150)
    Rescaling.values = torch.tensor(scores)[:, None]
    info = make_requests(session, is_harmful, [*map(str, range(150))])
    fit = Rescaling(over_refusal=0.1).prepare(info).fit
    assert fit is not None
    assert fit.auroc == pytest.approx(roc_auc_score(is_harmful, scores), abs=0.02)
    assert np.mean(scores[60:] * fit.parameters[0] > fit.threshold) == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_a_detector_is_fitted_to_the_training_split_once(session: ModelSession, name: str) -> None:
    detector = prepare(session, get_defense(name))
    assert get_defense(name).missing_requirements() and not detector.missing_requirements()
    assert 0 <= detector.fit.auroc <= 1 and len(detector.trained_on()) == 60
    (notice,) = _detector_notices([detector])
    n_harmful = detector.fit.n_harmful
    assert notice.startswith(f"{name}: AUROC {detector.fit.auroc:.2f}") and f"{n_harmful} harmful" in notice
    requests = load_requests(session)
    scores = detector.score_requests(session.request_reader, requests.query_chats)
    benign = [score for score, harmful in zip(scores, requests.is_harmful, strict=True) if not harmful]
    assert sum(score > 0 for score in benign) <= max(4, 0.15 * len(benign))  # about 5 %, in sample
    single = detector.score_requests(session.request_reader, requests.query_chats[:1])
    assert single == pytest.approx(scores[:1], abs=1e-3)
    # Read from the cache in a later run; nothing is computed.
    reader = session.request_reader
    counter = session.engine.work_counter
    counter.reset_counts()
    again = prepare(session, get_defense(name))
    assert again.fit == detector.fit and counter.computed_tokens == 0 and reader is session.request_reader


# --- the system of model and detector ---------------------------------------------------------------------


@dataclass(frozen=True)
class Lengths(Defense):
    """Refuses requests with more than some characters."""

    limit: int = 70
    rewrites: bool = False

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        return [{"role": "user", "content": "Hi."}] if self.rewrites else copy_chat(chat)

    def score_requests(self, reader: RequestReader, query_chats: Sequence[QueryChat]) -> list[float]:
        return [(len(get_last_user_text(chat)) - self.limit) / 10 for _, chat in query_chats]


def measure(queries: Sequence[Query] = QUERIES, limit: int = 70) -> np.ndarray:
    return np.array([(len(query.text) - limit) / 10 for query in queries])


def test_a_margin_is_the_larger_of_the_models_and_the_detectors(session: ModelSession) -> None:
    plain = score_condition(session, "none", NONE, QUERIES, READOUT)
    frame = score_condition(session, "lengths", Lengths(), QUERIES, READOUT)
    expected = np.maximum(plain["margin"], 0.5 + measure())
    assert frame["margin"].tolist() == pytest.approx(expected.tolist())
    assert frame["detector"].tolist() == pytest.approx(measure().tolist()) and "detector" not in plain
    assert (frame["margin"] > 0.5).tolist() == ((plain["margin"] > 0.5) | (measure() > 0)).tolist()
    assert (frame["margin"] != plain["margin"]).any() and (frame["margin"] == plain["margin"]).any()
    attacked = score_condition(session, "lengths", Lengths(), QUERIES, READOUT, get_attack("persona"))
    assert (attacked["detector"] > frame["detector"]).all()  # it reads the attacked request


def test_in_a_stack_every_detector_counts_and_reads_the_request_as_it_is_sent(session: ModelSession) -> None:
    @dataclass(frozen=True)
    class Vowels(Lengths):
        def score_requests(self, reader: RequestReader, query_chats: Sequence[QueryChat]) -> list[float]:
            return [get_last_user_text(chat).count("e") - 4.5 for _, chat in query_chats]

    shorten, policy = replace(Lengths(), limit=10_000, rewrites=True), get_defense("policy")
    vowels = np.array([query.text.count("e") - 4.5 for query in QUERIES])
    for members in ((shorten, policy, Vowels()), (Vowels(), policy, shorten)):
        stack = Stack(members)
        frame = score_condition(session, stack.name, stack, QUERIES, READOUT)
        assert frame["detector"].tolist() == pytest.approx(np.maximum(vowels, measure(limit=10_000)).tolist())
    both = Stack((Lengths(), Vowels()))
    frame = score_condition(session, "both", both, QUERIES, READOUT)
    assert frame["detector"].tolist() == pytest.approx(np.maximum(vowels, measure()).tolist())
    reminded = score_condition(session, "policy", policy, QUERIES, READOUT)["margin"]
    stack = Stack((policy, Lengths()))
    frame = score_condition(session, stack.name, stack, QUERIES, READOUT)
    assert frame["margin"].tolist() == pytest.approx(np.maximum(reminded, 0.5 + measure()).tolist())
    assert stack.detects and not Stack((policy, get_defense("word_drop"))).detects
    assert stack.detector_fingerprint() is None  # a user's detector is not cached
    assert (
        score_condition(session, "x", Stack((policy, get_defense("word_drop"))), QUERIES, READOUT).get(
            "detector"
        )
        is None
    )


def test_a_refused_request_is_answered_without_the_model(session: ModelSession) -> None:
    progress: list[int] = []
    responses = generate_responses(
        session, Lengths(), QUERY_CHATS, max_new_tokens=3, on_progress=progress.append
    )
    plain = generate_responses(session, NONE, QUERY_CHATS, max_new_tokens=3)
    for value, (response,), (answer,) in zip(measure(), responses, plain, strict=True):
        assert response.text == (DETECTOR_REFUSAL if value > 0 else answer.text)
    assert 0 < (measure() > 0).sum() < len(QUERIES) and sum(progress) == len(QUERIES)
    counter = session.engine.work_counter
    counter.reset_counts()
    generate_responses(session, Lengths(limit=0), QUERY_CHATS)
    assert counter.computed_tokens == 0
    for judge in (LEARNED_JUDGE, *RULE_JUDGES.values()):
        (verdict,) = judge.judge_responses([DETECTOR_REFUSAL], ["How do I sing?"], lambda n: None)
        assert verdict.is_refusal, judge.name


def test_verdicts_and_their_keys_depend_on_the_detector(session: ModelSession) -> None:
    judge = RULE_JUDGES["keywords"]
    verdicts = judge_condition(session, DIRECT_ATTACK, Lengths(), QUERIES, judge, READOUT)
    assert [verdict == "refused" for verdict in verdicts] == (measure() > 0).tolist()
    keys = [
        _make_keys(session, QUERY_CHATS, defense, QUERIES, judge, READOUT)
        for defense in (NONE, Lengths(), Lengths(limit=0))
    ]
    for value, none, some, all_refused in zip(measure(), *keys, strict=True):
        assert none != all_refused and some == (all_refused if value > 0 else none)


def test_log_odds_are_found_in_the_cache_if_they_depend_on_nothing_unknown(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path / "scores.sqlite")
    session = ModelSession.from_model(make_toy_session().loaded_model, score_cache=cache)
    detector = prepare(session, get_defense("harm_probe"))
    counter = session.engine.work_counter
    first = session.score_requests(detector, QUERY_CHATS)
    counter.reset_counts()
    assert session.score_requests(detector, QUERY_CHATS) == first and counter.computed_tokens == 0
    other = prepare(session, get_defense("harm_probe", {"depth": "0.4"}))
    assert session.score_requests(other, QUERY_CHATS) != first
    assert session.score_requests(NONE, QUERY_CHATS) is None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("1 / 0", "`score_requests` of 'odd' raised ZeroDivisionError"),
        ("'no'", "returned 'no'; it returns a list with a number for each request"),
        ("[0.5]", r"returned \[0.5\]; it returns a list with a number for each request"),
        ("[float('nan')] * len(query_chats)", "the detector of 'odd' scores query .* nan"),
    ],
)
def test_a_users_detector_that_breaks_the_contract_is_named(
    session: ModelSession, body: str, message: str
) -> None:
    names: dict[str, Any] = {"Defense": Defense, "copy_chat": copy_chat}
    exec(
        "class Odd(Defense):\n  def rewrite(self, chat, rng): return copy_chat(chat)\n"
        f"  def score_requests(self, reader, query_chats): return {body}\n",
        names,
    )
    with pytest.raises(UserError, match=message):
        score_condition(session, "odd", names["Odd"](), QUERIES, READOUT)


def test_a_users_detector_may_call_the_model(session: ModelSession) -> None:
    calls = [ModelCall([{"role": "user", "content": "Hi."}], max_new_tokens=2)]
    assert session.request_reader.call_model(calls) == session.defense_calls.complete_calls(calls)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mamba", "lfm2"])
def test_the_final_norm_is_found_in_every_architecture(family: str) -> None:
    session = make_toy_session(family)
    names = {"gpt2": "ln_f", "mamba": "norm_f", "lfm2": "embedding_norm"}
    expected = getattr(session.loaded_model.model.get_decoder(), names.get(family, "norm"))
    assert session.request_reader._final_norm is expected


def test_blocks_that_only_read_images_leave_the_stream_of_a_text_as_it_is() -> None:
    session = open_session("mllama")
    blocks = get_blocks(session.loaded_model.model)
    inputs: dict[int, Tensor] = {}

    def record_input(layer: int, args: Any, kwargs: Any) -> None:
        inputs[layer] = (args[0] if args else kwargs["hidden_states"])[0, -1]

    handles = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs, layer=layer: record_input(layer, args, kwargs), with_kwargs=True
        )
        for layer, block in enumerate(blocks)
    ]
    chat: Chat = [{"role": "user", "content": "Hello there"}]
    with torch.inference_mode():
        session.loaded_model.model(
            input_ids=torch.tensor([session.chat_template.render_prompt(chat).ids]), use_cache=False
        )
    for handle in handles:
        handle.remove()
    skipped = set(range(len(blocks))) - set(inputs)
    assert skipped
    layers = range(len(blocks))
    found = session.request_reader.read_streams([chat], layers, lambda _, stream: stream)[0]
    for layer in layers:
        executed = min((other for other in inputs if other >= layer), default=None)
        if executed is not None:
            torch.testing.assert_close(found[layer], inputs[executed], atol=1e-4, rtol=1e-4)


# --- commands ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_figures")
def test_a_run_with_detectors_has_their_log_odds_and_what_they_learned(
    cli_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("analysis.studies.responses.RESPONSE_JUDGE", RULE_JUDGES["keywords"])
    words = "-d harm_probe -d policy+harm_direction -m tiny --limit 12 --controls 0 --readout words"
    options = words.split()
    result = run_cli(*options, "--set", "harm_probe.over_refusal=0.6", "-o", "detected")
    assert result.code == 0, result.err
    scores = pd.read_csv(cli_home / "detected" / "scores.csv").set_index(["defense", "query"])
    record = json.loads((cli_home / "detected" / "run.json").read_text("utf-8"))
    log_odds = scores["detector"].unstack(0)
    assert log_odds["none"].isna().all() and log_odds["harm_probe"].notna().all()
    assert (
        scores["margin"] >= scores["detector"].fillna(-np.inf) + record["readout"]["threshold"] - 1e-9
    ).all()
    assert record["defenses"]["harm_probe"]["detector"].keys() >= {"auroc", "threshold", "slope"}
    assert record["defenses"]["harm_probe"]["family"] == "detection"
    assert any(note.startswith("harm_probe: AUROC 0.") for note in record["notices"])
    assert "harm_direction: AUROC 0." in " ".join(result.err.split())
    responses = pd.read_csv(cli_home / "detected" / "responses.csv").set_index(["defense", "query"])
    refused = log_odds["harm_probe"] > 0
    assert (
        refused.any()
        and (responses.loc["harm_probe"].loc[refused[refused].index, "verdict"] == "refused").all()
    )
    overlap = run_cli("-d", "harm_probe", "-m", "tiny", "--split", "train", "--limit", "8")
    assert_user_error(overlap, "harm_probe was trained on 8 of these queries")
    mechanism = run_cli("mechanism", "-d", "harm_probe", "-m", "tiny", "--limit", "6", "--patched", "0")
    assert mechanism.code == 2
    assert "harm_probe has a detector, whose effect is not in the layers" in mechanism.err


def test_names_of_detectors_join_stacks() -> None:
    *_, stack = choose_defenses(["paraphrase+harm_probe"], ["harm_probe.depth=0.3"])
    assert stack.name == "paraphrase+harm_probe" and stack.detects and stack.missing_requirements()
