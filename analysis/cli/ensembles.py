"""The commands `analyze ensembles` and `analyze recommend`, and the tables that they print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from analysis.cli.app import app
from analysis.cli.options import (
    DEFAULT_DATA,
    DEFAULT_MODEL,
    AnswerPrefixOption,
    AttackOption,
    BatchSizeOption,
    DataOption,
    DefenseOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LimitPerSplitOption,
    MaxSizeOption,
    ModelOption,
    OfflineOption,
    OutOption,
    OverlapOption,
    ReadoutOption,
    ResponsesOption,
    SeedOption,
    SettingsOption,
    SharePrefixOption,
    StacksOption,
    TemplateOption,
)

if TYPE_CHECKING:
    import pandas as pd

    from analysis.studies.recommend import RecommendationLimits
    from analysis.studies.run_spec import RunSpec

_MAX_FRONT_ROWS = 12  # maximum number of rows of the Pareto front that are printed
_COORDINATE_LABELS = {
    "shift": "shift",
    "discrimination": "discrimination",
    "delta_auroc": "ΔAUROC",
    "refusal_rate": "harmful refused",
    "over_refusal_rate": "benign refused",
}


def print_front(candidates: pd.DataFrame, record: Mapping[str, Any]) -> None:
    """Print the Pareto front of the calibration split, with its rates on the test split.

    Args:
        candidates: `candidates.csv`.
        record: `run.json`.
    """
    from analysis.cli.console import make_console_table, make_table_console
    from analysis.stats.tables import UNDEFENDED, iterate_rows

    chosen = candidates[candidates["on_front"] | (candidates["members"] == UNDEFENDED)]
    chosen = chosen.sort_values("harmful_calibration", ascending=False, kind="stable")
    attacks = len(record["attacks"])
    title = (
        f"{record['model']['name']}: {len(candidates):,} defenses and ensembles, "
        f"{int(candidates['on_front'].sum())} of them on the Pareto front of the calibration split"
    )
    heads = (
        "harmful refused (%)\ncalibration → test",
        "benign answered (%)\ncalibration → test",
        "cost\n(×)",
    )
    table = make_console_table("members\nhow", heads, title)
    for row in iterate_rows(_select_spread_rows(chosen)):
        rates = [
            f"{100 * row[f'{x}_calibration']:.0f} → {100 * row[f'{x}_test']:.0f}"
            for x in ("harmful", "benign")
        ]
        cells = (f"{row['members']}\n{row['how']}", *rates, f"{row['cost']:.1f}")
        table.add_row(*map(Text, cells))
    console = make_table_console()
    console.print(table)
    over = f", mean over {attacks} attacks" if attacks > 1 else ""
    data = record["data"]
    note = (
        f"Share of harmful queries refused{over}, and of benign queries answered without an attack; "
        f"{data['n_harmful']} harmful and {data['n_benign']} benign queries on both splits together. Cost: "
        "time to first token, as a multiple of the undefended model's. Intervals and the other rows are in "
        "ensembles.csv and candidates.csv."
    )
    console.print(Text(note, style="dim"))


def print_prediction_fit(prediction_fit: pd.DataFrame) -> None:
    """Print how often stacks differ from the sum of their members' margins, by kind.

    Args:
        prediction_fit: `additivity.csv`.
    """
    from analysis.cli.console import make_table_console
    from analysis.stats.tables import iterate_rows

    console = make_table_console()
    stacks = prediction_fit[
        (prediction_fit["split"] == "test")
        & (prediction_fit["how"] == "stack")
        & (prediction_fit["kind"] != "all")
    ]
    for row in iterate_rows(stacks[stacks["coordinate"].isin(("shift", "discrimination"))]):
        console.print(
            Text(
                f"{row['kind']} stacks, {row['attack']}: {row['coordinate']} differs from the members' sum "
                f"in {row['beyond_zero']:.0f} of {row['tested']:.0f} "
                f"(mean difference {row['mean_interaction']:+.2f} nats)"
            )
        )


def print_raised_distances(raised_distances: pd.DataFrame) -> None:
    """Print how many pairs of shift defenses raise the paper's distance, and how many raises are real.

    Args:
        raised_distances: `distance.csv`.
    """
    from analysis.cli.console import make_table_console

    console = make_table_console()
    if raised_distances.empty:
        console.print(Text("No pair of two shift defenses raises the distance on the probability scale."))
        return
    for how, group in raised_distances.groupby("how", sort=False):
        counts = ", ".join(f"{count} {kind}" for kind, count in group["raise"].value_counts().items())
        console.print(
            Text(f"Pairs of two shift defenses that raise the distance, {how}: {len(group)} ({counts})")
        )


def print_predictors(fit: pd.DataFrame | None, has_overlap: bool) -> None:
    """Print how well ensembles of the test split are predicted from their members' calibration scores.

    Of votes, the best predictor of each outcome is printed; of stacks, all.

    Args:
        fit: `predictors.csv`; None if nothing was predicted.
        has_overlap: whether the overlap of the defenses was given.
    """
    from analysis.cli.console import make_console_table, make_table_console
    from analysis.stats.format import Interval, format_number
    from analysis.stats.predictors import OUTCOMES, SAME_ON_CALIBRATION
    from analysis.stats.tables import iterate_rows

    console = make_table_console()
    if fit is None:
        return
    reported = fit[(fit["split"] == "test") & (fit["n"] > 2)]
    for attack, how in reported[["attack", "how"]].drop_duplicates().itertuples(index=False, name=None):
        group = reported[(reported["attack"] == attack) & (reported["how"] == how)]
        if how == "stack":
            title = (
                f"{attack}: {group['n'].iloc[0]} stacks of the test split, predicted from the calibration "
                "split: R², 95 % interval (* smallest error on the calibration split)"
            )
            heads = tuple(_COORDINATE_LABELS[outcome].replace(" ", "\n") for outcome in OUTCOMES)
            table = make_console_table("predictor", heads, title)
            for predictor, rows in group.groupby("predictor", sort=False):
                by_outcome = {row["outcome"]: row for row in iterate_rows(rows)}
                # The interval has a line of its own, so that the table fits the width of a terminal.
                cells = [
                    Interval.from_row(by_outcome[outcome], "r2")
                    .format_text(".2f")
                    .replace(" [", "*\n[" if by_outcome[outcome]["is_best"] else "\n[")
                    for outcome in OUTCOMES
                ]
                table.add_row(*map(Text, (str(predictor), *cells)))
            console.print(table)
            if not has_overlap:
                console.print(Text("Not compared: overlap, which needs --overlap FOLDER.", style="dim"))
            continue
        best = group[group["is_best"] & (group["predictor"] != SAME_ON_CALIBRATION)]
        agreement = [
            f"{_COORDINATE_LABELS[row['outcome']]} R² {format_number(row['r2'], '.2f', 1)} "
            f"({row['predictor']})"
            for row in iterate_rows(best)
        ]
        n = f"{group['n'].iloc[0]:,}"
        console.print(
            Text(f"Votes, predicted from calibration, {attack}, {how} (n = {n}): {'; '.join(agreement)}")
        )


def print_interactions(pairs: pd.DataFrame | None) -> None:
    """Print which stacks differ from the best prediction by more than is usual.

    Args:
        pairs: `interacting.csv`; None if no stack was run.
    """
    from analysis.cli.console import make_table_console

    if pairs is None:
        return
    console = make_table_console()
    for (attack, outcome), rows in pairs.groupby(["attack", "outcome"], sort=False):
        words = [
            f"{len(names)} {word} ({', '.join(names[:3])}{', …' * (len(names) > 3)})"
            for word in ("above", "below")
            if (names := rows.loc[rows["interacts"] == word, "members"].tolist())
        ]
        label = _COORDINATE_LABELS[str(outcome)]
        console.print(
            Text(
                f"Stacks that interact, {attack}, {label} (against {rows['predictor'].iloc[0]}): "
                f"{' and '.join(words) or 'none'} of {len(rows)}"
            )
        )


def print_recommendation(
    recommendation: pd.DataFrame, certification: pd.DataFrame, record: Mapping[str, Any]
) -> None:
    """Print the recommendation with its guarantee, next to the alternatives.

    Args:
        recommendation: `recommendation.csv`.
        certification: `certification.csv`.
        record: `run.json`.
    """
    from analysis.cli.console import make_console_table, make_table_console
    from analysis.stats.format import format_interval
    from analysis.stats.risk_control import ERROR_BUDGET
    from analysis.stats.tables import Basis, iterate_rows

    console = make_table_console()
    max_cost = record["max_cost"]
    cost_limit = f" and cost at most {max_cost:g} × undefended" if max_cost is not None else ""
    limits = f"at most {record['max_over_refusal']:.1%} of benign queries refused{cost_limit}"
    n_tested = int(certification["n_tested"].iloc[0])
    counts = certification["status"].value_counts()
    row = recommendation.iloc[0]
    if row["role"] != "recommended":
        console.print(Text(f"Nothing is certified: {limits}. {_describe_need(row, record)} The closest:"))
    else:
        console.print(Text(f"Use {row['members']} ({row['how']}): {limits}."))
        if row["p_meets"] < ERROR_BUDGET:
            warning = (
                "The test split contradicts this: the splits differ. Use more queries like your own before "
                "you rely on it."
            )
            console.print(Text(warning))
    basis = (
        "the judged responses of defenses and stacks (votes: their margins)"
        if record["guarantee_based_on"] == Basis.RESPONSES
        else "refusals by first-token margins, not by judged responses"
    )
    guarantee = (
        f"{record['guarantee']} It rests on {n_tested} benign calibration queries, of which no other use was "
        f"made except for the readout, and on {basis}. Tested in a fixed order: "
        f"{int(counts.get('certified', 0))} certified, {int(counts.get('failed', 0))} failed."
    )
    console.print(Text(guarantee))
    heads = ("refuses (%)\nharmful\nbenign", "calibration\nharmful\nbenign", "P(meets\nlimit)", "\ncost (×)")
    table = make_console_table("\nmembers, how", heads, with_row_lines=True)
    for values in iterate_rows(recommendation):
        cells = (
            f"{values['role']}\n{values['members']} ({values['how']})\n{values['trusted']}",
            "\n".join(
                ["", *(format_interval(values, name, ".0f", 100) for name in ("harmful", "over_refusal"))]
            ),
            f"\n{100 * values['harmful_calibration']:.0f}\n{100 - 100 * values['benign_calibration']:.0f}",
            f"\n{values['p_meets']:.0%}",
            f"\n{values['cost']:.1f}",
        )
        table.add_row(*map(Text, cells))
    console.print(table)


def _describe_need(row: pd.Series[Any], record: Mapping[str, Any]) -> str:
    """Return how many benign calibration queries the closest candidate would need, in a sentence."""
    needed, rate = row["n_benign_needed"], 1 - row["benign_calibration"]
    if needed != needed:
        return (
            f"{row['members']} ({row['how']}) refuses {rate:.1%} of the benign calibration queries by its "
            "margins; at this "
            f"rate no number of queries would show that it refuses at most {record['max_over_refusal']:.1%}."
        )
    return (
        f"If {row['members']} ({row['how']}) keeps refusing {rate:.1%} of the benign queries, it takes about "
        f"{needed:,.0f} benign calibration queries to certify it."
    )


def _select_spread_rows(candidates: pd.DataFrame) -> pd.DataFrame:
    """Return rows spread evenly over the Pareto front, both ends included."""
    if len(candidates) <= _MAX_FRONT_ROWS:
        return candidates
    step = (len(candidates) - 1) / (_MAX_FRONT_ROWS - 1)
    return candidates.iloc[sorted({round(row * step) for row in range(_MAX_FRONT_ROWS)})]


@app.command()
def ensembles(
    defense: DefenseOption = None,
    model: ModelOption = DEFAULT_MODEL,
    data: DataOption = DEFAULT_DATA,
    attack: AttackOption = None,
    readout: ReadoutOption = "outcome",
    size: MaxSizeOption = 2,
    stacks: StacksOption = 5,
    overlap: OverlapOption = None,
    limit: LimitPerSplitOption = None,
    batch_size: BatchSizeOption = "auto",
    share_prefix: SharePrefixOption = True,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    template: TemplateOption = None,
    answer_prefix: AnswerPrefixOption = None,
    out: OutOption = None,
    settings: SettingsOption = None,
    offline: OfflineOption = False,
) -> None:
    """Predict the effects of ensembles of defenses (default: all); measure votes and the best stacks.

    analyze ensembles -m smollm2:aligned -d self_reminder -d paraphrase -d policy
    """
    from analysis.studies.run_spec import build_run_spec, check_ensemble_options

    spec = build_run_spec(
        model,
        data,
        None,
        limit,
        batch_size,
        device,
        dtype,
        seed,
        offline,
        attack,
        readout,
        share_prefix=share_prefix,
        template=template,
        answer_prefix=answer_prefix,
    )
    check_ensemble_options(size, stacks)

    names = defense or ["all"]
    raise typer.Exit(run_ensembles_command(spec, names, settings or [], size, stacks, out, overlap))


@app.command()
def recommend(
    max_over_refusal: Annotated[
        str, typer.Option(help="Maximum share of benign queries refused: 5% or 0.05.")
    ],
    max_cost: Annotated[
        float | None,
        typer.Option(help="Maximum time to first token, as a multiple of the undefended model's."),
    ] = None,
    defense: DefenseOption = None,
    model: ModelOption = DEFAULT_MODEL,
    data: DataOption = DEFAULT_DATA,
    attack: AttackOption = None,
    readout: ReadoutOption = "outcome",
    size: MaxSizeOption = 2,
    stacks: StacksOption = 5,
    overlap: OverlapOption = None,
    limit: LimitPerSplitOption = None,
    batch_size: BatchSizeOption = "auto",
    share_prefix: SharePrefixOption = True,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    template: TemplateOption = None,
    answer_prefix: AnswerPrefixOption = None,
    out: OutOption = None,
    settings: SettingsOption = None,
    responses: ResponsesOption = "auto",
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Recommend the defense or ensemble that refuses the most harmful queries within your limits.

    analyze recommend -m smollm2:aligned --max-over-refusal 5% --max-cost 1.5
    """
    from analysis.studies.run_spec import (
        build_run_spec,
        check_ensemble_options,
        check_max_cost,
        parse_share,
    )

    spec = build_run_spec(
        model,
        data,
        None,
        limit,
        batch_size,
        device,
        dtype,
        seed,
        offline,
        attack,
        readout,
        responses,
        share_prefix=share_prefix,
        template=template,
        answer_prefix=answer_prefix,
    )
    check_ensemble_options(size, stacks)
    share = parse_share(max_over_refusal)
    check_max_cost(max_cost)
    from analysis.studies.recommend import RecommendationLimits

    limits, names = RecommendationLimits(share, max_cost), defense or ["all"]
    raise typer.Exit(
        run_recommend_command(spec, names, settings or [], size, stacks, limits, out, as_json, overlap)
    )


