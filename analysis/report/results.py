"""The result of a command: record, tables, figures, and the texts of its queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.report.headline import (
    choose_headline_attack,
    describe_arms,
    describe_depth,
    describe_effects,
    describe_model_findings,
    describe_rank_agreement,
    describe_validity,
)
from analysis.stats.agreement import RESPONSES_READOUT
from analysis.stats.format import ColumnFormat, format_defense_name, format_estimate, format_verdict
from analysis.stats.tables import DIRECT, Trust, format_condition, has_judged_rates

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from defenses.images import QueryImage

RATE_COLUMNS: tuple[ColumnFormat, ...] = (
    ("refusal_rate", "harmful refused (%)", ".0f", 100, True),
    ("over_refusal_rate", "benign refused (%)", ".0f", 100, True),
)
_RESPONSE_COLUMNS: tuple[ColumnFormat, ...] = (
    ("response_shift", "shift (points)", "+.0f", 1, True),
    ("response_discrimination", "discrimination (points)", "+.0f", 1, True),
)
DELTA_AUROC_COLUMN: ColumnFormat = ("delta_auroc", "ΔAUROC", "+.2f", 1, True)
_MODELS_TABLES = ("pooled", "findings", "order")  # of a comparison of models only
_DIVERGENCE_COLUMNS: tuple[ColumnFormat, ...] = (
    ("kl_benign", "KL on benign queries (nats)", ".2f", 1, True),
    ("kl_12_benign", "KL of 12 tokens (nats per token)", ".2f", 1, True),
)
_MARGIN_COLUMNS: tuple[ColumnFormat, ...] = (
    ("auroc", "AUROC of the margin", ".2f", 1, True),
    DELTA_AUROC_COLUMN,
    ("shift", "shift (nats)", "+.2f", 1, True),
    ("discrimination", "discrimination (nats)", "+.2f", 1, True),
)


def choose_estimate_columns(summary: pd.DataFrame) -> tuple[ColumnFormat, ...]:
    """Return the columns of a summary for readers: refusal rates, their changes if judged, and margins."""
    is_judged = has_judged_rates(summary)
    divergence = [column for column in _DIVERGENCE_COLUMNS if column[0] in summary]
    return (*RATE_COLUMNS, *(_RESPONSE_COLUMNS if is_judged else ()), *_MARGIN_COLUMNS, *divergence)


@dataclass(frozen=True, repr=False)
class Run:
    """A run: the result of a command, just computed or read from its folder.

    Attributes:
        name: of the folder, or of the command.
        record: contents of `run.json`.
        tables: CSV tables by stem.
        files: contents of the CSV and PNG files by name; empty for a run without a folder.
        texts: texts of the queries by id; empty if they are not available.
        missing_texts_reason: why the texts are not available.
        figures: names of the figures that are saved with the run.
        images: images of the queries by id, for the report; empty if they are not available or not wanted.
        model_runs: of a run with several models, the run of each model by its short name; else empty.
    """

    name: str
    record: Mapping[str, Any]
    tables: Mapping[str, pd.DataFrame]
    files: Mapping[str, bytes] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    missing_texts_reason: str = ""
    figures: tuple[str, ...] = ()
    images: Mapping[str, QueryImage] = field(default_factory=dict)
    model_runs: Mapping[str, Run] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return the headline, failures and notices, and the names of tables and figures."""
        lines = [self.headline]
        lines += [
            f"left out: {failure['model']}: {failure['why']}"
            for failure in self.record.get("failed_models", [])
        ]
        if self.record.get("interrupted") and self.model_runs:
            lines += [
                f"interrupted: {len(self.model_runs)} of {self.record['models_wanted']} models have results"
            ]
        elif self.record.get("interrupted"):
            n_wanted = self.record.get("conditions_wanted")  # missing in older runs
            lines += [
                f"interrupted: {self.n_finished_conditions} of {n_wanted or 'all'} conditions were finished"
            ]
        lines += [
            f"failed: {_format_failed_condition(failure)}: {failure['why']}"
            for failure in self.record.get("failed", [])
        ]
        lines += [f"note: {notice}" for notice in self.record.get("notices", [])]
        lines += [f"tables: {', '.join(self.tables)}", f"figures: {', '.join(self.figures)}"]
        return "\n".join(lines)

    @property
    def n_finished_conditions(self) -> int:
        """Number of conditions that are finished, their responses included if they are judged."""
        n_scored = len(self.tables.get("summary", self.tables.get("worth", ())))
        return int(self.record.get("responses", {}).get("conditions", n_scored))

    @property
    def headline(self) -> str:
        """Summary of the result in a few sentences."""
        if "findings" in self.tables:
            return describe_model_findings(self.tables["findings"], self.model_and_data)
        if self.model_runs:
            return " ".join(run.headline for run in self.model_runs.values())
        if "arms" in self.tables:
            return describe_arms(self.tables["arms"], self.model_and_data)
        if "summary" in self.tables:
            summary = self.tables["summary"]
            return describe_effects(summary, self.model_and_data, choose_headline_attack(summary))
        if "validity" in self.tables:
            return describe_validity(self.tables["validity"], self.model_and_data)
        if "depth" in self.tables:
            return describe_depth(self.tables["depth"], self.model_and_data)
        if "agreement" in self.tables:
            return describe_rank_agreement(self.tables["agreement"], self.model)
        return f"On {self.model_and_data}: this run holds no summary of its defenses."

    def format_summary(self, attack: str | None = None) -> pd.DataFrame:
        """Return the summary formatted for reading: a row per defense, estimates with 95 % intervals.

        With several models, a row per model and defense.

        Args:
            attack: the attack to show; by default the one that the headline covers.

        Raises:
            ValueError: if the run has no summary or no such attack.
        """
        if "summary" not in self.tables:
            raise ValueError(f"{self.name} has no summary; it has {', '.join(self.tables) or 'no tables'}")
        summary = self.tables["summary"]
        chosen, known = attack or choose_headline_attack(summary), list(summary["attack"].unique())
        if chosen not in known:
            raise ValueError(f"no attack {chosen!r} in this run; it has {', '.join(map(str, known))}")
        columns = choose_estimate_columns(summary)
        rows = summary[summary["attack"] == chosen].to_dict("records")
        formatted = pd.DataFrame(
            [
                {
                    **{column[1]: format_estimate(row, column) for column in columns},
                    "verdict": format_verdict(row),
                }
                for row in rows
            ]
        )
        names = pd.Index([format_defense_name(row) for row in rows], name="defense")
        if "model" in summary:
            models = [row["model"] for row in rows]
            return formatted.set_axis(pd.MultiIndex.from_arrays([models, names], names=["model", "defense"]))
        return formatted.set_axis(names)

    def list_page_runs(self) -> list[Run]:
        """Return what a report shows of this run: itself, or the comparison of models and the run of each.

        The comparison leaves out the tables that the models' runs have as well.
        """
        if not self.model_runs:
            return [self]
        own = {
            stem: table
            for stem, table in self.tables.items()
            if stem in _MODELS_TABLES or stem in self.figures
        }
        files = {
            name: content
            for name, content in self.files.items()
            if name.removesuffix(".csv").removesuffix(".png") in own
        }
        return [replace(self, tables=own, files=files, texts={}, images={}), *self.model_runs.values()]

    @property
    def further_figures(self) -> tuple[str, ...]:
        """Names of figures that were not saved with the run, but can be drawn from its tables."""
        from analysis.plots.further_data import list_further_figures

        return tuple(name for name in list_further_figures(self.tables) if name not in self.figures)

    def draw_figure(
        self,
        name: str,
        ax: Axes | None = None,
        *,
        unit: str | None = None,
        defenses: Sequence[str] | None = None,
        title: bool | None = None,
        caption: bool | None = None,
        style: str = "screen",
        width: float | None = None,
    ) -> Figure:
        """Return one of the run's figures, drawn from its tables and record alone.

        Args:
            name: one of `figures` or `further_figures`.
            ax: axes to draw into, of a figure with one panel. They keep their size; the caption is left out.
            unit: unit of the axes of the plane: SD (within-class SDs of the margin, the default) or nats.
            defenses: names of the defenses to draw besides the undefended model; by default all.
            title: whether to write the title; by default on a screen.
            caption: whether to write the caption below the figure; by default on a screen.
            style: `screen`, or `paper`: as wide as a column (3.3 inches) or two (6.9), texts of 8 points at
                most, no title and no caption by default.
            width: of the figure in inches, instead of that of the style; texts keep their sizes.

        Raises:
            UserError: if the run has no such figure, or it cannot be drawn as asked.
        """
        from analysis.plots.figures import draw_figure
        from analysis.plots.layout import FigureError
        from defenses.errors import UserError

        tables = {**self.tables, name: self.build_figure_table(name)}
        options: dict[str, Any] = {"ax": ax, "title": title, "caption": caption, "style": style}
        options |= {"defenses": defenses, "width": width}
        try:
            return draw_figure(tables, self.record, name, unit, **options)
        except FigureError as error:
            raise UserError(str(error)) from error

    def build_figure_table(self, name: str) -> pd.DataFrame:
        """Return the table that a figure is drawn from: the stored one, or a new one of a further figure.

        Raises:
            UserError: if the run has no such figure.
        """
        from analysis.plots.further_data import build_further_points
        from defenses.errors import unknown_name_error

        if name in self.figures and name in self.tables:
            return self.tables[name]
        if name in self.further_figures:
            return build_further_points(self.tables, self.record, name)
        known = [*(figure for figure in self.figures if figure in self.tables), *self.further_figures]
        raise unknown_name_error("figure of this run", name, known)

    @property
    def model(self) -> str:
        """Name of the model."""
        return str(self.record["model"]["name"])

    @property
    def model_and_data(self) -> str:
        """Model, data set and split, as a noun phrase."""
        data = self.record["data"]
        return f"{self.model} ({data['name']}, {self.record.get('reported_on', data['split'])} split)"

    @property
    def threshold(self) -> float:
        """Margin above which the classifier says "refuse", in nats.

        Raises:
            ValueError: if each of several models has its own.
        """
        if self.model_runs:
            raise ValueError(
                f"{self.name}: each model has its own threshold, such as model_runs[…].threshold"
            )
        return float(self.record["readout"]["threshold"])

    @property
    def rate_basis(self) -> str:
        """What the refusal rates of the summary rest on; an empty text if the run has no summary."""
        from analysis.plots.captions import format_response_basis

        if "summary" not in self.tables:
            return ""
        basis = format_response_basis(self.record)
        if not basis or not has_judged_rates(self.tables["summary"]):
            return "by the readout" + "; no response was judged" * (not self.record.get("judge"))
        responses = self.record["responses"]
        n_queries = f" ({responses['queries']} queries per condition)" if "queries" in responses else ""
        n_unjudged = int(responses.get("unjudged", 0))
        unjudged = f"; {n_unjudged} {'has' if n_unjudged == 1 else 'have'} no verdict" * bool(n_unjudged)
        return basis + n_queries + unjudged

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Facts about the run, as pairs of a name and a text."""
        record = self.record
        model, data = record["model"], record["data"]
        versions = record.get("versions", {})
        facts = [
            ("Model", f"{model['name']}: {_join_known_values(model, 'id', 'revision')}".removesuffix(": ")),
            ("Weights (SHA-256)", str(model.get("sha256", ""))),
            ("Computed in", f"{record.get('dtype', '')} on {record.get('device', '')}"),
            ("Data", f"{data['name']}, {data['split']} split; SHA-256 {str(data.get('sha256', ''))[:16]}…"),
            ("Queries", f"{data['n_harmful']} harmful, {data['n_benign']} benign"),
            ("Attacks", self._describe_attacks()),
            ("Readout", f"{record['readout']['name']}: {self._describe_readout_words()}"),
            ("Threshold", self._describe_threshold()),
            ("Rates", self.rate_basis),
            ("Agreement with text", self._describe_trust()),
            ("Seed", str(record.get("seed", ""))),
            ("Versions", ", ".join(f"{package} {version}" for package, version in versions.items())),
            ("Created", str(record.get("created", ""))),
        ]
        return [(name, text) for name, text in facts if text.strip(" :,")]

    def _describe_attacks(self) -> str:
        attacks = self.record.get("attacks", [])
        return ", ".join("none (direct)" if attack == DIRECT else str(attack) for attack in attacks)

    def _describe_readout_words(self) -> str:
        readout = self.record["readout"]
        return " against ".join(
            ", ".join(repr(str(word).strip()) for word in readout.get(side, [])[:6])
            for side in ("refuse", "comply")
            if readout.get(side)
        )

    def _describe_threshold(self) -> str:
        if self.model_runs:
            return "each model's own"
        origin = self.record["readout"].get("threshold_fitted")
        text = f"{self.threshold:.3g} nats".replace("-", "\N{MINUS SIGN}")
        return f"{text}, fitted {origin}" if origin else text

    def _describe_trust(self) -> str:
        values = [
            value for by_defense in self.record.get("trusted", {}).values() for value in by_defense.values()
        ]
        if not values and "validity" in self.tables:
            validity = self.tables["validity"]
            values = list(validity.loc[validity["readout"] != RESPONSES_READOUT, "trusted"])
        counts = pd.Series(values, dtype=object).value_counts()
        return (
            "; ".join(f"{count} conditions {value}" for value, count in counts.items()) or Trust.NOT_VALIDATED
        )


def _format_failed_condition(failure: Mapping[str, Any]) -> str:
    """Return the name of a condition that failed, after that of its model in a run with several."""
    name = format_condition(failure)
    return f"{failure['model']}: {name}" if "model" in failure else name


def _join_known_values(values: Mapping[str, Any], *names: str) -> str:
    return ", ".join(str(values[name]) for name in names if values.get(name))
