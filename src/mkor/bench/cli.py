"""The command line. It imports nothing heavy, so that `mkor --help` answers at once."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from .arguments import decays, share, whole, widths
from .errors import UsageError
from .reproduce import add_reproduce

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


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Adds the sizes of tasks.

    Args:
        parser: The parser of a command.
    """
    sizes = parser.add_argument_group("sizes of the task")
    sizes.add_argument("--width", type=whole(1), metavar="N", help="width of the layers")
    sizes.add_argument("--depth", type=whole(1), metavar="N", help="number of layers or blocks")
    sizes.add_argument("--batch", type=whole(1), metavar="N", help="samples in a step")
    sizes.add_argument("--context", type=whole(1), metavar="N", help="characters in a sample")


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Adds the number of threads.

    Args:
        parser: The parser of a command.
    """
    parser.add_argument(
        "--threads", type=whole(1), default=1, metavar="N", help="threads to compute with (1)"
    )


def add_warmup(parser: argparse.ArgumentParser) -> None:
    """Adds the share of the steps over which the learning rate rises.

    Args:
        parser: The parser of a command.
    """
    parser.add_argument(
        "--warmup",
        type=share,
        default=0.1,
        metavar="SHARE",
        help="share of the steps over which the learning rate rises (0.1)",
    )


def add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command `compare`.

    Args:
        commands: Where commands are added.
    """
    parser = commands.add_parser(
        "compare",
        help="train the same model with several optimizers and show who gets where, how fast",
        description="Train the same model with several optimizers on the same batches.",
        epilog=f"{CONTESTANTS}\n{COMPARE_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "task",
        nargs="?",
        default="text-lm",
        help="text-lm (the default), text-lm-torch-init, digits-mlp, digits-conv, "
        "digits-large or digits-autoencoder",
    )
    add(
        "contestants",
        nargs="?",
        default="adamw,mkor+adamw",
        help="separated by commas (adamw,mkor+adamw)",
    )
    add("--steps", type=whole(1), metavar="N", help="length of a run (the task's own)")
    add("--seeds", type=whole(1), default=3, metavar="K", help="reported seeds (3)")
    add(
        "--tune",
        type=whole(1),
        default=1,
        metavar="N",
        help="learning rates tried for each contestant, a factor of two apart (1: its own)",
    )
    add(
        "--weight-decay",
        type=decays,
        default=[],
        metavar="A,B",
        help="weight decays tried with each learning rate (the contestant's own)",
    )
    add(
        "--lr",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a contestant's learning rate, which is then not tuned; may be repeated",
    )
    add_warmup(parser)
    add("--baseline", metavar="NAME", help="whom the others are compared with (the first)")
    add(
        "--match",
        action="store_true",
        help="find how many steps each contestant needs to equal the baseline's final loss",
    )
    add_threads(parser)
    add("--out", metavar="DIR", help="write curves.png, results.json and curves.csv there")
    add("--quiet", action="store_true", help="no progress, only the result")
    add_sizes(parser)
    parser.set_defaults(run="compare:compare")


def add_overhead(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command `overhead`.

    Args:
        commands: Where commands are added.
    """
    parser = commands.add_parser(
        "overhead",
        help="time whole training iterations and their parts, and count memory",
        description="Time whole training iterations of several optimizers in turn.",
        epilog=CONTESTANTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "contestants",
        nargs="?",
        default="adamw,mkor+adamw",
        help="separated by commas; the first is the base of all ratios (adamw,mkor+adamw)",
    )
    add(
        "--model",
        default="mlp",
        metavar="NAME",
        help="mlp (Linear and GELU with squared error; the default), transformer, "
        "bert-base-block, conv-net (residual, 32x32), resnet50 or a task",
    )
    add("--rows", type=whole(1), metavar="N", help="rows in a step of the mlp (4096)")
    add("--rounds", type=whole(1), default=30, metavar="N", help="timed iterations of each (30)")
    add_threads(parser)
    add(
        "--limits",
        action="store_true",
        help="state for each part of MKOR's step the least it could take on this machine",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (cpu)")
    add("--bf16", action="store_true", help="compute products in bfloat16 (autocast)")
    add("--json", metavar="FILE", help="write all figures there")
    add("--plot", metavar="FILE", help="draw it there (with --scaling also beside the JSON file)")
    add("--quiet", action="store_true", help="no progress, only the result")
    add_sizes(parser)
    add(
        "--processes",
        type=whole(2),
        metavar="N",
        help="instead of timing, train on N processes and count the bytes that they send, per step "
        "and layer (--model bert-base-shapes has the matrices of BERT)",
    )
    scaling = parser.add_argument_group("one layer by itself, without training")
    scaling.add_argument(
        "--scaling",
        action="store_true",
        help="time updates and preconditioning with window, dense, KFAC and Eva factors against "
        "the layer's width, and count what they communicate",
    )
    scaling.add_argument(
        "--widths",
        type=widths,
        metavar="A,B",
        help="widths of the layer (128,256,512,1024,2048,4096)",
    )
    parser.set_defaults(run="overhead:overhead")


def add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command `inspect`.

    Args:
        commands: Where commands are added.
    """
    parser = commands.add_parser(
        "inspect",
        help="show which parameters of a model are preconditioned, and what that costs",
        description="Show which parameters of a model are preconditioned, and what that costs.",
        epilog=CONTESTANTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a task, or package.module:factory that returns a model")
    parser.add_argument(
        "contestant", nargs="?", default="mkor+adamw", help="whose coverage is shown (mkor+adamw)"
    )
    add_sizes(parser)
    parser.set_defaults(run="inspection:inspect_model")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line.

    Returns:
        The parser.
    """
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
    """Runs a command.

    Args:
        argv: The arguments; None for those of the process.

    Returns:
        The exit status: 0, 2 for a wrong request, 130 if interrupted.
    """
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
        return 130
    return status
