"""Images of a chat: loaded when they are needed, and edited by defenses and attacks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from defenses.chats import copy_chat
from defenses.contract import Chat

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class QueryImage:
    """An image that belongs to a user message.

    Attributes:
        name: path of the file, or what was drawn; for messages.
        digest: SHA-256 of everything that the pixels depend on: the file's content, and every edit.
        load: returns the pixels, in mode RGB.
    """

    name: str
    digest: str
    load: Callable[[], Image] = field(compare=False, repr=False)

    def edit(self, change: Callable[[Image], Image], identity: str | None = None) -> QueryImage:
        """Return the image with its pixels changed.

        Args:
            change: RGB image → RGB image, deterministic; it is called whenever the pixels are needed.
            identity: names the change and all its settings, the random seed included. None digests the
                pixels of the result instead, which takes longer.
        """

        def load() -> Image:
            return change(self.load())

        if identity is None:
            pixels = load()
            content = f"{pixels.size}".encode() + pixels.tobytes()
            return QueryImage(self.name, hashlib.sha256(content).hexdigest(), load)
        digest = hashlib.sha256(f"{self.digest}/{identity}".encode()).hexdigest()
        return QueryImage(self.name, digest, load)


def get_last_image(chat: Chat) -> QueryImage | None:
    """Return the image of the last user turn; None if it has none."""
    return next((message.get("image") for message in reversed(chat) if message["role"] == "user"), None)


def replace_last_image(chat: Chat, image: QueryImage | None) -> Chat:
    """Return the chat with the image of its last user turn replaced; None removes it.

    >>> replace_last_image([{"role": "user", "content": "Hi"}], None)
    [{'role': 'user', 'content': 'Hi'}]
    """
    last = max(index for index, message in enumerate(chat) if message["role"] == "user")
    new_chat = copy_chat(chat)
    new_chat[last].pop("image", None)
    if image is not None:
        new_chat[last]["image"] = image
    return new_chat


def edit_images(chat: Chat, change: Callable[[Image], Image], identity: str | None = None) -> Chat:
    """Return the chat with the images of all its turns edited.

    Args:
        chat: the chat.
        change: as for `QueryImage.edit`.
        identity: as for `QueryImage.edit`.
    """
    new_chat = copy_chat(chat)
    for message in new_chat:
        if "image" in message:
            message["image"] = message["image"].edit(change, identity)
    return new_chat


def edit_last_image(chat: Chat, change: Callable[[Image], Image], identity: str | None = None) -> Chat:
    """Return the chat with the image of its last user turn edited; a turn without an image stays.

    Args:
        chat: the chat.
        change: as for `QueryImage.edit`.
        identity: as for `QueryImage.edit`.
    """
    image = get_last_image(chat)
    return chat if image is None else replace_last_image(chat, image.edit(change, identity))
