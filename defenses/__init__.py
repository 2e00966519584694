"""Jailbreak defenses: the contract that each one implements, and lookup by name.

A defense is one short frozen dataclass in its family's module, or in a file of the user's own
(`analyze --defense ./mine.py`). Its fields are its settings; its docstring says what it changes and which
mechanism its authors expect; nothing else has to be edited. This package imports nothing from `analysis`.
"""

from defenses.catalog import get_defense, list_defense_names
from defenses.contract import (
    Chat,
    Consultation,
    Defense,
    MeanActivations,
    Message,
    ModelCall,
    ModelInfo,
    Source,
)
from defenses.errors import UserError

__all__ = [
    "Chat",
    "Consultation",
    "Defense",
    "MeanActivations",
    "Message",
    "ModelCall",
    "ModelInfo",
    "Source",
    "UserError",
    "get_defense",
    "list_defense_names",
]
