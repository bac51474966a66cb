"""The command line: arguments, their errors, and where results may go.

It imports nothing heavy, so that `mkor --help` answers at once; a command's module is imported
when the command runs.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

INTERRUPTED = 130
CONTESTANTS = """\
contestants:
  sgd, adamw, lamb, soap, muon     a base optimizer
  mkor+BASE                        MKOR over one of them
  mkor-h[fraction=0.2]+BASE        MKOR that goes over to the base when the loss falls slowly
  dense-mkor[release]+BASE         the paper's factors; rule: exact, paper or release
  kfac[inverse_every=10]+BASE      KFAC; eva+BASE: Eva
  rescale+BASE                     a control: MKOR's lengths, the raw gradient's directions
  mkor[rank=32,sides=left]+muon    options in brackets; none, true and false are understood
  adamw[weight_decay=0.1]          a base takes options too; lr=... gives its learning rate
(a shell may want quotes around brackets)
"""
COMPARE_EXAMPLES = """\
examples:
  mkor compare
  mkor compare text-lm sgd,adamw,mkor+sgd,mkor+adamw --tune 3 --match --out results
  mkor compare digits-autoencoder 'muon,mkor[sides=left,rescale=none]+muon' --seeds 5
"""
SIZES: Mapping[str, str] = {
    "width": "width of the layers",
    "depth": "number of layers or blocks",
    "batch": "samples in a step",
    "context": "characters in a sample",
}

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


class UsageError(Exception):
    """A wrong request; the message says what is wrong and what would be right."""


class UnknownNameError(UsageError):
    """A name that is not among the choices."""

    def __init__(self, kind: str, name: str, choices: Iterable[str]) -> None:
        """Suggests the nearest of the known names and lists them all."""
        known = list(choices)
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        super().__init__(f"unknown {kind} {name!r}.{hint} Choose from: {', '.join(known)}.")


class MissingExtraError(UsageError):
    """A package that only the bench needs is not installed."""

    def __init__(self, package: str, purpose: str) -> None:
        """Says what needs the package and how to install it."""
        super().__init__(f"{purpose} needs {package}, which is missing: pip install 'mkor[bench]'")


def whole(least: int) -> Callable[[str], int]:
    """Makes the type of an argument that is a whole number of at least `least`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} up")
        return value

    return read


def number(allowed: Callable[[float], bool], message: str) -> Callable[[str], float]:
    """Makes the type of an argument that is an allowed number; `message` says what is allowed."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"{text!r} {message}")
        return value

    return read


share = number(lambda value: 0 <= value < 1, "is no share; write a number from 0 to below 1")
positive = number(lambda value: 0 < value < math.inf, "is no positive number")
decay = number(lambda value: 0 <= value < math.inf, "is no number from 0 up")


def decays(text: str) -> list[float]:
    """Reads weight decays separated by commas."""
    return [decay(piece) for piece in text.split(",")]


def names(text: str) -> list[str]:
    """Reads names separated by commas, each once."""
    found = [piece.strip() for piece in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r}: write names separated by commas")
    return list(dict.fromkeys(found))


def sizes_of(arguments: argparse.Namespace) -> dict[str, int | None]:
    """The sizes given on the command line, None for each that is not given."""
    return {key: getattr(arguments, key) for key in SIZES}


def check_pictures(purpose: str) -> None:
    """Refuses to go on without matplotlib."""
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise MissingExtraError("matplotlib", purpose) from error


def prepare_folder(out: str | None) -> Path | None:
    """Makes the folder of results before anything runs, so that no result is lost at the end."""
    if out is None:
        return None
    check_pictures("--out with its picture")
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}.") from error
    return folder


def prepare_file(option: str, name: str | Path | None) -> Path | None:
    """Checks before anything runs that the file of an option, such as "--json", can be written."""
    if not name:
        return None
    path = Path(name)
    if path.is_dir():
        raise UsageError(f"{option} {path}: this is a folder, name a file in it.")
    if not path.parent.is_dir():
        raise UsageError(f"{option} {path}: there is no folder {path.parent}.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"{option} {path}: this cannot be written.")
    return path


def prepare_picture(option: str, name: str | Path | None) -> Path | None:
    """Checks that the picture of an option, such as "--plot", can be drawn and written."""
    path = prepare_file(option, name)
    if path:
        check_pictures(option)
    return path


def named_rate(text: str) -> tuple[str, float]:
    """Reads `NAME=VALUE`, a contestant's label and its learning rate."""
    name, equals, value = text.rpartition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return "".join(name.split()), positive(value)


