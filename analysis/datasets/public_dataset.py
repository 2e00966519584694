"""The description of a public data set: where it is published, and how its files are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GITHUB_ADDRESSES = "https://github.com/", "https://raw.githubusercontent.com/{repo}/{revision}/{file}"
HUGGING_FACE_ADDRESSES = (
    "https://huggingface.co/datasets/",
    "https://huggingface.co/datasets/{repo}/resolve/{revision}/{file}",
)

PublishedRow = Mapping[str, Any]
# (published row, path of its file) → rows in the project's own format; the column `image` holds the path of
# an image in one of the set's image folders.
RowParser = Callable[[PublishedRow, Path], list[dict[str, Any]]]


@dataclass(frozen=True)
class PublicDataset:
    """A public set: where it is published, and how its files are read.

    Attributes:
        name: of the set, for `--data`.
        description: one line for the list of data sets.
        license: as stated by the publisher.
        addresses: prefix of the repository's page, and pattern of a file's URL.
        repo: `owner/name`.
        revision: the commit to download; empty if the set is never downloaded, because the publisher requires
            consent or because it has images.
        files: path in the repository → its SHA-256, or None if it is not known in advance.
        kilobytes: approximate size of all files together; 0 if they are never downloaded.
        n_harmful: number of harmful queries.
        n_benign: number of benign queries.
        columns: columns that identify the published format; a file may have more.
        parse_row: converts a published row to rows in the project's own format.
        testing_only: whether the publisher forbids training on the set.
        image_folders: folders of the repository that hold the images of the rows; empty for a set of texts.
        contrast_file: path in the repository of a further file, which is read if a copy holds it.
    """

    name: str
    description: str
    license: str
    addresses: tuple[str, str]
    repo: str
    revision: str
    files: Mapping[str, str | None]
    kilobytes: int
    n_harmful: int
    n_benign: int
    columns: tuple[str, ...]
    parse_row: RowParser
    testing_only: bool = False
    image_folders: tuple[str, ...] = ()
    contrast_file: str | None = None

    @property
    def page(self) -> str:
        """Address of the set's page."""
        return self.addresses[0] + self.repo


def build_class_columns(harmful: bool) -> dict[str, Any]:
    """Class and kind; benign rows of public sets were written to look harmful, so they count as twins."""
    return {"harmful": harmful, "kind": "harmful" if harmful else "twin"}
