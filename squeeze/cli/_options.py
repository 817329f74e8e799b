"""Options that several subcommands share, each written once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def command(**settings: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a subcommand; every one takes ``--debug``."""

    def wrap(function: Callable[..., Any]) -> click.Command:
        return click.command(**settings)(_debug(function))

    return wrap


def _remember_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.meta["squeeze.debug"] = value  # click shares meta between the contexts of one call


_debug = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=_remember_debug,
    help="Show the traceback of an error.",
)

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output.")

model = click.option(
    "--model",
    default="reference",
    show_default=True,
    help="Folder or hub name of the dense model; 'reference' is the embedded one.",
)

output = click.option(
    "--output", type=click.Path(file_okay=False), help="Folder to write; must not exist."
)

overwrite = click.option("--overwrite", is_flag=True, help="Replace a finished output folder.")

device = click.option("--device", help="cpu, cuda or cuda:N; by default a GPU where there is one.")

dtype = click.option("--dtype", help="float32, bfloat16 or float16; by default the checkpoint's.")

seed = click.option("--seed", type=int, help="Seed of calibration and evaluation.")

overrides = click.option(
    "--set",
    "overrides",
    metavar="PATH=VALUE",
    multiple=True,
    help="Override one recipe value, e.g. kv_cache.keys.bits=3. Repeatable.",
)

trust_remote_code = click.option(
    "--trust-remote-code", is_flag=True, help="Run Python code that comes with the model."
)

quiet = click.option("--quiet", is_flag=True, help="Show no progress.")

dense = click.option(
    "--dense", metavar="MODEL", help="Dense model to compare with; by default the one it came from."
)


def stack(*options: Decorator) -> Decorator:
    """Apply several options, in the order that ``--help`` shows them."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return wrap


loading = stack(device, dtype, trust_remote_code)


class Numbers(click.ParamType):
    """A comma-separated list of positive integers, given as a tuple."""

    name = "N,N,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        """Split and check; click prints the failure with the option's name."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        if not all(part.isdecimal() and int(part) > 0 for part in parts):
            self.fail(f"got {value!r}; allowed: positive integers with commas between.", param, ctx)
        return tuple(int(part) for part in parts)
