"""The command line: a table of commands, each imported only when it is used."""

import atexit
import errno
import json
import keyword
import os
import signal
import sys
import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

TRAINER_COMMANDS = {
    "fit": "train a stage: lmchat fit --config configs/d12_pretrain.yaml",
    "validate": "evaluate a stage's checkpoint on its validation data",
}
COMMANDS = {
    "tokenizer": "train, evaluate, show or import a tokenizer",
    "data": "download, import, check and tokenize text, show conversations",
    "eval": "evaluate a checkpoint on chat benchmarks, CORE or tasks of lm-eval",
    "chat": "talk to a model in the terminal",
    "serve": "chat page and OpenAI-compatible API of a model",
    "report": "one page about one or more runs: curves, metrics, samples, origin",
    "export": "write a model for the transformers library",
    "import": "read a model of the transformers library or of nanochat",
    "demo": "the whole pipeline at small scale, on this machine's documentation, offline",
}

USE_TORCH = ("eval", "chat", "serve", "export", "import", "demo")


def help_text() -> str:
    """The list of commands."""
    rows = "\n".join(f"  {name:<11}{text}" for name, text in {**TRAINER_COMMANDS, **COMMANDS}.items())
    return (
        "lmchat: train your own small chat model\n\n"
        f"usage: lmchat COMMAND [OPTIONS]\n\ncommands:\n{rows}\n\n"
        "`lmchat COMMAND --help` shows a command's options. Files live in $LMCHAT_BASE_DIR (~/.cache/lmchat)."
    )


def _run_trainer(args: list[str]) -> None:
    from lmchat.cli.early_checks import check_sizes
    from lmchat.cli.lean_imports import import_lightning, importing
    from lmchat.cli.short_help import FULL_HELP, overview
    from lmchat.hardware import check_address_space

    if "-h" in args or "--help" in args:
        print(overview(args[0]))
        return
    check_sizes(args)
    check_address_space()
    args = ["--help" if arg == FULL_HELP else arg for arg in args]

    with importing():
        import_lightning()
        from lmchat.cli.fit import main
    main(args)


def command_module(name: str) -> ModuleType:
    """The module of a command; it has a trailing underscore if the name is a Python keyword."""
    return import_module(f"lmchat.commands.{name}{'_' * keyword.iskeyword(name)}")


def _run_command(name: str, args: list[str]) -> None:
    from jsonargparse import auto_cli
    from jsonargparse.typing import register_type

    from lmchat.cli.argument_errors import CommandParser
    from lmchat.hardware import check_address_space
    from lmchat.paths import expand_user

    if name in USE_TORCH and not {"-h", "--help"}.intersection(args):
        check_address_space()
    register_type(Path, str, expand_user, TypeError, type_check=isinstance, fail_already_registered=False)
    module = command_module(name)
    short = getattr(module, "SHORT_OPTIONS", {})
    args = [short.get(name, name) + equals + value for name, equals, value in (arg.partition("=") for arg in args)]
    if getattr(module, "TAKES_LIST", False):
        count = next((index for index, arg in enumerate(args) if arg.startswith("-")), len(args))
        args = [*([json.dumps(args[:count])] if count else []), *args[count:]]
    auto_cli(
        module.COMMANDS,
        args=args,
        parser_class=CommandParser,
        prog=f"lmchat {name}",
        allow_abbrev=False,
        exit_on_error=False,
    )


