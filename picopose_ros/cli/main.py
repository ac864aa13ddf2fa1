"""The ``picopose`` command: one sub-command per thing to do, each imported only when it is called."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from picopose_ros.libraries import importing, settle_threads


@dataclass(frozen=True)
class Command:
    """A sub-command.

    Attributes:
        module: where it lives; has ``run(args) -> int`` (the exit status), or ``COMMANDS`` of its own; may
            have ``arrange(argv) -> argv``, called before the arguments are parsed.
        summary: one line for ``picopose --help``.
        arguments: name of the module's function that adds arguments to a parser.
    """

    module: str
    summary: str
    arguments: str = "add_arguments"


COMMANDS = {
    "onboard": Command("picopose_ros.cli.onboard", "make the templates of a folder of meshes"),
    "estimate": Command("picopose_ros.cli.estimate", "poses of the segments of one image"),
    "bag": Command("picopose_ros.cli.bag", "a recording in, the same with poses out", "configure"),
    "images-from-bag": Command("picopose_ros.cli.images", "a recording's images as files, for a segmenter"),
    "segments-from-masks": Command("picopose_ros.cli.masks", "pictures of masks as segments in JSON"),
    "segments-from-cnos": Command("picopose_ros.cli.segments", "masks that CNOS found, for the node"),
    "segmenter": Command("picopose_ros.cli.segmenter", "masks of the objects in an image, by their meshes"),
    "convert": Command("picopose_ros.cli.convert", "published weights as this package reads them"),
    "export": Command("picopose_ros.cli.export", "the network as ONNX files, compared with PyTorch"),
    "pool": Command("picopose_ros.training.pool", "render procedural objects for training"),
    "train": Command("picopose_ros.training.train", "train the network on procedural objects"),
    "average": Command("picopose_ros.training.averaging", "one network from the weights of several runs"),
    "eval": Command("picopose_ros.cli.eval", "how good the poses are: several measurements"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command.

    Args:
        argv: arguments; those of the process if None.

    Returns:
        Exit status: 0 done, 1 done but not for everything, 2 wrong arguments or input (one line on stderr
            says what), 130 interrupted.
    """
    settle_threads()
    argv = list(sys.argv[1:] if argv is None else argv)
    return _dispatch("picopose", "6D poses of known objects from one image and their masks.", COMMANDS, argv)


def _dispatch(program: str, description: str, commands: Mapping[str, Command], argv: list[str]) -> int:
    """Find the command that the first argument names and run it with the others."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog="\n".join(["commands:", *(f"  {name:<20} {c.summary}" for name, c in commands.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if commands is COMMANDS:
        parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument(
        "command", nargs="?", choices=tuple(commands), help=f"{program} COMMAND --help tells more"
    )
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="arguments of the command")
    chosen = parser.parse_args(argv)
    if getattr(chosen, "version", False):
        from picopose_ros import __version__

        print(f"picopose {__version__}")
        return 0
    if chosen.command is None:
        parser.print_help(sys.stderr)
        return 2
    return _run(f"{program} {chosen.command}", commands[chosen.command], chosen.rest)


def _run(program: str, command: Command, argv: list[str]) -> int:
    from picopose_ros.errors import PicoPoseError

    description = command.summary[0].upper() + command.summary[1:] + "."
    with importing():
        module = importlib.import_module(command.module)
    if hasattr(module, "COMMANDS"):
        return _dispatch(program, description, module.COMMANDS, argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    parser = argparse.ArgumentParser(prog=program, description=description)
    getattr(module, command.arguments)(parser)
    args = parser.parse_args(module.arrange(argv) if hasattr(module, "arrange") else argv)
    try:
        return module.run(args)
    except PicoPoseError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    raise SystemExit(main())
