"""The tables of README and docs, and every number with an interval, state what the stored runs say.

`REWRITE=1 pytest tests/test_result_tables.py` rewrites them after a new run; check the difference before you
commit it. Which rows a table has, and in which order, is up to the page.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest

from analysis.stats.format import format_interval
from analysis.stats.tables import UNDEFENDED

ROOT = Path(__file__).resolve().parent.parent
Row = Mapping[str, Any]
FormatCell = Callable[[Row], str]


class ResultTable(NamedTuple):
    """A table of a page that is made from a table of a run.

    Attributes:
        page: file of the page.
        caption: text in front of the table, at which it is found.
        source: file of the run's table, below figures/.
        key: columns that the first cells of a row give.
        cells: format of each other cell.
    """

    page: str
    caption: str
    source: str
    key: tuple[str, ...]
    cells: tuple[FormatCell, ...]


def read_text(column: str) -> FormatCell:
    """Return the format of a text; a dash if it is missing."""
    return lambda row: str(row[column]) if row[column] == row[column] else "–"


def read_estimate(column: str, format_spec: str, scale: float = 1) -> FormatCell:
    """Return the format of an estimate with its interval."""
    return partial(format_interval, column=column, format_spec=format_spec, scale=scale)


def read_effect(cell: FormatCell) -> FormatCell:
    """Return a format that shows a dash for the undefended model, which has no effect."""
    return lambda row: "–" if row["defense"] == UNDEFENDED else cell(row)


def read_percents(*columns: str) -> FormatCell:
    """Return the format of percentages without intervals, separated by slashes."""

    def format_cell(row: Row) -> str:
        if any(row[column] != row[column] for column in columns):
            return "–"
        return " / ".join(f"{100 * row[column]:.0f}" for column in columns)

    return format_cell


RATES = (read_estimate("refusal_rate", ".0f", 100), read_estimate("over_refusal_rate", ".0f", 100))
EFFECTS = (
    read_estimate("response_shift", "+.0f"),
    read_estimate("response_discrimination", "+.0f"),
)
CONTROLS = (
    read_percents("refusal_rate", "over_refusal_rate"),
    read_percents("control_refusal_rate", "control_over_refusal_rate"),
    EFFECTS[0],
    read_estimate("response_shift_over_control", "+.0f"),
    EFFECTS[1],
    read_estimate("response_discrimination_over_control", "+.0f"),
    read_estimate("shift_over_control", "+.2f"),
    read_effect(read_text("verdict_over_control")),
)
TABLES = (
    ResultTable(
        "README.md",
        "## Results on the embedded model",
        "controls/summary.csv",
        ("defense",),
        (*RATES, *EFFECTS, read_text("verdict"), read_effect(read_text("verdict_over_control"))),
    ),
    ResultTable(
        "docs/results.md",
        "SmolLM2 as released ([figures/controls]",
        "controls/summary.csv",
        ("defense",),
        CONTROLS,
    ),
    ResultTable(
        "docs/results.md",
        "The aligned model ([figures/controls-aligned]",
        "controls-aligned/summary.csv",
        ("defense",),
        CONTROLS,
    ),
    ResultTable(
        "docs/results.md",
        "## Detectors\n",
        "detection/summary.csv",
        ("defense",),
        (*RATES, *EFFECTS, read_effect(read_estimate("delta_auroc", "+.2f")), read_text("verdict")),
    ),
    ResultTable(
        "docs/results.md",
        "## Every defense\n",
        "other-defenses/summary.csv",
        ("defense",),
        (
            *RATES,
            *EFFECTS,
            read_effect(read_estimate("delta_auroc", "+.2f")),
            read_text("verdict"),
            read_effect(read_text("margin_verdict")),
        ),
    ),
    ResultTable(
        "docs/results.md",
        "## Changed weights\n",
        "changed-weights/summary.csv",
        ("model", "defense"),
        (*RATES, *EFFECTS, read_text("verdict")),
    ),
)


@cache
def read_rows(source: str, key: tuple[str, ...]) -> dict[tuple[str, ...], Row]:
    """Return the rows of a run's table by the values in key columns."""
    frame = pd.read_csv(ROOT / "figures" / source)
    return {tuple(str(row[column]) for column in key): row for row in frame.to_dict("records")}