class Moved(argparse.Action):
    """An option or name that has left the command line; `const` says what takes its place."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Ends the program."""
        name = self.option_strings[0] if self.option_strings else parser.prog
        parser.error(f"{name} is not part of mkor any more: {self.const}")


class Command:
    """A command's parser with the kinds of options that several commands have."""

    def __init__(
        self, commands: Commands, name: str, run: str, about: str, epilog: str = ""
    ) -> None:
        """Adds a command; `run` is the module and function that carries it out."""
        self.parser = commands.add_parser(
            name,
            help=f"{about[0].lower()}{about[1:]}",
            description=f"{about}.",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.parser.set_defaults(run=run)
        self.add = self.parser.add_argument

    def count(self, name: str, text: str, default: int | None = None, least: int = 1) -> None:
        """Adds an option that is a whole number; its help ends with its default."""
        shown = text if default is None else f"{text} ({default})"
        self.add(name, type=whole(least), default=default, metavar="N", help=shown)

    def contestants(self, name: str, default: str, text: str) -> None:
        """Adds the argument for contestants."""
        self.add(name, nargs="?", default=default, help=f"{text} ({default})")

    def quiet(self) -> None:
        """Adds the wish for no progress display."""
        self.add("--quiet", action="store_true", help="no progress, only the result")

    def sizes(self) -> None:
        """Adds the sizes of tasks."""
        group = self.parser.add_argument_group("sizes of the task")
        for key, text in SIZES.items():
            group.add_argument(f"--{key}", type=whole(1), metavar="N", help=text)


def add_compare(commands: Commands) -> None:
    """Adds the command `compare`."""
    about = "Train the same model with several optimizers and show who gets where, how fast"
    own = Command(commands, "compare", "race:compare", about, f"{CONTESTANTS}\n{COMPARE_EXAMPLES}")
    tasks = "text-lm (the default), text-lm-torch-init, digits-mlp, digits-conv, digits-large or "
    own.add("task", nargs="?", default="text-lm", help=f"{tasks}digits-autoencoder")
    own.contestants("contestants", "adamw,mkor+adamw", "separated by commas")
    own.count("--steps", "length of a run (the task's own)")
    own.count("--seeds", "reported seeds", 3)
    own.count("--tune", "learning rates tried for each contestant, a factor of two apart", 1)
    decays_help = "weight decays tried with each learning rate (the contestant's own)"
    own.add("--weight-decay", type=decays, default=[], metavar="A,B", help=decays_help)
    lr_help = "a contestant's learning rate, which is then not tuned; may be repeated"
    own.add(
        "--lr", type=named_rate, action="append", default=[], metavar="NAME=VALUE", help=lr_help
    )
    warmup_help = "share of the steps over which the learning rate rises (0.1)"
    own.add("--warmup", type=share, default=0.1, metavar="SHARE", help=warmup_help)
    own.add("--baseline", metavar="NAME", help="whom the others are compared with (the first)")
    match_help = "find how many steps each contestant needs to equal the baseline's final loss"
    own.add("--match", action="store_true", help=match_help)
    own.count("--threads", "threads to compute with", 1)
    own.add("--out", metavar="DIR", help="write curves.png, results.json and curves.csv there")
    own.quiet()
    own.sizes()


def add_overhead(commands: Commands) -> None:
    """Adds the command `overhead`."""
    about = "Time whole training iterations of optimizers and their parts, and count memory"
    own = Command(commands, "overhead", "overhead:overhead", about, CONTESTANTS)
    first = "separated by commas; the first is the base of all ratios"
    own.contestants("contestants", "adamw,mkor+adamw", first)
    models = (
        "mlp (Linear and GELU with squared error; the default), transformer, bert-base-block, "
        "conv-net (residual, 32x32), resnet50 or a task"
    )
    own.add("--model", default="mlp", metavar="NAME", help=models)
    own.count("--rows", "rows in a step of the mlp (4096)")
    own.count("--rounds", "timed iterations of each", 30)
    own.count("--threads", "threads to compute with", 1)
    own.add("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (cpu)")
    own.add("--bf16", action="store_true", help="compute products in bfloat16 (autocast)")
    own.add("--json", metavar="FILE", help="write all figures there")
    own.add("--plot", metavar="FILE", help="draw it there")
    own.quiet()
    own.sizes()
    processes = (
        "instead of timing, train on N processes and count the bytes that they send, per step "
        "and layer (--model bert-base-shapes has the matrices of BERT)"
    )
    own.count("--processes", processes, least=2)
    scaling = "run benchmarks/scaling.py in the repository"
    for name, instead in (("--scaling", scaling), ("--limits", "torch.profiler shows its parts")):
        own.add(name, nargs=0, action=Moved, const=instead, help=argparse.SUPPRESS)


def add_inspect(commands: Commands) -> None:
    """Adds the command `inspect`."""
    about = "Show which parameters of a model are preconditioned, and what that costs"
    own = Command(commands, "inspect", "inspection:inspect_model", about, CONTESTANTS)
    own.add("model", help="a task, or package.module:factory that returns a model")
    own.contestants("contestant", "mkor+adamw", "whose coverage is shown")
    own.sizes()


def add_reproduce(commands: Commands) -> None:
    """Adds the command `reproduce`."""
    about = "make the results again that the documentation shows"
    parser = commands.add_parser("reproduce", help=about, description=f"{about.capitalize()}.")
    recipes = parser.add_subparsers(title="results", metavar="NAME", required=True)
    rules = "The paper's rules, windows, KFAC and Eva, over several bases and tasks"
    own = Command(recipes, "rules", "reproduce:rules", rules)
    out = "write rules.md there and what belongs to it (results)"
    own.add("--out", default="results", metavar="DIR", help=out)
    own.add("--tasks", type=names, metavar="A,B", help="only these tasks (all)")
    own.add("--bases", type=names, metavar="A,B", help="only over these bases (all)")
    own.count("--seeds", "reported seeds", 3)
    own.count("--tune", "learning rates tried for each contestant, a factor of two apart", 3)
    scale = "length of a run over the task's own (1)"
    own.add("--steps-scale", type=positive, default=1.0, metavar="X", help=scale)
    own.count("--jobs", "races at a time", 1)
    own.quiet()
    # Without options of its own, so that it takes whatever once belonged to it.
    moved = recipes.add_parser("precision", add_help=False, prefix_chars="\0")
    moved.add_argument("rest", nargs="*", action=Moved, const="run benchmarks/precision.py")


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="mkor",
        description="Curvature for any PyTorch optimizer: race it, time it, look into it.",
        epilog="mkor COMMAND --help tells more",
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for add in (add_compare, add_overhead, add_inspect, add_reproduce):
        add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, 2 for a wrong request, or 130 if interrupted."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.version:
        from importlib.metadata import version

        print(f"mkor {version('mkor')}")
        return 0
    if "run" not in arguments:
        parser.print_help()
        return 2
    # Read when torch is loaded: else its profiler writes to the terminal as it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    module, _, function = arguments.run.partition(":")
    try:
        command = getattr(importlib.import_module(f"{__package__}.{module}"), function)
        status: int = command(arguments)
        sys.stdout.flush()
    except UsageError as error:
        print(f"mkor: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever read the output, such as head, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return status
