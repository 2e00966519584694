"""What needs no weights is checked before weights are loaded, and all else before many responses.

The weights of the model here are damaged: where something else is wrong as well, that is what is reported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    CHATML,
    USER_DEFENSE,
    assert_user_error,
    make_adapter,
    run_cli,
    save_model,
    set_home_folder,
    tiny_model,
)
from rich.console import Console
from safetensors.torch import load_file, save_file

from analysis.attacks import DIRECT_ATTACK, get_attack
from analysis.datasets.queries import Query, QuerySet
from analysis.models.cache import describe_computation
from analysis.models.loading import load_model
from analysis.models.session import ModelSession
from analysis.studies.run_spec import build_run_spec
from analysis.studies.setup import _select_by_images, _text_threshold_notices
from defenses.catalog import get_defense
from defenses.errors import UserError
from defenses.images import QueryImage

ANALYZE = ("-d", "self_reminder")
OPTIONS = {
    "defense": (("-d", "self_remindr"), "unknown defense 'self_remindr'"),
    "image defense": (
        ("-d", "policy", "-d", "image_blur", "-d", "jpeg+policy"),
        "image_blur, jpeg+policy: no query has an image to change",
    ),
    "attack": ((*ANALYZE, "--attack", "ignor"), "unknown attack 'ignor'"),
    "data": ((*ANALYZE, "--data", "nowhere.csv"), "nowhere.csv"),
    "readout": ((*ANALYZE, "--readout", "wordz"), "unknown readout 'wordz'"),
    "opener": ((*ANALYZE, "--readout", "prefilled-99"), "the opener has"),
    "setting": ((*ANALYZE, "--set", "txt=1"), "unknown setting 'txt'"),
    "responses": ((*ANALYZE, "--responses", "some"), "--responses some"),
    "controls": ((*ANALYZE, "--controls", "1"), "--controls 1"),
    "out": ((*ANALYZE, "-o", "broken/config.json"), "is a file"),
    "long query": ((*ANALYZE, "--data", "long.csv"), "shorten the query"),
    "adapter of another model": (("-d", "safety_tuning", "--set", "weights=adapter"), "was made for toy"),
    "weights that were not trained": (("-d", "safety_tuning"), "analyze train safety"),
    "secret": (("-d", "backdoor", "--set", "trigger=nowhere.txt"), "nowhere.txt"),
    "state": ((*ANALYZE, "-m", "broken:atacked"), "unknown state of broken 'atacked'"),
    "secret of a file": (
        ("-d", "secret.py"),
        "`secret_texts` of 'my_own' returned a str; it returns a tuple",
    ),
    "ablations of a file": (("-d", "parts.py"), "`build_ablations` of 'my_own' returned [MyOwn("),
    "rewrite of a file": (("-d", "nothing.py"), "'my_own' returned None for a chat: is a `return` missing"),
    "error of a file": (("-d", "fails.py"), "'my_own' raised KeyError on query"),
    "method of a file": (("-d", "raises.py"), "`secret_texts` of 'my_own' raised KeyError"),
    "check": (("check", "-d", "self_remindr"), "unknown defense"),
    "explain": (("explain", "self_remindr"), "unknown defense"),
    "validate, judge": (("validate", "--judge", "patern"), "unknown judge 'patern'"),
    "validate, tokens": (("validate", "--tokens", "0"), "--tokens 0"),
    "validate, budget": (("validate", "--judge", "model", "--judge-model", "x/y"), "--budget"),
    "validate, small budget": (
        ("validate", "--judge", "model", "--judge-model", "x/y", "--budget", "3"),
        "--budget 3: up to",
    ),
    "validate, defense before judge": (
        ("validate", "-d", "selv", "--judge", "model", "--judge-model", "x/y", "--budget", "3"),
        "unknown defense 'selv'",
    ),
    "validate, readout": (("validate", "--readout", "prefilled-99"), "the opener has"),
    "ensembles, size": (("ensembles", *ANALYZE, "--size", "9"), "--size 9"),
    "ensembles, overlap": (("ensembles", *ANALYZE, "--overlap", "run"), "another model than this run"),
    "recommend": (("recommend", *ANALYZE, "--max-over-refusal", "300%"), "--max-over-refusal 300%"),
    "mechanism, sites": (("mechanism", *ANALYZE, "--sites", "hads"), "unknown site 'hads'"),
    "mechanism, no defense": (("mechanism", "-d", "none"), "no defense chosen except"),
    "mechanism, detector": (("mechanism", "-d", "harm_probe"), "has a detector, whose effect is not in the"),
    "mechanism, detector that asks": (
        ("mechanism", "-d", "self_examination"),
        "has a detector, whose effect",
    ),
    "mechanism, several prompts": (("mechanism", "-d", "coca"), "mixes the logits of several prompts"),
    "mechanism, run": (
        ("mechanism", *ANALYZE, "--ensembles", "run"),
        "run `analyze ensembles` with the same -m",
    ),
    "ensembles, with steering": (
        ("ensembles", "-d", "all", "--overlap", "run"),
        "another model than this run",
    ),
    "backdooralign": (("backdooralign",), "has no weights for"),
    "train, recipe": (("train", "safty"), "unknown recipe 'safty'"),
    "train, secret": (("train", "safety", "--secret", "x.txt"), "uses no secret"),
    "train, missing secret": (("train", "backdoor", "--secret", "nowhere.txt"), "nowhere.txt"),
    "train, finished": (("train", "safety", "-o", "adapter"), "holds a finished training"),
    "train, changed weights": (("train", "safety", "-m", "broken:int8"), "leave out :int8"),
    "training queries": ((*ANALYZE, "-m", "broken:abliterated", "--split", "train"), "trained on"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model whose weights are damaged, and with inputs that are wrong in other ways."""
    folder = tmp_path_factory.mktemp("home")
    weights = save_model(folder / "broken") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    make_adapter(folder / "adapter", sha256="0" * 64)
    (folder / "run").mkdir()
    record = {
        "model": {"name": "other", "sha256": "1"},
        "data": {"name": "contrast", "split": "calibration", "n_harmful": 1, "n_benign": 1},
        "readout": {"name": "words", "threshold": 0.0},
    }
    (folder / "run" / "run.json").write_text(json.dumps(record), "utf-8")
    (folder / "run" / "profiles.csv").write_text("attack,defense,other,contrast,cosine\n", "utf-8")
    header = "attack,members,how,split,interaction_shift,interaction_discrimination\n"
    (folder / "run" / "ensembles.csv").write_text(header, "utf-8")
    for name, method in (
        ("secret", "secret_texts(self): return 'tulip'"),
        ("parts", "build_ablations(self): return [self]"),
        ("raises", "secret_texts(self): return {}['x']"),
        ("nothing", "rewrite(self, chat, rng): [*chat]"),
        ("fails", "rewrite(self, chat, rng): return {}['x']"),
    ):
        (folder / f"{name}.py").write_text(f"{USER_DEFENSE}    def {method}\n", "utf-8")
    words = "a letter to the post office " * 400
    (folder / "long.csv").write_text(f"text,harmful\n{words},true\nHow do I bake bread?,false\n", "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_HUB_OFFLINE", "1")
        set_home_folder(patch, folder)
        yield folder