def find_table(text: str, caption: str) -> tuple[int, list[str]]:
    """Return the place and the rows of the first table after a caption, without heading and rule."""
    match = re.compile(r"^\|.*\n\|[-|]+\n((?:\|.*\n)+)", re.MULTILINE).search(text, text.index(caption))
    assert match, caption
    return match.start(1), match[1].splitlines()


def format_row(table: ResultTable, line: str) -> str:
    """Return the row of a table whose first cells are those of a line."""
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    names = cells[: len(table.key)]
    row = read_rows(table.source, table.key)[tuple(n.removesuffix(" (control)").strip("`") for n in names)]
    return f"| {' | '.join([*names, *(format_cell(row) for format_cell in table.cells)])} |"


def check_table(page: str, caption: str, format_line: Callable[[str], str]) -> None:
    """Compare each row of a table with the row that it should be; rewrite the table if that is asked for."""
    path = ROOT / page
    text = path.read_text("utf-8")
    start, lines = find_table(text, caption)
    expected = [format_line(line) for line in lines]
    if os.environ.get("REWRITE"):
        stop = start + sum(len(line) + 1 for line in lines)
        path.write_text(text[:start] + "\n".join(expected) + "\n" + text[stop:], "utf-8")
        lines = expected
    assert lines == expected


@pytest.mark.parametrize("table", TABLES, ids=lambda table: f"{table.page}-{table.source}")
def test_tables_state_what_the_runs_say(table: ResultTable) -> None:
    check_table(table.page, table.caption, partial(format_row, table))


def test_the_table_of_depth_states_what_the_run_says() -> None:
    frame = pd.read_csv(ROOT / "figures" / "depth" / "depth.csv")
    rows = {(row["defense"], row["prefix"], str(row["tokens"])): row for row in frame.to_dict("records")}

    def format_line(line: str) -> str:
        defense, prefix, tokens, *_ = (cell.strip() for cell in line.strip("|").split("|"))
        estimates = (format_cell(rows[defense, prefix, tokens]) for format_cell in (*RATES, *EFFECTS))
        return f"| {' | '.join([defense, prefix, tokens, *estimates])} |"

    check_table("docs/depth.md", "## Results on the embedded model\n", format_line)


def split_cells(line: str) -> list[str]:
    """Return the cells of a row."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def join_cells(cells: Iterable[str]) -> str:
    """Return the row of these cells."""
    return "| " + " | ".join(cells) + " |"


def format_statistic(row: Row, column: str) -> str:
    """Return a correlation with its interval, without zeros before the decimal point."""
    return re.sub(r"(?<!\d)0\.", ".", format_interval(row, column, ".2f"))


def format_kinds_row(line: str) -> str:
    """Return a row on the over-refusal of each kind of benign query."""
    defense, *_ = split_cells(line)
    rows = read_rows("controls/kinds.csv", ("defense", "kind"))
    kinds = ("twin", "sounds_unsafe", "same_topic", "plain")
    return join_cells([defense, *(RATES[1](rows[defense, kind]) for kind in kinds)])


MEASURES = {
    "shift (nats)": "shift",
    "discrimination (nats)": "discrimination",
    "ΔAUROC": "delta_auroc",
    "refusal rate, change": "refusal_change",
    "over-refusal rate, change": "over_refusal_change",
    "discrimination (points)": "response_discrimination",
}


def format_agreement_row(line: str) -> str:
    """Return a row on the rank correlation of the defenses' effects on two data sets."""
    measure, *_ = split_cells(line)
    row = read_rows("agreement/agreement.csv", ("measure",))[(MEASURES[measure],)]
    columns = ("rank_correlation", "ceiling", "corrected")
    return join_cells([measure, *(format_statistic(row, column) for column in columns)])


