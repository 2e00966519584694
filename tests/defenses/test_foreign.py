"""What a reviewer would try: pooled verdicts, own classes, adapters of others, secrets, begun answers."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import derive_readout, made_adapter, tiny_model, toy_bench, toy_tokenizer

from analysis.attacks import get_attack
from analysis.datasets.loading import load_queries
from analysis.datasets.queries import Query, sample_queries
from analysis.judges.judge import judge_queries
from analysis.judges.rules import RULE_JUDGES
from analysis.models.cache import SCORING_SOURCES, ScoreCache, describe_computation, hash_code
from analysis.models.session import ModelSession, Response
from analysis.readouts.readout import Readout
from analysis.run import score_condition
from analysis.studies.preflight import _normalize_text, check_condition, make_failed_check
from defenses.adapters import ADAPTER_CONFIG_FILE, check_weight_is_separate, load_adapter
from defenses.catalog import get_defense
from defenses.chats import copy_chat, prefill_response, prepend_system
from defenses.contract import Defense, ModelCall, ModelInfo
from defenses.errors import UserError
from defenses.tuning import SafetyTuning

ASKED = sample_queries(load_queries("twins").queries, 4)
NONE = get_defense("none")
NO, YES = "I'm sorry, but I can't help with that.", "Sure. Mix flour and water, and wait."


def verdict(pool: str, *texts: str) -> Any:
    """Return the verdict on several answers to one query."""
    defense = get_defense("erase_and_check" if pool == "max" else "smooth_llm")
    assert defense.pool == pool
    said = [[Response((1,), text, text) for text in texts]]
    return judge_queries(RULE_JUDGES["patterns"], ASKED[:1], said, defense)[0]


def test_of_several_answers_most_count_or_where_one_refusal_is_enough_any() -> None:
    assert not verdict("mean", YES, NO, YES).is_refusal and verdict("mean", YES, NO, NO).is_refusal
    assert not verdict("mean", NO, YES).is_refusal  # a tie
    assert verdict("max", YES, NO, YES).is_refusal and not verdict("max", YES, YES).is_refusal
    # The answer that the verdict is on is known by its place.
    assert [verdict("mean", NO, YES, YES).copy_index, verdict("max", YES, NO).copy_index] == [1, 1]


def margins(bench: ModelSession, defense: Defense, readout: Readout | None = None) -> list[float]:
    readout = readout or derive_readout(bench, ASKED, NONE)
    return list(score_condition(bench, defense.name, defense, ASKED, readout)["margin"])


OWN = """
from dataclasses import dataclass
from defenses.steering import Steering

@dataclass(frozen=True)
class Mine(Steering):
    '''Pushes by a factor.'''
    def make_transform(self, harmful, benign):
        return lambda stream: stream + {factor} * (harmful - benign).to(stream)