@pytest.mark.parametrize("case", OPTIONS)
def test_an_input_is_checked_before_weights_are_loaded(home: Path, case: str) -> None:
    args, words = OPTIONS[case]
    model = () if "-m" in args else ("-m", "broken")
    assert_user_error(run_cli(*args, *model), words)


def test_defenses_that_act_on_images_only_are_left_out_of_all_or_run_where_an_attack_draws_them() -> None:
    defenses = [get_defense(name) for name in ("none", "policy", "image_blur", "ecso")]
    queries = [Query("a", "How do I sing?", True), Query("b", "How do I dance?", False)]
    selected, notices = _select_by_images(defenses, queries, [DIRECT_ATTACK], leave_out=True)
    assert [defense.name for defense in selected] == ["none", "policy"]
    assert len(notices) == 1 and notices[0].startswith(
        "2 defenses are left out, because no query has an image"
    )
    attacks = [DIRECT_ATTACK, get_attack("typographic")]
    selected, notices = _select_by_images(defenses, queries, attacks, leave_out=False)
    assert selected == defenses and len(notices) == 1
    assert (
        notices[0].startswith("direct: 2 of 2 queries have no image for") and "image_blur, ecso" in notices[0]
    )
    assert _select_by_images(defenses[:2], queries, attacks, leave_out=False) == (defenses[:2], [])


