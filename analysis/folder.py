"""A run, just made or read from its folder: record, tables, figures, and the texts of its queries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.captions import Context
from analysis.cells import Column, named, told, verdict
from analysis.headline import first_attack, headline, of_arms, of_validity
from analysis.tables import DIRECT, UNVALIDATED, condition

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ESTIMATES: tuple[Column, ...] = (
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
        unread: why there are no texts.
        figures: what `figure` draws.
    """

    name: str
    record: Mapping[str, Any]
    tables: Mapping[str, pd.DataFrame]
    files: Mapping[str, bytes] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    unread: str = ""
    figures: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Return what a reader wants to know first: what the intervals say, and what there is to look at."""
        lines = [self.headline]
        if self.record.get("interrupted"):
            done = len(self.tables.get("summary", self.tables.get("worth", ())))
            wanted = self.record.get("conditions_wanted")  # older runs do not say
            lines += [f"interrupted: {done} of {wanted or 'all'} conditions were finished"]
        lines += [f"failed: {condition(one)}: {one['why']}" for one in self.record.get("failed", [])]
        lines += [f"note: {one}" for one in self.record.get("notices", [])]
        lines += [f"tables: {', '.join(self.tables)}", f"figures: {', '.join(self.figures)}"]
        return "\n".join(lines)

    @property
    def headline(self) -> str:
        """What its intervals allow one to say, in a few sentences."""
        if "arms" in self.tables:
            return of_arms(self.tables["arms"], self.where)
        if "summary" in self.tables:
            summary = self.tables["summary"]
            return headline(summary, self.where, first_attack(summary))
        if "validity" in self.tables:
            return of_validity(self.tables["validity"], self.where)
        return f"On {self.where}: this run holds no summary of its defenses."

    def brief(self, attack: str | None = None) -> pd.DataFrame:
        """Return the summary as people read it: a row per defense, each estimate with its 95 % interval.

        Args:
            attack: of which attack; by default the first that a headline is about.
        """
        if "summary" not in self.tables:
            raise ValueError(f"{self.name} has no summary; it has {', '.join(self.tables) or 'no tables'}")
        summary = self.tables["summary"]
        sent, known = attack or first_attack(summary), list(summary["attack"].unique())
        if sent not in known:
            raise ValueError(f"no attack {sent!r} in this run; it has {', '.join(map(str, known))}")
        rows = summary[summary["attack"] == sent].to_dict("records")
        lines = {
            named(row): {
                **{one[1]: told(row, one) for one in ESTIMATES},
                "what the intervals say": verdict(row),
            }
            for row in rows
        }
        return pd.DataFrame.from_dict(lines, orient="index").rename_axis("defense")

    def figure(self, name: str) -> Figure:
        """Return one of the run's figures, with title and caption.

        Args:
            name: one of `figures`.
        """
        from analysis.gallery import figure

        return figure(self, name)

    @property
    def model(self) -> str:
        """The model's name."""
        return str(self.record["model"]["name"])

    @property
    def where(self) -> str:
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
            ("Model", f"{model['name']}: {_words(model, 'id', 'revision')}"),
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


def context(record: Mapping[str, Any], read_by: str = "") -> Context:
    """Return what captions say about a run.

    Args:
        record: its `run.json`.
        read_by: name of the readout, where the run has several.
    """
    data = record["data"]
    (readout,) = [one for one in record.get("readouts", []) if one["name"] == read_by] or [record["readout"]]
    fitted = readout.get("threshold_fitted")
    return Context(
        model=_model(record),
        data=str(data["name"]),
        split=str(record.get("reported_on", data["split"])),
        threshold=float(readout["threshold"]),
        readout=_read(readout),
        judge=f"fitted {fitted}" if fitted else "no judge: first-token readout",
        refusing=tuple(str(token).strip() for token in readout.get("refuse", [])),
        complying=tuple(str(token).strip() for token in readout.get("comply", [])),
    )


def _read(readout: Mapping[str, Any]) -> str:
    """How logits are read, as a caption puts it in front of the words."""
    name = str(readout["name"])
    if readout.get("questions"):
        return "first-token logits, asked whether the request should be refused, of"
    if name.startswith("prefilled-"):
        return f"behind {name.removeprefix('prefilled-')} tokens of a complying opener, logits of"
    odds = readout.get("log_odds")
    return "log-odds, against all other first tokens, of" if odds else "first-token logits of"


def _model(record: Mapping[str, Any]) -> str:
    """The model as a reader would look it up: a path says nothing to anyone else."""
    name, found = str(record["model"]["name"]), str(record["model"].get("id", record["model"]["name"]))
    known = [found] if "/" in name or name == found else [name, found]
    return f"{known[0]} ({', '.join([*known[1:], *filter(None, [record.get('dtype')])])})".removesuffix(" ()")


def _words(values: Mapping[str, Any], *names: str) -> str:
    return ", ".join(str(values[name]) for name in names if values.get(name))
