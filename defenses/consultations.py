"""Several conversations with the model, held in step: what all of them ask is asked at once."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from defenses.contract import Chat, Consultation, ModelCall


def run_consultations(
    consultations: Sequence[Consultation],
) -> Generator[list[ModelCall], list[str], list[list[Chat]]]:
    """Hold several consultations as one; return the readings of each.

    Args:
        consultations: not yet begun.
    """
    readings: dict[int, list[Chat]] = {}
    said: dict[int, list[str] | None] = dict.fromkeys(range(len(consultations)))  # None begins a talk
    while said:
        asked: dict[int, list[ModelCall]] = {}
        for row, texts in said.items():
            try:
                asked[row] = consultations[row].send(texts)  # type: ignore[arg-type]
            except StopIteration as over:
                readings[row] = over.value
        if not asked:
            break
        answers = iter((yield [ask for asks in asked.values() for ask in asks]))
        said = {row: [next(answers) for _ in asks] for row, asks in asked.items()}
    return [readings[row] for row in range(len(consultations))]
