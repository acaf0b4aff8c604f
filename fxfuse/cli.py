"""The command `fxfuse`: parses the arguments and hands each verb to its own module."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

EXAMPLE = "fxfuse explain mypackage.models:make_model --input 32,512"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (default: the process's own); returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = _parser().parse_args(given)
    try:
        return int(args.run(args, given))
    except BrokenPipeError:  # `fxfuse doctor | head` is no error
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    from fxfuse.bench import demo, run

    parser = argparse.ArgumentParser(
        prog="fxfuse", description="A torch.fx graph-rewriting compiler pass with hand-written CUDA kernels."
    )
    verbs = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    verb = verbs.add_parser("demo", help="five models before and after: matched, time, memory, error")
    demo.add_arguments(verb)
    verb.set_defaults(run=lambda args, given: demo.main(args))

    verb = verbs.add_parser("bench", help="measure against eager, torch.compile and others, side by side")
    run.add_arguments(verb)
    verb.set_defaults(run=run.main)

    verb = verbs.add_parser("explain", help="what is replaced in a model, why, and what came near", epilog=EXAMPLE)
    _add_model(verb, required=True)
    verb.add_argument("--draw", type=Path, metavar="FILE", help="draw the graph before and after (.svg or .dot)")
    verb.set_defaults(run=_explain)

    verb = verbs.add_parser("doctor", help="this machine's CUDA and kernels, and the road each op takes on it")
    _add_model(verb, required=False)
    verb.set_defaults(run=_doctor)

    verb = verbs.add_parser("build", help="build the CUDA kernels now instead of at first use")
    verb.add_argument("--force", action="store_true", help="build again even where a good library is cached")
    verb.set_defaults(run=_build)
    return parser


def _add_model(verb: argparse.ArgumentParser, required: bool) -> None:
    verb.add_argument("model", nargs=None if required else "?", metavar="MODULE:NAME",
                      help="an nn.Module, or a function or class that makes one when called")  # fmt: skip
    verb.add_argument("--input", action="append", default=[], metavar="SHAPE",
                      help="shape of an example input, as 32,512; once for each")  # fmt: skip


def _explain(args: argparse.Namespace, given: Sequence[str]) -> int:
    import fxfuse
    from fxfuse.target import TargetError, example_inputs, load_model

    try:
        model, inputs = load_model(args.model), example_inputs(args.input)
    except TargetError as error:
        print(f"fxfuse explain: {error}", file=sys.stderr)
        return 2
    try:
        fused = fxfuse.optimize(model, inputs or None)
        print(fxfuse.explain(fused))
        if args.draw:
            print(f"\ngraph: {fxfuse.report(fused).draw(str(args.draw))}")
    except (ValueError, OSError) as error:  # inputs that do not fit, a drawing that can't be written
        print(f"fxfuse explain: {error}", file=sys.stderr)
        return 2
    return 0


def _doctor(args: argparse.Namespace, given: Sequence[str]) -> int:
    from fxfuse import doctor
    from fxfuse.target import TargetError, example_inputs, load_model

    if args.model is None:
        print(doctor.examine())
        return 0
    try:
        model, inputs = load_model(args.model), example_inputs(args.input)
    except TargetError as error:
        print(f"fxfuse doctor: {error}", file=sys.stderr)
        return 2
    if not inputs:
        print("fxfuse doctor: a model's roads depend on its inputs; give their shapes with --input", file=sys.stderr)
        return 2
    print(doctor.diagnose(model, inputs))
    return 0


def _build(args: argparse.Namespace, given: Sequence[str]) -> int:
    from fxfuse.kernels import build, loader

    if args.force:
        try:
            nvcc = build.find_nvcc()
            name = f"{build.source_key()}-nvcc{build.nvcc_version(nvcc)}" if nvcc else "none"
            print(f"built: {build.build(loader.cache_dir() / name)}")
        except (build.BuildError, OSError) as error:
            print(f"fxfuse build: {error}", file=sys.stderr)
            return 1
        return 0
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reason is printed below, once
        loader.reset()
        library = loader.library()
    if library is None:
        print(f"fxfuse build: {loader.why_unavailable()}", file=sys.stderr)
        return 1
    print(f"{library.origin}: {library.path}")
    return 0
