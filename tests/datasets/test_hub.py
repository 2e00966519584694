"""Data sets of the hub, loaded with `datasets` from a server that answers as the hub does."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import datasets
import pytest
from PIL import Image

from analysis.datasets.columns import ColumnChoice, choose_columns, split_column_choice
from analysis.datasets.hub import parse_hub_name
from analysis.datasets.loading import check_set_name, load_queries
from defenses.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = b"""---
license: cc-by-4.0
configs:
- config_name: easy
  data_files: [{split: test, path: easy/test.csv}, {split: train, path: easy/train.csv}]
- config_name: hard
  data_files: [{split: test, path: easy/train.csv}]
---
"""
# Loads each set, with the network and then without, and prints what a user would see.
SCRIPT = """
import json, sys
from analysis.datasets.loading import load_queries
from defenses.errors import UserError
results = []
for name, offline in json.loads(sys.argv[1]):
    notes = []
    try:
        found = load_queries(name, offline, notes.append)
        rows = [
            (query.id, query.text, query.harmful, query.category, query.image and query.image.load().size)
            for query in found.queries
        ]
        results.append({"rows": rows, "sources": found.sources, "notes": notes})
    except UserError as error:
        results.append({"error": str(error), "notes": notes})
print(json.dumps(results))
"""


def make_repositories() -> dict[str, dict[str, bytes]]:
    """Return the files of a data set with two configurations, and of one with images."""
    rows = "".join(f"request {n},{('safe', 'unsafe')[n % 2]},topic {n % 3}\n" for n in range(6))
    picture = io.BytesIO()
    Image.new("RGB", (7, 5), "red").save(picture, "PNG")
    features = {
        "query": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["harmful", "benign"]),
        "image": datasets.Image(),
    }
    pictured = datasets.Dataset.from_dict(
        {
            "query": ["What\u2028is it?", "And this?"],  # no line ends here
            "label": [0, 1],
            "image": [{"bytes": picture.getvalue()}, None],
        },
        datasets.Features(features),
    )
    parquet = io.BytesIO()
    pictured.to_parquet(parquet)
    table = f"prompt,label,kind\n{rows}".encode()
    return {
        "owner/name": {"README.md": CARD, "easy/test.csv": table, "easy/train.csv": table},
        "owner/pictures": {"test.parquet": parquet.getvalue()},
    }


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    """Address of a server with these data sets, and a gated one."""
    repositories = make_repositories()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def reply(self, code: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path)
            repo = "/".join(path.partition("datasets/")[2].split("/")[:2])
            files = repositories.get(repo)
            if repo == "owner/gated":
                self.reply(403, X_Error_Code="GatedRepo", X_Error_Message="gated")
            elif files is None:
                self.reply(404, X_Error_Code="RepoNotFound")
            elif "/tree/" in path:
                folder = path.partition(COMMIT)[2].strip("/")
                entries = [describe(files, name) for name in files if name.rpartition("/")[0] == folder]
                if entries:
                    self.reply(200, json.dumps(entries).encode())
                else:
                    self.reply(404, X_Error_Code="EntryNotFound")
            elif path.endswith("/revision/nothing"):
                self.reply(404, X_Error_Code="RevisionNotFound")
            elif path.startswith("/api/datasets/"):
                info = {"id": repo, "sha": COMMIT, "cardData": {"license": "cc-by-4.0"}}
                self.reply(200, json.dumps(info | {"tags": [], "siblings": []}).encode())
            elif (name := path.rpartition(f"/resolve/{COMMIT}/")[2]) in files:
                digest = f'"{hashlib.sha1(files[name]).hexdigest()}"'
                self.reply(200, files[name], ETag=digest, X_Repo_Commit=COMMIT)
            else:
                self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
            files = repositories["/".join(self.path.partition("datasets/")[2].split("/")[:2])]
            found = [describe(files, name) for name in asked if name in files]
            self.reply(200, json.dumps(found).encode())

    def describe(files: dict[str, bytes], name: str) -> dict[str, object]:
        content = files[name]
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": oid}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_set_of_the_hub_is_loaded_once_and_then_read_without_the_network(hub: str, tmp_path: Path) -> None:
    named = "hf:owner/name/easy:test?category=kind"
    asked = [
        (named, True),
        (named, False),
        (named, True),
        ("hf:owner/name@main/easy:train[:4]?text=prompt&harmful=label:safe+everyday", False),
        ("hf:owner/pictures", False),
        ("hf:owner/name", False),
        ("hf:owner/name/easy", False),
        ("hf:owner/name/easy:validation", False),
        ("hf:owner/name@nothing", False),
        ("hf:owner/gated", False),
        ("hf:owner/other", False),
    ]
    home = {"HF_HOME": str(tmp_path / "hf"), "XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": hub}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(asked)],
        env={**os.environ, **home, "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    missing, first, again, joined, pictured, *failed = json.loads(result.stdout.splitlines()[-1])
    assert "--offline forbids" in missing["error"]
    assert first["rows"][1] == ["q0002", "request 1", True, "topic 1", None]
    (source,) = first["sources"]
    assert source["revision"] == COMMIT and source["licence"] == "cc-by-4.0"
    assert "at revision 0123456789ab" in first["notes"][0]
    assert first["notes"][1] == (
        "note: hf:owner/name/easy:test: category is kind, text is prompt, harmful is label; 3 harmful and 3 "
        "benign queries"
    )
    assert again["rows"] == first["rows"] and again["sources"] == first["sources"]
    assert again["notes"] == first["notes"][1:]
    of_hub = [row for row in joined["rows"] if row[0].startswith("name:")]
    assert [row[2] for row in of_hub] == [True, False, True, False]
    assert any(row[0].startswith("everyday:") for row in joined["rows"])
    # Classes have their names, and an image is that of its row.
    assert [(row[2], row[4]) for row in pictured["rows"]] == [(True, [7, 5]), (False, None)]
    assert pictured["rows"][0][1] == "What\u2028is it?"
    for outcome, reason in zip(
        failed,
        (
            "has the configurations easy, hard: choose one, such as hf:owner/name/easy",
            "has the splits test, train: choose one, such as hf:owner/name/easy:test",
            'Unknown split "validation"',
            "has no revision 'nothing'",
            "is gated: accept its license on https://huggingface.co/datasets/owner/gated",
            "no data set 'owner/other' on the hub",
        ),
        strict=True,
    ):
        assert reason in outcome["error"] and "\n" not in outcome["error"]


ROWS = [{"goal": "a", "label": "attack", "n": 1}, {"goal": "b", "label": "chat", "n": 2}]


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ("?text=gaol&harmful=true", "unknown column of a set: 'gaol': did you mean 'goal'"),
        ("?harmful=label", "label has the values attack, chat, and 'attack' does not say whether"),
        ("?harmful=label:atack", "did you mean 'attack'"),
        ("?txt=goal", "unknown column of queries"),
        ("?text=", "text takes one column"),
        ("?text=goal&text=n", "text takes one column"),
    ],
)
def test_a_wrong_choice_of_columns_is_named_in_one_line(choice: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        choose_columns(ROWS, split_column_choice(f"set{choice}")[1] or ColumnChoice(), "a set")


def test_columns_are_found_by_usual_names_or_chosen() -> None:
    _, choice = split_column_choice("set?harmful=label:attack")
    assert choice is not None
    rows, chosen = choose_columns(ROWS, choice, "a set")
    assert rows == [{"text": "a", "harmful": True}, {"text": "b", "harmful": False}]
    assert chosen == "harmful is label = attack, text is goal"
    rows, _ = choose_columns(ROWS, ColumnChoice({"harmful": "false", "text": "label"}), "a set")
    assert [row["harmful"] for row in rows] == [False, False]
    with pytest.raises(UserError, match=r"no column with a usual name for text; .* add \?text=COLUMN"):
        choose_columns([{"words": "a"}], ColumnChoice(), "a set")


def test_columns_of_a_file_are_chosen_in_the_same_way(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("prompt,verdict\nHow?,bad\nHi,good\n", encoding="utf-8")
    notes: list[str] = []
    found = load_queries(f"{path}?harmful=verdict:bad", notify=notes.append)
    assert [(query.text, query.harmful) for query in found.queries] == [("How?", True), ("Hi", False)]
    assert notes == [f"note: {path}: harmful is verdict = bad, text is prompt"]
    strange = path.with_name("what?.csv")
    strange.write_text("text,harmful\nHow?,true\nHi,false\n", encoding="utf-8")
    assert len(load_queries(str(strange)).queries) == 2
    for name, reason in {
        "twins?text=a": "columns are chosen for a set of the hub or a file",
        "hf:name": "write it as hf:owner/name",
        "hf:a/b?txt=c": "unknown column of queries",
    }.items():
        with pytest.raises(UserError, match=reason):
            check_set_name(name)


def test_a_name_of_the_hub_has_parts() -> None:
    parsed = parse_hub_name("hf:owner/some.name:train[:50%]")
    assert (parsed.repo, parsed.revision, parsed.split) == ("owner/some.name", "main", "train[:50%]")