def run_ensembles_command(
    spec: RunSpec,
    defenses: Sequence[str],
    settings: Sequence[str],
    max_size: int,
    n_stacks: int,
    out: Path | None,
    overlap: Path | None = None,
) -> int:
    """Evaluate ensembles, save tables and figures, print the main tables; return the exit code.

    Args:
        spec: options of the run.
        defenses: names of defenses.
        settings: settings of the defenses, `key=value`.
        max_size: maximum number of members of an ensemble.
        n_stacks: number of most promising stacks to run, and of random ones.
        out: output folder; None for the default.
        overlap: output folder of `analyze mechanism`, or its `profiles.csv`.
    """
    from analysis.cli.console import print_run_location
    from analysis.report.folder import prepare_run_folder, save_run
    from analysis.studies.ensembles import evaluate_ensembles
    from analysis.studies.run_spec import choose_run_folder

    console = Console(stderr=True)
    out = prepare_run_folder(
        out or choose_run_folder(spec.model, ["ensembles", *defenses], datetime.now(UTC)), console
    )
    result = evaluate_ensembles(spec, defenses, settings, max_size, n_stacks, console, overlap)
    save_run(out, result.run, console)
    tables = result.run.tables
    print_front(tables["candidates"], result.run.record)
    print_predictors(tables.get("predictors"), overlap is not None)
    print_interactions(tables.get("interacting"))
    print_prediction_fit(tables["additivity"])
    print_raised_distances(tables["distance"])
    print_run_location(out, result.failures, console)
    return 1 if result.failures else 0


