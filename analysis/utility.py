"""What a defense costs in ordinary knowledge: accuracy on small multiple-choice questions.

The questions are this project's own (`data/utility.jsonl`); lm-evaluation-harness asks them through the
model's chat template and takes the choice with the highest likelihood. No network is used.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import os
from contextlib import redirect_stderr
from typing import Any

from analysis import data_folder
from analysis.models import LoadedModel
from defenses import UserError

_UTILITY_TASK = "refusalscope_utility"


def check_harness_installed() -> None:
    """Raise where lm-evaluation-harness is not installed; asked before the work, not after it."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--utility needs lm-evaluation-harness: pip install 'refusalscope[utility]'")


def count_correct_answers(loaded_model: LoadedModel, system_prompt: str) -> tuple[int, int]:
    """Return how many questions are answered right under a system prompt, and of how many.

    Args:
        loaded_model: the model, with the weights it is to be asked with.
        system_prompt: the system prompt; empty leaves the template's own.
    """
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with redirect_stderr(io.StringIO()):  # the harness draws bars of its own
        asked: Any = HFLM(pretrained=loaded_model.model, tokenizer=loaded_model.tokenizer, batch_size=16)
        found: Any = simple_evaluate(
            model=asked,
            tasks=[_utility_task_config()],
            apply_chat_template=True,
            system_instruction=system_prompt or None,
            bootstrap_iters=0,
        )
    right = [sample["acc"] for sample in found["samples"][_UTILITY_TASK]]
    return int(sum(right)), len(right)


def _utility_task_config() -> dict[str, Any]:
    return {
        "task": _UTILITY_TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(data_folder() / "utility.jsonl")},
        "test_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
