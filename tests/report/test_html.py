"""One page of several runs: what its words say, what it holds, what it keeps out, how it is reached."""

import base64
import csv
import gzip
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from conftest import assert_user_error as refused, run_cli as analyze

from analysis.report.embed import dump_script_json, encode_picture, encode_table
from analysis.report.folder import read_run
from analysis.report.headline import describe_effects
from analysis.report.html import MAX_PAGE_BYTES, render_page
from analysis.report.results import Run
from analysis.report.tables import build_ensemble_tables, build_validity_tables

EVIL = (
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "Line\u2028separator & <b>bold</b> 'quoted'",
)
ESTIMATES = ("refusal_rate", "over_refusal_rate", "auroc", "delta_auroc", "shift", "discrimination")


def summary_of(defenses, attack="direct", trusted="trusted"):
    """Plant a summary: name → family, shift, discrimination, verdict."""
    rows = []
    for name, (family, shift, discrimination, verdict) in defenses.items():
        row = {"attack": attack, "defense": name, "family": family, "n_harmful": 12, "n_benign": 12}
        values = dict.fromkeys(ESTIMATES, 0.5) | {"shift": shift, "discrimination": discrimination}
        for key, value in values.items():
            row |= {key: value, f"{key}_low": value - 0.1, f"{key}_high": value + 0.1}
        rows.append(row | {"verdict": verdict, "trusted": trusted})
    return pd.DataFrame(rows)


DEFENSES = {
    "none": ("none", 0.0, 0.0, "reference"),
    "policy": ("reminders", 1.0, 0.1, "shift +"),
    "policy/half": ("reminders", 0.5, 0.0, "shift +"),
    "smooth_llm": ("noise", -0.5, 0.4, "shift - discrimination +"),
    "paraphrase": ("refactoring", 0.0, -0.4, "discrimination -"),
    "neutral_prompt": ("control", 0.1, 0.0, "no effect found"),
}


def picture(color="#CC79A7", noise=0):
    """A PNG, of a color with a white rim, or of noise that cannot be packed."""
    pixels = np.full((60, 80, 3), 255, np.uint8)
    pixels[10:50, 10:70] = [int(color[place : place + 2], 16) for place in (1, 3, 5)]
    if noise:
        pixels = np.random.default_rng(noise).integers(0, 255, (700, 700, 3), dtype=np.uint8)
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "PNG")
    return held.getvalue()


