"""What `analyze explain` does: a defense's card, and what the model would read of one request under it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from analysis import queries
from analysis.bench import ModelSession
from analysis.query import Query
from analysis.rendering import redact_secrets
from analysis.request import RunSpec
from analysis.run import build_conditions
from analysis.tables import format_condition
from defenses import Defense, catalog
from defenses.ensemble import list_members
from defenses.settings import get_settings


def run_explain_command(spec: RunSpec, defense_name: str, settings: Sequence[str], query_text: str | None) -> int:
    """Print the card of a defense and, if this model can wear it, what the model reads; 0 in the end.

    Args:
        spec: model, attacks and seed.
        defense_name: of the defense.
        settings: of it.
        query_text: the request; None takes a shipped one.
    """
    *_, chosen = catalog.choose_defenses([defense_name], settings)
    console = Console()
    for one in list_members(chosen):
        _print_defense_card(console, one)
    own = Query("own", query_text, harmful=False) if query_text else None
    asked = own or next(one for one in queries.load_queries("contrast").select_split("test").queries if not one.harmful)
    for attack in spec.attacks:
        attack.check_covers_queries([asked])
    bench, host = spec.open_session(Console(stderr=True))
    ready = chosen.prepare(host)
    if why := ready.missing_requirements():
        console.print(Text(f"\n{spec.model}: {why}", style="yellow"))
    for attack in spec.attacks:
        for part, one in build_conditions([ready]).items():
            console.print()
            console.rule(Text(format_condition({"attack": attack.name, "defense": part})), align="left")
            _print_prompts(console, bench.with_attack(attack), one, asked)
    return 0


def _print_defense_card(console: Console, defense: Defense) -> None:
    """Family, cost, source, what it does, settings."""
    source = defense.source
    console.print(Text(defense.name, style="bold"), Text(f"{defense.family}, {defense.cost}", style="dim"))
    told, _, about = (inspect.getdoc(type(defense)) or "").partition("\n\nAttributes:\n")
    for paragraph in told.split("\n\n"):
        console.print(Text(" ".join(paragraph.split())))
    console.print(Text(f"\n{about}" if about else ""))
    console.print(Text(f"Source: {source.title} {source.url}\nWording: {source.wording}", style="dim"))
    if set_to := get_settings(defense):
        told = "\n".join(f"  --set {key}={value}" for key, value in set_to.items())
        console.print(Text(told, style="dim"))


def _print_prompts(console: Console, session: ModelSession, defense: Defense, query: Query) -> None:
    """What the model is asked first, and the prompts; secrets as a mark."""
    session = dataclasses.replace(session, defense_calls=session.defense_calls.copy_uncached())
    prompts = session.render_query(defense, query)
    secrets = defense.secret_texts()
    for asked, said in session.defense_calls.transcript:
        text = redact_secrets(session.chat_template.decode_tokens(asked), secrets)
        console.print(Text("asked first:", style="bold"), Text(text, style="magenta"))
        console.print(Text("it says:", style="bold"), Text(redact_secrets(said, secrets), style="green"))
    for number, prompt in enumerate(prompts, 1):
        title = f"reads ({number} of {len(prompts)}):" if len(prompts) > 1 else "reads:"
        console.print(Text(title, style="bold"))
        console.print(Text(redact_secrets(prompt.text, secrets), style="cyan"))
    if len(prompts) > 1:
        console.print(Text(f"The margin is the {'highest' if defense.pool == 'max' else 'mean'} of these."))
    if defense.retokenizes and not secrets:
        tokens = (session.chat_template.decode_tokens([token]) for token in prompts[0].ids)
        console.print(Text("in tokens:", style="bold"), Text("|".join(tokens), style="cyan"))
    if defense.weights_fingerprint() != "" or defense.logit_blend():
        weights = " and ".join(f"{weight:+g} x {one.name}" for weight, one in defense.logit_blend())
        console.print(Text(f"Logits: {weights}." if weights else "The model itself is changed meanwhile."))
