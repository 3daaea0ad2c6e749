"""The demo's last stage: sample chats with the trained model, on held-out questions."""

from itertools import islice

from lmchat.demo.run import Demo, Metrics
from lmchat.demo.tasks import Arithmetic
from lmchat.tasks import Identity, SimpleSpelling, SpellingBee
from lmchat.tasks.base import Task, graded
from lmchat.types import Conversation


def converse(run: Demo) -> Metrics:
    """Prints three short chats on held-out questions, answered by greedy decoding and graded."""
    from lmchat.checkpoint.load import find_checkpoint
    from lmchat.generation.sampling import SamplingParams
    from lmchat.serve.load import load_engine
    from lmchat.serve.terminal import TerminalChat

    engine = load_engine(find_checkpoint(run.checkpoints("rl")))
    marks = []
    for chat in script(run):
        print()
        terminal = TerminalChat(engine, SamplingParams(temperature=0))
        for task, example in chat:
            question = str(example["messages"][0]["content"])
            print(f"> {question}")
            marks.append(graded(task).evaluate(example, terminal.ask(question)))
            print("✓" if marks[-1] else "✗")
    print(f"\n{sum(marks)} of {len(marks)} answers are correct; no question was in the training data")
    return {"questions": len(marks), "right": sum(marks)}


def script(run: Demo) -> list[list[tuple[Task, Conversation]]]:
    """Questions of each chat with their tasks: identity, spelling and counting, two-step arithmetic."""
    identity, arithmetic = Identity("test"), Arithmetic("test", steps=(2, 2))
    spelling, counting = (task("test", words_path=str(run.words)) for task in (SimpleSpelling, SpellingBee))
    chats = [(identity, identity), (spelling, counting), (arithmetic, arithmetic)]
    return [[(task, _single_turn(task, number)) for number, task in enumerate(chat)] for chat in chats]


def _single_turn(task: Task, number: int) -> Conversation:
    """The example at index ``number`` among those with one question."""
    return next(islice((example for example in task if len(example["messages"]) == 2), number, None))
