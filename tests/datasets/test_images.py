"""Images are loaded by one set of rules, and a bad one is reported in one line before anything takes long."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image
from published_sets import assert_user_error
from rich.console import Console

from analysis.datasets import images
from analysis.datasets.images import check_images, open_image
from analysis.datasets.loading import load_queries
from analysis.datasets.queries import Query, QuerySet
from analysis.studies.run_spec import RunSpec
from analysis.studies.setup import prepare_setup


def encode(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    """Return an image as the content of a file."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def fill(mode: str, color: Any, size: tuple[int, int] = (2, 2)) -> Image.Image:
    return Image.new(mode, size, color)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


RED = encode(fill("RGB", "red"))
BLUE = encode(fill("RGB", "blue"))

# --- rules of loading -------------------------------------------------------------------------------------

# Content of a file → the color of its pixels.
COLORS = {
    "RGB": (RED, (255, 0, 0)),
    "L": (encode(fill("L", 90)), (90, 90, 90)),
    "1": (encode(fill("1", 1)), (255, 255, 255)),
    "P": (encode(fill("RGB", "red").quantize(2)), (255, 0, 0)),
    "CMYK": (encode(fill("CMYK", (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
    "transparent RGBA": (encode(fill("RGBA", (9, 9, 9, 0))), (255, 255, 255)),
    "half transparent RGBA": (encode(fill("RGBA", (255, 0, 0, 102))), (255, 153, 153)),
    "transparent LA": (encode(fill("LA", (9, 0))), (255, 255, 255)),
    "transparent P": (encode(fill("RGB", "red").quantize(2), transparency=bytes([0, 0])), (255, 255, 255)),
    "transparent color": (encode(fill("RGB", "red"), transparency=(255, 0, 0)), (255, 255, 255)),
    "transparent gray": (encode(fill("L", 90), transparency=90), (255, 255, 255)),
    "16 bits": (encode(fill("I;16", 32896)), (128, 128, 128)),
    "transparent 16 bits": (encode(fill("I;16", 300), transparency=300), (255, 255, 255)),
    "16 bits, read as 32": (b"P5 1 1 65535\n\x80\x80", (128, 128, 128)),
    "floats": (encode(fill("F", 0.2), "TIFF"), (51, 51, 51)),
    "GIF of one frame": (encode(fill("P", 0), "GIF"), (0, 0, 0)),
    "photo with a preview": (
        encode(fill("RGB", "white"), "MPO", save_all=True, append_images=[fill("RGB", "black")]),
        (255, 255, 255),
    ),
}


@pytest.mark.parametrize("name", COLORS)
def test_every_kind_of_file_becomes_rgb_without_clipping_and_on_white(tmp_path: Path, name: str) -> None:
    content, color = COLORS[name]
    pixels = open_image(write(tmp_path / "x", content), "q").load()
    assert pixels.mode == "RGB" and pixels.getpixel((0, 0)) == color


def test_the_orientation_that_a_camera_has_written_is_applied(tmp_path: Path) -> None:
    image = fill("RGB", "red", (2, 1))
    image.putpixel((1, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the top is at the right
    pixels = open_image(write(tmp_path / "x.png", encode(image, exif=exif)), "q").load()
    assert pixels.size == (1, 2) and pixels.getpixel((0, 0)) == (255, 0, 0)


def test_a_digest_names_the_content_and_the_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.png", RED)
    one, same = open_image(path, "a"), open_image(write(tmp_path / "b.png", RED), "b")
    assert one.digest == same.digest != open_image(write(tmp_path / "c.png", BLUE), "c").digest
    monkeypatch.setattr(images, "_LOADING_RULES", b"other rules")
    assert open_image(path, "a").digest != one.digest


def test_a_file_that_changed_since_its_digest_was_computed_is_not_used(tmp_path: Path) -> None:
    image = open_image(write(tmp_path / "a.png", RED), "q1")
    assert len(image.digest) == 64
    write(tmp_path / "a.png", BLUE)
    assert_user_error(image.load, "q1", "a.png", "has changed", "run again")


def write_nothing(path: Path) -> None:
    pass


# Content of a file, or how to make it → words of the error.
ANIMATION = encode(fill("RGB", "red"), "GIF", save_all=True, append_images=[fill("RGB", "blue")])
BAD_FILES: dict[str, tuple[bytes | Callable[[Path], object], list[str]]] = {
    "missing.png": (write_nothing, ["does not exist", "correct the path"]),
    "folder": (Path.mkdir, ["is a folder", "a file in it"]),
    "empty.png": (b"", ["is an empty file", "get it again"]),
    "text.png": (b"not an image", ["not an image that can be read", "PNG, JPEG", "save it as a .png"]),
    "drawing.png": (b"%PDF-1.7", ["not an image that can be read"]),
    "cut.png": (encode(fill("RGB", "red", (64, 64)))[:-40], ["is damaged", "get it again"]),
    "cut.jpg": (encode(fill("RGB", "red", (64, 64)), "JPEG")[:-40], ["is damaged", "get it again"]),
    "moving.gif": (ANIMATION, ["2 frames or pages", "save the one"]),
    "narrow.png": (b"P6 0 1 255\n", ["not an image that can be read", "no pixels"]),
    "wide.png": (encode(fill("RGB", "red", (15, 1))), ["more than 10 pixels", "make it smaller"]),
    "wider.png": (encode(fill("RGB", "red", (25, 1))), ["more than 10 pixels", "make it smaller"]),
    "range.tiff": (encode(fill("F", 2.5), "TIFF"), ["values from 2.5 to 2.5", "save it as a .png"]),
    "bits.tiff": (encode(fill("I", 200), "TIFF"), ["values from 200 to 200", "8 bits"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_image_is_reported_with_its_query_its_file_and_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    content, words = BAD_FILES[name]
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    if name.startswith("wide"):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert_user_error(lambda: open_image(path, "x.csv, query 'q1'").load(), "'q1': the image", name, *words)


# --- images of queries ------------------------------------------------------------------------------------

CSV = "id,text,harmful,image\na,What is it?,1,{}\nb,What is that?,0,\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a red and a blue image."""
    (tmp_path / "pictures").mkdir()
    write(tmp_path / "pictures" / "red.png", RED)
    write(tmp_path / "pictures" / "blue.png", BLUE)
    return tmp_path


def load_rows(folder: Path, *rows: str, notify: Callable[[str], None] = lambda text: None) -> QuerySet:
    (folder / "x.csv").write_text("\n".join(("id,text,harmful,image", *rows)), "utf-8")
    return load_queries(str(folder / "x.csv"), notify=notify)


def test_a_path_is_relative_to_the_file_and_in_a_frame_to_the_current_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_rows(folder, "a,Hi,1, pictures/red.png ", "b,Yo,0,", f"c,Yo,0,{folder}/pictures/red.png")
    digests = [query.content[1] for query in data.queries]
    assert digests[0] == digests[2] is not None and digests[1] is None
    monkeypatch.chdir(folder)
    frame = pd.DataFrame(
        {
            "text": ["Hi", "Yo", "Yo"],
            "harmful": [1, 0, 0],
            "image": ["pictures/red.png", float("nan"), Path("pictures/red.png")],
        }
    )
    assert [query.content[1] for query in QuerySet.from_frame(frame).queries] == digests


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("https://a.org/x.png", ["https://a.org/x.png", "never downloaded", "save it as a file"]),
        ("data:image/png;base64," + "A" * 9000, ["data:image/png", "…", "save it as a file"]),
        ("map.svg", ["map.svg", "without pixels", ".png"]),
        ("page.PDF", ["page.PDF", "without pixels", ".png"]),
        ("nowhere.png", ["nowhere.png", "does not exist"]),
        ("a" * 3000, ["cannot be read", "correct the path"]),
        ("pictures", ["is a folder"]),
    ],
)
def test_a_cell_that_is_no_path_of_an_image_is_reported_with_its_query(
    folder: Path, cell: str, words: list[str]
) -> None:
    with pytest.raises(Exception, match="query 'a': the image") as caught:
        load_rows(folder, f'a,Hi,1,"{cell}"', "b,Yo,0,")
    assert len(str(caught.value)) < 600
    assert_user_error(lambda: load_rows(folder, f'a,Hi,1,"{cell}"', "b,Yo,0,"), "x.csv", *words)


def test_a_value_that_is_no_text_is_reported() -> None:
    frame = pd.DataFrame({"text": ["Hi", "Yo"], "harmful": [1, 0], "image": [3, None]})
    assert_user_error(lambda: QuerySet.from_frame(frame), "'q0001': image is 3", "the path of a file")


def test_a_query_with_an_image_needs_a_text(folder: Path) -> None:
    assert_user_error(
        lambda: load_rows(folder, "a,,1,pictures/red.png"), "'a'", "text is empty", "also beside an image"
    )


def test_a_text_counts_together_with_its_image(folder: Path) -> None:
    notices: list[str] = []
    rows = ("a,What is it?,1,pictures/red.png", "b,What is it?,0,pictures/blue.png")
    assert len(load_rows(folder, *rows, notify=notices.append).queries) == 2 and notices == []
    again = "c,What is it?,{},pictures/red.png"
    assert_user_error(
        lambda: load_rows(folder, *rows, again.format(0)), "'a' and 'c'", "same text with the same image"
    )
    load_rows(folder, *rows, again.format(1), notify=notices.append)
    assert len(notices) == 1 and "repeats texts (1 of 3 queries)" in notices[0]


def test_joined_sets_use_a_text_once_with_each_image(folder: Path) -> None:
    for name, color in (("one", "red"), ("two", "blue"), ("three", "red")):
        rows = f"id,text,harmful,image\na,What is it?,1,pictures/{color}.png\nb,Yo,0,\n"
        (folder / f"{name}.csv").write_text(rows, "utf-8")
    joined = load_queries(f"{folder}/one.csv+{folder}/two.csv+{folder}/three.csv")
    assert [query.id for query in joined.queries] == ["one:a", "one:b", "two:a"]


def test_images_of_queries_that_are_left_out_are_not_opened(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    read = images._read_content
    monkeypatch.setattr(
        images, "_read_content", lambda path, name: opened.append(path.name) or read(path, name)
    )
    rows = []
    for number in range(20):
        write(folder / "pictures" / f"{number}.png", encode(fill("RGB", (number, 0, 0))))
        rows.append(f"q{number},Question {number},{number % 2},pictures/{number}.png")
    data = load_rows(folder, *rows)
    assert len(data.queries) == 20 and opened == []
    kept = data.limit_queries(4).queries
    assert len({query.content for query in kept}) == 4
    assert sorted(opened) == sorted(f"{query.id[1:]}.png" for query in kept)
    opened.clear()
    # The same words with another image have to be told from each other, if they are of both classes.
    load_rows(folder, *rows[:8], "a,Question 3,0,pictures/3.png".replace("3.png", "9.png"))
    assert sorted(opened) == ["3.png", "9.png"]


def test_each_content_is_decoded_once_and_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, progress = [], []
    monkeypatch.setattr(images, "decode_image", lambda content, name: decoded.append(content))
    write(folder / "pictures" / "copy.png", RED)
    rows = [f"{color},Look,1,pictures/{color}.png" for color in ("red", "blue", "copy")]
    data = load_rows(folder, *rows, "d,Yo,0,")
    check_images(data.queries, lambda n_finished, n_images: progress.append((n_finished, n_images)))
    assert decoded == [RED, BLUE] and progress == [(1, 2), (2, 2)]
    check_images([Query("a", "Hi", True)], lambda n_finished, n_images: progress.clear())
    assert progress == [(1, 2), (2, 2)]


def test_a_bad_image_ends_a_run_before_its_model_is_opened(folder: Path) -> None:
    write(folder / "pictures" / "bad.png", RED[:-30])
    rows = CSV.format("pictures/bad.png")
    (folder / "x.csv").write_text(rows, "utf-8")
    spec = RunSpec("no-such-model", str(folder / "x.csv"), offline=True)
    assert_user_error(
        lambda: prepare_setup(spec, ["policy"], [], Console(quiet=True)), "query 'a'", "bad.png", "is damaged"
    )
