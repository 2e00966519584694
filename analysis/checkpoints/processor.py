"""Processors of models that read images: loaded from a folder, without their parts for video and sound."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from defenses.errors import UserError, describe_library_error

# Of the two implementations in transformers, which differ slightly in their pixels, the one that needs no
# torchvision: the same pixels on every machine.
IMAGE_BACKEND = "pil"
_IMAGE_SETTINGS_FILES = ("processor_config.json", "preprocessor_config.json")


class _NoMedia:
    """In the place of a part that prepares videos or sound."""

    model_input_names: tuple[str, ...] = ()


def read_processor(folder: Path, config: Any, tokenizer: Any, name: str) -> Any | None:
    """Return the processor in a folder; None if the model reads text only.

    Args:
        folder: of the model.
        config: of transformers.
        tokenizer: of the model, which the processor is to use.
        name: of the model, for errors.

    Raises:
        UserError: if a model for images has no processor, or one that cannot be loaded.
    """
    import transformers
    from transformers import AutoImageProcessor, ProcessorMixin
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    if type(config) not in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        if getattr(config, "vision_config", None) is not None:  # such as Phi-4-multimodal
            raise UserError(
                f"transformers loads {name} ({config.model_type}) without images, and the queries have "
                "images: evaluate it on text, or use a model such as smolvlm or llava"
            )
        return None
    if not any((folder / file).is_file() for file in _IMAGE_SETTINGS_FILES):
        raise UserError(
            f"{name} has no {' or '.join(_IMAGE_SETTINGS_FILES)}, so that it is not known how it reads images"
        )
    try:
        settings, _ = ProcessorMixin.get_processor_dict(folder, local_files_only=True)
        class_name = settings.get("processor_class")
        processor_class = (
            getattr(transformers, class_name, None) if class_name else PROCESSOR_MAPPING[type(config)]
        )
        if processor_class is None:
            raise UserError(f"transformers has no processor {class_name!r}; update transformers")
        image_processor = AutoImageProcessor.from_pretrained(
            folder, backend=IMAGE_BACKEND, trust_remote_code=False, local_files_only=True
        )
        return build_processor(processor_class, image_processor, tokenizer, settings)
    except UserError:
        raise
    except Exception as error:  # of transformers, Pillow, or a library that the processor needs
        raise UserError(
            f"the image processor of {name} cannot be loaded: {describe_library_error(error)}"
        ) from error


def build_processor(
    processor_class: Any, image_processor: Any, tokenizer: Any, settings: dict[str, Any]
) -> Any:
    """Return a processor of a class of transformers that prepares images and text only.

    transformers prepares videos with torchvision, and without it loads no processor that could.

    Args:
        processor_class: of transformers.
        image_processor: the part for images.
        tokenizer: the part for text.
        settings: of the processor, as in its file.
    """
    known = {"image_processor": image_processor, "tokenizer": tokenizer}
    parts = {name: known.get(name, _NoMedia()) for name in processor_class.get_attributes()}
    accepted = inspect.signature(processor_class.__init__).parameters
    own_settings = {name: value for name, value in settings.items() if name in accepted and name not in parts}
    # transformers rejects a part of any other class.
    checked_class = type(
        processor_class.__name__,
        (processor_class,),
        {"check_argument_for_proper_class": lambda self, name, part: type(part)},
    )
    return checked_class(**parts, **own_settings)
