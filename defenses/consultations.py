"""Runs several conversations between a defense and the model in lockstep, so that their calls are batched."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from defenses.contract import Chat, Consultation, ModelCall


def run_consultations(
    consultations: Sequence[Consultation],
) -> Generator[list[ModelCall], list[str], list[list[Chat]]]:
    """Run several consultations as one: yield the calls of all, and pass each its responses.

    Args:
        consultations: generators that have not been started.

    Returns:
        The chats that each consultation returned, in order.
    """
    chats_by_index: dict[int, list[Chat]] = {}
    # None starts a generator.
    responses_by_index: dict[int, list[str] | None] = dict.fromkeys(range(len(consultations)))
    while responses_by_index:
        calls_by_index: dict[int, list[ModelCall]] = {}
        for index, responses in responses_by_index.items():
            try:
                calls_by_index[index] = consultations[index].send(responses)  # type: ignore[arg-type]
            except StopIteration as stop:
                chats_by_index[index] = stop.value
        if not calls_by_index:
            break
        new_responses = iter((yield [call for calls in calls_by_index.values() for call in calls]))
        responses_by_index = {
            index: [next(new_responses) for _ in calls] for index, calls in calls_by_index.items()
        }
    return [chats_by_index[index] for index in range(len(consultations))]
