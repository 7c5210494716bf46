"""The command `glasshouse`: its options, its commands, and what becomes of anything that goes wrong."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from glasshouse import __version__
from glasshouse.base.errors import Interrupted
from glasshouse.cli import align, audit, chat, demo, diff, envelope, export, ledger, lens, report, train, zoo
from glasshouse.cli.faults import BROKEN_PIPE, Debug, explain, show_warnings

EPILOG = """\b
Exit codes
    0  done; every check passed       7  training cannot go on
    1  error of another kind          8  not promoted
    2  wrong command or recipe        9  a check failed or broke
    3  unusable data                 10  disk full or not writable
    4  unusable checkpoint           11  stopped for a person
    5  ledger does not hold          12  nothing failed, something is undecided
    6  run folder is in use          70  a fault in Glasshouse itself
  130  interrupted; go on with --resume"""


class Commands(TyperGroup):
    """The commands. Ctrl-C outside a command's own handling, and a closed pipe, become errors of ours."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command named on the command line."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("interrupted; nothing was left half-written") from None
        except BrokenPipeError:
            raise PipeClosed from None


class PipeClosed(Exception):
    """Who read our output went away, as `| head` does."""


# Plain help: importing rich for boxes would double the time that `glasshouse --help` takes.
app = typer.Typer(
    cls=Commands,
    help="Grow language models under glass: train them, look inside, and check their safety constraints "
    "while they train.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"glasshouse {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error came from (also GLASSHOUSE_DEBUG=1).")
    ] = False,
) -> None:
    """Options of every command."""
    Debug.on = debug or os.environ.get("GLASSHOUSE_DEBUG", "") not in ("", "0")
    show_warnings()


app.command("demo")(demo.demo)
app.command("train")(train.train)
app.command("report")(report.report)
app.command("chat")(chat.chat)
app.command("audit")(audit.audit)
app.command("diff")(diff.diff)
app.command("envelope")(envelope.envelope)
app.command("align")(align.align)
app.command("export")(export.export)
app.add_typer(lens.app, name="lens")
app.add_typer(zoo.app, name="zoo")
app.add_typer(ledger.app, name="ledger")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name; default: this process's) and return its exit code."""
    # Waiting threads sleep instead of spinning: on a busy machine spinning slows small models 3-10 times.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        forgiving(stream)
    try:
        app(None if arguments is None else list(arguments), prog_name="glasshouse")
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else 0 if left.code is None else 1
    except PipeClosed:
        # Python flushes at exit, into the closed pipe, and would complain there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        return explain(error)
    return 0


def forgiving(stream: TextIO) -> None:
    """Let a terminal that cannot show a character show its code instead of ending the program."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
