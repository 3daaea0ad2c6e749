"""Tasks that only the demo uses."""

from lmchat.demo.tasks.arithmetic import Arithmetic
from lmchat.demo.tasks.dialogue import Dialogue

__all__ = ["Arithmetic", "Dialogue"]
