"""What the commands share: a parser whose mistakes are InputErrors, checks of output paths, stdout."""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from planner.errors import InputError
from planner.hardware import Hardware
from planner.units import parse_bytes

# Options that a hardware file takes the place of.
_DESCRIBED = (
    "gpus", "ram", "pinned", "disk", "disk_speed", "cpu_flops", "cpu_bandwidth", "links", "gpus_per_switch", "network",
    "host",
)  # fmt: skip


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises InputError instead of printing its usage and leaving."""

    def __init__(self, *, prog: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")


def add_output_options(parser: argparse._ActionsContainer) -> None:
    """Add the options that every command has."""
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout, errors included")
    parser.add_argument("--debug", action="store_true", help="print a traceback when something goes wrong")


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Add what describes the machine that is planned for; `hardware` reads it back."""
    machine = parser.add_argument_group("the machine (what is left out is assumed, and the output says so)")
    machine.add_argument(
        "--gpus", metavar="SPEC",
        help="2x24GB, 2xrtx4090,1xl4, or 0 for CPU and disk alone (default: 0); nodes as 4x80GB/2x24GB or '8*(4x80GB)'",
    )  # fmt: skip
    machine.add_argument("--ram", metavar="SIZE", help="host memory, of each node")
    machine.add_argument("--pinned", metavar="SIZE", help="how much of it may be pinned for GPUs to copy from")
    machine.add_argument("--disk", metavar="SIZE", help="disk for weights that fit nowhere else; 0 for none")
    machine.add_argument("--disk-speed", metavar="RATE", help="what reading from disk reaches: 7GB/s, or nvme4")
    machine.add_argument("--cpu-flops", metavar="FLOPS", help="what matmuls on the CPU reach, such as 2TFLOP/s")
    machine.add_argument(
        "--cpu-bandwidth", metavar="RATE", help="what the CPU reads from memory: 200GB/s, or 12xddr5-4800"
    )
    machine.add_argument(
        "--host", metavar="NAME", help="a kind of host, such as epyc-9004, for its memory and PCIe slots"
    )
    machine.add_argument(
        "--links", choices=("host", "p2p", "nvlink"),
        help="how GPUs of a node reach each other: through host memory, over PCIe directly, or NVLink (default: host)",
    )  # fmt: skip
    machine.add_argument(
        "--gpus-per-switch", type=count, metavar="N", help="so many neighbours share one way to the host (default: 1)"
    )
    machine.add_argument(
        "--network", metavar="RATE", help="what copies out of a node reach: 12.5GB/s, or in bits 100Gbit/s"
    )
    machine.add_argument(
        "--max-memory", metavar="NAME=SIZE", action="append", default=[],
        help="cap a memory, such as cuda:0=20GiB,cpu=64GB,pinned=16GB,node1/cpu=64GB; can be repeated",
    )  # fmt: skip
    machine.add_argument(
        "--hardware",
        metavar="FILE",
        help="a JSON file that describes it all (docs/hardware.md), or local: this machine",
    )
    machine.add_argument(
        "--page-cache", action="store_true", help="files on disk are in the page cache (with a calibrated --hardware)"
    )


def hardware(args: argparse.Namespace) -> Hardware:
    """Return the machine that the options describe.

    Raises:
        InputError: an option cannot be used, or a file is given besides what it describes.
    """
    found = _described(args)
    return found.with_page_cache() if args.page_cache else found


def _described(args: argparse.Namespace) -> Hardware:
    max_memory = parse_max_memory(args.max_memory)
    said = {name: value for name in _DESCRIBED if (value := getattr(args, name)) is not None}
    if args.hardware is None:
        return Hardware.from_options(max_memory=max_memory, **said)
    if said and args.hardware == "local":
        option = next(iter(said)).replace("_", "-")
        raise InputError(f"--hardware local reads this machine, and --{option} describes one; leave one of them out")
    if args.hardware == "local":
        return Hardware.local().with_max_memory(max_memory)
    if said:
        option = next(iter(said)).replace("_", "-")
        raise InputError(
            f"--hardware and --{option} both describe the machine; write it into {args.hardware}, or leave the file out"
        )
    return Hardware.load(args.hardware).with_max_memory(max_memory)


