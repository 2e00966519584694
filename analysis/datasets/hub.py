"""Data sets of the Hugging Face hub: `hf:owner/name[@revision][/config][:split]`.

The rows of a split are loaded with the library `datasets`, once, and kept as a file in the user's cache, with
its images beside it. The revision is the commit to which a branch or tag pointed; run.json records it.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.files import Notifier, get_cache_folder, stage_folder, write_text_file
from defenses.errors import UserError, describe_download_error, describe_library_error

if TYPE_CHECKING:
    from datasets import Dataset

HUB_PREFIX = "hf:"
_NAME = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/:@]+))?(?:/(?P<config>[^/:@]+))?(?::(?P<split>[^/@]+))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ROWS_FILE = "rows.jsonl"
_MAX_ROWS = 200_000


@dataclass(frozen=True)
class HubDataset:
    """A split of a data set on the hub.

    Attributes:
        repo: `owner/name`.
        revision: branch, tag or commit.
        config: name of the configuration (subset); None for the only one.
        split: name of the split, or a slice of it as `datasets` writes it (`train[:500]`); None for the only
            one.
    """

    repo: str
    revision: str = "main"
    config: str | None = None
    split: str | None = None

    @property
    def page(self) -> str:
        """Address of the set's page."""
        return f"https://huggingface.co/datasets/{self.repo}"


def parse_hub_name(name: str) -> HubDataset:
    """Return the data set that a name stands for.

    >>> parse_hub_name("hf:owner/name@v1/hard:test")
    HubDataset(repo='owner/name', revision='v1', config='hard', split='test')

    Args:
        name: without a choice of columns.

    Raises:
        UserError: if the name has another form.
    """
    match = _NAME.fullmatch(name.removeprefix(HUB_PREFIX))
    if match is None:
        raise UserError(f"--data {name}: write it as hf:owner/name, or hf:owner/name@revision/config:split")
    parts = {key: value for key, value in match.groupdict().items() if value is not None}
    return HubDataset(**parts)