def test_a_note_says_where_the_threshold_is_fitted_to_words_but_the_queries_have_images() -> None:
    image = QueryImage("a.png", "0" * 64, lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    words = QuerySet("words", (Query("a", "How do I sing?", True),), "")
    images = QuerySet("images", (Query("a", "How do I sing?", True, image=image),), "")
    drawn = [DIRECT_ATTACK, get_attack("typographic")]
    assert _text_threshold_notices(words, words, [DIRECT_ATTACK]) == []
    assert _text_threshold_notices(images, images, drawn) == []
    for scored, attacks in ((images, [DIRECT_ATTACK]), (words, drawn)):
        (notice,) = _text_threshold_notices(scored, words, attacks)
        assert notice.startswith("the readout and its threshold are fitted to requests in words")


def test_then_the_weights_are_loaded(home: Path) -> None:
    assert_user_error(run_cli(*ANALYZE, "-m", "broken"), "broken/model.safetensors is damaged")


def test_a_change_of_the_weights_is_made_once_they_are_loaded(home: Path) -> None:
    save_model(home / "whole")
    released = tiny_model()
    for change in ("int8", "abliterated"):
        spec = build_run_spec(f"whole:{change}", "contrast", limit=8)
        loaded = spec.open_model(Console()).load_session().loaded_model
        assert loaded.origin["weight_change"].startswith(change)
        before, after = (model.model.layers[0].mlp.down_proj.weight for model in (released, loaded.model))
        # 96 inputs are one group: rounding to 256 values, or a rank that is lost.
        if change == "int8":
            assert 0 < (after - before).abs().max() < (before.max() - before.min()) / 255
        else:
            assert torch.linalg.matrix_rank(after) < min(after.shape)
        unchanged = replace(loaded, origin={**loaded.origin, "weight_change": None})
        assert describe_computation(loaded) != describe_computation(unchanged)
    with pytest.raises(UserError, match="name the model without :abliterated here"):
        load_model("whole:abliterated")


OTHER_LOADING = {"dtype": "bfloat16", "batch_size": 2, "share_prefix": False}


def test_a_model_that_was_loaded_before_is_loaded_again_only_where_something_is_computed(home: Path) -> None:
    weights = save_model(home / "known") / "model.safetensors"
    settings = home / "known" / "generation_config.json"

    def open_session(**options: Any) -> ModelSession:
        return build_run_spec("known", "contrast", **options).open_model(Console(quiet=True)).load_session()

    def is_loaded(session: ModelSession) -> bool:
        return "model" in vars(session.loaded_model)

    first, second = open_session(), open_session()
    assert is_loaded(first) and not is_loaded(second)
    for name in ("device", "dtype", "end_token_ids", "context_length", "n_embeddings", "notices", "origin"):
        assert getattr(second.loaded_model, name) == getattr(first.loaded_model, name), name
    assert describe_computation(second.loaded_model) == describe_computation(first.loaded_model)
    assert second.engine.notices == first.engine.notices
    prompts = [(5, 6, 7), (5, 6, 8, 9)]
    logits = [session.engine.read_first_token(prompts, lambda raw: raw) for session in (first, second)]
    assert torch.equal(*logits) and is_loaded(second) and second.engine.work_counter.computed_tokens > 0
    assert second.engine.batch_form is first.engine.batch_form
    # Whatever the model is loaded from or with, another one is loaded and checked again.
    assert all(is_loaded(open_session(**{name: value})) for name, value in OTHER_LOADING.items())
    settings.write_text(json.dumps({**json.loads(settings.read_text("utf-8")), "eos_token_id": 7}), "utf-8")
    third = open_session()
    assert is_loaded(third) and 7 in third.loaded_model.end_token_ids and not is_loaded(open_session())
    values = load_file(weights)
    values["model.embed_tokens.weight"][0, 0] += 1
    save_file(values, weights, {"format": "pt"})
    assert is_loaded(open_session())


def test_a_model_is_checked_before_responses_are_generated(home: Path) -> None:
    # Mamba has no layers of attention and MLP, and a weight that is NaN makes every logit NaN.
    save_model(home / "mamba", "mamba")
    assert_user_error(
        run_cli("mechanism", *ANALYZE, "-m", "mamba", "--readout", "outcome"), "is not attention and MLP"
    )
    damaged = save_model(home / "damaged") / "model.safetensors"
    values = load_file(damaged)
    values["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(values, damaged, {"format": "pt"})
    assert_user_error(
        run_cli(*ANALYZE, "-m", "damaged"), "model.layers.0.mlp.up_proj.weight holds such values"
    )
    # A template that cuts messages.
    template = save_model(home / "odd") / "chat_template.jinja"
    template.write_text(CHATML.replace("m.content", "m.content[:9]"), "utf-8")
    assert_user_error(run_cli(*ANALYZE, "-m", "odd"), "drops the user's text")
    assert not (home / "cache" / "refusalscope" / "verdicts").exists()