def add_work_options(parser: argparse.ArgumentParser, *, choices: bool = False) -> None:
    """Add what the model will be asked to do; `work` reads it back.

    choices: of the cache and the dtype several may be allowed, which `rules_options.choices` reads.
    """
    work = parser.add_argument_group("the work")
    work.add_argument("--batch", type=count, metavar="N", help="prompts at a time")
    work.add_argument("--prompt", type=count, metavar="N", help="tokens of each prompt")
    work.add_argument("--new-tokens", type=count, metavar="N", help="tokens generated for each prompt")
    work.add_argument("--beams", type=count, metavar="N", help="beam search with so many beams")
    work.add_argument("--answers", type=count, metavar="N", help="answers to each prompt (num_return_sequences)")
    work.add_argument("--sample", action="store_true", help="sample tokens instead of taking the likeliest")
    work.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest tokens that make up P")
    several = "; a list of them, or choose for any" if choices else ""
    work.add_argument(
        "--cache", choices=None if choices else ("dynamic", "static", "fp8"), metavar="NAME",
        help="the KV cache: dynamic as long as needed, static as long as it may get, fp8 in 8 bits"
        f"{', or offloaded in host memory' if choices else ''} (default: dynamic{several})",
    )  # fmt: skip
    several = ", or a list such as none,256,1024 to choose from" if choices else ""
    work.add_argument(
        "--prefill-chunk", type=str if choices else count, metavar="N",
        help=f"take the prompt in chunks of so many tokens (generate's prefill_chunk_size){several}",
    )  # fmt: skip
    work.add_argument("--forward", action="store_true", help="plain forward calls instead of generate()")
    if choices:
        work.add_argument(
            "--experts-popularity", metavar="FILE",
            help="how often each expert of each layer was routed to (docs/popularity.md; default: all alike)",
        )  # fmt: skip
    several = "; then int8 and nf4 where weights may wait in them, as bfloat16,int8, or choose" if choices else ""
    work.add_argument(
        "--dtype", metavar="NAME", help=f"bfloat16, float16 or float32 (default: the checkpoint's{several})"
    )


def work(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of a Workload that were said; what was not is left out."""
    said: dict[str, Any] = {
        "batch_size": args.batch,
        "prompt_tokens": args.prompt,
        "new_tokens": args.new_tokens,
        "num_beams": args.beams,
        "num_return_sequences": args.answers,
        "top_p": args.top_p,
        "sampling": "sample" if args.sample or args.top_p is not None else None,
        "cache": args.cache,
        "prefill_chunk": args.prefill_chunk,
        "caller": "forward" if args.forward else None,
    }
    return {name: value for name, value in said.items() if value is not None}


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Add where the model's config comes from."""
    where = parser.add_argument_group("where the model's config comes from")
    where.add_argument("--hub", action="store_true", help="ask the Hugging Face Hub, not the bundled catalogue")
    where.add_argument("--revision", metavar="COMMIT", help="a branch, tag or commit on the Hub")
    where.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def add_color_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="colour the output; auto: on a terminal, unless NO_COLOR is set (default: auto)",
    )


