"""The command line: each subcommand is one function called with the parsed options; errors become exit codes.

0 done, 2 wrong usage, 3 bad input, 4 unsupported, 5 validation failed, 6 the environment lacks something, 130 Ctrl-C,
128 + n ended by signal n.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys

from . import __version__
from .errors import SplitqError, printable


class _Terminated(BaseException):
    """A signal that asks the process to end, raised so that every `finally` and `with` cleans up."""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = vars(_parser().parse_args(argv))
    run, debug = args.pop("run"), args.pop("debug")
    if sys.platform == "win32":
        return _fail("this program runs on Linux and macOS: on Windows, run it in WSL (`wsl --install`)")
    if debug:
        os.environ["SPLITQ_DEBUG"] = "1"  # the converter process prints its traceback as well
    wanted = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]  # nohup ignores one
    previous = {number: signal.signal(number, _terminate) for number in wanted}
    try:
        run(**args)
        return 0
    except SplitqError as error:
        if debug:
            raise
        return _fail(str(error), error.exit_code)
    except MemoryError:
        return _fail("memory ran out: close other programs or pass a smaller --max-ram")
    except RuntimeError as error:
        if debug or not (sentence := _out_of_memory(error)):
            raise
        return _fail(sentence)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes
        return 128 + signal.SIGPIPE
    except OSError as error:
        if debug:
            raise
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return _fail(f"{what}: check the disk, the path and its rights")
    except KeyboardInterrupt:
        print("gguf-splitq: interrupted; no incomplete file is left", file=sys.stderr)
        return 128 + signal.SIGINT
    except _Terminated as error:
        print("gguf-splitq: terminated; no incomplete file is left", file=sys.stderr)
        return 128 + error.args[0]
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _fail(sentence: str, code: int = 6) -> int:
    """Print what went wrong and return the exit code; 6 is what the machine lacks."""
    print(f"gguf-splitq: {printable(sentence)}", file=sys.stderr)
    return code


def _out_of_memory(error: RuntimeError) -> str | None:
    """The sentence for PyTorch's errors of memory, on a GPU or not; None for others."""
    torch = sys.modules.get("torch")  # where it is not loaded, nothing of it was raised
    if "out of memory" in str(error) or torch and isinstance(error, torch.cuda.OutOfMemoryError):
        return "the GPU's memory ran out: close other programs there or set CUDA_VISIBLE_DEVICES= to use the CPU"
    if "can't allocate memory" in str(error):
        return "memory ran out: close other programs or pass a smaller --max-ram"
    return None


def _terminate(number: int, frame) -> None:
    raise _Terminated(number)


def _convert(**options) -> None:
    from .convert import convert

    convert(**options)


def _dequantize(**options) -> None:
    from .dequantize import dequantize

    dequantize(**options)


def _inspect(**options) -> None:
    from .inspection import inspect

    inspect(**options)


def _validate(**options) -> None:
    from .measure.validate import validate

    validate(**options)


def _types() -> None:
    from rich.table import Table

    from . import display, types

    table = Table()
    for column in ("type", "bpw", "block", "bytes", "method", "for"):
        table.add_column(column, justify="right" if column in ("bpw", "block", "bytes") else "left")
    for t in types.all_types():
        table.add_row(t.name, f"{t.bpw:.4g}", str(t.block_size), str(t.block_bytes), t.method, t.purpose)
    display.console().print(table)


