"""Tasks: conversations to train on and to be graded by.

Importing this package makes each task known to configs by its short class name.
"""

from lmchat.tasks.base import Task as Task
from lmchat.tasks.gsm8k import GSM8K as GSM8K
from lmchat.tasks.humaneval import HumanEval as HumanEval
from lmchat.tasks.identity import Identity as Identity
from lmchat.tasks.jsonl import JSONLConversations as JSONLConversations
from lmchat.tasks.jsonl import SmolTalk as SmolTalk
from lmchat.tasks.multiple_choice import ARC as ARC
from lmchat.tasks.multiple_choice import MMLU as MMLU
from lmchat.tasks.spelling import SimpleSpelling as SimpleSpelling
from lmchat.tasks.spelling import SpellingBee as SpellingBee
