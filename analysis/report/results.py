"""A run, just made or read from its folder: record, tables, figures, and the texts of its queries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.report.headline import (
    choose_headline_attack,
    describe_arms,
    describe_effects,
    describe_validity,
)
from analysis.stats.format import ColumnFormat, format_defense_name, format_estimate, format_verdict
from analysis.stats.tables import DIRECT, UNVALIDATED, format_condition

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ESTIMATE_COLUMNS: tuple[ColumnFormat, ...] = (
    ("refusal_rate", "harmful refused (%)", ".0f", 100, True),
    ("over_refusal_rate", "benign refused (%)", ".0f", 100, True),
    ("auroc", "AUROC", ".2f", 1, True),
    ("delta_auroc", "ΔAUROC", "+.2f", 1, True),
    ("shift", "shift (nats)", "+.2f", 1, True),
    ("discrimination", "discrimination (nats)", "+.2f", 1, True),
)


@dataclass(frozen=True, repr=False)
class Run:
    """A run, just made or as it lies in its folder.

    Attributes:
        name: of the folder, or what was done.
        record: its `run.json`.
        tables: its CSV files, by stem.
        files: its CSV and PNG files, by name; of a run that lies in no folder there are none.
        texts: of its queries, by id; empty where they could not be had.
        missing_texts_reason: why there are no texts.
        figures: what `figure` draws.
    """

    name: str
    record: Mapping[str, Any]
    tables: Mapping[str, pd.DataFrame]
    files: Mapping[str, bytes] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    missing_texts_reason: str = ""
    figures: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Return what a reader wants to know first: what the intervals say, and what there is to look at."""
        lines = [self.headline]
        if self.record.get("interrupted"):
            done = len(self.tables.get("summary", self.tables.get("worth", ())))
            wanted = self.record.get("conditions_wanted")  # older runs do not say
            lines += [f"interrupted: {done} of {wanted or 'all'} conditions were finished"]
        lines += [f"failed: {format_condition(one)}: {one['why']}" for one in self.record.get("failed", [])]
        lines += [f"note: {one}" for one in self.record.get("notices", [])]
        lines += [f"tables: {', '.join(self.tables)}", f"figures: {', '.join(self.figures)}"]
        return "\n".join(lines)

    @property
    def headline(self) -> str:
        """What its intervals allow one to say, in a few sentences."""
        if "arms" in self.tables:
            return describe_arms(self.tables["arms"], self.model_and_data)
        if "summary" in self.tables:
            summary = self.tables["summary"]
            return describe_effects(summary, self.model_and_data, choose_headline_attack(summary))
        if "validity" in self.tables:
            return describe_validity(self.tables["validity"], self.model_and_data)
        return f"On {self.model_and_data}: this run holds no summary of its defenses."

    def format_summary(self, attack: str | None = None) -> pd.DataFrame:
        """Return the summary as people read it: a row per defense, each estimate with its 95 % interval.

        Args:
            attack: of which attack; by default the first that a headline is about.
        """
        if "summary" not in self.tables:
            raise ValueError(f"{self.name} has no summary; it has {', '.join(self.tables) or 'no tables'}")
        summary = self.tables["summary"]
        sent, known = attack or choose_headline_attack(summary), list(summary["attack"].unique())
        if sent not in known:
            raise ValueError(f"no attack {sent!r} in this run; it has {', '.join(map(str, known))}")
        rows = summary[summary["attack"] == sent].to_dict("records")
        lines = {
            format_defense_name(row): {
                **{one[1]: format_estimate(row, one) for one in ESTIMATE_COLUMNS},
                "what the intervals say": format_verdict(row),
            }
            for row in rows
        }
        return pd.DataFrame.from_dict(lines, orient="index").rename_axis("defense")

    def draw_figure(self, name: str) -> Figure:
        """Return one of the run's figures, with title and caption.

        Args:
            name: one of `figures`.
        """
        from analysis.plots.figures import draw_figure

        return draw_figure(self, name)

    @property
    def model(self) -> str:
        """The model's name."""
        return str(self.record["model"]["name"])

    @property
    def model_and_data(self) -> str:
        """Model and data, as they read behind "on"."""
        data = self.record["data"]
        return f"{self.model} ({data['name']}, {self.record.get('reported_on', data['split'])} split)"

    @property
    def threshold(self) -> float:
        """The margin above which the readout says "refuse"."""
        return float(self.record["readout"]["threshold"])

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What was run, as name and words."""
        record = self.record
        model, data, readout = record["model"], record["data"], record["readout"]
        words = " against ".join(
            ", ".join(repr(str(word).strip()) for word in readout.get(side, [])[:6])
            for side in ("refuse", "comply")
            if readout.get(side)
        )
        known = [
            one for per_attack in record.get("trusted", {}).values() for one in per_attack.values()
        ] or list(self.tables.get("validity", pd.DataFrame({"trusted": []}))["trusted"])
        counts = pd.Series(known, dtype=object).value_counts()
        trust = "; ".join(f"{count} conditions {word}" for word, count in counts.items()) or UNVALIDATED
        sent = ["none (as they are)" if one == DIRECT else str(one) for one in record.get("attacks", [])]
        fitted = f", fitted {readout['threshold_fitted']}" if readout.get("threshold_fitted") else ""
        found = [
            ("Model", f"{model['name']}: {_join_known_values(model, 'id', 'revision')}"),
            ("Weights (SHA-256)", str(model.get("sha256", ""))),
            ("Computed in", f"{record.get('dtype', '')} on {record.get('device', '')}"),
            ("Data", f"{data['name']}, {data['split']} split; SHA-256 {str(data.get('sha256', ''))[:16]}…"),
            ("Queries", f"{data['n_harmful']} harmful, {data['n_benign']} benign"),
            (
                "Attacks",
                ", ".join(sent),
            ),
            ("Readout", f"{readout['name']}: {words}"),
            ("Threshold", f"{self.threshold:.3g} nats".replace("-", "\N{MINUS SIGN}") + fitted),
            ("Readout against text", trust),
            ("Seed", str(record.get("seed", ""))),
            ("Versions", ", ".join(f"{name} {one}" for name, one in record.get("versions", {}).items())),
            ("Made", str(record.get("created", ""))),
        ]
        return [(name, words) for name, words in found if words.strip(" :,")]


def _join_known_values(values: Mapping[str, Any], *names: str) -> str:
    return ", ".join(str(values[name]) for name in names if values.get(name))
