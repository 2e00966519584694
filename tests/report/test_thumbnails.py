"""The images of queries on the page: small, each once, those that matter most, and none if not wanted."""

import base64
import io
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import run_cli
from PIL import Image
from saved_runs import load_query_images, make_picture, parse_chart_data, render_folders, write_run

from analysis.datasets.loading import load_query_texts
from analysis.report import thumbnails
from analysis.report.folder import read_run
from analysis.report.thumbnails import embed_thumbnails

COLORS = ("#CC0000", "#00CC00", "#0000CC")


def encode(size, color="#CC0000"):
    """Return a PNG of one color."""
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def decode(address):
    """Return the image in a data URI."""
    media_type, _, content = address.partition(";base64,")
    assert media_type == "data:image/webp"
    return Image.open(io.BytesIO(base64.b64decode(content)), formats=["WEBP"]).convert("RGB")


def write_pages(tmp_path, *options):
    """Write the page of the run in a folder, by the command; return its text and what was printed."""
    result = run_cli("report", tmp_path / "run", "-o", tmp_path / "page.html", *options)
    assert result.code == 0, result.err
    return (tmp_path / "page.html").read_text("utf-8"), result.err


def test_a_query_has_its_own_image_in_small_and_each_image_is_embedded_once(tmp_path):
    pictures = [
        encode((1024, 300), COLORS[0]),
        None,
        encode((100, 400), COLORS[1]),
        encode((60, 40), COLORS[2]),
    ]
    write_run(tmp_path / "run", pictures=[*pictures, pictures[0]])
    html, _ = write_pages(tmp_path)
    data = parse_chart_data(html)
    positions = data["runs"][0]["images"]
    shown = {query_id: decode(data["thumbnails"][position]) for query_id, position in positions.items()}
    sizes = {query_id: image.size for query_id, image in shown.items()}
    assert sizes == {"q000": (256, 75), "q002": (64, 256), "q003": (60, 40), "q004": (256, 75)}
    for query_id, channel in (("q000", 0), ("q002", 1), ("q003", 2)):
        color = np.asarray(shown[query_id]).mean(axis=(0, 1))
        assert color.argmax() == channel and color.max() > 180
    assert positions["q000"] == positions["q004"] and len(data["thumbnails"]) == 3
    assert html.count("data:image/webp") == 3 and "images are left out" not in html


def test_without_images_the_page_has_none_and_every_text(tmp_path):
    write_run(tmp_path / "run", pictures=[make_picture()])
    html, _ = write_pages(tmp_path, "--no-images")
    data = parse_chart_data(html)
    assert "data:image/webp" not in html and data["thumbnails"] == [] and "images" not in data["runs"][0]
    assert data["runs"][0]["queries"][5][1] == "Question 5?"


def test_only_the_page_is_written(tmp_path):
    folder = write_run(tmp_path / "run", pictures=[make_picture()])
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    write_pages(tmp_path)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {*files, tmp_path / "page.html"}
    assert all(path.read_bytes() == content for path, content in files.items()) and folder.is_dir()


@pytest.mark.parametrize("lost", ["run-queries.csv", "run-0.png"])
def test_the_page_says_why_images_are_missing(tmp_path, lost):
    write_run(tmp_path / "run", pictures=[make_picture()])
    (tmp_path / lost).unlink()
    words = "queries are shown by their ids and without their images, because their texts and images"
    html, printed = write_pages(tmp_path)
    assert words in html and words in printed and "data:image/webp" not in html
    html, printed = write_pages(tmp_path, "--no-images")
    assert "queries are shown by their ids, because their texts cannot" in html and words not in printed


def test_an_image_that_is_not_the_one_of_the_run_is_not_shown(tmp_path):
    folder = write_run(tmp_path / "run", pictures=[make_picture("#CC79A7"), make_picture("#009E73")])
    (tmp_path / "run-0.png").write_bytes(make_picture("#000000"))
    assert list(parse_chart_data(render_folders(folder))["runs"][0]["images"]) == ["q001"]


def test_the_images_of_the_largest_changes_are_shown_if_there_are_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(thumbnails, "MAX_THUMBNAILS", 4)
    folders = [
        write_run(tmp_path / name, pictures=[encode((n + 1, width)) for n in range(12)])
        for name, width in (("a", 20), ("b", 30))
    ]
    html = render_folders(*folders)
    data = parse_chart_data(html)
    assert len(data["thumbnails"]) == 4
    for folder, run in zip(folders, data["runs"], strict=True):
        scores = pd.read_csv(folder / "scores.csv")
        margins = scores.pivot(index="query", columns="defense", values="margin").head(12)
        changes = margins.sub(margins["none"], axis=0).abs().max(axis=1)
        assert set(run["images"]) == set(changes.nlargest(2).index)
    assert html.count("10 of 12 images are left out") == 2


def test_images_take_half_of_the_room_at_most_and_the_page_stays_small(tmp_path):
    rng = np.random.default_rng(0)
    folder = write_run(tmp_path / "run", pictures=[make_picture(noise_seed=n) for n in range(1, 9)])
    whole = render_folders(folder)
    addresses = parse_chart_data(whole)["thumbnails"]
    n_bytes = sum(map(len, addresses))
    assert len(addresses) == 8
    limit = len(whole.encode()) - n_bytes // 2
    small = render_folders(folder, max_bytes=limit)
    fewer = parse_chart_data(small)["thumbnails"]
    assert 0 < len(fewer) < 8 and len(small.encode()) < limit
    assert re.search(rf"{8 - len(fewer)} of 8 images are left out", small)
    run = read_run(folder, load_query_texts, load_images=load_query_images)
    for share in rng.uniform(0, 1, 5):
        embedded = embed_thumbnails([run], int(share * n_bytes))
        assert sum(map(len, embedded.values())) <= share * n_bytes
    assert embed_thumbnails([run], -1) == {} == embed_thumbnails([replace(run, images={})], n_bytes)
