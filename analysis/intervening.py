"""Interventions on one defense: what is patched, cut off or switched on, and what that does to contrasts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis import located, states
from analysis.asking import SITES
from analysis.located import Asked
from analysis.tables import UNDEFENDED
from defenses import Defense, catalog

if TYPE_CHECKING:
    from analysis.bench import Bench
    from analysis.looking import Room
    from analysis.mechanism.causes import Contrasted

_CONTROL = "neutral_prompt"


def intervene(
    room: Room, bench: Bench, attack: str, name: str, undefended: Defense, defense: Defense
) -> None:
    """Patch, cut and switch one defense, on the sample.

    Args:
        room: of the run; what is found is added to it.
        bench: that asks under the attack.
        attack: its name.
        name: of the defense.
        undefended: what it is compared with.
        defense: itself.
    """
    from analysis.mechanism import cutting, switching
    from analysis.mechanism.causes import Contrasted

    pair = Contrasted(bench, room.anatomy, room.ready.readout, undefended, defense, room.sample)
    if room.ready.readout.questions:
        room.note(
            f"no interventions: --readout {room.ready.readout.name} asks several questions about a query"
        )
        return
    if not pair.one_prompt():
        room.note(f"{name} reads several prompts, or several models, for one query: it is not intervened on")
        return
    asked = room.of(room.sample)
    sizes = dict(zip(("n_harmful", "n_benign"), asked.counts, strict=True))
    ids = [query.id for query in room.sample]
    before = room.scores.condition(attack, UNDEFENDED).loc[ids, "margin"].to_numpy(float)
    with room.guarded(attack, name, defense):
        _patch(room, pair, asked, attack, name)
    with room.guarded(attack, name, defense):
        own = pair.own_tokens()
        if why := cutting.uncut(bench.loaded.model):
            room.note(f"no cuts: {why}")
        elif any(map(any, own)):
            if not all(map(any, own)):
                room.note(f"{name} has no tokens of its own in some prompts, which are left as they are")
            with room.steps(f"cutting attention to {name}", len(ids)) as done:
                cells, left = pair.cuts(own, before, done)
            found = asked.contrasts(left).assign(
                reader=[reader for reader, _ in cells],
                first=[layers.start if layers else -1 for _, layers in cells],
                last=[layers.stop - 1 for _, layers in cells],
            )
            room.add(attack, name, cuts=found.assign(**sizes))
    with room.guarded(attack, name, defense):
        if weights := switching.changed(bench.loaded.model, defense):
            with room.steps(f"switching {name} on", len(switching.switches(weights))) as done:
                named, change = pair.switches(weights, before, done)
            found = asked.contrasts(change).assign(
                how=[how for how, _, _ in named],
                layer=pd.array([layer for _, layer, _ in named], dtype="Int64"),
                module=[module for *_, module in named],
            )
            room.add(attack, name, weights=found.assign(**sizes))


def _patch(room: Room, pair: Contrasted, asked: Asked, attack: str, name: str) -> None:
    """Patch every layer and the top heads; compare heads with what their slopes say."""
    from analysis.mechanism.causes import agreement

    wanted, heads = room.wanted, []
    if "heads" in wanted.sites:
        with room.steps(f"slopes of heads under {name}", len(room.sample)) as done:
            every, guessed = pair.slopes(done)
        slopes = asked.contrasts(guessed)
        size = slopes[list(located.CONTRASTS)].abs().max(axis=1).to_numpy()
        order = list(np.argsort(-size))
        chance = np.random.default_rng(room.seed).permutation(order[wanted.top :])[: wanted.top]
        picked = sorted([*order[: wanted.top], *chance])
        heads = [every[place] for place in picked]
        room.add(attack, name, slopes=pd.concat([located.named(every), slopes], axis=1))
    sites = pair.patcher.sites([kind for kind in SITES[:-1] if kind in wanted.sites], heads)
    if not sites:
        return
    controls = _controls(room, pair, name)
    with room.steps(f"patching {name}", 2 * len(room.sample)) as done:
        changes = pair.patches(sites, controls, room.seed, done)
    harmful, benign = asked.counts
    for (into, source), change in changes.items():
        found = pd.concat([located.named(sites), asked.contrasts(change)], axis=1)
        found = found.assign(into=into, source=source, n_harmful=harmful, n_benign=benign)
        room.add(attack, name, patches=found)
        if heads and (into, source) == ("undefended", "defense"):
            exact = found[found["kind"] == "head"]
            for contrast in located.CONTRASTS:
                both = slopes[contrast].to_numpy()[picked], exact[contrast].to_numpy()
                about = {"attack": attack, "defense": name, "contrast": contrast}
                room.agreement.append(about | agreement(*both))


def _controls(room: Room, pair: Contrasted, name: str) -> dict[str, Defense]:
    """A neutral prompt as long as the defense's."""
    if (wanted := pair.longer(pair.defense)) < 1:
        room.note(f"{name} makes prompts no longer: no neutral prompt is patched for comparison")
        return {}
    host = states.host(pair.bench.loaded.name, pair.bench.loaded.tokenizer, room.seed)
    length = wanted
    for _ in range(2):  # turns and breaks come with it, and a default system turn may go
        control = catalog.get(_CONTROL, {"length": str(max(1, length))}).prepare(host)
        adds = pair.longer(control)
        length += wanted - adds
    room.controls.append({"defense": name, "tokens": wanted, "control_tokens": adds})
    return {_CONTROL: control}