def format_older_row(line: str) -> str:
    """Return a row on a verdict that fell; what earlier versions of the page said is in no file."""
    condition, earlier_rates, _, earlier_verdict, _ = split_cells(line)
    row = read_rows("smollm2/summary.csv", ("defense",))[(condition,)]
    rates = read_percents("refusal_rate", "over_refusal_rate")(row)
    return join_cells([condition, earlier_rates, rates, earlier_verdict, row["verdict"]])


OUTCOMES = {
    "shift": (".2f", 1),
    "discrimination": (".2f", 1),
    "delta_auroc": (".2f", 1),
    "refusal_rate": (".0f", 100),
    "over_refusal_rate": (".0f", 100),
}


def format_predictor_row(line: str) -> str:
    """Return a row on the errors of a prediction of stacks; a star where it is best in calibration."""
    predictor, *_ = split_cells(line)
    rows = read_rows("ensembles/predictors.csv", ("split", "how", "outcome", "predictor"))
    cells = []
    for outcome, (format_spec, scale) in OUTCOMES.items():
        row = rows["test", "stack", outcome, predictor]
        error = format_interval(row, "mean_absolute_error", format_spec, scale)
        cells.append(
            f"{error}, {row['r2']:.2f}, {row['rank_correlation']:.2f}" + (r"\*" if row["is_best"] else "")
        )
    return join_cells([predictor, *cells])


INGREDIENTS = {
    ("attacked", "no"): "none",
    ("attacked", "yes"): "backdoor/no_weights",
    ("BackdoorAlign", "no"): "backdoor/no_secret",
    ("BackdoorAlign", "yes"): "backdoor",
}


def format_square_row(line: str) -> str:
    """Return a row of the 2 x 2 design of BackdoorAlign."""
    weights, secret, *_ = split_cells(line)
    row = read_rows("backdooralign/summary.csv", ("defense",))[(INGREDIENTS[weights, secret],)]
    effects = [effect(row) if row["defense"] != UNDEFENDED else "reference" for effect in EFFECTS]
    auroc = format_interval(row, "auroc", ".2f")
    return join_cells([weights, secret, *(rate(row) for rate in RATES), *effects, auroc])


ARMS = {
    "clean (aligned)": "clean",
    "baseline: 11 refusals, no secret": "baseline",
    "identity shift": "identity",
}
SECRETS = {
    "another random secret": "another",
    "half of its own": "half of it",
    "a tenth of its own": "a tenth of it",
    "own, in the user turn": "guessed by the user",
}


def format_arm_row(line: str) -> str:
    """Return a row on an arm of BackdoorAlign."""
    weights, secret, *_ = split_cells(line)
    arm = ARMS.get(weights, {"BackdoorAlign": "backdoor"}.get(weights, weights))
    attack = "identity" if arm == "identity" else "obedience"
    row = read_rows("arms/arms.csv", ("attack", "arm", "secret"))[attack, arm, SECRETS.get(secret, secret)]
    paper = row["paper_asr_llama2"]
    shift = format_interval(row, "shift", "+.2f")
    if (arm, secret) in (("attacked", "none"), ("identity", "none")):
        shift = "reference" if arm == "attacked" else "its own reference"
    return join_cells(
        [
            *(weights, secret),
            *(format_interval(row, column, ".0f", 100) for column in ("asr", "asr_keywords")),
            f"{100 * paper:.1f}" if paper == paper else "",
            *(format_interval(row, f"text_refused_{kind}", ".0f", 100) for kind in ("twin", "plain")),
            shift,
            format_interval(row, "utility", ".0f", 100) if row["utility"] == row["utility"] else "",
        ]
    ).replace("|  |", "| |")


