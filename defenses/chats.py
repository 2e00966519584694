"""Edits of a chat that several defenses share; each returns a new list and leaves its argument unchanged."""

from __future__ import annotations

from collections.abc import Callable

from defenses.contract import Chat, Message


def copy_chat(chat: Chat) -> Chat:
    """Return a copy of the chat with new messages.

    >>> copy_chat([{"role": "user", "content": "Hi"}])
    [{'role': 'user', 'content': 'Hi'}]
    """
    return [Message(**message) for message in chat]


def build_user_chat(system_prompt: str, text: str) -> Chat:
    """Return a chat of one user turn under a system prompt; an empty one leaves the template's default.

    >>> build_user_chat("", "Hi")
    [{'role': 'user', 'content': 'Hi'}]
    """
    user_turn = Message(role="user", content=text)
    return [Message(role="system", content=system_prompt), user_turn] if system_prompt else [user_turn]


def prepend_system(chat: Chat, text: str) -> Chat:
    """Return the chat with `text` before the content of its system turn, which is added if it has none.

    >>> prepend_system([{"role": "user", "content": "Hi"}], "Be kind.")
    [{'role': 'system', 'content': 'Be kind.'}, {'role': 'user', 'content': 'Hi'}]
    """
    if chat and chat[0]["role"] == "system":
        text = f"{text}\n\n{chat[0]['content']}"
        chat = chat[1:]
    return [Message(role="system", content=text), *copy_chat(chat)]


def insert_turns(chat: Chat, turns: list[tuple[str, str]]) -> Chat:
    """Return the chat with demonstration turns (user, assistant) after its system turn.

    >>> [m["content"] for m in insert_turns([{"role": "user", "content": "Hi"}], [("a", "b")])]
    ['a', 'b', 'Hi']
    """
    n_system_turns = 1 if chat and chat[0]["role"] == "system" else 0
    demonstrations = [
        Message(role=role, content=content)
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    new_chat = copy_chat(chat)
    return [*new_chat[:n_system_turns], *demonstrations, *new_chat[n_system_turns:]]


def get_last_user_text(chat: Chat) -> str:
    """Return the content of the last user turn.

    >>> get_last_user_text([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}])
    'Hi'
    """
    return next(message["content"] for message in reversed(chat) if message["role"] == "user")


def edit_last_user(chat: Chat, edit: Callable[[str], str]) -> Chat:
    """Return the chat with its last user turn edited.

    >>> edit_last_user([{"role": "user", "content": "Hi"}], str.upper)
    [{'role': 'user', 'content': 'HI'}]
    """
    last = max(index for index, message in enumerate(chat) if message["role"] == "user")
    new_chat = copy_chat(chat)
    new_chat[last]["content"] = edit(new_chat[last]["content"])
    return new_chat


def replace_last_user(chat: Chat, text: str) -> Chat:
    """Return the chat with the content of its last user turn replaced.

    >>> replace_last_user([{"role": "user", "content": "Hi"}], "Bye")
    [{'role': 'user', 'content': 'Bye'}]
    """
    return edit_last_user(chat, lambda _: text)


def split_prefill(chat: Chat) -> tuple[Chat, str]:
    """Return the chat up to the response, and the prefill of the response (empty if there is none).

    >>> split_prefill([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Sure:"}])
    ([{'role': 'user', 'content': 'Hi'}], 'Sure:')
    """
    new_chat = copy_chat(chat)
    if new_chat and new_chat[-1]["role"] == "assistant":
        return new_chat[:-1], new_chat[-1]["content"]
    return new_chat, ""


def prefill_response(chat: Chat, text: str) -> Chat:
    r"""Return the chat with `text` at the start of its final assistant message, which is added if missing.

    End the text with a paragraph break, so that the next token starts a sentence, as the first token of a
    response does. For models whose responses start with a space (Llama 2), the chat template replaces the
    break with a space.

    >>> prefill_response([{"role": "user", "content": "Hi"}], "Sure:\n\n")[-1]
    {'role': 'assistant', 'content': 'Sure:\n\n'}
    """
    prompt, prefill = split_prefill(chat)
    return [*prompt, Message(role="assistant", content=text + prefill)]
