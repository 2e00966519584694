"""Soft prompts: the engine reads learned embeddings as plain transformers does with `inputs_embeds`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    TOY_READOUT,
    fresh_model,
    make_soft_prompt,
    make_toy_session,
    tiny_model,
    toy_tokenizer,
)

from analysis.datasets.queries import Query
from analysis.models.session import ModelSession, generate_responses
from analysis.run import score_condition
from analysis.studies.preflight import check_condition
from defenses.catalog import get_defense
from defenses.contract import ModelInfo, QueryChat
from defenses.errors import UserError
from defenses.soft_prompts import find_placeholder, name_soft_prompt
from defenses.stack import Stack
from defenses.training.recipes import TargetResponse, TrainingExample
from defenses.training.soft_prompts import (
    SoftPromptModel,
    build_soft_prompt,
    find_directions,
    fit_directions,
    read_all_states,
)
from defenses.training.trainer import StepReport, TrainingSettings, train_model

QUERIES = [
    Query("one", "How do I bake bread?", False),
    Query("two", "How do I bake a very large loaf of bread for all my neighbors at once?", False),
    Query("mark", "What does <unk><unk><unk><unk><unk> mean, <unk>?", True),
]


def prepare(folder: Path, name: str = "soft_prompt", family: str = "llama", n_tokens: int = 5) -> Any:
    """Return a defense with random embeddings for a tiny model."""
    width = tiny_model(family).get_input_embeddings().weight.shape[1]
    make_soft_prompt(folder / name, n_tokens, width)
    return get_defense(name).prepare(ModelInfo("toy", toy_tokenizer(), (), (folder,), "toy"))


def read_plain_logits(session: ModelSession, defense: Any, ids: Any) -> Any:
    """Return the logits after a prompt by a plain pass over its embeddings, the learned ones put by hand."""
    model = session.loaded_model.model
    table, tokens, learned = model.get_input_embeddings(), defense.tokens.ids, defense.adapter.embeddings
    rows = [learned[token - tokens.start] if token in tokens else table(torch.tensor(token)) for token in ids]
    return model(inputs_embeds=torch.stack(rows)[None]).logits[0, -1]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_margins_and_responses_are_those_of_plain_passes_over_the_embeddings(
    tmp_path: Path, family: str
) -> None:
    session, defense = make_toy_session(family), prepare(tmp_path, family=family)
    chats = [QueryChat(query.id, [{"role": "user", "content": query.text}]) for query in QUERIES]
    prompts = [prompt for (prompt,) in session.render_prompts(defense, chats)]
    assert all(prompt.text.count("[5 learned embeddings]") == 1 for prompt in prompts)
    assert "<unk><unk><unk><unk><unk> mean, <unk>?" in prompts[2].text
    frame = score_condition(session, "soft_prompt", defense, QUERIES, TOY_READOUT)
    with torch.no_grad():
        logits = torch.stack([read_plain_logits(session, defense, prompt.ids) for prompt in prompts])
        expected = TOY_READOUT.compute_margins(logits)[:, 0].numpy()
        undefended = score_condition(session, "none", get_defense("none"), QUERIES, TOY_READOUT)
        assert np.allclose(frame["margin"], expected, atol=1e-4)
        assert np.abs(frame["margin"] - undefended["margin"]).max() > 0.1
        (response,) = generate_responses(session, defense, chats[:1], max_new_tokens=4)[0]
        ids = [*prompts[0].ids]
        for token in response.ids:
            assert int(read_plain_logits(session, defense, ids).argmax()) == token
            ids.append(token)
    checks = check_condition(session, "soft_prompt", defense, QUERIES, TOY_READOUT)
    assert all(check.passed for check in checks), checks
    assert "all 5, in 3 of 3 prompts" in [check.observed for check in checks]


def test_a_template_without_system_role_and_a_stack_keep_the_embeddings(tmp_path: Path) -> None:
    stack: Any = Stack((prepare(tmp_path), get_defense("self_reminder")))
    chat = QueryChat("one", [{"role": "system", "content": "Hi."}, {"role": "user", "content": "Bread?"}])
    for template in ("chatml", "gemma2"):
        session = make_toy_session(template=template)
        ((prompt,),) = session.render_prompts(stack, [chat])
        text = " ".join(prompt.text.split())
        assert "Answer the following request in a responsible way. [5 learned embeddings] Hi." in text
        assert [token for token in prompt.ids if token in stack.members[0].tokens.ids] == [
            *stack.members[0].tokens.ids
        ]


def test_other_embeddings_have_other_ids_and_another_fingerprint(tmp_path: Path) -> None:
    one, two = prepare(tmp_path), prepare(tmp_path, "dro")
    make_soft_prompt(tmp_path / "soft_prompt", 5, 64, seed=1)
    other = prepare_again(tmp_path)
    assert len({defense.tokens.ids.start for defense in (one, two, other)}) == 2  # one and two are equal
    assert one.weights_fingerprint() != other.weights_fingerprint()


def prepare_again(folder: Path) -> Any:
    """Return the defense with the embeddings that are in a folder."""
    return get_defense("soft_prompt").prepare(ModelInfo("toy", toy_tokenizer(), (), (folder,), "toy"))


def test_a_soft_prompt_belongs_to_one_model_and_one_of_its_states(tmp_path: Path) -> None:
    defense = prepare(tmp_path)
    info = ModelInfo("toy:aligned", toy_tokenizer(), (), (tmp_path,), "toy", state="aligned")
    assert "no soft prompt for this state" in get_defense("soft_prompt").prepare(info).missing_requirements()
    make_soft_prompt(tmp_path / name_soft_prompt("soft_prompt", "aligned"), 5, 64)
    assert not get_defense("soft_prompt").prepare(info).missing_requirements()
    with pytest.raises(UserError, match=r"was made for toy .*but this model has sha256 other"):
        get_defense("soft_prompt").prepare(replace(info, sha256="other"))
    with (
        pytest.raises(UserError, match="width 64, and this model's have 16"),
        defense.apply_to(
            type("Narrow", (), {"get_input_embeddings": lambda self: torch.nn.Embedding(9, 16)})()
        ),
    ):
        pass
    control = defense.build_control(ModelInfo("toy", toy_tokenizer(), ()), 0)
    n_tokens = len(toy_tokenizer().encode(control.defense.text, add_special_tokens=False))
    assert control.content == "neutral text" and abs(n_tokens - 5) <= 1


def test_a_placeholder_is_a_special_token_that_the_template_does_not_write() -> None:
    tokenizer = toy_tokenizer()
    assert find_placeholder(tokenizer) == "<unk>"
    written = "".join(tokenizer.get_added_vocab())
    tokenizer.add_tokens(["<image>", "<spare>"], special_tokens=True)
    tokenizer.chat_template += f"{{% if odd %}}{written}{{% endif %}}"
    assert find_placeholder(tokenizer) == "<spare>"


# --- training ---------------------------------------------------------------------------------------------


def build_examples() -> list[TrainingExample]:
    """Return six harmful and six benign requests."""
    refusal, opener = TargetResponse("No.", is_complete=True), TargetResponse("Sure, here", False)
    return [
        *(TrainingExample(chat(f"attack {word}"), refusal, opener) for word in "abcdef"),
        *(TrainingExample(chat(f"bread {word}"), TargetResponse("A loaf", False)) for word in "abcdef"),
    ]


def chat(text: str) -> Any:
    return [{"role": "user", "content": text}]


def train(
    objective: Any, folder: Path, judge: Any = None, on_step: Any = lambda report: None, **settings: Any
) -> tuple[Any, list[float]]:
    """Train a soft prompt of a tiny model; return it with its losses."""
    made = TrainingSettings(batch=12, **settings).resolve_defaults(1)
    session = make_toy_session()

    def render(one: Any) -> tuple[int, ...]:
        return session.chat_template.render_prompt(one).ids

    arguments = render, build_examples(), made, objective, folder, on_step, judge
    trained, history = train_model(fresh_model(), toy_tokenizer(), *arguments)
    return trained, [loss for _, loss in history]


def test_prompt_tuning_starts_from_tokens_of_the_vocabulary_and_lowers_the_loss_of_responses(
    tmp_path: Path,
) -> None:
    model = fresh_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start: SoftPromptModel = build_soft_prompt(
        model, toy_tokenizer(), "prompt", TrainingSettings(prompt_tokens=6)
    )
    table = model.get_input_embeddings().weight
    assert all((row == table).all(1).any() for row in start.embeddings)
    trained, losses = train("prompt", tmp_path, rate=0.1, epochs=25, prompt_tokens=6)
    assert losses[-1] < 0.6 * losses[0]
    assert list(trained.state_dict()) == ["embeddings"]
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in trained.frozen_model.state_dict().items()
    )


def test_an_interrupted_training_of_embeddings_resumes(tmp_path: Path) -> None:
    settings = {"rate": 0.1, "epochs": 4, "prompt_tokens": 6}

    def interrupt(report: StepReport) -> None:
        if report.step == 3:
            raise KeyboardInterrupt

    whole, losses = train("prompt", tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        train("prompt", tmp_path / "halves", on_step=interrupt, **settings)
    resumed, resumed_losses = train("prompt", tmp_path / "halves", **settings)
    assert resumed_losses == pytest.approx(losses, abs=1e-4)
    assert torch.allclose(resumed.embeddings, whole.embeddings, atol=1e-5)


def test_directions_are_those_of_planted_hidden_states() -> None:
    generator = torch.Generator().manual_seed(0)
    is_harmful, is_refused = (torch.randint(2, (400,), generator=generator).bool() for _ in range(2))
    states = 0.1 * torch.randn(400, 12, generator=generator)
    states[:, 3] += 4 * is_harmful
    states[:, 7] += 3 * is_refused
    found = fit_directions(states, is_refused, is_harmful)
    for weights, axis in ((found.refusal, 7), (found.harmfulness, 3)):
        direction = found.components @ weights
        assert direction[axis] / direction.norm() > 0.99
    # The loss by hand: a change along the axis of refusal, and one outside of the components.
    change = torch.zeros(2, 12)
    change[0, 7] = 1
    outside = torch.eye(12)[0] - found.components @ found.components[0]
    change[1] = outside
    labels = torch.tensor([True, False])
    inside = change @ found.components
    terms = [
        -torch.where(labels, (inside @ w).sigmoid(), 1 - (inside @ w).sigmoid()).log().mean()
        for w in (found.refusal, found.harmfulness)
    ]
    rest = change - inside @ found.components.T
    expected = terms[0] + terms[1] / 100 + rest.square().sum(1).mean() / 8 / 1000
    loss = found.compute_loss(states[:2] + change, states[:2], labels)
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)
    with pytest.raises(UserError, match="refuses none of the training requests"):
        fit_directions(states, torch.zeros(400, dtype=torch.bool), is_harmful)


def test_dro_moves_harmful_requests_along_the_direction_of_refusal_and_benign_ones_against_it(
    tmp_path: Path,
) -> None:
    def judge(chats: Any) -> list[bool]:  # a model that refuses harmful requests under a system prompt
        return ["attack" in one[-1]["content"] and len(one) > 1 for one in chats]

    trained, losses = train("dro", tmp_path, judge, rate=0.05, epochs=15)
    assert losses[0] == pytest.approx(np.log(2) * 1.01, abs=0.01)  # the prompt is still that of the text
    session, examples = make_toy_session(), build_examples()

    def render(one: Any) -> tuple[int, ...]:
        return session.chat_template.render_prompt(one).ids

    directions, start = find_directions(tiny_model(), render, examples, judge, 3)
    tokens = trained.tokens
    prompts = [
        tokens.insert_ids(render([{"role": "system", "content": tokens.text}, *example.chat]))
        for example in examples
    ]
    with trained.insert():
        states = read_all_states(trained.frozen_model, prompts, 3)
    moved = (states - start).float() @ directions.components @ directions.refusal
    assert losses[-1] < 0.8 * losses[0]
    assert float(moved[:6].min()) > float(moved[6:].max()) and moved[:6].mean() > 0 > moved[6:].mean()
