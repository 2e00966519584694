"""Cascade of text recognition and a text model: the text in an image stands where the image would.

A cascade sees the text in an image and nothing else of it. It is no vision-language model: it shows what a
text model does with requests that are written into images, once something has read them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from typing import Any

from analysis.models.cache import get_cache_kind_folder, read_cached_json, write_cached_json
from defenses.contract import Chat, Message
from defenses.errors import UserError
from defenses.images import QueryImage
from defenses.ocr import MISSING_OCR, is_ocr_installed, read_image_text


class OcrReader:
    """Replaces images by the text that is recognized in them; texts are kept for later runs.

    Raises:
        UserError: if RapidOCR is not installed.
    """

    def __init__(self) -> None:
        if not is_ocr_installed():
            raise UserError(MISSING_OCR)

    @property
    def identity(self) -> dict[str, Any]:
        """What the recognized texts depend on, in plain values, for run.json and cache keys."""
        return {"ocr": f"rapidocr {importlib.metadata.version('rapidocr')}"}

    def replace_images(self, chat: Chat) -> Chat:
        """Return the chat with the text of each image, if it has any, before the message's own."""
        replaced = []
        for message in chat:
            texts = [self.read_text(message["image"])] if "image" in message else []
            content = "\n\n".join(text for text in [*texts, message["content"]] if text)
            replaced.append(Message(role=message["role"], content=content))
        return replaced

    def read_text(self, image: QueryImage) -> str:
        """Return the text in an image, from the cache if it was read before; empty if there is none."""
        settings = json.dumps([image.digest, self.identity], sort_keys=True)
        name = hashlib.sha256(settings.encode()).hexdigest()[:32]
        path = get_cache_kind_folder("image_texts") / f"{name}.json"
        text = read_cached_json(path, lambda content: str(content["text"]))
        if text is None:
            text = read_image_text(image)
            write_cached_json(path, {"text": text})
        return text
