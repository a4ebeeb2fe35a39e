"""The `plan` command: finds the subcommand, and turns what goes wrong into one message and an exit code.

Nothing heavy is imported before it is needed: `plan --help` and a cached answer load neither torch nor
transformers, ortools, pandas or plotly.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from planner.commands import options
from planner.commands.layout import Page, clean
from planner.errors import InfeasibleError, InputError, PlanError

# Modules of planner.commands, whose `run(argv)` does the work; where none is named, "plan" does.
COMMANDS = ("memory", "models", "gpus", "show", "verify", "check", "explain", "simulate", "compare", "calibrate")
# What shells report for a process that SIGINT or SIGPIPE ended.
INTERRUPTED = 130
PIPE_CLOSED = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run `plan` with the arguments given (else those of the process) and return its exit code.

    0: done. 1: a fault of our own. 2 to 6: the `exit_code` of the PlanError met. 130: interrupted.
    141: nobody reads stdout any more.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _command(words)
    except SystemExit as exc:  # --help and --version
        return exc.code if isinstance(exc.code, int) else 0
    except KeyboardInterrupt:
        print("plan: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _silence_stdout()
        return PIPE_CLOSED
    except Exception as exc:
        return _fail(exc, words)


def entry() -> NoReturn:
    """Run `plan` as a process of its own, and leave at once.

    Taking torch and its like apart at the interpreter's exit costs most of a second, and nothing is left to be done.
    """
    code = main()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _command(words: list[str]) -> int:
    name = "plan"
    if words and not words[0].startswith("-"):
        name, *words = words
        if name not in COMMANDS:
            raise InputError(
                f"there is no command {name!r}: to plan a model write plan --model {name}; "
                f"the commands are {', '.join(COMMANDS)}"
            )
    run: Callable[[Sequence[str]], int] = importlib.import_module(f"planner.commands.{name}").run
    return run(words)


def _fail(exc: Exception, words: Sequence[str]) -> int:
    """Tell what went wrong, on stderr or with --json as the one document on stdout; return the exit code."""
    if "--debug" in words:
        traceback.print_exception(exc)
    if isinstance(exc, PlanError):
        told, code = exc.as_dict(), exc.exit_code
    else:
        message = f"a fault of plan itself: {type(exc).__name__}: {exc}"
        told, code = {"error": type(exc).__name__, "message": message, "exit_code": 1}, 1
    message = " ".join(str(told["message"]).split())
    if code == 1 and "--debug" not in words:
        message += " (--debug shows where)"
    if "--json" in words:
        try:
            options.say_json(json.dumps({**told, "message": message}, indent=1, default=str))
            return code
        except BrokenPipeError:
            _silence_stdout()
            return PIPE_CLOSED
        except InputError:
            pass
    print(f"plan: error: {clean(message)}", file=sys.stderr)
    if isinstance(exc, InfeasibleError):
        _tell_fixes(exc)
    _silence_stdout(only_if_broken=True)
    return code


def _tell_fixes(exc: InfeasibleError) -> None:
    """Tell on stderr what would make it fit, where that was looked for."""
    from planner.fixes import lines

    page = Page(color=False)
    for line in lines(exc):
        page.paragraph(line.removeprefix("  - "), first="  - " if line.startswith("  - ") else "")
    sys.stderr.write(page.text().lstrip("\n"))


def _silence_stdout(*, only_if_broken: bool = False) -> None:
    """Let the interpreter's last flush go nowhere, so that it does not complain of a stdout that is gone."""
    with contextlib.suppress(OSError, ValueError):
        if only_if_broken:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                return
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    entry()
