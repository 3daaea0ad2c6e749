"""Tasks: conversations to train on and to be graded by.

Importing this package makes each task known to configs by its short class name.
"""

from lmchat.tasks.base import Task
from lmchat.tasks.gsm8k import GSM8K
from lmchat.tasks.humaneval import HumanEval
from lmchat.tasks.identity import Identity
from lmchat.tasks.jsonl import JSONLConversations, SmolTalk
from lmchat.tasks.multiple_choice import ARC, MMLU
from lmchat.tasks.spelling import SimpleSpelling, SpellingBee

__all__ = [
    "ARC",
    "GSM8K",
    "MMLU",
    "HumanEval",
    "Identity",
    "JSONLConversations",
    "SimpleSpelling",
    "SmolTalk",
    "SpellingBee",
    "Task",
]
