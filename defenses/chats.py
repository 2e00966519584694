"""Edits of a chat that several defenses share; each returns a new list and leaves the given one as it was."""

from __future__ import annotations

from collections.abc import Callable

from defenses.contract import Chat, Message


def copy_chat(chat: Chat) -> Chat:
    """Return the chat as it is, in messages of its own.

    >>> copy_chat([{"role": "user", "content": "Hi"}])
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
    return [Message(role="system", content=text), *copy_chat(chat)]


def edit_last_user(chat: Chat, edit: Callable[[str], str]) -> Chat:
    """Return the chat with its last user turn edited.

    >>> edit_last_user([{"role": "user", "content": "Hi"}], str.upper)
    [{'role': 'user', 'content': 'HI'}]
    """
    last = max(place for place, message in enumerate(chat) if message["role"] == "user")
    new = copy_chat(chat)
    new[last]["content"] = edit(new[last]["content"])
    return new


def split_prefill(chat: Chat) -> tuple[Chat, str]:
    """Return the chat up to where the answer begins, and what the answer is made to begin with.

    >>> split_prefill([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Sure:"}])
    ([{'role': 'user', 'content': 'Hi'}], 'Sure:')
    """
    new = copy_chat(chat)
    return (new[:-1], new[-1]["content"]) if new and new[-1]["role"] == "assistant" else (new, "")


def prefill_response(chat: Chat, text: str) -> Chat:
    r"""Return the chat with `text` in front of its final assistant message, which is made if there is none.

    End the text in a paragraph break: then the next token begins a sentence, as an answer's first token does.
    Where answers open with a space (Llama 2), what is read goes on behind one instead of the break.

    >>> prefill_response([{"role": "user", "content": "Hi"}], "Sure:\n\n")[-1]
    {'role': 'assistant', 'content': 'Sure:\n\n'}
    """
    asked, begun = split_prefill(chat)
    return [*asked, Message(role="assistant", content=text + begun)]


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
    old = copy_chat(chat)
    return [*old[:head], *shown, *old[head:]]


def get_last_user_text(chat: Chat) -> str:
    """Return the words of the last user turn.

    >>> get_last_user_text([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}])
    'Hi'
    """
    return next(message["content"] for message in reversed(chat) if message["role"] == "user")


def replace_last_user(chat: Chat, text: str) -> Chat:
    """Return the chat with other words in its last user turn.

    >>> replace_last_user([{"role": "user", "content": "Hi"}], "Bye")
    [{'role': 'user', 'content': 'Bye'}]
    """
    return edit_last_user(chat, lambda _: text)


def build_user_chat(system_prompt: str, text: str) -> Chat:
    """Return the chat of a user's words under a system prompt; an empty one leaves the template's own.

    >>> build_user_chat("", "Hi")
    [{'role': 'user', 'content': 'Hi'}]
    """
    asked = Message(role="user", content=text)
    return [Message(role="system", content=system_prompt), asked] if system_prompt else [asked]