def run_recommend_command(
    spec: RunSpec,
    defenses: Sequence[str],
    settings: Sequence[str],
    max_size: int,
    n_stacks: int,
    limits: RecommendationLimits,
    out: Path | None,
    as_json: bool,
    overlap: Path | None = None,
) -> int:
    """Recommend a defense or an ensemble, save tables and figures, print the table; return the exit code.

    Args:
        spec: options of the run.
        defenses: names of defenses.
        settings: settings of the defenses, `key=value`.
        max_size: maximum number of members of an ensemble.
        n_stacks: number of most promising stacks to run, and of random ones.
        limits: limits of the recommendation.
        out: output folder; None for the default.
        as_json: whether to print the table as JSON.
        overlap: output folder of `analyze mechanism`, or its `profiles.csv`.
    """
    from analysis.cli.console import print_json_table, print_run_location
    from analysis.report.folder import prepare_run_folder, save_run
    from analysis.studies.recommend import recommend_defense
    from analysis.studies.run_spec import choose_run_folder

    console = Console(stderr=True)
    out = prepare_run_folder(
        out or choose_run_folder(spec.model, ["recommend", *defenses], datetime.now(UTC)), console
    )
    result = recommend_defense(spec, defenses, settings, max_size, n_stacks, limits, console, overlap)
    save_run(out, result.run, console)
    recommendation = result.run.tables["recommendation"]
    if as_json:
        print_json_table(recommendation)
    else:
        print_recommendation(recommendation, result.run.tables["certification"], result.run.record)
    print_run_location(out, result.failures, console)
    return 1 if result.failures else 0