def load_hub_rows(
    dataset: HubDataset, offline: bool, notify: Notifier
) -> tuple[list[dict[str, Any]], Path, dict[str, str]]:
    """Return the rows of a data set, the folder of its images, and the set's entry for run.json.

    Args:
        dataset: on the hub.
        offline: whether downloads are forbidden; then the cache must hold the rows.
        notify: prints a line before a download.

    Raises:
        UserError: if the data set cannot be loaded.
    """
    root = get_cache_folder() / "datasets" / f"hf-{dataset.repo.replace('/', '--')}"
    commit, license_name = _find_commit(dataset, root, offline)
    choice = f"{dataset.config or ''}:{dataset.split or ''}"
    folder = root / commit[:12] / hashlib.sha256(choice.encode()).hexdigest()[:12]
    if not (folder / _ROWS_FILE).is_file():
        if offline:
            raise _not_cached_error(dataset)
        notify(
            f"Fetching {dataset.repo}, license {license_name}, from {dataset.page} at revision {commit[:12]}"
            "; this happens once."
        )
        loaded = _load_dataset(dataset, commit)
        with stage_folder(folder, _ROWS_FILE) as staged:
            lines = [
                json.dumps(row, ensure_ascii=False, default=str) for row in _iterate_rows(loaded, staged)
            ]
            (staged / _ROWS_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    content = (folder / _ROWS_FILE).read_bytes()
    rows = [json.loads(line) for line in content.decode("utf-8").split("\n") if line]
    source = {
        "name": f"{HUB_PREFIX}{dataset.repo}",
        "source": dataset.page,
        "revision": commit,
        "licence": license_name,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    return rows, folder, source


def _find_commit(dataset: HubDataset, root: Path, offline: bool) -> tuple[str, str]:
    """Return the commit of a revision and the license; without the network, as they were last found."""
    path = root / "revisions.json"
    try:
        known: dict[str, list[str]] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        known = {}
    is_pinned = _COMMIT.fullmatch(dataset.revision) is not None
    if dataset.revision in known and (offline or is_pinned):
        commit, license_name = known[dataset.revision]
        return commit, license_name
    if offline:
        raise _not_cached_error(dataset)
    commit, license_name = _ask_hub(dataset)
    write_text_file(path, json.dumps(known | {dataset.revision: [commit, license_name]}))
    return commit, license_name


def _ask_hub(dataset: HubDataset) -> tuple[str, str]:
    """Return the commit of a revision on the hub, and the license that the set's card states."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    access = "run `hf auth login` or set HF_TOKEN"
    try:
        info = HfApi().dataset_info(dataset.repo, revision=dataset.revision)
    except GatedRepoError as error:
        raise UserError(
            f"{dataset.repo} is gated: accept its license on {dataset.page}, then {access}"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{dataset.repo} has no revision {dataset.revision!r}") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"no data set {dataset.repo!r} on the hub, or it is private: check the name, or {access}"
        ) from error
    except Exception as error:  # errors of the hub or of its HTTP library
        raise UserError(
            f"{dataset.repo} cannot be reached: {describe_download_error(error)}; --offline uses what was "
            "loaded before"
        ) from error
    card = info.card_data
    license_name = getattr(card, "license", None) if card is not None else None
    return str(info.sha), str(license_name or "see the page")


def _load_dataset(dataset: HubDataset, commit: str) -> Dataset:
    """Return the rows of a configuration and a split; raise with their names if the choice is open."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"--data {HUB_PREFIX}{dataset.repo} needs `datasets`: pip install 'refusalscope[hub]'"
        ) from error
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        config = dataset.config or _choose_only(
            dataset, "configurations", datasets.get_dataset_config_names(dataset.repo, revision=commit), "/"
        )
        split = dataset.split or _choose_only(
            dataset, "splits", datasets.get_dataset_split_names(dataset.repo, config, revision=commit), ":"
        )
        loaded = datasets.load_dataset(dataset.repo, config, split=split, revision=commit)
    except UserError:
        raise
    except ValueError as error:  # an unknown configuration or split; the text lists those that there are
        raise UserError(f"{dataset.repo}: {describe_library_error(error)}") from error
    except Exception as error:  # errors of the hub, of its HTTP library, of a file format or of the disk
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error  # says what happened
        raise UserError(f"{dataset.repo} could not be loaded: {describe_download_error(cause)}") from error
    if len(loaded) > _MAX_ROWS:
        raise UserError(
            f"{dataset.repo} has {len(loaded):,} rows; choose a part of them, such as "
            f"{HUB_PREFIX}{dataset.repo}:{dataset.split or 'train'}[:1000]"
        )
    return loaded


def _choose_only(dataset: HubDataset, kind: str, names: list[str], mark: str) -> str:
    """Return the only configuration or split; raise with their names if there are several."""
    if len(names) == 1:
        return names[0]
    config = f"/{dataset.config}" if dataset.config and mark == ":" else ""
    raise UserError(
        f"{dataset.repo} has the {kind} {', '.join(names)}: choose one, such as "
        f"{HUB_PREFIX}{dataset.repo}{config}{mark}{names[0]}"
    )


def _iterate_rows(loaded: Dataset, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows; classes have their names, and images are written to the folder and named."""
    import datasets

    class_labels = {
        name: feature for name, feature in loaded.features.items() if isinstance(feature, datasets.ClassLabel)
    }
    image_columns = [name for name, feature in loaded.features.items() if isinstance(feature, datasets.Image)]
    for name in image_columns:
        loaded = loaded.cast_column(name, datasets.Image(decode=False))
    for row in loaded:
        converted = dict(row)
        for name, label in class_labels.items():
            if converted[name] is not None and converted[name] >= 0:  # -1: no label
                converted[name] = label.int2str(converted[name])
        for name in image_columns:
            converted[name] = _write_image(converted[name], folder)
        yield converted


def _write_image(image: dict[str, Any] | None, folder: Path) -> str | None:
    """Write the bytes of an image to a file named after their digest; return the file's name."""
    if image is None:
        return None
    content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
    name = f"{hashlib.sha256(content).hexdigest()[:32]}{Path(image['path'] or 'image').suffix.lower()}"
    if not (folder / name).exists():
        (folder / name).write_bytes(content)
    return name


def _not_cached_error(dataset: HubDataset) -> UserError:
    return UserError(
        f"{HUB_PREFIX}{dataset.repo} is not in the local cache, and --offline forbids the download"
    )
