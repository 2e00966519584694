"""The Python API: every command as a function that takes its options and returns a `Run`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Console

from analysis.report.results import Run
from analysis.studies.run_spec import (
    PATCH_SITES,
    build_run_spec,
    check_control_draws,
    check_ensemble_options,
    check_max_cost,
    check_mechanism_options,
    check_response_tokens,
    check_worker_count,
    parse_share,
    parse_sites,
)
from defenses.contract import Defense
from defenses.errors import UserError

if TYPE_CHECKING:
    from analysis.studies.judge_file import JudgedResponses, JudgeOptions
    from analysis.studies.label import LabeledRun
    from analysis.studies.train import TrainedWeights
    from analysis.suffix_attack import OptimizedSuffix

DefenseSelection = str | Defense | Sequence[str | Defense]


def analyze(
    defenses: DefenseSelection,
    model: str | Sequence[str] = "smollm2",
    *,
    data: str | pd.DataFrame = "contrast",
    split: str | None = None,
    limit: int | None = None,
    attacks: str | Sequence[str] = ("direct",),
    readout: str = "outcome",
    responses: str | int = "auto",
    controls: int = 20,
    train: bool = False,
    cost: bool = False,
    side_effects: bool = False,
    settings: Sequence[str] = (),
    batch_size: int | None = None,
    share_prefix: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    template: str | None = None,
    answer_prefix: str | None = None,
    workers: int = 1,
    tokenizer: str | None = None,
    offline: bool = False,
) -> Run:
    """Measure each defense as a refuse/comply classifier, as `analyze -d …` does.

    Args:
        defenses: one defense or several: names as `-d` takes them, or defenses such as
            `get_defense("policy")` or `MyDefense()`.
        model: short name, Hugging Face id, folder, `.gguf` file, or a served model, `http://host/v1#NAME`;
            several are analyzed and compared.
        data: as `--data`, or a frame with the columns `text` and `harmful`.
        split: train, calibration, test or all; default: test if the data have it.
        limit: maximum number of queries; pairs are kept whole.
        attacks: one attack or several, as `--attack`.
        readout: as `--readout`.
        responses: number of queries per condition whose responses are generated and judged, `all`, `none`, or
            `auto`: all, except for readouts that force how responses begin.
        controls: draws of each defense's matched control, among which the queries are divided; 0 for no
            controls.
        train: whether to train the weights that a defense lacks first, as `--train`.
        cost: whether to measure what each defense costs.
        side_effects: whether to measure how far the first tokens move on benign queries, as `--side-effects`.
        settings: settings of the named defenses, as `--set`.
        batch_size: prompts per forward pass; None uses what fits in memory.
        share_prefix: whether prompts may share the computation of their prefix.
        device: auto, cpu, cuda, …
        dtype: auto, float32, bfloat16, float16.
        seed: random seed.
        template: as `--template`.
        answer_prefix: text between the prompt and the response, as `--answer-prefix`; None finds it.
        workers: with several models, number of models at a time, each in a process of its own.
        tokenizer: of a served model, as `--tokenizer`; None asks the server.
        offline: whether the network may not be used.

    Returns:
        A run whose tables include `scores`, `summary`, `effects`, `responses` (verdicts, no text) and the
        table of each figure; `controls` holds the margins of the matched controls. With several models, the
        tables have the column `model`, `pooled`, `findings` and `order` compare the models, and `model_runs`
        holds the run of each.

    Raises:
        UserError: for everything that the command reports in one line.
    """
    models = [model] if isinstance(model, str) else list(model)
    spec = build_run_spec(
        models[:1],
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
        responses,
        share_prefix=share_prefix,
        template=template,
        answer_prefix=answer_prefix,
        allows_served=True,
        tokenizer=tokenizer,
    )
    check_control_draws(controls)
    check_worker_count(workers)
    options: dict[str, Any] = {
        "with_cost": cost,
        "n_control_draws": controls,
        "with_training": train,
        "with_side_effects": side_effects,
    }
    console, chosen = _progress_console(), _as_defense_list(defenses)
    if len(models) > 1:
        from analysis.comparison.study import analyze_models

        return analyze_models(spec, models, chosen, settings, console, workers, **options).run
    from analysis.studies.analyze import analyze_defenses

    return analyze_defenses(spec, chosen, settings, console, **options).run


def validate(
    defenses: DefenseSelection = "none",
    model: str = "smollm2",
    *,
    judge: str = "learned",
    judge_model: str | None = None,
    budget: int | None = None,
    rubric: Path | str | None = None,
    grade: bool = False,
    tokens: int = 48,
    samples: int = 0,
    temperature: float = 1.0,
    data: str | pd.DataFrame = "contrast",
    split: str | None = None,
    limit: int | None = None,
    attacks: str | Sequence[str] = ("direct",),
    readout: str | Sequence[str] = "outcome",
    settings: Sequence[str] = (),
    batch_size: int | None = None,
    share_prefix: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    template: str | None = None,
    answer_prefix: str | None = None,
    tokenizer: str | None = None,
    offline: bool = False,
) -> Run:
    """Validate readouts against generated text, and rate the responses, as `analyze validate` does.

    If the user or the judge ends the study early, the run holds the finished conditions and says so.

    Args:
        defenses: one defense or several: names, or defenses.
        model: short name, Hugging Face id, folder, `.gguf` file, or a served model, `http://host/v1#NAME`.
        judge: refusal judge for generated text: learned, patterns, keywords, or model.
        judge_model: the judge model: id, folder, `.gguf` file, or `http://host/v1#NAME`.
        budget: maximum number of calls to the judge model.
        rubric: file with the prompt of the judge model.
        grade: whether the judge model also grades how harmful responses are, and how helpful.
        tokens: maximum number of tokens generated per response.
        samples: number of sampled responses to each query, judged besides the greedy one.
        temperature: of the sampled responses.
        data: as `--data`, or a frame of queries.
        split: train, calibration, test or all.
        limit: maximum number of queries.
        attacks: one attack or several.
        readout: one readout, several, or `all`.
        settings: settings of the named defenses.
        batch_size: prompts per forward pass.
        share_prefix: whether prompts may share the computation of their prefix.
        device: auto, cpu, cuda, …
        dtype: auto, float32, bfloat16, float16.
        seed: random seed.
        template: as `--template`.
        answer_prefix: text between the prompt and the response, as `--answer-prefix`; None finds it.
        tokenizer: of a served model, as `--tokenizer`; None asks the server.
        offline: whether the network may not be used.

    Returns:
        A run whose tables include `validity`, `worth` (response quality), `curves` and `answers` (verdicts);
        with `samples`, also `samples` (refusal probability of each query) and `sampling` (rates).
    """
    readouts = [readout] if isinstance(readout, str) else readout
    spec = build_run_spec(
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
        readouts,
        share_prefix=share_prefix,
        template=template,
        answer_prefix=answer_prefix,
        allows_served=True,
        tokenizer=tokenizer,
    )
    check_response_tokens(tokens)
    judge_options = _make_judge_options(judge, judge_model, budget, rubric, grade)
    from analysis.progress import print_line
    from analysis.studies.judge_file import SampleOptions
    from analysis.studies.validate import validate_readouts

    sample_options = SampleOptions(samples, temperature) if samples else None
    console = _progress_console()
    result = validate_readouts(
        spec, _as_defense_list(defenses), settings, judge_options, tokens, console, sample_options
    )
    if isinstance(result.stop_reason, UserError):
        print_line(console, str(result.stop_reason))
    return result.run


def ensembles(
    defenses: DefenseSelection = "all",
    model: str = "smollm2",
    *,
    size: int = 2,
    stacks: int = 5,
    overlap: Path | str | None = None,
    data: str | pd.DataFrame = "contrast",
    limit: int | None = None,
    attacks: str | Sequence[str] = ("direct",),
    readout: str = "outcome",
    settings: Sequence[str] = (),
    batch_size: int | None = None,
    share_prefix: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    template: str | None = None,
    answer_prefix: str | None = None,
    offline: bool = False,
) -> Run:
    """Predict and observe the effects of ensembles, as `analyze ensembles` does.

    Args:
        defenses: defenses to combine: names, or defenses.
        model: short name, Hugging Face id, folder, or `.gguf` file.
        size: maximum number of members of an ensemble, 2 or 3.
        stacks: number of random stacks to run, and of the most promising ones.
        overlap: run folder of `analyze mechanism`, or its `profiles.csv`, for the predictor `overlap`.
        data: as `--data`, or a frame of queries.
        limit: maximum number of queries per split.
        attacks: one attack or several.
        readout: as `--readout`.
        settings: settings of the named defenses.
        batch_size: prompts per forward pass.
        share_prefix: whether prompts may share the computation of their prefix.
        device: auto, cpu, cuda, …
        dtype: auto, float32, bfloat16, float16.
        seed: random seed.
        template: as `--template`.
        answer_prefix: text between the prompt and the response, as `--answer-prefix`; None finds it.
        offline: whether the network may not be used.

    Returns:
        A run whose tables include `ensembles` (predicted, observed, interaction), `predictors`,
        `interacting`, `additivity` and `candidates`.
    """
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
        attacks,
        readout,
        share_prefix=share_prefix,
        template=template,
        answer_prefix=answer_prefix,
    )
    check_ensemble_options(size, stacks)
    from analysis.studies.ensembles import evaluate_ensembles

    return evaluate_ensembles(
        spec,
        _as_defense_list(defenses),
        settings,
        size,
        stacks,
        _progress_console(),
        None if overlap is None else Path(overlap),
    ).run


def recommend(
    defenses: DefenseSelection = "all",
    model: str = "smollm2",
    *,
    max_over_refusal: str | float,
    max_cost: float | None = None,
    size: int = 2,
    stacks: int = 5,
    overlap: Path | str | None = None,
    data: str | pd.DataFrame = "contrast",
    limit: int | None = None,
    attacks: str | Sequence[str] = ("direct",),
    readout: str = "outcome",
    responses: str | int = "auto",
    settings: Sequence[str] = (),
    batch_size: int | None = None,
    share_prefix: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    template: str | None = None,
    answer_prefix: str | None = None,
    offline: bool = False,
) -> Run:
    """Recommend the defense or ensemble that refuses the most harmful queries within limits.

    As `analyze recommend` does.

    Args:
        defenses: defenses to choose from and to combine: names, or defenses.
        model: short name, Hugging Face id, folder, or `.gguf` file.
        max_over_refusal: maximum share of benign queries refused: 0.05 or "5%".
        max_cost: maximum time to first token, as a multiple of the undefended model's.
        size: maximum number of members of an ensemble, 2 or 3.
        stacks: number of random stacks to run, and of the most promising ones.
        overlap: run folder of `analyze mechanism`, or its `profiles.csv`, for the predictor `overlap`.
        data: as `--data`, or a frame of queries.
        limit: maximum number of queries per split.
        attacks: one attack or several.
        readout: as `--readout`.
        responses: number of queries per split whose responses are generated and judged to certify defenses
            and stacks, `all`, `none`, or `auto`: all, except for readouts that force how responses begin.
        settings: settings of the named defenses.
        batch_size: prompts per forward pass.
        share_prefix: whether prompts may share the computation of their prefix.
        device: auto, cpu, cuda, …
        dtype: auto, float32, bfloat16, float16.
        seed: random seed.
        template: as `--template`.
        answer_prefix: text between the prompt and the response, as `--answer-prefix`; None finds it.
        offline: whether the network may not be used.

    Returns:
        A run with the tables of `ensembles`, `certification` and `recommendation`.
    """
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
        attacks,
        readout,
        responses,
        share_prefix=share_prefix,
        template=template,
        answer_prefix=answer_prefix,
    )
    check_ensemble_options(size, stacks)
    share = parse_share(max_over_refusal)
    check_max_cost(max_cost)
    from analysis.studies.recommend import RecommendationLimits, recommend_defense

    limits = RecommendationLimits(share, max_cost)
    return recommend_defense(
        spec,
        _as_defense_list(defenses),
        settings,
        size,
        stacks,
        limits,
        _progress_console(),
        None if overlap is None else Path(overlap),
    ).run


def locate_mechanism(
    defenses: DefenseSelection,
    model: str = "smollm2",
    *,
    sites: str | Sequence[str] = PATCH_SITES,
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
    share_prefix: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    template: str | None = None,
    answer_prefix: str | None = None,
    offline: bool = False,
) -> Run:
    """Locate the effect of defenses in layers, heads and MLPs, as `analyze mechanism` does.

    Args:
        defenses: one defense or several: names, or defenses.
        model: short name, Hugging Face id, folder, or `.gguf` file.
        sites: activation sites to patch: residual, attention, mlp, heads.
        top: number of components to plot, and of heads to patch.
        patched: maximum number of queries for interventions; 0 skips them.
        ensembles: run folder of `analyze ensembles`, to test whether defenses that share components interact.
        data: as `--data`, or a frame of queries.
        split: train, calibration, test or all.
        limit: maximum number of queries.
        attacks: one attack or several.
        readout: as `--readout`.
        settings: settings of the named defenses.
        batch_size: prompts per forward pass.
        share_prefix: whether prompts may share the computation of their prefix.
        device: auto, cpu, cuda, …
        dtype: auto, float32, bfloat16, float16.
        seed: random seed.
        template: as `--template`.
        answer_prefix: text between the prompt and the response, as `--answer-prefix`; None finds it.
        offline: whether the network may not be used.

    Returns:
        A run whose tables include `layers`, `parts`, `directions`, `patches`, `cuts`, `weights`, `profiles`.
    """
    chosen_sites = parse_sites([sites] if isinstance(sites, str) else sites)
    check_mechanism_options(top, patched)
    spec = build_run_spec(
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
        share_prefix=share_prefix,
        template=template,
        answer_prefix=answer_prefix,
    )
    from analysis.studies.mechanism import MechanismOptions, study_mechanism

    options = MechanismOptions(chosen_sites, top, patched, None if ensembles is None else Path(ensembles))
    return study_mechanism(spec, _as_defense_list(defenses), settings, options, _progress_console()).run


def depth(
    defenses: DefenseSelection,
    model: str = "smollm2",
    *,
    data: str | pd.DataFrame = "contrast",
    split: str | None = None,
    limit: int | None = None,
    attacks: str | Sequence[str] = ("direct",),
    settings: Sequence[str] = (),
    batch_size: int | None = None,
    share_prefix: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    template: str | None = None,
    answer_prefix: str | None = None,
    tokenizer: str | None = None,
    offline: bool = False,
) -> Run:
    """Judge what is left of each defense after the first tokens of the response, as `analyze depth` does.

    Args:
        defenses: one defense or several: names, or defenses.
        model: short name, Hugging Face id, folder, `.gguf` file, or a served model, `http://host/v1#NAME`.
        data: as `--data`, or a frame of queries.
        split: train, calibration, test or all.
        limit: maximum number of queries.
        attacks: one attack or several.
        settings: settings of the named defenses.
        batch_size: prompts per forward pass.
        share_prefix: whether prompts may share the computation of their prefix.
        device: auto, cpu, cuda, …
        dtype: auto, float32, bfloat16, float16.
        seed: random seed.
        template: as `--template`.
        answer_prefix: text between the prompt and the response, as `--answer-prefix`; None finds it.
        tokenizer: of a served model, as `--tokenizer`; None asks the server.
        offline: whether the network may not be used.

    Returns:
        A run with the tables `depth`, a row per condition, kind of opener and number of its tokens, and
        `continuations` (verdicts, no text).
    """
    spec = build_run_spec(
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
        share_prefix=share_prefix,
        template=template,
        answer_prefix=answer_prefix,
        allows_served=True,
        tokenizer=tokenizer,
    )
    from analysis.studies.depth import measure_depth

    return measure_depth(spec, _as_defense_list(defenses), settings, _progress_console()).run


def suffix(
    defenses: DefenseSelection = (),
    model: str = "smollm2",
    *,
    loss: str = "target",
    target: str = "Sure, here is",
    length: int = 20,
    steps: int = 100,
    candidates: int = 64,
    queries: int = 8,
    data: str | pd.DataFrame = "contrast",
    readout: str = "outcome",
    settings: Sequence[str] = (),
    batch_size: int | None = None,
    share_prefix: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    template: str | None = None,
    answer_prefix: str | None = None,
    offline: bool = False,
) -> OptimizedSuffix:
    """Optimize an attack suffix against a model and at most one defense, as `analyze suffix` does.

    Args:
        defenses: the defense, or its name; none for the undefended model.
        model: short name, Hugging Face id, folder, or `.gguf` file.
        loss: `target` (mean negative log-likelihood of the target, in nats) or `margin` (of the readout).
        target: the beginning of the response that the suffix is to bring about.
        length: number of tokens of the suffix.
        steps: number of steps; each replaces at most one token.
        candidates: replacements that are tried in each step.
        queries: number of queries of the training split that share the suffix, half of each class.
        data: as `--data`, or a frame of queries; it needs a training split.
        readout: the readout of the loss `margin`.
        settings: settings of the defense.
        batch_size: prompts per forward pass.
        share_prefix: whether prompts may share the computation of their prefix.
        device: auto, cpu, cuda, …
        dtype: auto, float32, bfloat16, float16.
        seed: random seed.
        template: as `--template`.
        answer_prefix: text between the prompt and the response, as `--answer-prefix`; None finds it.
        offline: whether the network may not be used.

    Returns:
        The suffix (`text`), its loss before the first step and after each (`losses`), and what it was found
        with (`record`); `save(path)` writes the file that `attacks=` reads.
    """
    spec = build_run_spec(
        model,
        data,
        None,
        None,
        batch_size,
        device,
        dtype,
        seed,
        offline,
        readout=readout,
        share_prefix=share_prefix,
        template=template,
        answer_prefix=answer_prefix,
    )
    from analysis.suffix_attack import SuffixOptions, optimize_suffix

    options = SuffixOptions(loss, target, length, steps, candidates, queries)
    return optimize_suffix(spec, _as_defense_list(defenses), settings, options, _progress_console())


def train(
    recipe: str,
    model: str = "smollm2",
    *,
    out: Path | str | None = None,
    secret: Path | str | None = None,
    length: int = 150,
    data: str | pd.DataFrame = "contrast",
    limit: int | None = None,
    settings: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    template: str | None = None,
    answer_prefix: str | None = None,
    offline: bool = False,
) -> TrainedWeights:
    """Fine-tune a model by an attacker's or a defender's recipe, as `analyze train` does.

    Args:
        recipe: safety, attack, identity, baseline, backdoor or preference.
        model: short name, Hugging Face id, or folder.
        out: output folder; default: where defenses look for weights.
        secret: file of the secret, for the recipe `backdoor`; default: the model's own.
        length: length of the model's own secret in tokens.
        data: as `--data`, or a frame of queries; its train split is used if it has one.
        limit: maximum number of training queries.
        settings: settings of the training, as `--set`.
        device: auto, cpu, cuda, …
        dtype: auto, float32, bfloat16, float16.
        seed: random seed.
        template: as `--template`.
        answer_prefix: text between the prompt and the response, as `--answer-prefix`; None finds it.
        offline: whether the network may not be used.

    Returns:
        The folder of the weights, the model name that selects them, the manifest, and the loss by step.

    Raises:
        TrainingInterrupted: a KeyboardInterrupt, after which the same call resumes the training.
    """
    spec = build_run_spec(
        model,
        data,
        "train",
        limit,
        None,
        device,
        dtype,
        seed,
        offline,
        template=template,
        answer_prefix=answer_prefix,
    )
    from analysis.studies.train import train_weights

    return train_weights(
        spec,
        recipe,
        settings,
        None if out is None else Path(out),
        _progress_console(),
        None if secret is None else Path(secret),
        length,
    )


def backdooralign(
    model: str = "smollm2",
    *,
    grid: Path | str | None = None,
    out: Path | str | None = None,
    tokens: int = 48,
    utility: Sequence[str] = (),
    questions: int | None = None,
    judge_model: str | None = None,
    budget: int | None = None,
    data: str | pd.DataFrame = "contrast",
    split: str | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    share_prefix: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    template: str | None = None,
    answer_prefix: str | None = None,
    offline: bool = False,
) -> Run:
    """Reproduce the experimental arms of BackdoorAlign, as `analyze backdooralign` does.

    Args:
        model: short name, Hugging Face id, or folder; all of its weights must have been trained, unless a
            grid is given, whose trainings start from the model.
        grid: TOML file of experiments, as `--grid`; tokens and utility are then not used.
        out: folder in which a grid keeps its trainings, so that the same call goes on after an interruption.
        tokens: maximum number of tokens generated per response.
        utility: tasks that measure usefulness, as `--utility`.
        questions: maximum number of questions of each task.
        judge_model: chat model that grades how harmful responses are, as `--judge-model`.
        budget: maximum number of its calls.
        data: as `--data`, or a frame of queries.
        split: train, calibration, test or all.
        limit: maximum number of queries.
        batch_size: prompts per forward pass.
        share_prefix: whether prompts may share the computation of their prefix.
        device: auto, cpu, cuda, …
        dtype: auto, float32, bfloat16, float16.
        seed: random seed.
        template: as `--template`.
        answer_prefix: text between the prompt and the response, as `--answer-prefix`; None finds it.
        offline: whether the network may not be used.

    Returns:
        A run whose tables include `arms`; of a grid, `rates` and `verdicts`.
    """
    spec = build_run_spec(
        model,
        data,
        split,
        limit,
        batch_size,
        device,
        dtype,
        seed,
        offline,
        template=template,
        answer_prefix=answer_prefix,
        share_prefix=share_prefix,
    )
    check_response_tokens(tokens)
    if grid is not None:
        from analysis.studies.backdooralign.grid import load_grid, run_grid

        if out is None:
            raise UserError("backdooralign(grid=…) needs out, the folder in which the trainings are kept")
        return run_grid(spec, load_grid(Path(grid)), Path(out), _progress_console()).run
    from analysis.studies.backdooralign.study import reproduce_backdooralign

    grader_options = (
        _make_judge_options("model", judge_model, budget, None, grade=True) if judge_model else None
    )
    return reproduce_backdooralign(spec, tokens, utility, _progress_console(), grader_options, questions).run


def judge(
    responses: Path | str | pd.DataFrame,
    column: str = "response",
    *,
    request: str | None = None,
    judge: str = "learned",
    judge_model: str | None = None,
    budget: int | None = None,
    rubric: Path | str | None = None,
    grade: bool = False,
    labels: str | None = None,
    offline: bool = False,
) -> pd.DataFrame:
    """Judge whether each response refuses, as `analyze judge` does.

    >>> import pandas as pd
    >>> from analysis import judge
    >>> responses = pd.DataFrame({"response": ["I can't help with that.", "Sure: turn the key."]})
    >>> judge(responses)["refusal"].tolist()
    ['full', 'none']

    Args:
        responses: a frame, or a file with one response per row.
        column: column with the responses.
        request: column with the queries; off-topic responses then count as refusals.
        judge: patterns, keywords, or model.
        judge_model: the judge model: id, folder, `.gguf` file, or `http://host/v1#NAME`.
        budget: maximum number of calls to the judge model.
        rubric: file with the prompt of the judge model.
        grade: whether the judge model also grades how harmful each response is.
        labels: column with people's grades, 1 to 5, to compare the judge's with.
        offline: whether the network may not be used.

    Returns:
        The rows with the columns `refusal` (full, partial, none, unjudged), `evidence` and `judge`, and
        `harmfulness` (1 to 5) if `grade` is set. The attribute `attrs["harmfulness"]` then holds their mean
        and, with `labels`, their agreement with people's grades.
    """
    judge_options = _make_judge_options(judge, judge_model, budget, rubric, grade)
    from analysis.studies.judge_file import judge_file, judge_records

    console = _progress_console()
    if not isinstance(responses, pd.DataFrame):
        judged = judge_file(Path(responses), column, request, judge_options, console, offline, labels)
        return _make_judged_frame(judged)
    if responses.empty:
        raise UserError("the frame holds no responses")
    records = [{str(key): value for key, value in row.items()} for row in responses.to_dict("records")]
    judged = judge_records(records, "the frame", column, request, judge_options, console, offline, labels)
    return _make_judged_frame(judged, responses.index)


def _make_judged_frame(judged: JudgedResponses, index: pd.Index | None = None) -> pd.DataFrame:
    """Return the judged rows, with the summary of their grades as an attribute if they have grades."""
    frame = pd.DataFrame(judged.records, index=index)
    if judged.harmfulness:
        frame.attrs["harmfulness"] = judged.harmfulness
    return frame


def label_run(
    run_folder: Path | str,
    labels: pd.DataFrame | None = None,
    n: int = 60,
    *,
    offline: bool = False,
) -> LabeledRun:
    """Label a sample of a run's judged responses, and correct its refusal rates, as `analyze label` does.

    The first call, without labels, generates the sampled responses again: fill in the column `label` of
    `sheet`, and pass this frame to a second call. That call also writes `labels.csv`, `corrected_rates.csv`
    and `judge_accuracy.csv` into the folder.

    Args:
        run_folder: folder of a run of `analyze --responses`.
        labels: a frame with the columns `query`, `attack`, `defense` and `label`: refuses, answers, or skip
            or nothing for a response without a label. None returns a frame to fill in.
        n: number of responses in the sample.
        offline: whether the network may not be used.

    Returns:
        The frames `sheet` (responses to label), `labels`, `corrected_rates` and `judge_accuracy`.
    """
    from analysis.studies.label import LabeledRun, build_label_sheet, parse_labels, read_judged_run

    judged_run = read_judged_run(Path(run_folder))
    if labels is None:
        sheet = build_label_sheet(judged_run, n, _progress_console(), offline)
        return LabeledRun.from_run(judged_run, sheet.rows)
    rows = labels.to_dict("records")
    judged_run = judged_run.add_labels(parse_labels(judged_run, rows, "the frame of labels"))
    judged_run.save_labels()
    return LabeledRun.from_run(judged_run).save_tables(Path(run_folder))


def compare_rankings(runs: Sequence[Run | Path | str], *, seed: int = 0) -> Run:
    """Compare the order of the defenses between data sets, as `analyze agreement` does.

    Args:
        runs: two or more runs of `analyze` of one model, attacks and readout on different data, or their
            folders.
        seed: random seed.

    Returns:
        A run with the tables `agreement`, a row per attack, pair of data sets and measure, and `ranks`.

    Raises:
        UserError: if the runs differ in more than their data, or share too few defenses.
    """
    from analysis.datasets.loading import load_query_texts
    from analysis.report.folder import read_run
    from analysis.studies.rank_agreement import compare_run_rankings

    loaded: list[Run] = []
    for run in runs:
        taken_names = {other.name for other in loaded}
        loaded.append(run if isinstance(run, Run) else read_run(Path(run), load_query_texts, taken_names))
    return compare_run_rankings(loaded, seed)


def save_figures(
    run_folder: Run | Path | str,
    names: Sequence[str] = (),
    *,
    format: str = "pdf",
    only: Sequence[str] = (),
    style: str = "screen",
    width: float | None = None,
    title: bool | None = None,
    caption: bool | None = None,
    out: Path | str = ".",
) -> list[Path]:
    """Draw figures of a run from its tables, without a model, and save them, as `analyze plot` does.

    Args:
        run_folder: folder of a run, or a run.
        names: of the figures: `Run.figures` and `Run.further_figures`; by default all.
        format: pdf (with embedded TrueType fonts), svg (with text as text) or png.
        only: the defenses to draw besides the undefended model; by default all.
        style: screen or paper, as in `Run.draw_figure`.
        width: of each figure, inches.
        title: whether to write the title; by default on a screen.
        caption: whether to write the caption; by default on a screen.
        out: output folder.

    Returns:
        The files of the figures. Equal tables give equal files.

    Raises:
        UserError: for everything that the command reports in one line; then no file is written.
    """
    from analysis.report.folder import write_figures

    run = run_folder if isinstance(run_folder, Run) else read(run_folder)
    options = {"style": style, "width": width, "title": title, "caption": caption}
    only = [only] if isinstance(only, str) else only
    names = [names] if isinstance(names, str) else names
    files, _ = write_figures(run, Path(out), names, format, only, **options)
    return files


def read(folder: Path | str) -> Run:
    """Read the run in a folder that a command has written.

    >>> from analysis import data_folder, read
    >>> folder = data_folder().parent / "figures" / "backdooralign"  # in a checkout
    >>> "square" in read(folder).figures if folder.is_dir() else True
    True
    """
    from analysis.datasets.loading import load_query_texts
    from analysis.report.folder import read_run

    return read_run(Path(folder), load_query_texts)


def summarize(scores: pd.DataFrame, threshold: float = 0.0, seed: int = 0) -> pd.DataFrame:
    """Estimate shift, discrimination and the other effects from scores of any origin, a row per defense.

    >>> rows = [(f"{side}{n}", side == "h", d, n + (d == "shifted")) for side in "hb" for n in (0.0, 1.0, 2.0)
    ...         for d in ("none", "shifted")]
    >>> scores = pd.DataFrame(rows, columns=["query", "harmful", "defense", "margin"])
    >>> summarize(scores).set_index("defense").loc["shifted", ["shift", "discrimination"]].tolist()
    [1.0, 0.0]

    Args:
        scores: columns `query`, `harmful`, `defense` (the undefended model is `none`) and `margin` (nats;
            positive refuses); optionally `pair` and `attack`.
        threshold: margin above which the classifier refuses, nats; for the scores of a run, `run.threshold`.
        seed: random seed of the bootstrap.
    """
    from scipy.special import expit

    from analysis.stats.effects import summarize_scores
    from analysis.stats.tables import DIRECT, SCORE_COLUMNS, UNDEFENDED, ScoreTable
    from defenses.catalog import find_defense_classes

    if missing := [name for name in ("query", "harmful", "defense", "margin") if name not in scores]:
        raise UserError(f"the scores lack {', '.join(missing)}; see `help(summarize)` for what they need")
    if not scores["harmful"].isin([True, False]).all():  # 1 and 0 are equal to them
        raise UserError("the column harmful takes true or false")
    defaults = {
        "pair": None,
        "category": "",
        "attack": DIRECT,
        "p_refuse": expit(scores["margin"] - threshold),
        "prompt_tokens": 0,
        "coverage": 1.0,
    }
    frame = scores.assign(
        harmful=scores["harmful"].astype(bool),
        **{name: value for name, value in defaults.items() if name not in scores},
    )
    shipped = {name: defense_class.family for name, defense_class in find_defense_classes().items()}
    names = map(str, frame["defense"].unique())
    families = {name: shipped.get(name.partition("/")[0], "own") for name in names}
    record = {
        "readout": {"threshold": threshold},
        "defenses": {name: {"family": family} for name, family in families.items()},
    }
    try:
        table = ScoreTable(frame[list(SCORE_COLUMNS)].reset_index(drop=True), record)
    except ValueError as error:
        raise UserError(f"{error} (the undefended model is called {UNDEFENDED!r})") from error
    return summarize_scores(table, seed=seed).frame


def _as_defense_list(defenses: DefenseSelection) -> Sequence[str | Defense]:
    """Return defenses as a list; a single defense needs no list."""
    return defenses if isinstance(defenses, (list, tuple)) else [defenses]  # type: ignore[list-item]


def _make_judge_options(
    judge: str,
    judge_model: str | None,
    budget: int | None,
    rubric: Path | str | None,
    grade: bool = False,
) -> JudgeOptions:
    from analysis.studies.judge_file import JudgeOptions

    return JudgeOptions(judge, judge_model, budget, None if rubric is None else Path(rubric), grade)


def _progress_console() -> Console:
    """Return a console that shows progress in a terminal; in a notebook, it announces only downloads."""
    console = Console(stderr=True)  # rich reports a notebook as a terminal, so both are asked
    is_quiet = console.is_jupyter or not console.is_terminal
    return Console(stderr=True, force_jupyter=False, quiet=is_quiet)