def plant(folder, defenses=DEFENSES, attacks=("direct",), queries=24, trusted="trusted", length=0):
    """Write a run folder, and the file of its queries beside it; return the folder."""
    folder.mkdir(parents=True)
    names = [f"q{number:03d}" for number in range(queries)]
    data = folder.parent / f"{folder.name}-asked.csv"
    asked = [EVIL[n] if n < len(EVIL) else f"Question {n}? " + "word " * length for n in range(queries)]
    with data.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "text", "harmful"])
        rows.writerows(zip(names, asked, [n % 2 == 0 for n in range(queries)], strict=True))
    chance, rows = np.random.default_rng(0), []
    for attack in attacks:
        base = chance.normal(0, 1, queries)
        for name, (_, shift, discrimination, _) in defenses.items():
            harmful = np.arange(queries) % 2 == 0
            change = shift + np.where(harmful, 0.5, -0.5) * discrimination
            jitter = 0 if name == "none" else chance.normal(0, 0.2, queries)
            margin = base + harmful + change + jitter
            margin[0] += 9 * (name == "policy")  # the first query changes most
            rows.append(
                pd.DataFrame(
                    {
                        **{"query": names, "pair": None, "category": "topic <i>", "harmful": harmful},
                        **{"attack": attack, "defense": name, "margin": margin},
                    }
                )
            )
    pd.concat(rows).to_csv(folder / "scores.csv", index=False)
    read = [
        (attack, name, one, 1 + 2 * (name == "paraphrase"), f"<s>{name}: {text}</s>")
        for attack in attacks
        for name in ("policy", "paraphrase")
        for one, text in zip(names[:2], asked if name == "policy" else ("Reworded <b>", "x"), strict=False)
    ]
    columns = ["attack", "defense", "query", "readings", "read"]
    pd.DataFrame(read, columns=columns).to_csv(folder / "prompts.csv", index=False)
    summary = pd.concat([summary_of(defenses, attack, trusted) for attack in attacks])
    summary.to_csv(folder / "summary.csv", index=False)
    plane = summary[summary["defense"] != "none"].drop(columns=["verdict"])
    plane.to_csv(folder / "plane.csv", index=False)
    (folder / "plane.png").write_bytes(picture())
    (folder / "odd.png").write_bytes(picture("#009E73"))
    record = {
        "created": "2026-11-21T19:46:26+00:00",
        "model": {"name": "toy", "id": "toy", "revision": "1", "sha256": "a" * 64},
        **{"device": "cpu", "dtype": "float32", "seed": 0, "attacks": list(attacks)},
        "readout": {"name": "words", "refuse": ["I"], "comply": ["Sure"], "threshold": 0.5},
        "defenses": {"policy": {"settings": {"trigger": "SECRET-WORDS"}, "secrets": ["sha256:0123456789ab"]}},
        "data": {"name": str(data), "split": "all", "n_harmful": queries // 2, "n_benign": queries // 2},
        "versions": {"python": "3.11"},
        "notices": ["a notice with <script>"],
        "trusted": {attack: dict.fromkeys(defenses, trusted) for attack in attacks},
    }
    (folder / "run.json").write_text(json.dumps(record), "utf-8")
    return folder


def written(*folders, limit=MAX_PAGE_BYTES):
    """The page of some folders."""
    runs = []
    for folder in folders:
        runs.append(read_run(folder, {run.name for run in runs}))
    return render_page(runs, limit)


def carried(html):
    """The numbers that a page carries for its charts."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


# --- words ------------------------------------------------------------------------------------------------


def test_the_headline_counts_what_verdicts_say_of_defenses_alone():
    text = describe_effects(summary_of(DEFENSES), "toy")
    assert text == (
        "Of 3 defenses on toy, by their 95\xa0% intervals: 1 shifts towards refusal, 1 away from it; "
        "1 tells harm from harmless better (smooth_llm), 1 worse."
    )


def test_the_headline_says_what_is_provisional_and_leaves_out_what_text_contradicts():
    found = summary_of(DEFENSES)
    found.loc[found["defense"] == "policy", "trusted"] = "not validated"
    found.loc[found["defense"] == "smooth_llm", "trusted"] = "not trusted"
    text = describe_effects(found, "toy")
    assert text.startswith("Of 2 defenses on toy") and "none tells harm from harmless better, 1 worse" in text
    assert "1 is provisional" in text and "1 is not counted: generated text contradicts" in text
    assert "All are provisional" in describe_effects(summary_of(DEFENSES, trusted="not validated"), "toy")
    assert describe_effects(summary_of(DEFENSES, trusted="not trusted"), "toy").startswith(
        "Nothing can be said of 3"
    )


def test_the_headline_names_the_attack_and_tells_ensembles_from_defenses():
    found = summary_of({"a+b": ("ensemble", 1.0, 0.0, "shift +")} | DEFENSES, attack="persona")
    text = describe_effects(found, "toy", "persona")
    assert text.startswith("Of 3 defenses and 1 ensemble on toy, attacked by persona") and "2 shift t" in text
    only = summary_of({"none": DEFENSES["none"]})
    assert describe_effects(only, "toy") == "No defense was read on toy: only what defenses are read against."


# --- what is carried --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*EVIL, "<!--<script>", "]]>", "\u2029"])
def test_no_text_ends_the_element_that_carries_it(text):
    held = dump_script_json({text: [text]})
    assert not set("<>&\u2028\u2029") & set(held)
    assert json.loads(held) == {text: [text]}


def test_a_picture_keeps_the_colors_of_its_small_marks_in_fewer_bytes():
    across, down = np.meshgrid(np.linspace(0, 255, 300), np.linspace(0, 255, 200))
    pixels = np.dstack([across, 0.5 * across + 0.5 * down, np.full_like(down, 200)])
    pixels = (pixels * np.random.default_rng(0).uniform(0.9, 1, pixels.shape)).astype(np.uint8)
    marks = ((213, 94, 0), (204, 121, 167), (0, 158, 115))
    for place, color in enumerate(marks):
        pixels[20:26, 20 + 30 * place : 26 + 30 * place] = color
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "PNG")
    address = encode_picture(held.getvalue())
    small = base64.b64decode(address.partition(",")[2])
    assert address.startswith("data:image/png;base64,") and len(small) < len(held.getvalue())
    kept = np.asarray(Image.open(io.BytesIO(small)).convert("RGB")).astype(int)
    for place, color in enumerate(marks):
        assert np.abs(kept[22, 23 + 30 * place] - color).max() <= 24


def test_a_table_can_be_had_again_from_the_page():
    long = b"x,y\n" + b"1,2\n" * 9000
    for csv_bytes, name in ((b"x\n1\n", "a.csv"), (long, "a.csv.gz")):
        saved, address = encode_table("a.csv", csv_bytes)
        held = base64.b64decode(address.partition(",")[2])
        assert saved == name and (gzip.decompress(held) if name.endswith("gz") else held) == csv_bytes


def test_the_page_holds_every_picture_with_words_and_every_table(tmp_path):
    html = written(plant(tmp_path / "run"))
    alts = re.findall(r'<img src="data:image/png;base64,[^"]+" alt="([^"]*)"', html)
    assert len(alts) == 2 and all(len(alt) > 40 for alt in alts)
    assert any("Change of the first-answer-token margin" in alt and "12 harmful" in alt for alt in alts)
    links = set(re.findall(r'href="data:[^"]+" download="([^"]+)"', html))
    assert links == {"scores.csv", "summary.csv", "plane.csv", "prompts.csv"}
    for words in (
        "Model",
        "Threshold",
        "0.5 nats",
        "float32",
        "6 conditions trusted",
        "a notice with &lt;script&gt;",
    ):
        assert words in html
    assert "SECRET-WORDS" not in html
    data = carried(html)["runs"][0]
    assert [one["name"] for one in data["plane"]["direct"]["points"]] == [n for n in DEFENSES if n != "none"]
    assert len(data["margins"]["direct"]["policy"]) == len(data["queries"]) == 24
    assert data["queries"][0][:3] == ["q000", EVIL[0], 1]


def test_thirty_defenses_and_five_hundred_queries_stay_under_eight_megabytes(tmp_path):
    many = {"none": DEFENSES["none"]} | {f"d{n}": ("noise", 0.1 * n, 0.0, "shift +") for n in range(30)}
    html = written(plant(tmp_path / "run", many, queries=500, length=60))
    assert len(html.encode()) < 4_000_000
    assert "Left out" not in html


def test_what_finds_no_room_is_left_out_by_name_and_the_page_stays_small(tmp_path):
    folder = plant(tmp_path / "run")
    (folder / "noise.png").write_bytes(picture(noise=1))
    whole = written(folder)
    small = written(folder, limit=len(whole.encode()) - 200_000)
    assert len(small.encode()) < len(whole.encode()) - 200_000
    assert "run/noise.png" in small and "Left out" in small and "noise.png is left out" in small
    assert "Left out" not in whole


def test_the_table_of_the_front_names_the_share_that_it_shows():
    candidates = pd.DataFrame(
        {
            "members": ["none"],
            "how": ["alone"],
            "harmful_test": [0.97],
            "benign_test": [0.23],
            "on_front": [True],
        }
    )
    recommended = pd.DataFrame({"members": ["policy"], "harmful": [0.5], "over_refusal": [0.03]})
    tables = {"candidates": candidates, "recommendation-5": recommended}
    front, pick = build_ensemble_tables(Run("run", {}, tables))
    # `benign_test` in candidates.csv is the share of benign queries that are answered.
    assert dict(zip(front.headers, front.rows[0], strict=True))["benign answered (%)"] == "23"
    assert "benign refused (%)" not in front.headers
    assert dict(zip(pick.headers, pick.rows[0], strict=True))["benign refused (%)"] == "3"


def test_no_shipped_table_names_its_defenses_by_another_column():
    tables = list((Path(__file__).parents[2] / "figures").glob("*/*.csv"))
    heads = {
        f"{path.parent.name}/{path.name}": path.read_text("utf-8").split("\n", 1)[0].strip().split(",")
        for path in tables
    }
    assert "defense" in heads["validity/validity.csv"] and "defense" in heads["validity/worth.csv"]
    assert [name for name, columns in heads.items() if "condition" in columns] == []


def test_the_validity_of_an_older_run_is_shown_by_defense(tmp_path):
    folder = plant(tmp_path / "run")
    row = {"attack": "direct", "condition": "policy", "readout": "words", "n": 24, "trusted": "trusted"}
    pd.DataFrame([row]).to_csv(folder / "validity.csv", index=False)
    (shown,) = build_validity_tables(read_run(folder))
    assert shown.headers[0] == "defense" and shown.rows[0][0] == "policy"


def test_runs_are_compared_on_what_is_free_of_scale(tmp_path):
    first, second = plant(tmp_path / "a"), plant(tmp_path / "b", attacks=("direct", "persona"))
    html = written(first, second, first)
    names = [run["name"] for run in carried(html)["runs"]]
    assert names == ["a", "b", "a (2)"], "the same run twice is told apart"
    assert len(carried(html)["across"]) == 3 * 5
    assert "Across runs" in html and "Across runs" not in written(first)
    assert "Defenses × attacks" in html and "attack: persona" in html


def test_runs_with_nothing_in_common_say_so(tmp_path):
    only = {name: DEFENSES[name] for name in ("none", "policy")}
    other = {"none": DEFENSES["none"], "paraphrase": DEFENSES["paraphrase"]}
    html = written(plant(tmp_path / "a", only), plant(tmp_path / "b", other))
    assert {one["name"] for one in carried(html)["across"]} == set()
    assert "Table of the comparison" in html, "both read the undefended model"


def test_a_cell_that_text_contradicts_is_marked(tmp_path):
    html = written(plant(tmp_path / "run", attacks=("direct", "persona"), trusted="not trusted"))
    assert "50?" in html and "generated text contradicts the readout" in html and "(not trusted)" in html


def test_a_run_without_scores_or_summary_shows_what_it_has(tmp_path):
    folder = plant(tmp_path / "run")
    (folder / "scores.csv").unlink()
    assert "A closer look" not in written(folder)
    (folder / "summary.csv").unlink()
    html = written(folder)
    assert "holds no summary" in html and "plane.csv" in html


@pytest.mark.parametrize("change", ["gone", "other"])
def test_where_texts_cannot_be_had_queries_are_shown_by_their_ids(tmp_path, change):
    folder = plant(tmp_path / "run")
    data = tmp_path / "run-asked.csv"
    if change == "gone":
        data.unlink()
    else:
        path = folder / "run.json"
        record = json.loads(path.read_text("utf-8"))
        record["data"]["sha256"] = "0" * 64
        path.write_text(json.dumps(record), "utf-8")
    html = written(folder)
    assert "queries are shown by their ids" in html
    assert {query[1] for query in carried(html)["runs"][0]["queries"]} == {""}


# --- the command ------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_and_says_how_large_it_is(tmp_path):
    done = analyze("report", plant(tmp_path / "run"), "-o", tmp_path / "new" / "page.html")
    assert done.code == 0, done.err
    assert (tmp_path / "new" / "page.html").read_text("utf-8").startswith("<!DOCTYPE html>")
    assert re.search(r"page.html: \d\.\d MB", done.err)
    assert [one.name for one in (tmp_path / "new").iterdir()] == ["page.html"]


def test_a_folder_that_is_no_run_is_answered_with_what_it_lacks(tmp_path):
    out = ("-o", tmp_path / "page.html")
    refused(analyze("report", tmp_path / "nothing", *out), "nothing is not there", "-d NAME -o FOLDER")
    (tmp_path / "file").write_text("x", "utf-8")
    refused(analyze("report", tmp_path / "file", *out), "is a file", "analyze -d NAME")
    (tmp_path / "empty").mkdir()
    refused(analyze("report", tmp_path / "empty", *out), "lacks run.json", "analyze -d NAME")
    folder = plant(tmp_path / "run")
    for name in ("scores.csv", "summary.csv", "plane.csv", "prompts.csv"):
        (folder / name).unlink()
    refused(analyze("report", folder, *out), "lacks summary.csv")
    refused(analyze("report", *out), "Missing argument 'runs'")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("name", "held", "words"),
    [
        ("run.json", "{", "is no JSON"),
        ("run.json", "[]", "lacks model: name"),
        ("run.json", '{"model": {"name": "toy"}}', "lacks data: name, split"),
        ("summary.csv", "attack,defense\ndirect,none\n", "lacks the column family"),
        ("scores.csv", "", "lacks the column query"),
        ("odd.png", "no picture", "is no PNG"),
    ],
)
def test_a_file_that_no_command_wrote_is_named(tmp_path, name, held, words):
    folder = plant(tmp_path / "run")
    (folder / name).write_text(held, "utf-8")
    refused(analyze("report", folder, "-o", tmp_path / "page.html"), name, words)


def test_a_picture_that_was_cut_short_is_named(tmp_path):
    folder = plant(tmp_path / "run")
    (folder / "odd.png").write_bytes(picture(noise=1)[:9000])
    refused(analyze("report", folder, "-o", tmp_path / "page.html"), "odd.png", "is no PNG")


def test_an_out_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    folder = plant(tmp_path / "run")
    refused(analyze("report", folder, "-o", tmp_path), "is a folder", "report.html")
    refused(analyze("report", folder, "-o", folder / "run.json" / "page.html"), "is a file")
    refused(analyze("report", folder, "-o", folder / "run.json"), "HTML", "run.html")


# --- in a browser -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium, without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A page of two runs, one of them under two attacks."""
    place = tmp_path_factory.mktemp("pages")
    runs = plant(place / "first"), plant(place / "second", attacks=("direct", "persona"), queries=60)
    (place / "page.html").write_text(written(*runs), "utf-8")
    return (place / "page.html").as_uri()


@pytest.fixture
def opened(browser, address):
    """Opens the page as some reader has it; what it asked for and complained of is checked at the end."""
    contexts, heard, asked = [], [], []

    def open_(**reader):
        contexts.append(browser.new_context(**reader))
        view = contexts[-1].new_page()
        view.on("console", lambda message: heard.append(message.text))
        view.on("pageerror", lambda error: heard.append(str(error)))
        view.on("request", lambda request: asked.append(request.url))
        view.goto(address)
        return view

    yield open_
    for context in contexts:
        context.close()
    assert heard == []
    assert [url for url in asked if not url.startswith("data:")] == [address] * len(contexts)


def plane(view, run=0):
    """The points of a run's plane, once they are drawn."""
    view.locator("article").nth(run).locator(".plane").scroll_into_view_if_needed()
    points = view.locator("article").nth(run).locator(".points path[data-defense]")
    points.first.wait_for()
    return points


def test_a_click_on_a_point_shows_its_queries_what_changed_most_first(opened):
    view = opened()
    plane(view)
    article = view.locator("article").first
    for name in ("paraphrase", "policy"):
        article.locator(f'.points path[data-defense="{name}"]').click()
        assert article.locator("select.defense").input_value() == name
        assert article.locator(".counts").inner_text().startswith(f"{name}: of 24 queries")
    rows = article.locator(".queries tbody tr")
    assert rows.count() == 24 and "q000" in rows.first.inner_text()
    told = rows.locator("td:nth-child(6)").all_inner_texts()
    change = [abs(float(text.replace("−", "-"))) for text in told]
    assert change == sorted(change, reverse=True) and change[0] > 5
    assert article.locator(".roc svg").is_visible() and article.locator(".margins svg").is_visible()
    article.locator(".flipped").check()
    assert 0 < rows.count() < 24 and all("→" in text for text in rows.all_inner_texts())


def test_below_a_query_stands_what_the_model_read(opened):
    view = opened()
    plane(view)
    article = view.locator("article").first
    rows = article.locator(".queries tbody tr")
    read = {}
    for name in ("policy", "paraphrase", "smooth_llm"):
        article.locator("select.defense").select_option(name)
        folds = rows.locator("details.read")
        read[name] = dict(zip(rows.locator(".id").all_inner_texts(), folds.all_inner_texts(), strict=False))
        for fold in folds.all()[:1]:
            fold.locator("summary").press("Enter")
            assert fold.locator("pre").is_visible()
    assert rows.count() == 24
    # Between the same words stand all queries; of what is reworded there are two examples.
    assert len(read["policy"]) == 24 and len(read["paraphrase"]) == 2 and not read["smooth_llm"]
    article.locator("select.defense").select_option("policy")
    row = rows.filter(has=view.locator(".id", has_text="q005"))
    assert row.locator("pre").text_content() == "<s>policy: Question 5?</s>"
    article.locator("select.defense").select_option("paraphrase")
    row = rows.filter(has=view.locator(".id", has_text="q000"))
    assert row.locator("summary").text_content() == "what the model read (the first of 3 copies)"
    assert row.locator("pre").text_content() == "<s>paraphrase: Reworded <b></s>"


def test_texts_from_data_sets_stay_texts(opened):
    view = opened()
    plane(view)
    cells = view.locator("article").first.locator(".queries tbody")
    for text in EVIL[:2]:
        assert text in cells.inner_text()
    assert "topic <i>" in cells.inner_text()
    assert view.title().startswith("refusalscope")
    assert view.locator('img[src="x"]').count() == 0 and cells.locator("b, i, img, script").count() == 0


def test_no_script_but_the_pages_own_runs_and_nothing_can_be_fetched(browser, address):
    context = browser.new_context()
    view = context.new_page()
    view.goto(address)
    tried = """async () => {
        const refused = [];
        document.addEventListener("securitypolicyviolation", (one) => refused.push(one.effectiveDirective));
        document.body.append(Object.assign(document.createElement("img"), { src: "https://a.test/x" }));
        document.body.insertAdjacentHTML("beforeend", '<p onclick="document.title=1">');
        document.body.lastElementChild.click();
        const script = Object.assign(document.createElement("script"), { textContent: "document.title = 2" });
        document.body.append(script);
        await fetch("https://a.test/").catch(() => null);
        await new Promise((done) => setTimeout(done, 200));
        return refused.sort();
    }"""
    assert view.evaluate(tried) == ["connect-src", "img-src", "script-src-attr", "script-src-elem"]
    assert view.title().startswith("refusalscope")
    context.close()


def test_the_keyboard_reaches_points_and_their_queries(opened):
    view = opened()
    plane(view)
    view.locator("article .facts summary").first.focus()
    view.keyboard.press("Tab")
    names = []
    for _ in range(3):
        names.append(view.evaluate("document.activeElement.dataset.defense"))
        view.keyboard.press("ArrowRight")
    assert names == ["smooth_llm", "paraphrase", "neutral_prompt"], "from left to right"
    told = view.locator("article").first.locator(".point").inner_text()
    assert told.startswith("policy/half (reminders): shift +0.50 [+0.40, +0.60]")
    view.keyboard.press("Enter")
    view.wait_for_function("document.activeElement.classList.contains('closer')")
    assert view.locator("article").first.locator("select.defense").input_value() == "policy/half"


def test_a_row_of_the_summary_leads_to_the_same_place_under_its_attack(opened):
    view = opened()
    plane(view, 1)
    article = view.locator("article").nth(1)
    article.locator("details summary", has_text="attack: persona").click()
    article.locator('button.open[data-attack="persona"][data-defense="paraphrase"]').click()
    assert article.locator("select.attack").input_value() == "persona"
    assert article.locator("select.defense").input_value() == "paraphrase"
    assert article.locator(".queries tbody tr").count() == 40
    article.locator(".more").click()
    assert article.locator(".queries tbody tr").count() == 60


def test_a_phone_scrolls_tables_but_never_the_page_sideways(opened):
    view = opened(viewport={"width": 360, "height": 740}, has_touch=True)
    for run in (0, 1):
        plane(view, run)
    view.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert view.evaluate("document.documentElement.scrollWidth") <= 360
    assert view.evaluate("[...document.querySelectorAll('.scroll')].some((one) => one.scrollWidth > 360)")
    wide = "[...document.querySelectorAll('.chart svg')].map((one) => one.getBoundingClientRect().right)"
    assert max(view.evaluate(wide)) <= 360


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_ink_stands_out_from_paper_in_both_schemes(opened, scheme):
    view = opened(color_scheme=scheme)
    plane(view)
    look = "(at) => getComputedStyle(document.querySelector(at))"
    paper = view.evaluate(f"({look})('body').backgroundColor")
    label = view.evaluate(f"({look})('.plane .role-axis-title text').fill")
    ink = view.evaluate(f"({look})('h1').color")
    light = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in (paper, label, ink)]
    assert label == ink
    assert light[0] - light[1] > 500 if scheme == "light" else light[1] - light[0] > 500


def test_print_opens_what_is_folded_and_drops_the_controls(opened):
    view = opened(color_scheme="dark")
    plane(view)
    view.emulate_media(media="print", color_scheme="dark")
    view.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert view.locator("details:not([open]):not(.read)").count() == 0
    assert not view.locator(".filters").first.is_visible()
    assert view.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert view.evaluate("getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"
    view.locator("article").nth(1).locator(".points path").first.wait_for(state="attached")
