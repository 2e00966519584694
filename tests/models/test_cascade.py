"""Text recognition before a text model, and runs on queries with images from end to end."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from conftest import assert_user_error, run_cli
from PIL import Image
from vision_models import save_vision_model

from analysis.models.cascade import OcrReader
from defenses.images import QueryImage


def make_image(digest):
    return QueryImage("drawn", digest * 64, lambda: Image.new("RGB", (8, 8), "white"))


def test_recognized_text_stands_in_the_place_of_the_image_and_is_read_once(monkeypatch, tmp_path):
    pytest.importorskip("rapidocr")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    read = []
    monkeypatch.setattr(
        "analysis.models.cascade.read_image_text",
        lambda image: read.append(image) or "Bake a loaf" * (image.digest < "b"),
    )
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "What is asked?", "image": make_image("a")},
    ]
    for _ in range(2):  # the second reader finds the text of the first one
        first, second = OcrReader().replace_images(chat)
        assert first == chat[0]
        assert second == {"role": "user", "content": "Bake a loaf\n\nWhat is asked?"}
    assert len(read) == 1
    blank = [{"role": "user", "content": "What is asked?", "image": make_image("b")}]
    assert OcrReader().replace_images(blank) == [{"role": "user", "content": "What is asked?"}]


@pytest.fixture(scope="module")
def image_queries(cli_home):
    """A file of eight queries with images, beside a tiny LLaVA and the tiny text model."""
    save_vision_model(cli_home / "llava", "llava")
    rows = []
    for number in range(4):
        for harmful in (True, False):
            name = f"{number}-{harmful}.png"
            pixels = np.random.default_rng([number, harmful]).integers(0, 256, (60, 90, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(cli_home / name)
            verb = "hide" if harmful else "paint"
            rows.append((f"How do I {verb} thing {number}?", harmful, name, f"p{number}"))
    table = pd.DataFrame(rows, columns=["text", "harmful", "image", "pair"])
    table.to_csv(cli_home / "queries.csv", index=False)
    return "queries.csv"


def test_a_run_on_images(image_queries, cli_home, no_figures):
    defenses_of_run = ("-d", "self_reminder", "-d", "gaussian_noise", "-d", "caption_only")
    options = ("--data", image_queries, "--readout", "words", "--controls", "0", "--limit", "4")
    result = run_cli(*defenses_of_run, "-m", "./llava", *options, "--responses", "none", "-o", "with-images")
    assert result.code == 0, result.err
    scores = pd.read_csv(cli_home / "with-images" / "scores.csv")
    assert scores["image"].str.fullmatch("[0-9a-f]{64}").all() and scores["image"].nunique() == 4
    margins = scores.pivot(index="query", columns="defense", values="margin")
    assert (margins["gaussian_noise"] != margins["none"]).all()
    record = json.loads((cli_home / "with-images" / "run.json").read_text("utf-8"))
    assert record["chat_template"]["images"]["processor"] == "LlavaProcessor"
    assert any("8 of 8 images reach the model in part only" in text for text in record["notices"])


def test_knockouts_of_attention_need_no_known_components(image_queries, cli_home):
    """TransformerLens does not know InternVL, whose attention can be blocked all the same."""
    save_vision_model(cli_home / "internvl", "internvl")
    args = ("mechanism", "-d", "self_reminder", "-m", "./internvl", "--data", image_queries, "--split", "all")
    result = run_cli(*args, "--readout", "words", "--patched", 2, "-o", "cuts")
    assert result.code == 0, result.err
    knockouts = pd.read_csv(cli_home / "cuts" / "cuts.csv")
    whole = knockouts[knockouts["first"] == -1]
    assert whole["tokens"].tolist() == ["defense", "defense", "image", "image"]
    assert whole["shift"].to_numpy() == pytest.approx([whole["shift"].iloc[0]] * 4, abs=1e-3)
    written = {path.name for path in (cli_home / "cuts").iterdir()}
    assert "cuts.png" in written and not {"layers.csv", "parts.csv", "patches.csv"} & written
    record = json.loads((cli_home / "cuts" / "run.json").read_text("utf-8"))
    notice = (
        "attention knockout and weight patching only: TransformerLens does not know the architecture InternVL"
    )
    assert any(text.startswith(notice) for text in record["notices"])
    assert "attention to images is blocked" in " ".join(result.out.split())
    assert_user_error(run_cli(*args, "--patched", 0), "does not know the architecture InternVL")


def test_check_shows_what_the_model_sees_of_an_image(image_queries):
    shown = " ".join(
        run_cli("check", "-d", "self_reminder", "-m", "./llava", "--data", image_queries).out.split()
    )
    assert "[image: 16 tokens, 90×60 → 56×56, 6" in shown and "% of the pixels]" in shown


def test_a_text_model_is_not_given_images(image_queries, cli_home, monkeypatch):
    result = run_cli("-d", "self_reminder", "-m", "tiny", "--data", image_queries, "--readout", "words")
    assert_user_error(result, "reads text only", "+ocr")
    settings = cli_home / "llava" / "processor_config.json"
    broken = json.loads(settings.read_text("utf-8")) | {"processor_class": "NoProcessor"}
    monkeypatch.setattr("defenses.ocr.importlib.util.find_spec", lambda name: None)
    result = run_cli("-d", "self_reminder", "-m", "tiny+ocr", "--data", image_queries, "--readout", "words")
    assert_user_error(result, "pip install 'refusalscope[vision]'")
    settings.write_text(json.dumps(broken), "utf-8")
    result = run_cli("-d", "self_reminder", "-m", "./llava", "--data", image_queries, "--readout", "words")
    assert_user_error(result, "no processor 'NoProcessor'")
    assert run_cli("check", "-d", "self_reminder", "-m", "./llava", "--split", "test").code == 0
