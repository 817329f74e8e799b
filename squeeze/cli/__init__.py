"""The command line: one file per subcommand, file name = subcommand name.

A subcommand's file is light to import and does its work behind imports of its own, so that
``squeeze --help`` stays fast. A user's mistake ends in one paragraph and exit code 2.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import click

from squeeze.errors import SqueezeError

__all__ = ["main"]


class Commands(click.Group):
    """A group whose subcommands are the public files of this folder."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the files, which are the subcommands."""
        return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name[0] != "_")

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one subcommand's file; ``None`` for an unknown name, which click reports."""
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = importlib.import_module(f"{__name__}.{cmd_name}").command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand; print a user's mistake as one paragraph and exit with 2."""
        try:
            return super().invoke(ctx)
        except SqueezeError as error:
            if ctx.meta.get("squeeze.debug"):
                raise
            click.echo(f"Error: {error}", err=True)
            ctx.exit(2)


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from squeeze import __version__

        click.echo(__version__)
        ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version.",
)
def main() -> None:
    """Compress Hugging Face language models: one recipe in, a smaller and faster model out.

    \b
    squeeze run quickstart --output out     the whole flow on the embedded reference model
    squeeze plan kv4 --model PATH           what would happen, saving how many bytes
    squeeze ls                              every method, with its source
    """  # noqa: D301 - \b is click's mark for a verbatim block