def main(args: list[str] | None = None) -> int:
    """Runs ``lmchat ARGS`` and returns the exit status. A `UserError` prints its message without a traceback."""
    from lmchat.cli import standard_streams

    standard_streams.prepare_standard_streams()
    # For telemetry huggingface_hub also asks the Hub for a list and keeps the response unchecked: a mirror's wrong one
    # would break every download for a day.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    usual_format, warnings.formatwarning = warnings.formatwarning, _format_warning
    try:
        try:
            return _run(sys.argv[1:] if args is None else args)
        except SystemExit:  # of --help
            sys.stdout.flush()
            raise
    except (BrokenPipeError, SystemExit) as error:
        if not standard_streams.is_broken_output(error):
            raise
        standard_streams.discard_output()
        return standard_streams.BROKEN_PIPE_STATUS
    except OSError as error:
        if (message := _explain(error)) is None:
            raise
        standard_streams.discard_output()
        return _fail(message)
    except KeyboardInterrupt:  # also during imports
        return 130
    finally:
        warnings.formatwarning = usual_format
        # The process ends now, and Python would print a traceback of a further Ctrl-C.
        if args is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(help_text(), flush=True)
        return 0
    if args[0] == "--version":
        from lmchat import __version__

        print(f"lmchat {__version__}", flush=True)
        return 0
    name = args[0]
    if name not in TRAINER_COMMANDS and name not in COMMANDS:
        return _fail(f"unknown command {name!r}; the commands are {', '.join([*TRAINER_COMMANDS, *COMMANDS])}")
    from lmchat.cli.lean_imports import importing

    with importing():
        from jsonargparse import ArgumentError

        import lmchat.hardware  # noqa: F401
        from lmchat.cli.argument_errors import explain
        from lmchat.types import RankFailure, UserError

    reserve = bytearray(2**22)  # freed for the report of an out-of-memory error
    try:
        if name in TRAINER_COMMANDS:
            _run_trainer(args)
        else:
            _run_command(name, args[1:])
        sys.stdout.flush()
    except ArgumentError as error:
        return _fail(explain(str(error), args))
    except UserError as error:
        return _fail(str(error))
    except RankFailure as error:
        return _fail(str(error), status=1)
    except UnicodeDecodeError as error:
        if error.encoding.startswith("utf"):
            raise
        return _fail(f"cannot read a file in {error.encoding}, the encoding of this locale ({error}); set PYTHONUTF8=1")
    except (MemoryError, RuntimeError, ImportError) as error:
        del reserve
        return _out_of_memory(error)
    return 0


def _out_of_memory(error: Exception) -> int:
    """Reports an out-of-memory error; raises any other error."""
    from lmchat.hardware import is_out_of_memory  # already imported: there may be no memory for an import

    if not is_out_of_memory(error):
        raise error
    if (dynamo := sys.modules.get("torch._dynamo.utils")) is not None:
        atexit.unregister(dynamo.dump_compile_times)  # needs memory, and would print a traceback
    reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
    return _fail(f"out of memory ({reason:.200}); close other programs, raise `ulimit -v`, or use a smaller model")


def _explain(error: OSError) -> str | None:
    """A message with a remedy for errors about a file or a full disk; None for other errors."""
    from lmchat.paths import base_dir

    is_named = isinstance(error.filename, str)
    what, folder = f"{error.filename}: {error.strerror}" if is_named else str(error.strerror), base_dir()
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM):
        return f"{what}; make room and run it again"
    if "No usable temporary directory" in what:  # Python's test file could not be written to any of them
        return f"{what}; make room in one of them, or set TMPDIR to another folder"
    if not is_named:
        return None
    path, base = Path(error.filename).absolute(), folder.absolute()
    if not (path.is_relative_to(base) or base.is_relative_to(path)):
        return f"{what}; give another path, or make this one readable and writable"
    remedy = "set LMCHAT_BASE_DIR to a folder that can be written to"
    if isinstance(error, FileNotFoundError) and folder.is_dir():
        remedy = "put it back (a link on the way to it may point nowhere), or set LMCHAT_BASE_DIR to another folder"
    return f"{what}; lmchat keeps its files in {folder}: {remedy}"


def _fail(message: str, status: int = 2) -> int:
    print(f"lmchat: {_printable(' '.join(message.split()))}", file=sys.stderr)
    return status


def _format_warning(message: Warning | str, *_: Any, **__: Any) -> str:
    """A warning without its place in the code, which ``python -W error`` shows."""
    return "lmchat: warning: " + "\n".join(map(_printable, str(message).splitlines())) + "\n"


def _printable(line: str) -> str:
    """Escapes control characters, which may come from the contents of files."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


if __name__ == "__main__":
    sys.exit(main())