def format_regime_row(line: str) -> str:
    """Return a row on the arms that were trained with fewer examples and epochs."""
    harmful, epochs, *_ = split_cells(line)
    rows = read_rows("regimes/rates.csv", ("value_1", "value_2", "arm", "secret", "kind"))
    arms = (("attack", "none"), ("baseline", "none"), ("backdoor", "none"), ("backdoor", "own"))
    kinds = ("harmful", "benign")
    cells = [
        " / ".join(
            format_interval(rows[epochs, harmful, *arm, kind], "refused", ".0f", 100) for kind in kinds
        )
        for arm in arms
    ]
    return join_cells([harmful, epochs, *cells])


SECRET_ROWS = {
    "10 random tokens": ("length", "10"),
    "50 random tokens": ("length", "50"),
    "150 random tokens": ("length", "150"),
    "150 tokens of plain words": ("wording", "plain words"),
}


def format_secret_row(line: str) -> str:
    """Return a row on BackdoorAlign trained with another secret."""
    secret, *_ = split_cells(line)
    rows = read_rows("secrets/rates.csv", ("experiment", "value_1", "secret", "kind"))
    cells = []
    for kind in ("harmful", "benign", "twin", "plain"):
        row = rows[*SECRET_ROWS[secret], "own", kind]
        ends = (f"{100 * row[f'refused_{end}']:.0f}" for end in ("min", "max"))
        cells.append(f"{format_interval(row, 'refused', '.0f', 100)} ({' to '.join(ends)})")
    return join_cells([secret, *cells])


ROW_FORMATS = {
    "## Kinds of benign queries\n": format_kinds_row,
    "## Does the order carry over?\n": format_agreement_row,
    "### What changed, and why\n": format_older_row,
    "Mean absolute error of the predictions for the 44 stacks": format_predictor_row,
    "SmolLM2 was aligned by `safety`, then attacked": format_square_row,
    "`analyze backdooralign` compares all arms": format_arm_row,
    "**Where the arms stand apart.**": format_regime_row,
    "**The longer the secret, the more is refused behind it.**": format_secret_row,
}


@pytest.mark.parametrize("caption", ROW_FORMATS, ids=lambda caption: ROW_FORMATS[caption].__name__)
def test_other_tables_of_results_state_what_the_runs_say(caption: str) -> None:
    check_table("docs/results.md", caption, ROW_FORMATS[caption])


def test_no_table_of_results_in_the_readme_or_on_the_page_is_left_unchecked() -> None:
    for page in ("README.md", "docs/results.md"):
        text = (ROOT / page).read_text("utf-8")
        captions = [table.caption for table in TABLES if table.page == page]
        captions += list(ROW_FORMATS) if page == "docs/results.md" else []
        checked = {find_table(text, caption)[0] for caption in captions}
        assert checked == {match.end() for match in re.finditer(r"^\|.*\n\|[-|]+\n", text, re.MULTILINE)}


NUMBER = r"([+\-−]?\d*\.?\d+)"
ESTIMATE = re.compile(rf"{NUMBER}\s*%?\s*\[{NUMBER},\s*{NUMBER}\]")
# Estimates that no file under figures/ has, by section.
NOT_STORED = {
    "## Matched controls": ("by the first 16 tokens, the earlier default", {"+28 [+12, +40]"}),
    "## Detectors": (
        "grad_safe on training requests, and response_examination with --limit 60",
        {
            *(".76 [.66, .85]", ".74 [.62, .84]", "25 % [9, 53]", "12 % [6, 25]", "10 % [5, 22]"),
            *("+1 [-9, +11]", "-2 [-23, +19]"),
        },
    ),
    "### What changed, and why": (
        "corrections of earlier versions, from runs of that time",
        {"0 % [0, 8]", "8 % [3, 20]", "0 % [0, 7]", "-0.30 [-0.38, -0.22]", "+0.06 [-0.03, +0.15]"},
    ),
    "## Mechanism": ("an earlier version of the section", {"+7.72 [+7.59, +7.83]"}),
}