"""


def test_an_own_class_that_was_edited_is_computed_again(tmp_path: Path) -> None:
    from analysis.mechanism.directions import load_mean_activations
    from analysis.studies.manifest import describe_defense

    bench = ModelSession.from_model(toy_bench().loaded_model, score_cache=ScoreCache(tmp_path / "s"))
    found, about = [], []
    for factor in (1, 5):
        (tmp_path / "mine.py").write_text(OWN.format(factor=factor))
        mine: Any = get_defense(str(tmp_path / "mine.py"))
        assert mine.is_user_defined
        found.append(margins(bench, replace(mine, activations=load_mean_activations(bench, ASKED))))
        about.append(describe_defense(mine)["source_sha256"])
    assert found[0] != found[1] and about[0] != about[1]


def test_what_scales_an_adapter_names_its_scores(tmp_path: Path) -> None:
    bench = ModelSession.from_model(toy_bench().loaded_model, score_cache=ScoreCache(tmp_path / "s"))
    folder = made_adapter(tmp_path / "a", seed=1)
    first = margins(bench, SafetyTuning(adapter=load_adapter(folder)))
    config = json.loads((folder / ADAPTER_CONFIG_FILE).read_text())
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps(config | {"lora_alpha": 4 * config["lora_alpha"]}))
    assert margins(bench, SafetyTuning(adapter=load_adapter(folder))) != first


def peft_folder(place: Path, **settings: Any) -> tuple[Path, Any]:
    """Write an adapter as PEFT itself does, with no manifest; return it and the model that wears it."""
    from peft import LoraConfig, get_peft_model

    model = copied_model()
    tuned = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **settings)
    )
    made = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, one in tuned.named_parameters():
            if "lora_B" in name:
                one.copy_(torch.randn(one.shape, generator=made) / 8)
    tuned.save_pretrained(str(place))
    return place, tuned.eval()


def copied_model() -> Any:
    import copy

    return copy.deepcopy(tiny_model())


HOST = ModelInfo("toy", None, ())
IDS = torch.tensor([[5, 60, 70, 81, 9]])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"alpha_pattern": {"v_proj": 32}, "rank_pattern": {"q_proj": 2}},
        {"use_rslora": True},
    ],
    ids=["plain", "patterns", "rslora"],
)
def test_somebodys_adapter_is_worn_as_peft_wears_it(tmp_path: Path, settings: Any) -> None:
    folder, tuned = peft_folder(tmp_path / "a", **settings)
    defense: Any = get_defense("adapter", {"weights": str(folder)}).prepare(HOST)
    assert not defense.missing_requirements()
    with torch.no_grad():
        want = tuned(input_ids=IDS).logits
        plain = tiny_model()(input_ids=IDS).logits
        with defense.apply_to(tiny_model()):
            assert torch.allclose(tiny_model()(input_ids=IDS).logits, want, atol=1e-4)
    assert (want - plain).abs().max() > 0.05


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"bias": "all"}, "bias"),
    ],
)
def test_an_adapter_of_another_kind_is_refused_before_anything_runs(
    tmp_path: Path, settings: Any, words: str
) -> None:
    folder, _ = peft_folder(tmp_path / "a")
    config = json.loads((folder / ADAPTER_CONFIG_FILE).read_text())
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps(config | settings))
    with pytest.raises(UserError, match=rf"only plain LoRA adapters are read, and this has {words}"):
        get_defense("adapter", {"weights": str(folder)}).prepare(HOST)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("../nothere", "is no folder, and no Hugging Face id"),
        ("nobody/nothing", "cannot be fetched"),
        ("{here}", "it lacks adapter_config.json"),
    ],
)
@pytest.mark.parametrize("name", ["adapter.weights", "weights.path"])
def test_weights_that_are_not_there_are_answered_in_one_line(
    tmp_path: Path, place: str, words: str, name: str
) -> None:
    defense, _, key = name.partition(".")
    if defense == "weights" and place == "{here}":
        words = "holds no .safetensors"
    with pytest.raises(UserError, match=words):
        get_defense(defense, {key: place.format(here=tmp_path)}).prepare(replace(HOST, offline=True))


def test_a_whole_checkpoint_is_worn_and_taken_off(tmp_path: Path) -> None:
    other = copied_model()
    with torch.no_grad():
        for one in other.parameters():
            one.mul_(1.1)
        want = other(input_ids=IDS).logits
    other.save_pretrained(str(tmp_path / "m"))
    defense: Any = get_defense("weights", {"path": str(tmp_path / "m")}).prepare(HOST)
    model = copied_model()
    before = model(input_ids=IDS).logits
    with torch.no_grad(), defense.apply_to(model):
        assert torch.allclose(model(input_ids=IDS).logits, want, atol=1e-5)
    assert torch.equal(model(input_ids=IDS).logits, before) and len(defense.weights_fingerprint()) == 64
    with pytest.raises(UserError, match="is no checkpoint of this model"), defense.apply_to(tiny_model("gpt2")):
        pass


def test_a_weight_that_is_also_another_one_is_not_changed(tmp_path: Path) -> None:
    model = tiny_model("qwen3")  # its unembedding is its embedding
    with pytest.raises(UserError, match="which this model also uses as"):
        check_weight_is_separate(model, "model.embed_tokens.weight", "it")
    untied = copied_model()
    model = copied_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    untied.save_pretrained(str(tmp_path / "m"))
    defense: Any = get_defense("weights", {"path": str(tmp_path / "m")}).prepare(HOST)
    with pytest.raises(UserError, match=r"cannot be worn: .* is also"), defense.apply_to(model):
        pass


@pytest.mark.parametrize("name", ["paraphrase", "summarize", "two_pass_intention", "back_translation"])
def test_an_instruction_without_a_place_for_the_request_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"must contain \{request\}"):
        get_defense(name, {"text": "Rephrase the request."})


def test_a_depth_at_which_there_is_no_direction_is_refused() -> None:
    from analysis.mechanism.directions import load_mean_activations

    bench = toy_bench()
    host = replace(HOST, compute_mean_activations=lambda: load_mean_activations(bench, ASKED))
    with pytest.raises(UserError, match=r"depth=0\.0 the model holds the same"):
        get_defense("refusal_steering", {"depth": "0"}).prepare(host)
    assert not get_defense("refusal_steering", {"depth": "0.5"}).prepare(host).missing_requirements()


def test_what_is_no_number_is_not_kept(tmp_path: Path) -> None:
    store = ScoreCache(tmp_path / "s")
    store.write_scores([(b"a", float("nan"), 1.0), (b"b", float("inf"), 1.0), (b"c", 1.0, 1.0)])
    assert store.read_scores([b"a", b"b", b"c"]) == {b"c": (1.0, 1.0)}
    assert (tmp_path / "s").stat().st_mode & 0o077 == 0


def test_answers_to_requests_are_never_kept_on_the_disk(tmp_path: Path) -> None:
    from analysis.models.cache import count_cached_rows

    bench = ModelSession.from_model(toy_bench().loaded_model, score_cache=ScoreCache(tmp_path / "s"))
    chat = [{"role": "user", "content": "How do I sing?"}]
    bench.defense_calls.complete_calls([ModelCall(chat, 6, stops_at_newline=False)])
    assert count_cached_rows(tmp_path / "s")["drafts"] == 0
    bench.defense_calls.complete_calls([ModelCall(chat, 6, stops_at_newline=True)])
    assert count_cached_rows(tmp_path / "s")["drafts"] == 1


def test_the_expert_is_not_put_on_a_state(tmp_path: Path) -> None:
    made_adapter(tmp_path / "aligned", seed=1)
    host = ModelInfo("toy", toy_tokenizer(), (), (tmp_path,), "toy")
    assert not get_defense("safe_decoding").prepare(host).missing_requirements()
    assert (
        "released weights"
        in get_defense("safe_decoding").prepare(replace(host, state="x")).missing_requirements()
    )


@dataclass(frozen=True)
class Talkative(Defense):
    """Says its secret where it must not."""

    def rewrite(self, chat: Any, rng: Any) -> Any:
        if "never" in chat[-1]["content"]:
            return prepend_system(chat, "tulip seven")
        raise ValueError("cannot use tulip seven here")

    def secret_texts(self) -> tuple[str, ...]:
        return ("tulip seven",)


def test_an_error_shows_no_secret() -> None:
    check = make_failed_check(
        toy_bench(), "talkative", Talkative(), ValueError("cannot use tulip seven here")
    )
    assert "tulip" not in check.observed and "⟨secret⟩" in check.observed


@pytest.mark.parametrize(
    ("body", "words"),
    [("yield Ask(chat)", "must yield lists of"), ("yield []; return []", "gives nothing to read")],
)
def test_a_consultation_that_breaks_the_contract_is_told(body: str, words: str) -> None:
    made: dict[str, Any] = {"Ask": ModelCall, "Defense": Defense, "copied": copy_chat}
    head = "class Odd(Defense):\n  def rewrite(self, chat, rng): return copied(chat)\n"
    exec(f"{head}  def consult_model(self, chat, rng):\n    {body}\n", made)
    with pytest.raises(UserError, match=words):
        toy_bench().render_query(made["Odd"](), ASKED[0])


# --- answers that are begun -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "kind", "gap"),
    [("llama2", "metaspace", " "), ("mistral0.3", "metaspace", " "), ("chatml", "bytes", "")],
)
def test_behind_a_begun_answer_the_next_word_has_the_form_that_answers_open_with(
    template: str, kind: str, gap: str
) -> None:
    renderer = toy_bench(template=template, kind=kind).chat_template
    chat = [{"role": "user", "content": "How do I sing?"}]
    begun = renderer.render_prompt(prefill_response(chat, "Sure, here it is:\n\n"))
    assert renderer.has_leading_space == bool(gap)
    assert begun.text.endswith("here it is:" if gap else "here it is:\n\n")
    assert _normalize_text(begun.prefill) == "Sure,hereitis:"


def test_a_readout_behind_an_opener_does_not_read_what_is_begun_otherwise() -> None:
    bench = toy_bench()
    opener = tuple(bench.loaded_model.tokenizer.encode("Sure, here", add_special_tokens=False))
    readout = derive_readout(bench, ASKED, NONE, opener)
    checks = check_condition(bench, "safety_prefix", get_defense("safety_prefix"), ASKED, readout)
    assert [one.observed for one in checks if not one.passed] == [
        "the readout begins answers itself ('Sure,here'), and this one is begun already"
    ]
    under = check_condition(bench.with_attack(get_attack("prefill")), "none", NONE, ASKED, readout)
    assert not all(one.passed for one in under)


def test_of_a_blend_the_preflight_looks_at_the_blend(tmp_path: Path) -> None:
    from defenses.decoding import SafeDecoding

    bench = toy_bench()
    blend = SafeDecoding(adapter=load_adapter(made_adapter(tmp_path / "x", seed=3)))
    readout = derive_readout(bench, ASKED, NONE)
    checks = {one.name: one for one in check_condition(bench, "safe_decoding", blend, ASKED, readout)}
    plain = {one.name: one for one in check_condition(bench, "none", NONE, ASKED, readout)}
    assert all(one.passed for one in checks.values())
    assert checks["coverage"].observed != plain["coverage"].observed


def test_asked_about_two_passes_the_question_holds_the_request() -> None:
    from analysis.readouts.first_token import REFUSAL_QUESTIONS

    query = Query("q", "How do I sing?", False)
    bench = toy_bench().with_questions(REFUSAL_QUESTIONS)
    prompts = bench.render_query(get_defense("two_pass_intention"), query)
    assert all("How do I sing?" in prompt.chat[-1]["content"] for prompt in prompts)


def test_another_configuration_or_version_of_the_code_finds_nothing() -> None:
    loaded = toy_bench().loaded_model
    about = describe_computation(loaded)
    assert about["code"] == hash_code(*SCORING_SOURCES) and about["config"]["hidden_size"] == 64
    assert about["config"]["_name_or_path"] == ""
