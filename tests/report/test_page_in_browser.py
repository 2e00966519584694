"""The page in a browser: charts, queries, keyboard, phone, print, and what it keeps from running."""

import json
import re
import shutil

import pandas as pd
import pytest
from saved_runs import DEFENSES, HOSTILE_TEXTS, make_picture, render_folders, write_run


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        instance = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield instance
        instance.close()


@pytest.fixture(scope="module")
def page_url(tmp_path_factory):
    """A page of two runs, one of them under two attacks."""
    folder = tmp_path_factory.mktemp("pages")
    runs = (
        write_run(folder / "first"),
        write_run(folder / "second", attacks=("direct", "persona"), n_queries=60),
    )
    (folder / "page.html").write_text(render_folders(*runs), "utf-8")
    return (folder / "page.html").as_uri()


@pytest.fixture
def open_page(browser, page_url):
    """Opens the page with the options of a reader; at the end, it must have logged and fetched nothing."""
    contexts, messages, urls = [], [], []

    def open_with(**options):
        contexts.append(browser.new_context(**options))
        view = contexts[-1].new_page()
        view.on("console", lambda message: messages.append(message.text))
        view.on("pageerror", lambda error: messages.append(str(error)))
        view.on("request", lambda request: urls.append(request.url))
        view.goto(page_url)
        return view

    yield open_with
    for context in contexts:
        context.close()
    assert messages == []
    assert [url for url in urls if not url.startswith("data:")] == [page_url] * len(contexts)


def wait_for_plane(view, run=0):
    """Scroll to a run's plane and return its points once they are drawn."""
    view.locator("article").nth(run).locator(".plane").scroll_into_view_if_needed()
    points = view.locator("article").nth(run).locator(".points path[data-defense]")
    points.first.wait_for()
    return points


def test_a_click_on_a_point_shows_its_queries_largest_change_first(open_page):
    view = open_page()
    wait_for_plane(view)
    article = view.locator("article").first
    assert "reminders (SR)" in article.locator(".plane .role-legend").text_content()
    for name in ("paraphrase", "policy"):
        article.locator(f'.points path[data-defense="{name}"]').click()
        assert article.locator("select.defense").input_value() == name
        assert article.locator(".counts").inner_text().startswith(f"{name}: of 24 queries")
    rows = article.locator(".queries tbody tr")
    assert rows.count() == 24 and "q000" in rows.first.inner_text()
    texts = rows.locator("td:nth-child(6)").all_inner_texts()
    changes = [abs(float(text.replace("−", "-"))) for text in texts]
    assert changes == sorted(changes, reverse=True) and changes[0] > 5
    assert article.locator(".roc svg").is_visible() and article.locator(".margins svg").is_visible()
    article.locator(".flipped").check()
    assert 0 < rows.count() < 24 and all("→" in text for text in rows.all_inner_texts())


def test_below_a_query_is_the_prompt_that_the_model_read(open_page):
    view = open_page()
    wait_for_plane(view)
    article = view.locator("article").first
    rows = article.locator(".queries tbody tr")
    prompts = {}
    for name in ("policy", "paraphrase", "smooth_llm"):
        article.locator("select.defense").select_option(name)
        details = rows.locator("details.read")
        prompts[name] = dict(
            zip(rows.locator(".id").all_inner_texts(), details.all_inner_texts(), strict=False)
        )
        for element in details.all()[:1]:
            element.locator("summary").press("Enter")
            assert element.locator("pre").is_visible()
    assert rows.count() == 24
    # A template around every query gives all prompts; a rewording defense has two examples.
    assert len(prompts["policy"]) == 24 and len(prompts["paraphrase"]) == 2 and not prompts["smooth_llm"]
    article.locator("select.defense").select_option("policy")
    row = rows.filter(has=view.locator(".id", has_text="q005"))
    assert row.locator("pre").text_content() == "<s>policy: Question 5?</s>"
    article.locator("select.defense").select_option("paraphrase")
    row = rows.filter(has=view.locator(".id", has_text="q000"))
    assert row.locator("summary").text_content() == "prompt (the first of 3 copies)"
    assert row.locator("pre").text_content() == "<s>paraphrase: Reworded <b></s>"


def test_texts_from_data_sets_are_never_markup(open_page):
    view = open_page()
    wait_for_plane(view)
    cells = view.locator("article").first.locator(".queries tbody")
    for text in HOSTILE_TEXTS[:2]:
        assert text in cells.inner_text()
    assert "topic <i>" in cells.inner_text()
    assert view.title().startswith("refusalscope")
    assert view.locator('img[src="x"]').count() == 0 and cells.locator("b, i, img, script").count() == 0