def _runtime(action: str, tests: bool = False) -> None:
    from .runtime import building, fetching

    if action == "check":
        for name in fetching.patches_check():
            print(f"{name} applies")
    else:
        print({"fetch": fetching.fetch, "build": lambda: building.build(tests), "path": building.path}[action]())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gguf-splitq", description="Better low-bit GGUF files for llama.cpp.")
    parser.add_argument("--version", action="version", version=f"gguf-splitq {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks instead of one sentence")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    p = command("convert", _convert, "Convert a checkpoint to a GGUF file.")
    p.add_argument("model", help="a Hugging Face folder, a Hub id, or a GGUF in F32, F16 or BF16")
    p.add_argument("--type", help="tensor type, see `gguf-splitq types`")
    p.add_argument("--bpw", type=float, metavar="X", help="instead: the best types in X bits per weight; needs --calib")
    p.add_argument("--save-plan", metavar="FILE", help="write the types that --bpw chose as JSON")
    p.add_argument("--plan", dest="plan_file", metavar="FILE", help="instead of both: types that --save-plan wrote")
    p.add_argument("--outfile", default="{name}-{type}.gguf", help="file, folder or template (%(default)s)")
    many = "type of the tensors whose name matches; may be repeated, the first match wins"
    p.add_argument("--tensor-type", action="append", default=[], metavar="REGEX=TYPE", help=many)
    p.add_argument("--token-embedding-type", metavar="TYPE", help="q8_0 unless given")
    p.add_argument("--output-tensor-type", metavar="TYPE", help="q8_0 unless given")
    p.add_argument("--imatrix", metavar="FILE", help="importance matrix of llama-imatrix, .dat or .gguf")
    p.add_argument("--calib", metavar="TEXT", help="error feedback: calibrate on this text, or on `self`-made text")
    p.add_argument("--calib-tokens", type=int, default=131_072, metavar="N", help="tokens to use (%(default)s)")
    p.add_argument("--hessians", metavar="FILE", help="measure the float model once for many types: read or write FILE")
    p.add_argument("--tune", action="store_true", help="train block scales and norms too; the model must fit twice")
    dtype = "what the Hessians are computed in; auto: bf16 where the processor is fast in it, else f32"
    p.add_argument("--calib-dtype", choices=("auto", "f32", "bf16"), default="auto", help=dtype)
    metric = "what gives a column of cq2.x, cq3.x, sq2.x, sq3.x more bits (%(default)s)"
    p.add_argument("--claq-metric", choices=("hessian", "outlier"), default="hessian", help=metric)
    p.add_argument("--dry-run", action="store_true", help="print the plan with sizes, write only --save-plan")
    aside = "also write the vision or audio part (%(const)s beside the output)"
    p.add_argument("--mmproj", nargs="?", const="mmproj-{name}.gguf", metavar="FILE", help=aside)
    p.add_argument("--no-check", dest="load", action="store_false", help="do not try whether llama.cpp loads the file")
    p.add_argument("--report", metavar="FILE", help="write every tensor's error as JSON, over an earlier report")
    p.add_argument("--threads", type=int, metavar="N", help="worker threads, all CPUs unless given")
    p.add_argument("--max-ram", metavar="SIZE", help="memory to stay below, such as 1500M or 2G")
    p.add_argument("--overwrite", action="store_true", help="replace an existing output or plan")
    p.add_argument("--revision", help="branch, tag or commit of a Hub id")

    p = command("dequantize", _dequantize, "Turn a quantized GGUF back into one of floats.")
    p.add_argument("file")
    p.add_argument("--outfile", help="file, folder or template ({name}-{type}.gguf)")
    p.add_argument("--type", default="f16", help="f16 (default), bf16 or f32")
    p.add_argument("--threads", type=int, metavar="N", help="worker threads, all CPUs unless given")
    p.add_argument("--overwrite", action="store_true", help="replace an existing output")

    p = command("inspect", _inspect, "Show types, bits per weight and sizes of a GGUF file.")
    p.add_argument("file")
    p.add_argument("--json", action="store_true", help="print JSON")

    p = command("validate", _validate, "Compare a GGUF file with its F16 baseline: perplexity, KL divergence, top-1.")
    p.add_argument("file")
    p.add_argument("--baseline", required=True, metavar="F16", help="GGUF of the same model in F16")
    p.add_argument("--text", required=True, help="text file to measure on")
    p.add_argument("--ctx", type=int, default=512, help="tokens per chunk (%(default)s)")
    p.add_argument("--chunks", type=int, help="chunks to use, the whole text unless given")
    p.add_argument("--threads", type=int, metavar="N", help="threads, llama.cpp's choice unless given")
    p.add_argument("--max-kld", type=float, help="fail (exit code 5) when the mean KL divergence is above")
    p.add_argument("--max-ppl-ratio", type=float, help="fail (exit code 5) when perplexity / baseline's is above")
    p.add_argument("--force", action="store_true", help="measure even on text that FILE was calibrated on")
    p.add_argument("--report", metavar="FILE", help="write the numbers as JSON, over an earlier report")

    command("types", _types, "List the tensor types with their bits per weight.")

    p = command("runtime", _runtime, "The patched llama.cpp that runs the files.")
    actions = p.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("fetch", help="get the pinned source and patch it")
    p = actions.add_parser("build", help="build it")
    p.add_argument("--tests", action="store_true", help="build llama.cpp's tests as well")
    actions.add_parser("path", help="print the folder of the built programs")
    actions.add_parser("check", help="apply the patches to a clean tree, without fuzz")
    return parser
