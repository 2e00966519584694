"""The Python interface: what the command does, called from a notebook; frames in, frames and figures out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console

from analysis.report.results import Run
from analysis.studies.run_spec import (
    PATCH_SITES,
    build_run_spec,
    check_ensemble_options,
    check_mechanism_options,
    parse_sites,
)
from defenses.contract import Defense
from defenses.errors import UserError

DefenseSelection = str | Defense | Sequence[str | Defense]


def analyze(
    defenses: DefenseSelection,
    model: str = "smollm2",
    *,
    data: str | pd.DataFrame = "contrast",
    split: str | None = None,
    limit: int | None = None,
    attacks: str | Sequence[str] = ("direct",),
    readout: str = "words",
    cost: bool = False,
    settings: Sequence[str] = (),
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    offline: bool = False,
) -> Run:
    """Read each defense as a refuse/comply classifier and say what it does, as `analyze -d …` does.

    Args:
        defenses: names, as `-d` takes them, or defenses themselves: `get("policy")`, `MyOwn()`; or one.
        model: name, Hugging Face id, folder, or `.gguf` file.
        data: as `--data`, or a frame with the columns `text` and `harmful`.
        split: train, calibration, test or all; by default test where there is one.
        limit: queries at most, pairs kept whole.
        attacks: how queries are sent, as `--attack`.
        readout: how a forward pass becomes a number, as `--readout`.
        cost: whether it is also measured what each defense costs.
        settings: of the defenses that are named, as `--set`.
        batch_size: prompts in one pass; None tries what fits.
        device: auto, cpu, cuda, …
        dtype: auto, float32, bfloat16, float16.
        seed: of everything random.
        offline: whether nothing may be fetched.

    Returns:
        `tables` (scores, summary, effects, and the table of each figure), `brief()`, and `figure(name)`.

    Raises:
        UserError: for what the command would have answered in one line.
    """
    from analysis.studies.analyze import analyze_defenses

    request = build_run_spec(
        model, data, split, limit, batch_size, device, dtype, seed, offline, attacks, readout
    )
    return analyze_defenses(request, _as_defense_list(defenses), settings, _progress_console(), cost).run


def ensembles(
    defenses: DefenseSelection,
    model: str = "smollm2",
    *,
    size: int = 2,
    stacks: int = 5,
    data: str | pd.DataFrame = "contrast",
    limit: int | None = None,
    attacks: str | Sequence[str] = ("direct",),
    readout: str = "words",
    settings: Sequence[str] = (),
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    offline: bool = False,
) -> Run:
    """Predict what defenses come to together, and observe it, as `analyze ensembles` does.

    Args:
        defenses: names, or defenses themselves.
        model: name, Hugging Face id, folder, or `.gguf` file.
        size: members of an ensemble at most, 2 or 3.
        stacks: how many of the most promising stacks are run, and as many drawn by chance.
        data: as `--data`, or a frame of queries.
        limit: queries of either split at most.
        attacks: how queries are sent.
        readout: how a forward pass becomes a number.
        settings: of the defenses that are named.
        batch_size: prompts in one pass.
        device: auto, cpu, cuda, …
        dtype: auto, float32, bfloat16, float16.
        seed: of everything random.
        offline: whether nothing may be fetched.

    Returns:
        Among its tables `ensembles` (predicted, observed, interaction), `additivity`, `candidates`.
    """
    check_ensemble_options(size, stacks)
    from analysis.studies.ensembles import evaluate_ensembles

    request = build_run_spec(
        model, data, None, limit, batch_size, device, dtype, seed, offline, attacks, readout
    )
    return evaluate_ensembles(
        request, _as_defense_list(defenses), settings, size, stacks, _progress_console()
    ).run


def locate_mechanism(
    defenses: DefenseSelection,
    model: str = "smollm2",
    *,
    sites: Sequence[str] = PATCH_SITES,
    top: int = 10,
    patched: int = 32,
    ensembles: Path | str | None = None,
    data: str | pd.DataFrame = "contrast",
    split: str | None = None,
    limit: int | None = None,
    attacks: str | Sequence[str] = ("direct",),
    readout: str = "words",
    settings: Sequence[str] = (),
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    offline: bool = False,
) -> Run:
    """Find out in which layers, heads and MLPs defenses act, as `analyze mechanism` does.

    Args:
        defenses: names, or defenses themselves.
        model: name, Hugging Face id, folder, or `.gguf` file.
        sites: what is patched: residual, attention, mlp, heads.
        top: parts that are drawn one by one, and heads that are patched.
        patched: queries at most that interventions run on; 0 for none.
        ensembles: folder of `analyze ensembles`: do defenses that use the same parts interact?
        data: as `--data`, or a frame of queries.
        split: train, calibration, test or all.
        limit: queries at most.
        attacks: how queries are sent.
        readout: how a forward pass becomes a number; one that is linear in the logits.
        settings: of the defenses that are named.
        batch_size: prompts in one pass.
        device: auto, cpu, cuda, …
        dtype: auto, float32, bfloat16, float16.
        seed: of everything random.
        offline: whether nothing may be fetched.

    Returns:
        Among its tables `layers`, `parts`, `directions`, `patches`, `cuts`, `weights` and `profiles`.
    """
    chosen = parse_sites([sites] if isinstance(sites, str) else sites)
    check_mechanism_options(top, patched)
    from analysis.studies.mechanism import MechanismOptions, study_mechanism

    request = build_run_spec(
        model,
        data,
        split,
        limit,
        batch_size,
        device,
        dtype,
        seed,
        offline,
        attacks,
        readout,
        needs_linear_readout=True,
    )
    wanted = MechanismOptions(chosen, top, patched, None if ensembles is None else Path(ensembles))
    return study_mechanism(request, _as_defense_list(defenses), settings, wanted, _progress_console()).run


def read(folder: Path | str) -> Run:
    """Return the run that lies in a folder that the command has written.

    >>> from analysis import data_folder, read
    >>> folder = data_folder().parent / "figures" / "backdooralign"  # in a checkout
    >>> read(folder).figures if folder.is_dir() else ("margins", "plane", "roc", "square")
    ('margins', 'plane', 'roc', 'square')
    """
    from analysis.datasets.loading import load_query_texts
    from analysis.report.folder import read_run

    return read_run(Path(folder), load_query_texts)


def summarize(scores: pd.DataFrame, threshold: float = 0.0, seed: int = 0) -> pd.DataFrame:
    """Return shift, discrimination and all else of scores that came from anywhere, a row per defense.

    >>> rows = [(f"{side}{n}", side == "h", d, n + (d == "shifted")) for side in "hb" for n in (0.0, 1.0, 2.0)
    ...         for d in ("none", "shifted")]
    >>> scores = pd.DataFrame(rows, columns=["query", "harmful", "defense", "margin"])
    >>> summarize(scores).set_index("defense").loc["shifted", ["shift", "discrimination"]].tolist()
    [1.0, 0.0]

    Args:
        scores: columns `query`, `harmful`, `defense` (the undefended is `none`) and `margin` (nats, positive
            refuses); `pair` and `attack` if there are any.
        threshold: margin above which "refuse" is said, nats; of the scores of a run, `run.threshold`.
        seed: of the bootstrap.
    """
    from scipy.special import expit

    from analysis.stats.effects import summarize_scores
    from analysis.stats.tables import DIRECT, SCORE_COLUMNS, UNDEFENDED, ScoreTable
    from defenses.catalog import find_defense_classes

    if missing := [name for name in ("query", "harmful", "defense", "margin") if name not in scores]:
        raise UserError(f"the scores lack {', '.join(missing)}; see `help(summarize)` for what they need")
    if not scores["harmful"].isin([True, False]).all():  # 1 and 0 are equal to them
        raise UserError("the column harmful takes true or false")
    usual = {
        "pair": None,
        "category": "",
        "attack": DIRECT,
        "p_refuse": expit(scores["margin"] - threshold),
        "prompt_tokens": 0,
        "coverage": 1.0,
    }
    frame = scores.assign(
        harmful=scores["harmful"].astype(bool),
        **{name: one for name, one in usual.items() if name not in scores},
    )
    known = {name: one.family for name, one in find_defense_classes().items()}
    named = {str(name): known.get(str(name).partition("/")[0], "own") for name in frame["defense"].unique()}
    record = {
        "readout": {"threshold": threshold},
        "defenses": {name: {"family": one} for name, one in named.items()},
    }
    try:
        table = ScoreTable(frame[list(SCORE_COLUMNS)].reset_index(drop=True), record)
    except ValueError as error:
        raise UserError(f"{error} (the undefended model is called {UNDEFENDED!r})") from error
    return summarize_scores(table, seed=seed).frame


def _as_defense_list(defenses: DefenseSelection) -> Sequence[str | Defense]:
    """Defenses as a list; one that stands alone is meant, too."""
    return defenses if isinstance(defenses, (list, tuple)) else [defenses]  # type: ignore[list-item]


def _progress_console() -> Console:
    """Progress and notes in a terminal; a notebook keeps its outputs, and hears of fetching and the like."""
    usual = Console(stderr=True)  # in a notebook, it would call itself a terminal if it were not asked this
    quiet = usual.is_jupyter or not usual.is_terminal
    return Console(stderr=True, force_jupyter=False, quiet=quiet)