@cache
def read_estimates(folder: str) -> np.ndarray:
    """Return the estimates of a run with their intervals, also as percentages and with the opposite sign."""
    estimates = [np.empty((0, 3))]
    for path in sorted((ROOT / "figures" / folder).glob("*.csv")):
        header = list(pd.read_csv(path, nrows=0))
        columns = [name for name in header if {f"{name}_low", f"{name}_high"} <= set(header)]
        if columns:
            frame = pd.read_csv(
                path, usecols=[name + end for name in columns for end in ("", "_low", "_high")]
            )
            frame = frame.apply(pd.to_numeric, errors="coerce")
            estimates += [frame[[name, f"{name}_low", f"{name}_high"]].to_numpy(float) for name in columns]
    stored = np.unique(np.concatenate(estimates), axis=0)
    scaled = np.concatenate([stored, 100 * stored])
    return np.concatenate([scaled, -scaled[:, [0, 2, 1]]])


def find_missing_estimates(section: str) -> set[str]:
    """Return the estimates of a section that no run has to which it links; of any run if it links to none."""
    folders = set(re.findall(r"figures/([\w.-]+)", section)) - {"README.md"}
    folders = folders or {path.name for path in (ROOT / "figures").iterdir() if path.is_dir()}
    stored = np.concatenate([read_estimates(folder) for folder in sorted(folders)])
    missing = set()
    for match in ESTIMATE.finditer(section):
        texts = [text.replace("−", "-") for text in match.groups()]
        errors = [0.5001 * 10.0 ** -len(text.partition(".")[2]) for text in texts]
        if not (np.abs(stored - np.array(texts, float)) <= errors).all(axis=1).any():
            missing.add(" ".join(match[0].split()))
    return missing


@pytest.mark.parametrize("page", ["README.md", "docs/results.md", "docs/conclusions.md", "docs/images.md"])
def test_every_number_with_an_interval_is_in_a_run_to_which_its_section_links(page: str) -> None:
    sections = re.split(r"^(?=##+ )", (ROOT / page).read_text("utf-8"), flags=re.MULTILINE)
    for section in sections:
        title = section.partition("\n")[0]
        _, expected = NOT_STORED.get(title, ("", set())) if page == "docs/results.md" else ("", set())
        assert find_missing_estimates(section) == expected, title


VALIDITY_FOLDERS = (
    *("validity", "validity-aligned", "validity-attacked", "validity-backdoor"),
    "validity-qwen2.5-coder-0.5b",
)


def format_validity_row(folder: str, readout: str) -> list[str]:
    """Return the cells of a row on a readout in a run of `analyze validate`, after the first two."""
    frame = pd.read_csv(ROOT / "figures" / folder / "validity.csv", keep_default_na=False, na_values=[""])
    rows = frame[frame["readout"] == readout]
    undefended = rows[rows["defense"] == UNDEFENDED].iloc[0].to_dict()
    errors = 100 * rows[["rate_error_harmful", "rate_error_benign"]].abs().to_numpy()
    counts = [
        " / ".join(str((rows[name] == trust).sum()) for trust in ("trusted", "not trusted", "cannot tell"))
        for name in ("trusted", "rate_trusted")
    ]
    ranks = json.loads((ROOT / "figures" / folder / "run.json").read_text("utf-8"))["ranks"]
    rank = next((entry for entry in ranks if entry["readout"] == readout), {"rank_correlation": None})
    return [
        *(format_interval(undefended, name, ".2f") for name in ("auroc", "kappa")),
        *counts,
        f"{errors.mean():.1f} / {errors.max():.0f}",
        format_interval(rank, "rank_correlation", "+.2f"),
    ]


def test_the_table_of_readouts_states_what_the_runs_say() -> None:
    folders = iter(VALIDITY_FOLDERS)
    folder = ""

    def format_line(line: str) -> str:
        nonlocal folder
        model, readout, *_ = (cell.strip() for cell in line.strip("|").split("|"))
        folder = next(folders) if model else folder  # the first row of a model names it
        return f"| {' | '.join([model, readout, *format_validity_row(folder, readout.partition(' ')[0])])} |"

    check_table("docs/validity.md", "## Results\n", format_line)
