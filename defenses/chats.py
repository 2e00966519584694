"""Edits of a chat that several defenses share; each returns a new list and leaves the given one as it was."""

from __future__ import annotations

from collections.abc import Callable

from defenses import Chat, Message


def copied(chat: Chat) -> Chat:
    """Return the chat as it is, in messages of its own.

    >>> copied([{"role": "user", "content": "Hi"}])
    [{'role': 'user', 'content': 'Hi'}]
    """
    return [Message(**message) for message in chat]


def prepend_system(chat: Chat, text: str) -> Chat:
    """Return the chat with `text` in front of its system turn, which is made where there is none.

    >>> prepend_system([{"role": "user", "content": "Hi"}], "Be kind.")
    [{'role': 'system', 'content': 'Be kind.'}, {'role': 'user', 'content': 'Hi'}]
    """
    if chat and chat[0]["role"] == "system":
        text = f"{text}\n\n{chat[0]['content']}"
        chat = chat[1:]
    return [Message(role="system", content=text), *copied(chat)]


def edit_last_user(chat: Chat, edit: Callable[[str], str]) -> Chat:
    """Return the chat with its last user turn edited.

    >>> edit_last_user([{"role": "user", "content": "Hi"}], str.upper)
    [{'role': 'user', 'content': 'HI'}]
    """
    last = max(place for place, message in enumerate(chat) if message["role"] == "user")
    new = copied(chat)
    new[last]["content"] = edit(new[last]["content"])
    return new


def insert_turns(chat: Chat, turns: list[tuple[str, str]]) -> Chat:
    """Return the chat with demonstration turns (user, assistant) behind its system turn.

    >>> [m["content"] for m in insert_turns([{"role": "user", "content": "Hi"}], [("a", "b")])]
    ['a', 'b', 'Hi']
    """
    head = 1 if chat and chat[0]["role"] == "system" else 0
    shown = [
        Message(role=role, content=content)
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    old = copied(chat)
    return [*old[:head], *shown, *old[head:]]
