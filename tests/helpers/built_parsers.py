"""The parser of `lmchat fit` is built once per process: tests run hundreds of command lines in one."""

from __future__ import annotations

from typing import Any

PARTS = ("parser", "_subcommand_parsers", "_subcommand_method_arguments")


def keep_parsers() -> None:
    """Makes `LMChatCLI` use the parser that a command line before it has built; parsing does not change it."""
    from lmchat.cli.fit import LMChatCLI

    build, built = LMChatCLI.setup_parser, dict[Any, dict[str, Any]]()

    def setup_parser(self: LMChatCLI, *args: Any) -> None:
        key = type(self), self._command
        if key not in built:
            build(self, *args)
            built[key] = {name: vars(self)[name] for name in PARTS}
        vars(self).update(built[key])

    LMChatCLI.setup_parser = setup_parser  # type: ignore[method-assign]
