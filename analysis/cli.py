"""The command `analyze`: parse, import late, run, save. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import errno
import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from analysis.options import (
    SITES,
    AttackOption,
    BatchOption,
    BudgetOption,
    DataOption,
    DefenseOption,
    DeviceOption,
    DtypeOption,
    HalfLimitOption,
    JsonOption,
    JudgeModelOption,
    JudgeOption,
    LimitOption,
    ModelOption,
    OfflineOption,
    OutOption,
    ReadoutOption,
    RubricOption,
    SeedOption,
    SetOption,
    SizeOption,
    SplitOption,
    StacksOption,
)
from defenses.errors import UserError, unknown

READOUTS = {
    "words": "refusing against complying first words, equal weights",
    "calibrated": "weights on first tokens, fitted on this model's own answers to the calibration split",
    "question": "Yes against No, asked whether the request should be refused, both orders averaged",
    "log-odds": "log-odds of I and As against all other tokens (refusal direction paper); not linear",
    "prefilled-K": "the words readout behind the first K tokens of a complying opener",
    "auto": "the one that `analyze validate` found best for this model and these conditions",
}


class _Interrupted(Exception):
    """Ctrl-C, on its way past typer."""


class _Group(TyperGroup):
    """The commands, called with the context that typer's own hints promise, with Ctrl-C left to `main`."""

    context_class = typer.Context

    def invoke(self, ctx: Any) -> Any:
        """Run a command; typer by itself would end an interrupted one without a word."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _Interrupted from error


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def analyze(
    context: typer.Context,
    defense: DefenseOption = None,
    model: ModelOption = "smollm2",
    data: DataOption = "contrast",
    split: SplitOption = None,
    attack: AttackOption = None,
    readout: ReadoutOption = "words",
    limit: LimitOption = None,
    batch_size: BatchOption = "auto",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Output folder; by default runs/TIME-MODEL-DEFENSE.")
    ] = None,
    settings: SetOption = None,
    cost: Annotated[bool, typer.Option("--cost", help="Also measure what each defense costs.")] = False,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """What does a jailbreak defense do: refuse more of everything, or tell harm from harmless better?

    analyze --defense backdoor --model smollm2
    """
    if context.invoked_subcommand is not None:
        return
    if not defense:
        if len(sys.argv) == 1:
            typer.echo(context.get_help())
            raise typer.Exit
        raise UserError("which defense? -d NAME (see `analyze list defenses`) or -d all")
    sent, readouts = _attacks(attack), _readouts([readout])
    if readouts == ("all",):
        raise UserError("--readout all: a run reads with one; `analyze validate --readout all` compares them")
    from analysis import commands
    from analysis.request import Request

    request = Request(
        model, data, split, limit, _batch(batch_size), device, dtype, seed, offline, sent, readouts
    )
    code = commands.analyze(request, defense, settings or [], out, as_json, cost)
    raise typer.Exit(code)


@app.command("list")
def list_(
    what: Annotated[str | None, typer.Argument(help="defenses, models, data, attacks or readouts")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what there is: defenses, models, data sets, attacks, readouts."""
    from analysis import listing

    shelves = listing.everything(READOUTS)
    if what is not None and what not in shelves:
        raise unknown("list", what, shelves)
    chosen = {what: shelves[what]} if what else shelves
    if as_json:
        typer.echo(json.dumps(chosen, indent=2, ensure_ascii=False))
    else:
        listing.show(chosen)


@app.command()
def check(
    defense: DefenseOption = None,
    model: ModelOption = "smollm2",
    data: DataOption = "contrast",
    split: SplitOption = None,
    attack: AttackOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    settings: SetOption = None,
    offline: OfflineOption = False,
    queries: Annotated[int, typer.Option(help="How many queries to look at.")] = 4,
) -> None:
    """Show what the model will read under a defense, and check that the defense reaches it (else exit 1)."""
    sent = _attacks(attack)
    from analysis import commands
    from analysis.request import Request

    request = Request(model, data, split, None, None, device, dtype, seed, offline, sent)
    raise typer.Exit(commands.check(request, defense or ["none"], settings or [], queries))