def write_hostile_run(folder):
    """Write a run in which every text that comes from users or from model files is markup."""
    script, picture, line = HOSTILE_TEXTS
    policy = DEFENSES["policy"]
    defenses = {"none": DEFENSES["none"], f"{script}.py": policy, f"{picture}/half": policy}
    write_run(folder, defenses, attacks=(f"persona{picture}",))
    scores = pd.read_csv(folder / "scores.csv").replace(
        {"q000": script, "q001": picture, "topic <i>": picture}
    )
    scores.to_csv(folder / "scores.csv", index=False)
    prompts = scores[["attack", "defense", "query"]].head(3).assign(readings=1, read=script)
    prompts.to_csv(folder / "prompts.csv", index=False)
    summary = pd.read_csv(folder / "summary.csv").assign(verdict_note=picture, family=script)
    summary.to_csv(folder / "summary.csv", index=False)
    kinds = pd.concat([summary.assign(kind=kind, n=12) for kind in (script, picture, line)])
    kinds.to_csv(folder / "kinds.csv", index=False)
    pd.DataFrame({script: [picture], picture: ["javascript:document.title='owned'"]}).to_csv(
        folder / "other.csv", index=False
    )
    (folder / f"fig{picture.replace('/', '')}.png").write_bytes((folder / "plane.png").read_bytes())
    record = json.loads((folder / "run.json").read_text("utf-8"))
    record["model"] |= {"name": script, "id": picture, "revision": "javascript:document.title='owned'"}
    record["readout"] |= {"name": picture, "refuse": [script], "comply": [picture]}
    record["failed"] = [{"attack": script, "defense": picture, "why": script}]
    record["notices"] = [script, picture, line]
    record["data"]["split"] = script
    record["versions"] = {script: picture}
    (folder / "run.json").write_text(json.dumps(record), "utf-8")
    return folder


def test_markup_in_any_text_of_a_run_stays_text(browser, tmp_path):
    url = tmp_path / "hostile.html"
    url.write_text(render_folders(write_hostile_run(tmp_path / "<img src=x>")), "utf-8")
    plain = tmp_path / "plain.html"
    plain.write_text(render_folders(write_run(tmp_path / "plain")), "utf-8")
    context = browser.new_context()
    view, messages = context.new_page(), []
    view.on("console", lambda message: messages.append(message.text))
    view.on("pageerror", lambda error: messages.append(str(error)))
    view.on("dialog", lambda dialog: messages.append(dialog.message))
    view.goto(plain.as_uri())
    n_scripts = view.locator("script").count()
    view.goto(url.as_uri())
    wait_for_plane(view)
    view.evaluate("document.querySelectorAll('details').forEach((element) => { element.open = true; })")
    selects = view.locator("select.defense")
    for value in selects.first.locator("option").evaluate_all("options => options.map((one) => one.value)"):
        selects.first.select_option(value)
    view.locator(".points path[data-defense]").first.focus()  # shows the description of the point
    view.wait_for_timeout(100)
    assert view.title().startswith("refusalscope") and messages == []
    assert view.locator("script").count() == n_scripts
    assert view.locator('img[src="x"], [onerror], a[href^="javascript"]').count() == 0
    shown = view.locator("body").inner_text()
    assert shown.count("<script>document.title='owned'</script>") > 5 and shown.count("<img src=x") > 5
    context.close()


def test_only_the_own_scripts_run_and_nothing_can_be_fetched(browser, page_url):
    context = browser.new_context()
    view = context.new_page()
    view.goto(page_url)
    attempts = """async () => {
        const violations = [];
        const record = (event) => violations.push(event.effectiveDirective);
        document.addEventListener("securitypolicyviolation", record);
        document.body.append(Object.assign(document.createElement("img"), { src: "https://a.test/x" }));
        document.body.insertAdjacentHTML("beforeend", '<p onclick="document.title=1">');
        document.body.lastElementChild.click();
        const script = Object.assign(document.createElement("script"), { textContent: "document.title = 2" });
        document.body.append(script);
        await fetch("https://a.test/").catch(() => null);
        await new Promise((done) => setTimeout(done, 200));
        return violations.sort();
    }"""
    assert view.evaluate(attempts) == ["connect-src", "img-src", "script-src-attr", "script-src-elem"]
    assert view.title().startswith("refusalscope")
    context.close()