def join_negatives(argv: Sequence[str]) -> list[str]:
    """Return `argv` with "--ram -1GB" as "--ram=-1GB": argparse takes a leading dash for an option."""
    joined: list[str] = []
    for word in argv:
        after_option = bool(joined) and re.fullmatch(r"--[a-z-]+", joined[-1]) is not None
        if after_option and re.match(r"-\.?\d", word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def count(text: str) -> int:
    """Return the whole number of at least 1 that `text` is; a type for argparse."""
    if re.fullmatch(r"\s*0*[1-9][0-9]{0,11}\s*", text) is None:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more (at most 12 digits); got {text!r}")
    return int(text)


def parse_max_memory(values: Sequence[str]) -> dict[str, str]:
    """Return {"cuda:0": "20GiB", "cpu": "64GB"} for ["cuda:0=20GiB,cpu=64GB"]; a bare number is that GPU.

    Raises:
        InputError: not NAME=SIZE, a size that cannot be read or is zero, or a name that comes twice.
    """
    caps: dict[str, str] = {}
    for part in ",".join(values).split(",") if values else []:
        name, equals, size = (word.strip() for word in part.partition("="))
        if not name or not equals or not size:
            raise InputError(f"--max-memory {part.strip()!r}: write NAME=SIZE, such as cuda:0=20GiB,cpu=64GB")
        name = f"cuda:{int(name)}" if name.isascii() and name.isdigit() else name
        if name in caps:
            raise InputError(f"--max-memory names {name} twice ({caps[name]} and {size}); keep one")
        if parse_bytes(size, what=f"--max-memory of {name}") == 0:
            raise InputError(
                f"--max-memory {name}={size}: must not be zero; to do without a GPU name fewer in --gpus, "
                "to do without the disk say --disk 0"
            )
        caps[name] = size
    return caps


def output_path(option: str, text: str | None, *, inputs: Sequence[str] = ()) -> Path | None:
    """Return where `option` is to write, links followed, once it is sure that a file can be made there.

    Raises:
        InputError: the folder is missing or cannot be written, the path is no regular file, or is one of
            `inputs`.
    """
    if text is None:
        return None
    if text in ("", "-"):
        raise InputError(f"{option} {text!r} is not a file; give a path, or --json to print the plan")
    try:
        path = Path(text).resolve()
        if path.is_dir():
            raise InputError(f"cannot write {option} {text}: it is a folder; give the path of a file")
        if path.exists():
            _check_replaceable(option, text, path, inputs)
        if not path.parent.is_dir():
            raise InputError(f"cannot write {option} {text}: there is no folder {path.parent}; create it first")
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except (OSError, ValueError, RuntimeError) as exc:
        reason = getattr(exc, "strerror", None) or str(exc)
        raise InputError(f"cannot write {option} {text}: {reason}") from exc
    return path


def _check_replaceable(option: str, text: str, path: Path, inputs: Sequence[str]) -> None:
    if not path.is_file():
        raise InputError(f"cannot write {option} {text}: it is not a regular file")
    if not os.access(path, os.W_OK):
        raise InputError(f"cannot write {option} {text}: the file there is read-only")
    for other in inputs:
        if Path(other).exists() and path.samefile(other):
            raise InputError(f"{option} {text} would overwrite what is read; choose another path")


def different_paths(out: Path | None, report: Path | None) -> None:
    """Raise InputError where both outputs would be written to one file."""
    if out is not None and out == report:
        raise InputError(f"--out and --report are both {out}; give two paths")


def join_words(words: Sequence[str], last: str) -> str:
    """Return "a", "a or b", "a, b or c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def wants_color(choice: str) -> bool:
    """Return whether to colour stdout: as asked, or on a capable terminal where NO_COLOR is not set."""
    if choice != "auto":
        return choice == "always"
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def say(text: str) -> None:
    """Write a command's result to stdout; characters that its encoding lacks become "?".

    Raises:
        InputError: stdout cannot be written. BrokenPipeError: nobody reads it any more.
    """
    _write(text, errors="replace")


def say_json(text: str) -> None:
    """Write a JSON document to stdout, in UTF-8 whatever the locale.

    Raises:
        InputError: stdout cannot be written. BrokenPipeError: nobody reads it any more.
    """
    _write(text, encoding="utf-8")


def _write(text: str, **encoding: str) -> None:
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    try:
        if reconfigure is not None:
            reconfigure(**encoding)
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise InputError(f"cannot write to stdout: {exc.strerror or exc}") from exc
