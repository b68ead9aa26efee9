"""``tulle``: dispatch and exit codes.

0: done. 2: bad input, with one line on standard error. 130: interrupted. Anything else is a fault of ours and exits
with 1 and one line; ``--debug``, anywhere on the line, shows the traceback.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

import typer

from tulle.cli.common import quiet_libraries
from tulle.cli.compress import compress
from tulle.cli.demo import demo
from tulle.cli.engine import bench, chat, generate
from tulle.cli.eval import evaluate
from tulle.cli.export import export
from tulle.cli.inspect import inspect
from tulle.cli.law import app as law
from tulle.cli.recover import recover
from tulle.cli.serve import serve
from tulle.cli.train import train
from tulle.errors import UserError

INTERRUPTED = 130
app = typer.Typer(
    name="tulle",
    help="Make Transformer language models sparse and low-bit, and run them.",
    epilog="Start with: tulle demo. Every command has --help with an example; --debug shows tracebacks.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
app.command("demo", short_help="The whole story on the bundled model, in minutes.")(demo)
app.command("compress", short_help="Make a model sparse and low-bit by a recipe.")(compress)
app.command("recover", short_help="Train a compressed model back towards the dense one.")(recover)
app.command("eval", short_help="Perplexity, bits per byte, tasks.")(evaluate)
app.command("inspect", short_help="Structure, bits, sparsity, outliers, sensitivity.")(inspect)
app.command("export", short_help="Write a compressed model in another format.")(export)
app.command("generate", short_help="Continue a text with the native engine.")(generate)
app.command("chat", short_help="Talk to a model.")(chat)
app.command("serve", short_help="Serve models over HTTP, as OpenAI's clients expect.")(serve)
app.command("bench", short_help="Prefill and decode speed of the engine.")(bench)
app.command("train", short_help="Train by a recipe: new, continued, fine-tuned, sparse.")(train)

app.add_typer(law, name="law", short_help="Scaling laws of sparse activations.")


def _version(wanted: bool) -> None:
    if wanted:
        import tulle

        print(f"tulle {tulle.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    """Make Transformer language models sparse and low-bit, and run them."""


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code."""
    debug = "--debug" in arguments
    quiet_libraries()
    try:
        code = app(args=[a for a in arguments if a != "--debug"], prog_name="tulle", standalone_mode=False)
        if code == INTERRUPTED:  # typer makes an exit code of Ctrl-C
            return _fail("interrupted", INTERRUPTED)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort) as error:
        return _fail(f"interrupted{_notes(error.__cause__ or error)}", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as error:
        if debug:
            raise
        return _fail(f"{error}{_notes(error)}", 2)
    except OSError as error:
        if debug:
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"expected space on the disk, found it full ({error}); free some and run again"
            return _fail(message + _notes(error), 2)
        return _fail(f"{type(error).__name__}: {error}; run again with --debug for the traceback{_notes(error)}", 1)
    except Exception as error:
        # click's exceptions, whether click is a package of its own or part of typer, describe themselves.
        if hasattr(error, "format_message"):
            return _fail(_usage(error.format_message(), getattr(error, "ctx", None)), 2)
        if debug:
            raise
        return _fail(f"{type(error).__name__}: {error}; run again with --debug for the traceback{_notes(error)}", 1)


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def _usage(message: str, context: object) -> str:
    command = getattr(context, "command_path", "tulle")
    return f"{message.rstrip('.')}; try: {command} --help"


def _notes(error: BaseException) -> str:
    """What was added to an error on its way up, such as what to do with an unfinished run."""
    return "".join(f"; {note}" for note in getattr(error, "__notes__", ()))


def _fail(message: str, code: int) -> int:
    print("tulle: " + " ".join(message.split()), file=sys.stderr)
    return code