def test_the_image_of_a_query_stands_below_its_text_and_its_words_stay_text(browser, tmp_path):
    folder = write_run(tmp_path / "run", pictures=[make_picture("#CC79A7"), None, make_picture(noise_seed=1)])
    hostile_id = 'q" onerror="document.title=1'
    for path in (folder / "scores.csv", tmp_path / "run-queries.csv"):
        pd.read_csv(path).replace({"q000": hostile_id}).to_csv(path, index=False)
    (tmp_path / "page.html").write_text(render_folders(folder), "utf-8")
    context = browser.new_context(viewport={"width": 360, "height": 740})
    view, messages = context.new_page(), []
    view.on("console", lambda message: messages.append(message.text))
    view.goto((tmp_path / "page.html").as_uri())
    wait_for_plane(view)
    images = view.locator(".queries img")
    images.nth(1).scroll_into_view_if_needed()
    sizes = "images => images.map((one) => [one.alt, one.naturalWidth, one.naturalHeight])"
    assert sorted(images.evaluate_all(sizes)) == [
        [f"image of {hostile_id}", 80, 60],
        ["image of q002", 256, 256],
    ]
    cell = view.locator(".queries td", has=view.locator(".id", has_text="q002"))
    assert cell.locator("img").count() == 1 and HOSTILE_TEXTS[2][:4] in cell.inner_text()
    assert view.locator("[onerror]").count() == 0 and messages == []
    assert view.evaluate("document.documentElement.scrollWidth") <= 360
    context.close()


def test_the_keyboard_reaches_points_and_their_queries(open_page):
    view = open_page()
    wait_for_plane(view)
    view.locator("article .facts summary").first.focus()
    view.keyboard.press("Tab")
    names = []
    for _ in range(3):
        names.append(view.evaluate("document.activeElement.dataset.defense"))
        view.keyboard.press("ArrowRight")
    assert names == ["smooth_llm", "paraphrase", "neutral_prompt"], "from left to right"
    description = view.locator("article").first.locator(".point").inner_text()
    assert description.startswith(
        "policy/half (reminders): shift +, discrimination equivalent; harmful refused 50"
    )
    assert "shift +0.25 [+0.15, +0.35], discrimination 0.00" in description and description.endswith(" SD")
    view.keyboard.press("Enter")
    view.wait_for_function("document.activeElement.classList.contains('closer')")
    assert view.locator("article").first.locator("select.defense").input_value() == "policy/half"


def test_a_row_of_the_summary_opens_its_defense_under_its_attack(open_page):
    view = open_page()
    wait_for_plane(view, 1)
    article = view.locator("article").nth(1)
    article.locator("details summary", has_text="attack: persona").click()
    article.locator('button.open[data-attack="persona"][data-defense="paraphrase"]').click()
    assert article.locator("select.attack").input_value() == "persona"
    assert article.locator("select.defense").input_value() == "paraphrase"
    assert article.locator(".queries tbody tr").count() == 40
    article.locator(".more").click()
    assert article.locator(".queries tbody tr").count() == 60


def test_a_phone_scrolls_tables_but_never_the_page_sideways(open_page):
    view = open_page(viewport={"width": 360, "height": 740}, has_touch=True)
    for run in (0, 1):
        wait_for_plane(view, run)
    view.evaluate("document.querySelectorAll('details').forEach((element) => { element.open = true; })")
    assert view.evaluate("document.documentElement.scrollWidth") <= 360
    assert view.evaluate(
        "[...document.querySelectorAll('.scroll')].some((element) => element.scrollWidth > 360)"
    )
    edges = "[...document.querySelectorAll('.chart svg')].map((svg) => svg.getBoundingClientRect().right)"
    assert max(view.evaluate(edges)) <= 360


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_contrasts_with_the_background_in_both_schemes(open_page, scheme):
    view = open_page(color_scheme=scheme)
    wait_for_plane(view)
    style = "(selector) => getComputedStyle(document.querySelector(selector))"
    background = view.evaluate(f"({style})('body').backgroundColor")
    label = view.evaluate(f"({style})('.plane .role-axis-title text').fill")
    heading = view.evaluate(f"({style})('h1').color")
    brightness = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in (background, label, heading)]
    assert label == heading
    difference = brightness[0] - brightness[1]
    assert difference > 500 if scheme == "light" else difference < -500


def test_print_unfolds_details_and_hides_controls(open_page):
    view = open_page(color_scheme="dark")
    wait_for_plane(view)
    view.emulate_media(media="print", color_scheme="dark")
    view.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert view.locator("details:not([open]):not(.read)").count() == 0
    assert not view.locator(".filters").first.is_visible()
    assert view.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert view.evaluate("getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"
    view.locator("article").nth(1).locator(".points path").first.wait_for(state="attached")