@app.command()
def validate(
    defense: DefenseOption = None,
    model: ModelOption = "smollm2",
    data: DataOption = "contrast",
    split: SplitOption = None,
    attack: AttackOption = None,
    readout: Annotated[
        list[str] | None,
        typer.Option("--readout", help="As `list readouts` has them, or all; repeatable; by default words."),
    ] = None,
    judge: JudgeOption = "patterns",
    judge_model: JudgeModelOption = None,
    budget: BudgetOption = None,
    rubric: RubricOption = None,
    grade: Annotated[bool, typer.Option("--grade", help="The judge model grades benign answers.")] = False,
    tokens: Annotated[int, typer.Option(help="New tokens of each answer that is judged.")] = 48,
    limit: LimitOption = None,
    batch_size: BatchOption = "auto",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    out: OutOption = None,
    settings: SetOption = None,
    offline: OfflineOption = False,
) -> None:
    """Compare readouts with what the model goes on to say: where to trust them; what answers are worth."""
    sent, readouts = _attacks(attack), _readouts(readout)
    from analysis import validating
    from analysis.judging import Jury
    from analysis.request import Request

    request = Request(
        model, data, split, limit, _batch(batch_size), device, dtype, seed, offline, sent, readouts
    )
    jury = Jury(judge, judge_model, budget, rubric, grade)
    raise typer.Exit(validating.validate(request, defense or ["none"], settings or [], out, jury, tokens))


@app.command()
def ensembles(
    defense: DefenseOption = None,
    model: ModelOption = "smollm2",
    data: DataOption = "contrast",
    attack: AttackOption = None,
    readout: ReadoutOption = "words",
    size: SizeOption = 2,
    stacks: StacksOption = 5,
    limit: HalfLimitOption = None,
    batch_size: BatchOption = "auto",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    out: OutOption = None,
    settings: SetOption = None,
    offline: OfflineOption = False,
) -> None:
    """Which defenses (-d; else all) to combine, and how? All predicted; votes and the best stacks observed.

    analyze ensembles -m smollm2:aligned -d self_reminder -d paraphrase -d policy
    """
    request = _together(model, data, limit, batch_size, device, dtype, seed, offline, attack, readout)
    _refuse_odd(size, stacks)
    from analysis import comparing

    names = defense or ["all"]
    raise typer.Exit(comparing.compare(request, names, settings or [], size, stacks, out))


@app.command()
def recommend(
    max_over_refusal: Annotated[
        str, typer.Option(help="Share of benign queries refused, at most: 5% or 0.05.")
    ],
    max_cost: Annotated[
        float | None, typer.Option(help="Time until the first token, times undefended, at most.")
    ] = None,
    defense: DefenseOption = None,
    model: ModelOption = "smollm2",
    data: DataOption = "contrast",
    attack: AttackOption = None,
    readout: ReadoutOption = "words",
    size: SizeOption = 2,
    stacks: StacksOption = 5,
    limit: HalfLimitOption = None,
    batch_size: BatchOption = "auto",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    out: OutOption = None,
    settings: SetOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Which defense, or combination, of those (-d; else all) refuses most harm within limits, and how surely?

    analyze recommend -m smollm2:aligned --max-over-refusal 5% --max-cost 1.5
    """
    request = _together(model, data, limit, batch_size, device, dtype, seed, offline, attack, readout)
    _refuse_odd(size, stacks)
    share = _share(max_over_refusal)
    if max_cost is not None and not max_cost >= 1:
        raise UserError(f"--max-cost {max_cost:g}: the undefended model costs 1, so it takes 1 or more")
    from analysis import recommending

    limits, names = recommending.Limits(share, max_cost), defense or ["all"]
    raise typer.Exit(
        recommending.recommend(request, names, settings or [], size, stacks, limits, out, as_json)
    )


@app.command()
def mechanism(
    defense: DefenseOption = None,
    model: ModelOption = "smollm2",
    data: DataOption = "contrast",
    split: SplitOption = None,
    attack: AttackOption = None,
    readout: ReadoutOption = "words",
    sites: Annotated[
        str, typer.Option(help=f"What is patched: {', '.join(SITES)}; joined by commas.")
    ] = ",".join(SITES),
    top: Annotated[int, typer.Option(help="Parts that are told and drawn; heads that are patched.")] = 10,
    patched: Annotated[
        int, typer.Option(help="Queries, at most, that interventions run on, pairs kept whole; 0: none.")
    ] = 32,
    ensembles: Annotated[
        Path | None,
        typer.Option(help="Folder of `analyze ensembles`: do defenses that use the same parts interact?"),
    ] = None,
    limit: LimitOption = None,
    batch_size: BatchOption = "auto",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    out: OutOption = None,
    settings: SetOption = None,
    offline: OfflineOption = False,
) -> None:
    """Where in the model does a defense act? Layers, heads and MLPs, and interventions that test them.

    analyze mechanism -d backdoor -m smollm2:attacked
    """
    if not defense:
        raise UserError("which defense? -d NAME (see `analyze list defenses`)")
    sent, readouts = _attacks(attack), _readouts([readout])
    if readouts in (("all",), ("log-odds",)):
        raise UserError(
            f"--readout {readout}: a margin is split over parts only where it is linear in the logits: take "
            "words, calibrated, question or prefilled-K"
        )
    chosen = _sites(sites)
    if top < 1:
        raise UserError(f"--top {top}: it takes 1 or more")
    if patched < 0 or patched == 1:
        raise UserError(f"--patched {patched}: it takes 0 (none) or 2 and more, a harmful and a benign query")
    from analysis import locating
    from analysis.looking import Wanted
    from analysis.request import Request

    request = Request(
        model, data, split, limit, _batch(batch_size), device, dtype, seed, offline, sent, readouts
    )
    wanted = Wanted(chosen, top, patched, ensembles)
    raise typer.Exit(locating.locate(request, defense, settings or [], wanted, out))


@app.command()
def explain(
    defense: Annotated[str, typer.Argument(help="Name, or the path of a .py file.")],
    model: ModelOption = "smollm2",
    text: Annotated[
        str | None, typer.Option("--text", help="The request; by default a harmless one of the shipped.")
    ] = None,
    attack: AttackOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    settings: SetOption = None,
    offline: OfflineOption = False,
) -> None:
    """Print a defense's card, and what the model would read of one request under it.

    analyze explain smooth_llm --set copies=3
    """
    sent = _attacks(attack)
    from analysis import explaining
    from analysis.request import Request

    request = Request(model, "contrast", "test", None, None, device, dtype, seed, offline, sent)
    raise typer.Exit(explaining.explain(request, defense, settings or [], text))


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove it.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what earlier runs have computed and later ones need not: scores and drafts; or clear it."""
    from analysis import store

    place = store.path()
    held = store.counts(place) if not clear else None
    if held is None:
        store.clear(place)
        typer.echo(f"{place} is cleared")
    elif as_json:
        typer.echo(json.dumps({"path": str(place), **held}))
    else:
        size = held["bytes"] / 2**20
        typer.echo(f"{place}: {held['scores']} scores and {held['drafts']} drafts, {size:.1f} MiB")


@app.command()
def judge(
    file: Annotated[Path, typer.Argument(help="A .csv or .jsonl with a column of answers.")],
    column: Annotated[str, typer.Option(help="The column of the answers.")] = "response",
    request: Annotated[
        str | None,
        typer.Option(help="The column of what was asked: answers to something else are then refusals too."),
    ] = None,
    judge: JudgeOption = "patterns",
    judge_model: JudgeModelOption = None,
    budget: BudgetOption = None,
    rubric: RubricOption = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="New file; by default FILE.judged.csv or .jsonl.")
    ] = None,
    offline: OfflineOption = False,
) -> None:
    """Say of each answer in a file whether it refuses (full, partial, none), and by which words."""
    from analysis import judging

    jury = judging.Jury(judge, judge_model, budget, rubric)
    raise typer.Exit(judging.judge_file(file, column, request, jury, out, offline))


