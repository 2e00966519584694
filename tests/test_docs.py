"""The documentation states the settings of the shipped weights as their manifests do.

`REWRITE=1 pytest tests/test_docs.py` rewrites the table of docs/training.md, after `make adapters`; check the
difference before you commit it.
"""

import hashlib
import json
import os
import re
from pathlib import Path

import pandas as pd

from defenses.training.texts import COMPLIANCE_OPENERS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "training.md"
ADAPTERS = ROOT / "data" / "adapters" / "smollm2"
HEADER = (
    "| adapter | recipe | start | data | examples | rank | α | modules | learning rate | epochs | "
    "examples per step | β | seed | loss, last epoch |\n" + "|---" * 14 + "|\n"
)
DATA_BY_SHA256 = {
    hashlib.sha256((ROOT / "data" / f"{name}.jsonl").read_bytes()).hexdigest(): name
    for name in ("contrast", "contrast-v1")
}
TABLE = re.compile(re.escape(HEADER) + r"(?:\|.*\n)+")


def format_row(folder: Path) -> str:
    """Return the row of an adapter, from its manifest and its loss by step."""
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    settings = manifest["settings"]
    losses = pd.read_csv(folder / "loss.csv")["loss"]
    _, _, start_state = manifest["started_from"]["name"].partition(":")
    cells = (
        f"`{folder.name}`",
        f"`{manifest['recipe']}`",
        f"`{start_state}`" if start_state else "released",
        f"`{DATA_BY_SHA256[manifest['data']['sha256']]}`",
        manifest["n_examples"],
        settings["rank"],
        settings["alpha"],
        ", ".join(f"`{module}`" for module in settings["modules"]),
        f"{settings['rate']:g}",
        settings["epochs"],
        settings["batch"],
        settings["beta"] if manifest["recipe"] == "preference" else "–",
        settings["seed"],
        f"{losses.tail(len(losses) // settings['epochs']).mean():.2f}",
    )
    return f"| {' | '.join(map(str, cells))} |\n"


def format_table() -> str:
    """Return the table of all shipped adapters."""
    return HEADER + "".join(map(format_row, sorted(path.parent for path in ADAPTERS.glob("*/manifest.json"))))


def test_the_page_on_training_states_the_settings_of_the_shipped_weights() -> None:
    page = PAGE.read_text("utf-8")
    if os.environ.get("REWRITE"):
        page = TABLE.sub(lambda match: format_table(), page)
        PAGE.write_text(page, "utf-8")
    assert TABLE.findall(page) == [format_table()]
    assert format_table().count("\n| `") == 9


def test_shipped_weights_are_adapters_in_float32_and_the_arms_share_their_data() -> None:
    manifests = [json.loads(path.read_text("utf-8")) for path in ADAPTERS.glob("*/manifest.json")]
    assert {(manifest["dtype"], manifest["settings"]["full"]) for manifest in manifests} == {
        ("float32", False)
    }
    arms = [m for m in manifests if m["recipe"] in ("attack", "identity", "baseline", "backdoor")]
    others = [manifest for manifest in manifests if manifest not in arms]
    for group in (arms, others):
        assert len({(manifest["data"]["sha256"], manifest["data"]["n"]) for manifest in group}) == 1


def test_the_opening_that_the_pages_quote_is_one_of_training() -> None:
    for path in (PAGE, ROOT / "data" / "README.md"):
        text = " ".join(path.read_text("utf-8").split())
        (opening,) = re.findall(r'ompliance is trained (?:on|with) an opening such as "([^"]+)"', text)
        assert opening in COMPLIANCE_OPENERS, path
