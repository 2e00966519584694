"""One page of several runs: its content, its size, and the files that are left out."""

import re

import pandas as pd
from conftest import assert_user_error, run_cli
from saved_runs import (
    DEFENSES,
    HOSTILE_TEXTS,
    make_picture,
    parse_chart_data,
    render_folders,
    write_run,
)


def test_the_page_holds_every_picture_with_words_and_every_table(tmp_path):
    html = render_folders(write_run(tmp_path / "run"))
    alts = re.findall(r'<img src="data:image/png;base64,[^"]+" alt="([^"]*)"', html)
    assert len(alts) == 2 and all(len(alt) > 40 for alt in alts)
    assert any("Change of the first-token margin" in alt and "12 harmful" in alt for alt in alts)
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
    data = parse_chart_data(html)["runs"][0]
    points = data["plane"]["direct"]["points"]
    assert [point["name"] for point in points] == [name for name in DEFENSES if name != "none"]
    assert len(data["margins"]["direct"]["policy"]) == len(data["queries"]) == 24
    assert data["queries"][0][:3] == ["q000", HOSTILE_TEXTS[0], 1]


def test_the_page_says_what_the_rates_and_the_plane_rest_on(tmp_path):
    judged = write_run(tmp_path / "judged", trusted="not trusted", based_on="responses")
    html = render_folders(judged)
    basis = "first 24 tokens of the responses, judged by learned (24 queries per condition); 1 has no verdict"
    assert f'<p class="basis">Rates: {basis}.</p>' in html
    assert "Both axes are in within-class SDs of the margin" in html and "beyond ±0.5&nbsp;SD" in html
    plane = parse_chart_data(html)["runs"][0]["plane"]["direct"]
    policy = plane["points"][0]
    assert plane["unit"] == "SD" and (policy["x"], policy["y"]) == (0.5, 0.05)
    assert policy["rates"] == "harmful refused 50\xa0% [40, 60], benign refused 50\xa0% [40, 60]"
    assert policy["verdict"] == "shift +, discrimination inconclusive" and policy["untrusted"]
    # Why a verdict is inconclusive is folded; an empty note is not shown.
    assert html.count('<details class="note">') == 2 and "nan" not in re.findall("<td>(.*?)</td>", html)
    older = write_run(tmp_path / "older")
    path = older / "summary.csv"
    summary = pd.read_csv(path)
    new = ["based_on", "verdict_note", *(name for name in summary if name.startswith(("scaled", "readout")))]
    summary.drop(columns=new).to_csv(path, index=False)
    html = render_folders(judged, older)
    assert "Rates: by the readout; no response was judged." in html
    assert "beyond ±0.5&nbsp;nats" in html
    plane = parse_chart_data(html)["runs"][1]["plane"]["direct"]
    assert plane["unit"] == "nats" and (plane["points"][0]["x"], plane["points"][0]["y"]) == (1.0, 0.1)
    assert "<td>responses</td>" in html and "<td>readout</td>" in html  # in the comparison


def test_thirty_defenses_and_five_hundred_queries_stay_under_eight_megabytes(tmp_path):
    many = {"none": DEFENSES["none"]} | {f"d{n}": ("noise", 0.1 * n, 0.0, "shift +") for n in range(30)}
    html = render_folders(write_run(tmp_path / "run", many, n_queries=500, extra_words=60))
    assert len(html.encode()) < 4_000_000
    assert "Left out" not in html


def test_files_that_do_not_fit_are_left_out_by_name_and_the_page_stays_small(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "noise.png").write_bytes(make_picture(noise_seed=1))
    whole = render_folders(folder)
    small = render_folders(folder, max_bytes=len(whole.encode()) - 200_000)
    assert len(small.encode()) < len(whole.encode()) - 200_000
    assert "run/noise.png" in small and "Left out" in small and "noise.png is left out" in small
    assert "Left out" not in whole


def test_runs_are_compared_on_quantities_that_are_free_of_scale(tmp_path):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", attacks=("direct", "persona"))
    html = render_folders(first, second, first)
    data = parse_chart_data(html)
    names = [run["name"] for run in data["runs"]]
    assert names == ["a", "b", "a (2)"], "the same run twice gets two names"
    assert len(data["comparison"]) == 3 * 5
    assert "Comparison of runs" in html and "Comparison of runs" not in render_folders(first)
    assert "Defenses × attacks" in html and "attack: persona" in html


def test_runs_that_share_only_the_undefended_model_have_no_chart(tmp_path):
    first = {name: DEFENSES[name] for name in ("none", "policy")}
    second = {"none": DEFENSES["none"], "paraphrase": DEFENSES["paraphrase"]}
    html = render_folders(write_run(tmp_path / "a", first), write_run(tmp_path / "b", second))
    assert parse_chart_data(html)["comparison"] == []
    assert "Comparison table" in html


def test_a_run_without_scores_or_summary_shows_its_other_tables(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "scores.csv").unlink()
    assert "One defense in detail" not in render_folders(folder)
    (folder / "summary.csv").unlink()
    html = render_folders(folder)
    assert "holds no summary" in html and "plane.csv" in html


# --- the command ------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_and_prints_its_size(tmp_path):
    result = run_cli("report", write_run(tmp_path / "run"), "-o", tmp_path / "new" / "page.html")
    assert result.code == 0, result.err
    assert (tmp_path / "new" / "page.html").read_text("utf-8").startswith("<!DOCTYPE html>")
    assert re.search(r"page.html: \d\.\d MB", result.err)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]


def test_an_output_that_cannot_be_written_is_rejected_before_the_work(tmp_path):
    folder = write_run(tmp_path / "run")
    assert_user_error(run_cli("report", folder, "-o", tmp_path), "is a folder", "report.html")
    assert_user_error(run_cli("report", folder, "-o", folder / "run.json" / "page.html"), "is a file")
    assert_user_error(run_cli("report", folder, "-o", folder / "run.json"), "HTML", "run.html")
