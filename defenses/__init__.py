"""Jailbreak defenses: the interface that each one implements, and lookup by name.

A defense is one short frozen dataclass in the module of its family, or in a user's file
(`analyze --defense ./mine.py`). Its fields are its settings; its docstring states what it changes and which
mechanism its authors expect. Adding one requires no other edit. This package imports nothing from `analysis`.
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
    QueryChat,
    RequestReader,
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
    "QueryChat",
    "RequestReader",
    "Source",
    "UserError",
    "get_defense",
    "list_defense_names",
]
