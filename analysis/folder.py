"""What the report knows of a run: its folder's record, tables and files, and the texts of its queries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from analysis.captions import Context
from analysis.tables import DIRECT, UNVALIDATED


@dataclass(frozen=True)
class Run:
    """A run, as it lies in its folder.

    Attributes:
        name: of the folder, unlike that of any other run of the page.
        record: its `run.json`.
        tables: its CSV files, by stem; read are those that the page shows.
        files: its CSV and PNG files, by name.
        texts: of its queries, by id; empty where they could not be had.
        unread: why there are no texts.
    """

    name: str
    record: Mapping[str, Any]
    tables: Mapping[str, pd.DataFrame]
    files: Mapping[str, bytes]
    texts: Mapping[str, str] = field(default_factory=dict)
    unread: str = ""

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

    @property
    def context(self) -> Context:
        """What captions say about the run."""
        record, readout = self.record, self.record["readout"]
        fitted = readout.get("threshold_fitted")
        how = "log-odds, against all other first tokens, of" if readout.get("log_odds") else ""
        how = how or (
            "first-token logits, asked whether the request should be refused, of"
            if readout.get("questions")
            else "first-token logits of"
        )
        return Context(
            model=f"{self.model} ({record.get('dtype', '')})",
            data=str(record["data"]["name"]),
            split=str(record["data"]["split"]),
            threshold=self.threshold,
            readout=how,
            judge=f"fitted {fitted}" if fitted else "no judge: first-token readout",
            refusing=tuple(str(token).strip() for token in readout.get("refuse", [])),
            complying=tuple(str(token).strip() for token in readout.get("comply", [])),
        )


def _words(values: Mapping[str, Any], *names: str) -> str:
    return ", ".join(str(values[name]) for name in names if values.get(name))
