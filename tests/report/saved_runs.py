"""Run folders with planted results, for the tests of the report."""

import csv
import io
import json
import re

import numpy as np
import pandas as pd
from PIL import Image

from analysis.datasets.images import open_image
from analysis.datasets.loading import load_queries, load_query_texts
from analysis.report.folder import read_run
from analysis.report.html import MAX_PAGE_BYTES, render_page

HOSTILE_TEXTS = (
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "Line\u2028separator & <b>bold</b> 'quoted'",
)
ESTIMATES = ("refusal_rate", "over_refusal_rate", "auroc", "delta_auroc", "shift", "discrimination")
ESTIMATES += ("scaled_shift", "scaled_discrimination", "readout_refusal_rate", "readout_over_refusal_rate")
DEFENSES = {
    "none": ("none", 0.0, 0.0, "reference"),
    "policy": ("reminders", 1.0, 0.1, "shift +, discrimination inconclusive"),
    "policy/half": ("reminders", 0.5, 0.0, "shift +, discrimination equivalent"),
    "smooth_llm": ("noise", -0.5, 0.4, "shift -, discrimination +"),
    "paraphrase": ("refactoring", 0.0, -0.4, "shift inconclusive, discrimination -"),
    "neutral_prompt": ("control", 0.1, 0.0, "equivalent"),
}


def make_summary(defenses, attack="direct", trusted="trusted", based_on="margins"):
    """Make a summary from name → family, shift, discrimination (nats; half as many SDs), verdict."""
    rows = []
    for name, (family, shift, discrimination, verdict) in defenses.items():
        row = {"attack": attack, "defense": name, "family": family, "n_harmful": 12, "n_benign": 12}
        values = dict.fromkeys(ESTIMATES, 0.5) | {"shift": shift, "discrimination": discrimination}
        values |= {"scaled_shift": shift / 2, "scaled_discrimination": discrimination / 2}
        if based_on == "responses":
            values |= {"response_shift": 10 * shift, "response_discrimination": 10 * discrimination}
        for key, value in values.items():
            row |= {key: value, f"{key}_low": value - 0.1, f"{key}_high": value + 0.1}
        note = "shift: the interval is wide" if "inconclusive" in verdict else ""
        row |= {"verdict": verdict, "verdict_note": note, "based_on": based_on, "trusted": trusted}
        rows.append(row | {"n_responses": 24} if based_on == "responses" else row)
    return pd.DataFrame(rows)


def make_picture(color="#CC79A7", noise_seed=0):
    """Make a PNG of one color with a white rim, or of noise that does not compress."""
    pixels = np.full((60, 80, 3), 255, np.uint8)
    pixels[10:50, 10:70] = [int(color[place : place + 2], 16) for place in (1, 3, 5)]
    if noise_seed:
        pixels = np.random.default_rng(noise_seed).integers(0, 255, (700, 700, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_run(
    folder,
    defenses=DEFENSES,
    attacks=("direct",),
    n_queries=24,
    trusted="trusted",
    extra_words=0,
    based_on="margins",
    pictures=(),
):
    """Write a run folder, and the file of its queries beside it; return the folder.

    The first queries have the pictures (contents of files, or None) as images.
    """
    folder.mkdir(parents=True)
    ids = [f"q{number:03d}" for number in range(n_queries)]
    data = folder.parent / f"{folder.name}-queries.csv"
    texts = [
        HOSTILE_TEXTS[n] if n < len(HOSTILE_TEXTS) else f"Question {n}? " + "word " * extra_words
        for n in range(n_queries)
    ]
    paths, digests = [""] * n_queries, [None] * n_queries
    for n, picture in enumerate(pictures):
        if picture is not None:
            path = folder.parent / f"{folder.name}-{n}.png"
            path.write_bytes(picture)
            paths[n], digests[n] = path.name, open_image(path, "query").digest
    with data.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text", "harmful", "image"])
        writer.writerows(zip(ids, texts, [n % 2 == 0 for n in range(n_queries)], paths, strict=True))
    rng, score_frames = np.random.default_rng(0), []
    for attack in attacks:
        base = rng.normal(0, 1, n_queries)
        for name, (_, shift, discrimination, _) in defenses.items():
            harmful = np.arange(n_queries) % 2 == 0
            change = shift + np.where(harmful, 0.5, -0.5) * discrimination
            jitter = 0 if name == "none" else rng.normal(0, 0.2, n_queries)
            margin = base + harmful + change + jitter
            margin[0] += 9 * (name == "policy")  # the first query changes most
            score_frames.append(
                pd.DataFrame(
                    {
                        **{"query": ids, "pair": None, "category": "topic <i>", "harmful": harmful},
                        **{"attack": attack, "defense": name, "margin": margin},
                        **({"image": digests} if any(digests) else {}),
                    }
                )
            )
    pd.concat(score_frames).to_csv(folder / "scores.csv", index=False)
    prompts = [
        (attack, name, query_id, 1 + 2 * (name == "paraphrase"), f"<s>{name}: {text}</s>")
        for attack in attacks
        for name in ("policy", "paraphrase")
        for query_id, text in zip(ids[:2], texts if name == "policy" else ("Reworded <b>", "x"), strict=False)
    ]
    columns = ["attack", "defense", "query", "readings", "read"]
    pd.DataFrame(prompts, columns=columns).to_csv(folder / "prompts.csv", index=False)
    summary = pd.concat([make_summary(defenses, attack, trusted, based_on) for attack in attacks])
    summary.to_csv(folder / "summary.csv", index=False)
    plane = summary[summary["defense"] != "none"].drop(columns=["verdict"])
    plane.to_csv(folder / "plane.csv", index=False)
    (folder / "plane.png").write_bytes(make_picture())
    (folder / "odd.png").write_bytes(make_picture("#009E73"))
    record = {
        "created": "2026-11-21T19:46:26+00:00",
        "model": {"name": "toy", "id": "toy", "revision": "1", "sha256": "a" * 64},
        **{"device": "cpu", "dtype": "float32", "seed": 0, "attacks": list(attacks)},
        "readout": {"name": "words", "refuse": ["I"], "comply": ["Sure"], "threshold": 0.5},
        "defenses": {"policy": {"settings": {"trigger": "SECRET-WORDS"}, "secrets": ["sha256:0123456789ab"]}},
        "data": {"name": str(data), "split": "all", "n_harmful": n_queries // 2, "n_benign": n_queries // 2},
        "versions": {"python": "3.11"},
        "notices": ["a notice with <script>"],
        "trusted": {attack: dict.fromkeys(defenses, trusted) for attack in attacks},
    }
    if based_on == "responses":
        record["responses"] = {"new_tokens": 24, "queries": 24, "unjudged": 1, "judge": {"name": "learned"}}
    (folder / "run.json").write_text(json.dumps(record), "utf-8")
    return folder


def load_query_images(name):
    """Load the images of a data set by the ids of their queries."""
    return {query.id: query.image for query in load_queries(name, offline=True).queries if query.image}


def render_folders(*folders, max_bytes=MAX_PAGE_BYTES):
    """Render the page of some run folders."""
    runs = []
    for folder in folders:
        taken_names = {run.name for run in runs}
        runs.append(read_run(folder, load_query_texts, taken_names, load_query_images))
    return render_page(runs, max_bytes)


def parse_chart_data(html):
    """Return the data that a page embeds for its charts."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])
