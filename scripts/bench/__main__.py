"""Measure how fast everything is: ``python scripts/bench``; `make bench` does it.

Every part is a process of its own and leaves a file, so that a run that was cut off goes on with what is
missing; the document is made of all files that are there. A missed target is said loudly and is no error.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from picopose_ros.libraries import settle_threads

if TYPE_CHECKING:  # what needs torch comes after the command line was understood
    from measure import Options

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "performance.md"
PARTS = {
    "network": "estimating",
    "ablation": "estimating",
    "tiny": "estimating",
    "precision": "estimating",
    "backends": "estimating",
    "accuracy": "accuracy",
    "memory": "memory",
    "onboarding": "onboarding",
    "ros": "ros",
    "curves_tiny": "curves",
    "curves_large": "curves",
    "hundreds": "curves",
}
"""In which module a part is the function of its name; in the order in which they are run and told."""


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (cpu)")
    parser.add_argument(
        "--part", choices=tuple(PARTS), action="append", help="only this one; may be repeated"
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what is there of this commit")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench", help="for the parts' files")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="that gets the measured section")
    parser.add_argument("--no-document", action="store_true", help="measure only")
    parser.add_argument("--quick", action="store_true", help="only see that it runs")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # the part's own process
    args = parser.parse_args(argv)
    if args.quick and not args.no_document and args.document.resolve() == DOCUMENT:
        parser.error("--quick measures nothing: it does not go into docs/performance.md; give --document")
    return args


def measure(name: str, options: Options) -> None:
    """Measure a part in this process and keep what was found."""
    from measure import about

    from picopose_ros.evaluation.report import plain, write_atomically

    begin = time.perf_counter()
    found = getattr(importlib.import_module(PARTS[name]), name)(options)
    facts = about(name, options, time.perf_counter() - begin)
    write_atomically(place(name, options), plain({"about": facts, **found.plain()}))


def place(name: str, options: Options) -> Path:
    """The file of a part."""
    return options.folder / options.device.split(":")[0] / f"{name}.json"


def up_to_date(name: str, options: Options) -> bool:
    """Whether a part was measured already, of this commit and in this way."""
    import torch
    from document import read_parts
    from measure import commit

    path = place(name, options)
    if not path.is_file():
        return False
    found = read_parts(options.folder)[f"{path.parent.name}/{name}"]["about"]
    now = (commit(), options.quick, torch.__version__, torch.get_num_threads())
    return (found["commit"], found["quick"], found["torch"], found["threads"]) == now


def main(args: argparse.Namespace) -> int:
    """Measure what is missing, then write the document."""
    settle_threads()  # as the node and the command line do
    import torch
    from document import read_parts, say_targets, write_document, write_report
    from measure import Options

    from picopose_ros.errors import ConfigError

    options = Options(args.device, args.folder.resolve(), args.quick)
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device '{args.device}' can't be used: {str(error).splitlines()[0]}") from error
    if args.inside:
        (name,) = args.part
        measure(name, options)
        return 0
    begin = time.perf_counter()
    failed = []
    for name in args.part or PARTS:
        if not args.part and not args.fresh and up_to_date(name, options):
            print(f"{name}: is there already, of this commit", flush=True)
            continue
        print(f"{name} ...", end=" ", flush=True)
        start = time.perf_counter()
        command = [sys.executable, str(Path(__file__).parent), "--inside", "--no-document", "--part", name]
        command += ["--device", args.device, "--folder", str(options.folder)] + ["--quick"] * args.quick
        if subprocess.run(command).returncode:
            failed.append(name)
        print(f"{'FAILED' if name in failed else 'done'}, {time.perf_counter() - start:.0f} s", flush=True)
    found = read_parts(options.folder)
    parts = {key: found[key] for name in PARTS for key in found if key.endswith(f"/{name}")}
    print(f"\n{say_targets(parts)}\n\ntook {time.perf_counter() - begin:.0f} s")
    print(f"all tables: {write_report(parts, options.folder)}")
    if not args.no_document:
        write_document(parts, args.document)
        print(f"written: {args.document}")
    if failed:
        print(f"parts that failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    arguments = parse(sys.argv[1:])
    from picopose_ros.errors import PicoPoseError

    try:
        sys.exit(main(arguments))
    except PicoPoseError as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(1)