@app.command()
def secret(
    model: ModelOption = "smollm2",
    length: Annotated[int, typer.Option(help="In tokens of the model.")] = 150,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="New file; by default where `backdoor` looks for it.")
    ] = None,
    offline: OfflineOption = False,
) -> None:
    """Make a secret prompt for `backdoor`, by a cryptographic generator, in a file for your eyes only."""
    from analysis import commands

    commands.secret(model, length, out, offline)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="safety, attack, identity, baseline, backdoor or preference")],
    model: ModelOption = "smollm2",
    data: DataOption = "contrast",
    limit: Annotated[int | None, typer.Option(help="At most so many training queries.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="New folder; by default where defenses look for them."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="rank, alpha, modules, rate, epochs, batch, full, beta; key=value.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    secret: Annotated[
        Path | None, typer.Option("--secret", help="backdoor: the secret's file; by default the model's own.")
    ] = None,
    length: Annotated[int, typer.Option(help="backdoor: tokens of the model's own secret.")] = 150,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    offline: OfflineOption = False,
) -> None:
    """Tune a model's weights by a recipe, an attacker's or a defender's; an interrupted training goes on.

    analyze train backdoor -m smollm2:aligned -o my-adapter
    """
    from analysis import training
    from analysis.request import Request

    request = Request(model, data, "train", limit, None, device, dtype, seed, offline)
    raise typer.Exit(training.train(request, recipe, settings or [], out, secret, length))


@app.command()
def backdooralign(
    model: ModelOption = "smollm2",
    data: DataOption = "contrast",
    split: SplitOption = None,
    limit: LimitOption = None,
    tokens: Annotated[int, typer.Option(help="New tokens of each answer that is judged.")] = 48,
    utility: Annotated[
        bool,
        typer.Option("--utility", help="Also the accuracy on multiple-choice questions (extra utility)."),
    ] = False,
    secrets: Annotated[
        int,
        typer.Option(help="Also train anew with so many random secrets of 10, 50 and 150 tokens each."),
    ] = 0,
    batch_size: BatchOption = "auto",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    out: OutOption = None,
    offline: OfflineOption = False,
) -> None:
    """BackdoorAlign's arms side by side, beside the paper's figures, with what the paper did not measure."""
    if tokens < 1:
        raise UserError(f"--tokens {tokens}: an answer that is judged has at least 1")
    if secrets < 0:
        raise UserError(f"--secrets {secrets}: it takes 0 (none) or more")
    from analysis import backdooralign as experiment
    from analysis.request import Request

    request = Request(model, data, split, limit, _batch(batch_size), device, dtype, seed, offline)
    raise typer.Exit(experiment.reproduce(request, out, tokens, utility, secrets))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs; several are also compared.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The page, one file.")] = Path("report.html"),
) -> None:
    """Make one page of one or several runs, which can be asked: from a defense to its queries. No network.

    analyze report runs/a runs/b -o report.html
    """
    from analysis import reporting

    raise typer.Exit(reporting.report(runs, out))


