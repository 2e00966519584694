"""Thumbnails of the images of queries: which ones a page shows, and what it says about the others."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from analysis.report.embed import choose_fitting, encode_thumbnail
from analysis.report.results import Run
from analysis.stats.tables import UNDEFENDED

if TYPE_CHECKING:
    from defenses.images import QueryImage

MAX_THUMBNAILS = 300  # on a page


def embed_thumbnails(runs: Sequence[Run], max_bytes: int) -> dict[str, str]:
    """Return the thumbnails of a page: digest of an image → data URI.

    If not all images fit, those of the queries whose margins change most are taken, from each run in turn.

    Args:
        runs: of the page.
        max_bytes: of all data URIs together.
    """
    by_run = [_list_shown_images(run) for run in runs]
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*by_run))
    images = _drop_repeated(image for image in in_turn if image is not None)[:MAX_THUMBNAILS]
    encoded = {image.digest: encode_thumbnail(image.load()) for image in images}
    fitting = choose_fitting({digest: len(address) for digest, address in encoded.items()}, max_bytes)
    return {digest: address for digest, address in encoded.items() if digest in fitting}


def locate_thumbnails(run: Run, digests: Iterable[str]) -> dict[str, int]:
    """Return query id → position of the thumbnail of its image; queries without one are missing.

    Args:
        run: with or without images.
        digests: of the images that have thumbnails, in their order on the page.
    """
    positions = {digest: position for position, digest in enumerate(digests)}
    return {
        query_id: positions[image.digest]
        for query_id, image in run.images.items()
        if image.digest in positions
    }


def describe_left_out_images(run: Run, thumbnails: Mapping[str, str]) -> str:
    """Return how many images of a run have no thumbnail, as a sentence; an empty text if all have one."""
    images = _list_shown_images(run)
    n_left_out = sum(image.digest not in thumbnails for image in images)
    if not n_left_out:
        return ""
    return (
        f"To limit the size of the page, {n_left_out:,} of {len(images):,} images are left out; those of the "
        "queries with the largest changes come first."
    )


def _list_shown_images(run: Run) -> list[QueryImage]:
    """Return the images that the list of queries can show, each once, largest change of the margin first."""
    if not run.images:
        return []
    ranked = _rank_queries(run.tables["scores"])
    return _drop_repeated(run.images[query_id] for query_id in ranked if query_id in run.images)


def _rank_queries(scores: pd.DataFrame) -> list[str]:
    """Return the ids of queries by their largest change of the margin under any defense and attack.

    >>> rows = [("a", "none", 1.0), ("b", "none", 1.0), ("a", "policy", 1.5), ("b", "policy", -2.0)]
    >>> _rank_queries(pd.DataFrame(rows, columns=["query", "defense", "margin"]).assign(attack="direct"))
    ['b', 'a']

    Args:
        scores: `scores.csv`.
    """
    keys = ["attack", "query"]
    undefended = scores.loc[scores["defense"] == UNDEFENDED, [*keys, "margin"]]
    rows = scores.merge(undefended, on=keys, suffixes=("", "_undefended"))
    change = (rows["margin"] - rows["margin_undefended"]).abs()
    largest = change.groupby(rows["query"].astype(str), sort=False).max().dropna()
    return largest.sort_values(ascending=False, kind="stable").index.tolist()


def _drop_repeated(images: Iterable[QueryImage]) -> list[QueryImage]:
    """Return the images without those that occurred before."""
    first: dict[str, QueryImage] = {}
    for image in images:
        first.setdefault(image.digest, image)
    return list(first.values())
