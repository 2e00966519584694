"""Figures of where a defense acts show what their tables say, all of it can be read, from 2 layers to 80."""

import io
import itertools
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import readable
from matplotlib.axes import Axes
from matplotlib.colors import same_color, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from analysis.anatomy import DRAWN, of_mechanism
from analysis.captions import Context
from analysis.heads import NONE
from analysis.likeness import likeness
from analysis.palette import GREY
from analysis.panels import CONTRASTS, LOOKS

RUN = Context("SmolLM2-135M-Instruct (float32)", "twins", "test", -1.0, ("I", "Sorry"), ("Sure", "Here"))
NAMES = (
    *("backdoor", "backdoor/no_weights", "self_reminder+backdoor", "smoothllm(copies=5)"),
    *("policy", "refusal_direction", "paraphrase", "in_context", "retokenize"),
)
LONG = "./somewhere/a_defense_with_a_very_long_name.py(copies=10,$q$=0.1)+"
MANNERS: dict[str, dict[str, Any]] = {
    "tiny": {"layers": 2, "heads": 4, "defenses": 1},
    "usual": {"layers": 12, "heads": 9, "defenses": 3},
    "large": {"layers": 80, "heads": 64, "defenses": 8},
    "crowd": {"layers": 24, "heads": 16, "defenses": 9, "ranges": 12},
    "long": {"layers": 6, "heads": 4, "defenses": 2, "name": 3 * LONG},
    "attacked": {"layers": 4, "heads": 2, "defenses": 2, "attacks": ("direct", "./my attack.py")},
    "bare": {"layers": 4, "heads": 3, "defenses": 2, "sure": False},
}


def estimated(rows: pd.DataFrame, column: str, values: Any, sure: bool = True) -> None:
    """Add an estimate with its interval, which is missing in some rows, or in all."""
    wide = np.where(np.arange(len(rows)) % 17 == 3, np.nan, 0.05 + 0.2 * np.abs(values)) if sure else np.nan
    rows[column], rows[f"{column}_low"], rows[f"{column}_high"] = values, values - wide, values + 1.5 * wide


def planted(
    layers: int,
    heads: int,
    defenses: int,
    ranges: int = 4,
    name: str = "",
    attacks: tuple[str, ...] = ("direct",),
    sure: bool = True,
) -> dict[str, pd.DataFrame]:
    """Return all tables of `analyze mechanism`."""
    generator = np.random.default_rng(layers)
    made: dict[str, list[pd.DataFrame]] = {}
    for attack, (number, defense) in itertools.product(attacks, enumerate(NAMES[:defenses])):
        about = {"attack": attack, "defense": name + defense}
        rise = 1 / (1 + np.exp(-(np.arange(layers + 1) - layers * (0.3 + 0.05 * number)) / (layers / 12)))
        tables = {
            "layers": pd.DataFrame({"layer": range(layers + 1)}),
            "half": pd.DataFrame({"contrast": [*CONTRASTS], "half": [layers // 2, np.nan if number else 1]}),
        }
        kinds = [(None, "embedding", None), (None, "bias", None)]
        for layer in range(layers):
            kinds += [(layer, "head", head) for head in range(heads)] + [(layer, "mlp", None)]
        kinds += [(layers // 2, "added", None)] * (number % 2)
        tables["parts"] = pd.DataFrame(kinds, columns=["layer", "kind", "head"]).astype(
            {"layer": "Int64", "head": "Int64"}
        )
        both = itertools.product(range(layers + 1), ("refusal", "harmfulness"))
        tables["directions"] = pd.DataFrame(both, columns=["layer", "direction"])
        tables["directions"]["chosen"] = tables["directions"]["layer"] == layers // 2
        sources = ("defense", "placebo", "neutral_prompt")
        cells = [
            (into, source, kind, layer, None)
            for into in ("undefended", "defended")
            for source in sources
            for kind in ("residual", "attention", "mlp")
            for layer in range(layers)
        ]
        cells += [
            ("undefended", source, "head", layer, layer % heads)
            for source in sources[:2]
            for layer in range(layers)
        ]
        tables["patches"] = pd.DataFrame(cells, columns=["into", "source", "kind", "layer", "head"])
        tables["patches"] = tables["patches"].assign(n_harmful=24, n_benign=20)
        edges = np.unique(np.linspace(0, layers, ranges + 1).astype(int))
        spans = [(-1, -1), *zip(edges[:-1], edges[1:] - 1, strict=True)]
        tables["cuts"] = pd.DataFrame(
            [(reader, *span) for reader in ("answer", "everything") for span in spans],
            columns=["reader", "first", "last"],
        )
        ways = [(how, layer, None) for how in ("alone", "up to") for layer in range(layers)]
        ways += [("module", None, module) for module in ("q_proj", "k_proj", "v_proj", "down_proj")]
        tables["weights"] = pd.DataFrame(ways, columns=["how", "layer", "module"])
        others = [(other, contrast) for other in NAMES[number + 1 : defenses] for contrast in CONTRASTS]
        tables["profiles"] = pd.DataFrame(others, columns=["other", "contrast"])
        tables["profiles"]["other"] = name + tables["profiles"]["other"]
        for kind, table in tables.items():
            size = len(table)
            for contrast, most in (("shift", 2.5), ("discrimination", -0.6)):
                if kind == "layers":
                    estimated(table, contrast, most * rise + generator.normal(0, 0.03, size), sure)
                elif kind not in ("half", "profiles"):
                    noise = generator.normal(0, 0.05 if kind == "directions" else 0.1, size)
                    up = np.where(table.get("source", table.index) == "placebo", 0.0, most / 3)
                    estimated(table, contrast, noise + (0 if kind == "parts" else up), sure)
            if kind == "half":
                table["half_low"], table["half_high"] = table["half"] - 1, table["half"] + 0.5
                estimated(table, "final", np.array([2.5, -0.6]), sure)
            elif kind == "directions":
                for column, base in (("auroc", 0.85), ("auroc_after", 0.7)):
                    estimated(
                        table,
                        column,
                        base
                        + generator.uniform(-0.02, 0.02, size)
                        + 0.05 * np.sin(np.arange(size) / size * 6),
                        sure,
                    )
            elif kind == "profiles":
                estimated(table, "cosine", generator.uniform(-1, 1, size), sure)
            if kind == "parts":
                mlp = table["kind"] == "mlp"
                for end in ("", "_low", "_high"):
                    table.loc[mlp, f"shift{end}"] *= 3
            made.setdefault(kind, []).append(table.assign(**about)[[*about, *table.columns]])
    return {kind: pd.concat([part for part in parts if len(part)] or parts) for kind, parts in made.items()}


@cache
def made(manner: str) -> dict[str, tuple[Figure, pd.DataFrame]]:
    return of_mechanism(planted(**MANNERS[manner]), RUN, counts=(50, 40))