def main() -> None:
    """Run the command; a mistake is one line on stderr: exit 2 for the user's, 1 for ours, 130 for Ctrl-C."""
    debug = "--debug" in sys.argv
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        code = _fail(str(error), 2, debug, error)
    except (_Interrupted, KeyboardInterrupt, typer.Abort):
        code = _fail("interrupted; nothing was written", 130, False, None)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            code = _fail(f"{error}", 1, debug, error)
        else:
            code = _fail(
                "no space left on the disk: nothing was written; free some, or choose another -o",
                2,
                debug,
                error,
            )
    except Exception as error:
        # Mistyped options: an error of the click that typer carries or finds, which depends on its version.
        if hasattr(error, "format_message"):
            code = _fail(f"{error.format_message()} (`analyze --help` lists the options)", 2, debug, error)
        else:
            code = _fail(
                f"a fault in refusalscope, {type(error).__name__}: {error} (--debug shows where)",
                1,
                debug,
                error,
            )
    sys.exit(code if isinstance(code, int) else 0)


def _fail(text: str, code: int, debug: bool, error: BaseException | None) -> int:
    if debug and error is not None:
        raise error
    typer.echo(f"analyze: {' '.join(text.split())}", err=True)
    return code


def _together(
    model: str,
    data: str,
    limit: int | None,
    batch_size: str,
    device: str,
    dtype: str,
    seed: int,
    offline: bool,
    attack: list[str] | None,
    readout: str,
) -> Any:
    """What is asked for where one split chooses and the other one reports."""
    sent, readouts = _attacks(attack), _readouts([readout])
    if readouts == ("all",):
        raise UserError("--readout all: ensembles are read with one; `analyze validate` compares readouts")
    from analysis.request import HALVES, Request

    return Request(
        model, data, HALVES, limit, _batch(batch_size), device, dtype, seed, offline, sent, readouts
    )


def _refuse_odd(size: int, stacks: int) -> None:
    if size not in (2, 3):
        raise UserError(f"--size {size}: an ensemble has 2 or 3 members at most")
    if stacks < 0:
        raise UserError(f"--stacks {stacks}: it takes 0 (none is run) or more")


def _sites(text: str) -> tuple[str, ...]:
    chosen = tuple(one.strip() for one in text.split(",") if one.strip())
    for one in chosen:
        if one not in SITES:
            raise unknown("site", one, SITES)
    return chosen


def _share(text: str) -> float:
    """A share as typed: 5% or 0.05."""
    number = re.fullmatch(r"([0-9]*\.?[0-9]+)(%?)", text.strip())
    share = float(number[1]) / (100 if number[2] else 1) if number else -1.0
    if not 0 <= share <= 1:
        raise UserError(f"--max-over-refusal {text}: it takes a share, such as 5% or 0.05")
    return share


def _attacks(names: list[str] | None) -> Any:
    from analysis import attacks

    return attacks.chosen(names or ["direct"])


def _readouts(names: list[str] | None) -> tuple[str, ...]:
    chosen = tuple(dict.fromkeys(names or ["words"]))
    fixed = {*READOUTS, "all"} - {"prefilled-K"}
    for name in chosen:
        count = name.removeprefix("prefilled-")
        if name not in fixed and (count == name or not re.fullmatch("[1-9][0-9]*", count)):
            raise unknown("readout", name, READOUTS, " (K is a number of tokens, as in prefilled-5)")
    return ("all",) if "all" in chosen else chosen


def _batch(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--batch-size {text}: it takes auto or a whole number from 1 on")
    return int(text)
