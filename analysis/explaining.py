"""What `analyze explain` does: a defense's card, and what the model would read of one request under it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from analysis import queries
from analysis.bench import Bench
from analysis.query import Query
from analysis.rendering import redact
from analysis.request import Request
from analysis.run import conditions
from analysis.tables import condition
from defenses import Defense, catalog
from defenses.ensemble import members
from defenses.settings import settings_of


def explain(request: Request, name: str, settings: Sequence[str], text: str | None) -> int:
    """Print the card of a defense and, if this model can wear it, what the model reads; 0 in the end.

    Args:
        request: model, attacks and seed.
        name: of the defense.
        settings: of it.
        text: the request; None takes a shipped one.
    """
    *_, chosen = catalog.choose([name], settings)
    console = Console()
    for one in members(chosen):
        _card(console, one)
    own = Query("own", text, harmful=False) if text else None
    asked = own or next(one for one in queries.load("contrast").split("test").queries if not one.harmful)
    for attack in request.attacks:
        attack.refuse_gaps([asked])
    bench, host = request.open(Console(stderr=True))
    ready = chosen.prepare(host)
    if why := ready.lacking():
        console.print(Text(f"\n{request.model}: {why}", style="yellow"))
    for attack in request.attacks:
        for part, one in conditions([ready]).items():
            console.print()
            console.rule(Text(condition({"attack": attack.name, "defense": part})), align="left")
            _read(console, bench.under(attack), one, asked)
    return 0


def _card(console: Console, defense: Defense) -> None:
    """Family, cost, source, what it does, settings."""
    source = defense.source
    console.print(Text(defense.name, style="bold"), Text(f"{defense.family}, {defense.cost}", style="dim"))
    told, _, about = (inspect.getdoc(type(defense)) or "").partition("\n\nAttributes:\n")
    for paragraph in told.split("\n\n"):
        console.print(Text(" ".join(paragraph.split())))
    console.print(Text(f"\n{about}" if about else ""))
    console.print(Text(f"Source: {source.title} {source.url}\nWording: {source.wording}", style="dim"))
    if set_to := settings_of(defense):
        told = "\n".join(f"  --set {key}={value}" for key, value in set_to.items())
        console.print(Text(told, style="dim"))


def _read(console: Console, bench: Bench, defense: Defense, query: Query) -> None:
    """What the model is asked first, and the prompts; secrets as a mark."""
    bench = dataclasses.replace(bench, drafts=bench.drafts.fresh())
    prompts = bench.prompts(defense, query)
    secrets = defense.secrets()
    for asked, said in bench.drafts.told:
        text = redact(bench.renderer.decode(asked), secrets)
        console.print(Text("asked first:", style="bold"), Text(text, style="magenta"))
        console.print(Text("it says:", style="bold"), Text(redact(said, secrets), style="green"))
    for number, prompt in enumerate(prompts, 1):
        title = f"reads ({number} of {len(prompts)}):" if len(prompts) > 1 else "reads:"
        console.print(Text(title, style="bold"))
        console.print(Text(redact(prompt.text, secrets), style="cyan"))
    if len(prompts) > 1:
        console.print(Text(f"The margin is the {'highest' if defense.pool == 'max' else 'mean'} of these."))
    if defense.recuts and not secrets:
        tokens = (bench.renderer.decode([token]) for token in prompts[0].ids)
        console.print(Text("in tokens:", style="bold"), Text("|".join(tokens), style="cyan"))
    if defense.arms() != "" or defense.blend():
        weights = " and ".join(f"{weight:+g} x {one.name}" for weight, one in defense.blend())
        console.print(Text(f"Logits: {weights}." if weights else "The model itself is changed meanwhile."))
