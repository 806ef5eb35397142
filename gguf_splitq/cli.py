# SPDX-License-Identifier: MIT
"""The command line: each subcommand is one function called with the parsed options; errors become exit codes.

0 done, 2 wrong usage, 3 bad input, 4 unsupported, 5 validation failed, 6 the environment lacks something, 130 Ctrl-C,
128 + n ended by signal n.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import __version__
from .calibration import ranks
from .errors import SplitqError, printable

# README.md has the same commands; a test compares them and runs them.
JOURNEYS = """\
Better low-bit GGUF files for llama.cpp, in three ways.

Once, about ten minutes on two cores: llama.cpp with our patches
gguf-splitq runtime build

1. A better q4_k for any llama.cpp, Ollama or LM Studio
gguf-splitq convert HuggingFaceTB/SmolLM2-135M-Instruct --type q4_k --calib self

2. The best file of a size, run and chat
gguf-splitq convert HuggingFaceTB/SmolLM2-135M-Instruct --size 100M --calib self
"$(gguf-splitq runtime path)/llama-server" -m SmolLM2-135M-Instruct-100M.gguf

3. Without data, in seconds
gguf-splitq convert HuggingFaceTB/SmolLM2-135M-Instruct --type sq4w --outfile quick.gguf

In place of the Hub id, a folder or an F16 GGUF will do.
`gguf-splitq --help` lists commands, `gguf-splitq convert --help` its options."""

# Examples in --help.
CONVERT = """
gguf-splitq convert MODEL --type q4_k --calib some.txt     # for any llama.cpp
gguf-splitq convert MODEL --type sq4w --calib some.txt     # ours, 4.25 bits
gguf-splitq convert MODEL --type sq4w                      # no text, seconds
gguf-splitq convert MODEL --size 1.8G --calib some.txt     # that size at most
gguf-splitq convert MODEL --type sq3w --tensor-type ffn_down=sq4w --dry-run
"""
DEQUANTIZE = """
gguf-splitq dequantize model-sq4.gguf        # writes model-sq4-f16.gguf
"""
INSPECT = """
gguf-splitq inspect model-sq4.gguf
gguf-splitq inspect model-sq4.gguf --json | jq .metadata
"""
REPACK = """
gguf-splitq repack model-sq4.gguf --container      # for every GGUF reader
gguf-splitq repack model-sq4.gguf --native-ids     # type ids 100 and up
"""
VALIDATE = """
gguf-splitq convert MODEL --type f16
gguf-splitq validate M-sq4.gguf --baseline M-f16.gguf --text some.txt
gguf-splitq validate M-sq4.gguf --baseline M-f16.gguf --text some.txt \\
    --chunks 20 --max-kld 0.02 --report numbers.json
"""
SERVE = """
gguf-splitq serve MODEL-sq4.gguf              # open http://127.0.0.1:8080
gguf-splitq serve MODEL-sq4.gguf --port 9000 --ctx-size 32768
gguf-splitq serve MODEL-sq4.gguf --help       # llama-server's options
"""
RUN = """
gguf-splitq run MODEL-sq4.gguf
gguf-splitq run MODEL-sq4.gguf -p "Why is the sky blue?" --single-turn
"""
OLLAMA = """
gguf-splitq ollama serve               # in place of `ollama serve`
gguf-splitq ollama create NAME MODEL-sq4.gguf    # then: ollama run NAME
gguf-splitq ollama install --system    # for its systemd service, as root
"""
RUNTIME = """
gguf-splitq runtime build
"$(gguf-splitq runtime path)/llama-server" -m MODEL-sq4.gguf
"""


class _Terminated(BaseException):
    """A signal that asks the process to end, raised so that every `finally` and `with` cleans up."""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = vars(_parser().parse_args(argv))
    run, debug = args.pop("run", None), args.pop("debug")
    if run is None:  # no command: not an error to explain, but a script that forgot one should notice
        print(JOURNEYS)
        return 2
    if sys.platform == "win32":
        return _fail("this program runs on Linux and macOS: on Windows, run it in WSL (`wsl --install`)")
    if debug:
        os.environ["SPLITQ_DEBUG"] = "1"  # the converter process prints its traceback as well
    wanted = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]  # nohup ignores one
    wanted = wanted if ranks.speaks() else []  # another process has nothing to clean up, and ends without a word
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
        if ranks.speaks():
            print("gguf-splitq: interrupted; no incomplete file is left", file=sys.stderr)
        return 128 + signal.SIGINT
    except _Terminated as error:
        print("gguf-splitq: terminated; no incomplete file is left", file=sys.stderr)
        return 128 + error.args[0]
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _fail(sentence: str, code: int = 6) -> int:
    """Print what went wrong, unless another process does, and return the exit code; 6 is what the machine lacks."""
    if sentence:
        print(f"gguf-splitq: {printable(sentence)}", file=sys.stderr)
    return code


def _out_of_memory(error: RuntimeError) -> str | None:
    """The sentence for PyTorch's errors of memory, on a GPU or not; None for others."""
    torch = sys.modules.get("torch")  # where it is not loaded, nothing of it was raised
    if "out of memory" in str(error) or torch and isinstance(error, torch.cuda.OutOfMemoryError):
        return "the GPU's memory ran out: close other programs there, give a larger --max-vram, or --device cpu"
    if "can't allocate memory" in str(error):
        return "memory ran out: close other programs or pass a smaller --max-ram"
    return None


def _terminate(number: int, frame: object) -> None:
    raise _Terminated(number)


def _convert(**options: Any) -> None:
    from .convert import convert

    convert(**options)


def _dequantize(**options: Any) -> None:
    from .dequantize import dequantize

    dequantize(**options)


def _inspect(**options: Any) -> None:
    from .inspection import inspect

    inspect(**options)


def _repack(**options: Any) -> None:
    from .repack import repack

    repack(**options)


def _validate(**options: Any) -> None:
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


def _serve(file: str, options: list[str]) -> None:
    from .serving import programs

    programs.serve(file, options)


def _run(file: str, options: list[str]) -> None:
    from .serving import programs

    programs.run(file, options)


def _ollama(action: str, **options: Any) -> None:
    from .serving import creating, service, shadow

    options.pop("system", None)  # required, so that nobody changes a machine unawares; there is no other way
    ways: dict[str, Callable[..., object]] = {"serve": shadow.serve, "stop": shadow.stop, "remove": shadow.remove}
    ways |= {"create": creating.create, "install": service.install, "uninstall": service.uninstall}
    ways[action](**options)


def _runtime(action: str, tests: bool = False, **options: Any) -> None:
    from .runtime import building, fetching, installing

    if action == "check":
        changed = fetching.patches_check()
        for name, lines in changed.items():
            print(f"{name} applies: {lines} lines of llama.cpp's files changed")
        print(f"{sum(changed.values())} changed lines in all")
        return
    ways: dict[str, Callable[..., Path]] = {"fetch": fetching.fetch, "path": building.path}
    ways |= {"build": lambda: building.build(tests), "install": installing.install, "archive": installing.archive}
    print(ways[action](**options))


def _format(prog: str) -> argparse.HelpFormatter:
    """Help as wide as the terminal, but no wider than a line that reads well; epilogs keep their lines."""
    width = min(shutil.get_terminal_size().columns, 110) - 2
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=width)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gguf-splitq",
        description="Better low-bit GGUF files for llama.cpp.",
        epilog="`gguf-splitq COMMAND --help` explains its options; `gguf-splitq` is a tour.",
        formatter_class=_format,
    )
    parser.add_argument("--version", action="version", version=f"gguf-splitq {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks instead of one sentence")
    commands = parser.add_subparsers(metavar="COMMAND")

    def command(name: str, run: Callable[..., None], text: str, examples: str = "") -> argparse.ArgumentParser:
        epilog = "examples:\n" + textwrap.indent(examples.strip(), "  ") if examples else None
        sub = commands.add_parser(name, help=text, description=text, epilog=epilog, formatter_class=_format)
        sub.set_defaults(run=run)
        return sub

    _add_convert(command("convert", _convert, "Convert a checkpoint to a GGUF file.", CONVERT))

    p = command("dequantize", _dequantize, "Turn a quantized GGUF back into one of floats.", DEQUANTIZE)
    p.add_argument("file", metavar="FILE", help="a GGUF file; for a program that does not know its types")
    p.add_argument("--outfile", metavar="OUT", help="file, folder or template (default: {name}-{type}.gguf)")
    p.add_argument("--type", default="f16", help="f16, bf16 or f32 (default: %(default)s)")
    p.add_argument("--threads", type=int, metavar="N", help="worker threads (default: all CPUs)")
    p.add_argument("--overwrite", action="store_true", help="replace an existing output; without it one is refused")

    p = command("repack", _repack, "Change the form of a file with our types; its data stay as they are.", REPACK)
    p.add_argument("file", metavar="FILE", help="a GGUF file, or the first of its shards, which become one")
    forms = p.add_mutually_exclusive_group(required=True)
    form = "our types as rows of bytes that every GGUF reader takes, as `convert` writes them"
    forms.add_argument("--container", action="store_true", help=form)
    form = "our types with their own ids, 100 and up, which only the patched llama.cpp knows"
    forms.add_argument("--native-ids", dest="container", action="store_false", help=form)
    p.add_argument("--outfile", metavar="OUT", help="file, folder or template (default: {name}-{type}.gguf)")
    p.add_argument("--overwrite", action="store_true", help="replace an existing output; without it one is refused")

    p = command("inspect", _inspect, "Show types, bits per weight and sizes of a GGUF file.", INSPECT)
    p.add_argument("file", metavar="FILE", help="a GGUF file, or the first of its shards")
    p.add_argument("--json", action="store_true", help="print JSON, with all metadata, for programs")

    text = "Compare a GGUF file with its F16 baseline: perplexity, KL divergence, top-1."
    p = command("validate", _validate, text, VALIDATE)
    p.add_argument("file", metavar="FILE", help="the GGUF file to judge")
    g = p.add_argument_group("what to measure")
    g.add_argument(
        "--baseline", required=True, metavar="F16", help="the same model in F16: `convert --type f16` makes it"
    )
    g.add_argument("--text", required=True, help="text to measure on; not the text that FILE was calibrated on")
    g.add_argument(
        "--ctx", type=int, default=512, metavar="N", help="tokens per chunk (default: %(default)s, as others do)"
    )
    chunks = "chunks to use (default: the whole text); 20 give a first idea, 100 a figure to keep"
    g.add_argument("--chunks", type=int, metavar="N", help=chunks)
    g.add_argument("--force", action="store_true", help="measure even on text that FILE was calibrated on")
    g = p.add_argument_group("limits, for scripts")
    kld = "exit code 5 when the mean KL divergence is above X nats (default: no limit)"
    g.add_argument("--max-kld", type=float, metavar="X", help=kld)
    ratio = "exit code 5 when perplexity / baseline's is above X (default: no limit)"
    g.add_argument("--max-ppl-ratio", type=float, metavar="X", help=ratio)
    g = p.add_argument_group("output and speed")
    g.add_argument("--report", metavar="JSON", help="write the numbers, over an earlier report (default: none)")
    card = "put the numbers into a model card that `convert --card` wrote (default: none)"
    g.add_argument("--card", metavar="FILE", help=card)
    g.add_argument("--threads", type=int, metavar="N", help="threads (default: llama.cpp's choice)")

    text = "Serve a GGUF file: a page to chat on and OpenAI's API."
    p = command("serve", _serve, text, SERVE)
    p.add_argument("file", metavar="FILE", help="a GGUF file, or the first of its shards")
    p.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="options of llama-server, after FILE")

    p = command("run", _run, "Chat with a GGUF file in the terminal.", RUN)
    p.add_argument("file", metavar="FILE", help="a GGUF file, or the first of its shards")
    p.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="options of llama-cli, after FILE")

    _add_ollama(command("ollama", _ollama, "Run the files in an installed Ollama.", OLLAMA))

    command("types", _types, "List the tensor types with their bits per weight.")

    p = command("runtime", _runtime, "The patched llama.cpp that runs the files.", RUNTIME)
    actions = p.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("fetch", help="get the pinned source and patch it")
    p = actions.add_parser("build", help="fetch and build it: about ten minutes on two cores, once")
    p.add_argument("--tests", action="store_true", help="build llama.cpp's tests as well; only developers need them")
    actions.add_parser("path", help="print the folder of the built programs")
    p = actions.add_parser("install", help="copy the build to a folder that needs nothing else of this program")
    p.add_argument("prefix", metavar="PREFIX", help="folder for llama.cpp alone; the programs come to PREFIX/bin")
    p.add_argument("--overwrite", action="store_true", help="replace an earlier copy; without it one is refused")
    p = actions.add_parser("archive", help="build for all processors of this kind and pack it, for other machines")
    p.add_argument("file", nargs="?", metavar="FILE", help="file or folder (default: named by platform, here)")
    p.add_argument("--overwrite", action="store_true", help="replace an existing file; without it one is refused")
    actions.add_parser("check", help="apply the patches to a clean tree, without fuzz")
    return parser


def _add_ollama(p: argparse.ArgumentParser) -> None:
    actions = p.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("serve", help="run the installed Ollama with our llama.cpp for models of our types")
    create = actions.add_parser("create", help="make a file a model of a running Ollama, near or far")
    create.add_argument("name", metavar="NAME", help="the model's name there")
    create.add_argument("file", metavar="FILE", help="a GGUF file, or the first of its shards")
    modelfile = "template, system prompt, parameters (default: the file's own); its FROM is not looked at"
    create.add_argument("--modelfile", metavar="M", help=modelfile)
    taken = "replace a model of that name, which is gone then; without it one is refused"
    create.add_argument("--overwrite", action="store_true", help=taken)
    host = "address of the server (default: OLLAMA_HOST, else http://127.0.0.1:11434)"
    create.add_argument("--host", metavar="URL", help=host)
    actions.add_parser("stop", help="end the servers that `serve` started")
    actions.add_parser("remove", help="end them and delete what `serve` made; the installed Ollama is as it was")
    for name, text in (("install", "make Ollama's systemd service do the same"), ("uninstall", "undo `install`")):
        p = actions.add_parser(name, help=text)
        p.add_argument("--system", action="store_true", required=True, help="the service of the machine; needs root")
        p.add_argument("--root", metavar="DIR", default="/", help="of an image, not running (default: %(default)s)")


def _add_convert(p: argparse.ArgumentParser) -> None:
    """The options of `convert`, in groups: what to convert, to which type, with which text, where to, how fast."""
    g = p.add_argument_group("what to convert")
    g.add_argument("model", metavar="MODEL", help="a Hugging Face folder, a Hub id, or a GGUF in F32, F16 or BF16")
    g.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub id (default: its main branch)")
    aside = "also write the vision or audio part (default: left out; without FILE: %(const)s beside the output)"
    g.add_argument("--mmproj", nargs="?", const="mmproj-{name}.gguf", metavar="FILE", help=aside)

    g = p.add_argument_group("to which type", "One of --type, --bpw, --file-bpw, --size and --plan is needed.")
    g.add_argument(
        "--type", help="type of the linear layers: q4_k for any llama.cpp, sq4w for ours; see `gguf-splitq types`"
    )
    bpw = "a type for each linear layer, X bits per weight in these (no default); 2.3 to 8.5; needs --calib"
    g.add_argument("--bpw", type=float, metavar="X", help=bpw)
    whole = "a type for each tensor, X bits per weight in the whole file (no default); 2.3 to 8.5; needs --calib"
    g.add_argument("--file-bpw", type=float, metavar="X", help=whole)
    size = "the same, for a file of at most that size, such as 800M or 1.8G (no default); needs --calib"
    g.add_argument("--size", metavar="SIZE", help=size)
    g.add_argument("--save-plan", metavar="JSON", help="keep the types that a budget chose (default: not kept)")
    g.add_argument("--plan", dest="plan_file", metavar="JSON", help="types that --save-plan kept (no default)")
    many = "type of tensors by name, such as ffn_down=sq4 (default: none); may be repeated, the first match wins"
    g.add_argument("--tensor-type", action="append", default=[], metavar="REGEX=TYPE", help=many)
    embedding = (
        "type of the embedding (default: q8_0, with K and IQ types q6_k); a smaller one pays off in small models"
    )
    g.add_argument("--token-embedding-type", metavar="TYPE", help=embedding)
    g.add_argument("--output-tensor-type", metavar="TYPE", help="type of the output matrix (default: the same)")
    metric = "what gives columns of cq2.x to sq3.x more bits (default: %(default)s); outlier is CLAQ's, for comparing"
    g.add_argument("--claq-metric", choices=("hessian", "outlier"), default="hessian", help=metric)

    g = p.add_argument_group(
        "calibration", "Optional; it lowers the divergence of every type. See docs/calibration.md."
    )
    calib = "text like what the model is for, or `self`: the model writes one (default: no calibration, seconds)"
    g.add_argument("--calib", metavar="TEXT", help=calib)
    tokens = "tokens to use (default: %(default)s); time grows with them, and the gain slows"
    g.add_argument("--calib-tokens", type=int, default=131_072, metavar="N", help=tokens)
    hessians = "what the backward pass measured: read FILE, or write it (default: not kept); for several types"
    g.add_argument("--hessians", metavar="FILE", help=hessians)
    tune = (
        "train what is stored: scales (and norms; minutes), or codes too (GPU, 8 bytes a weight), of the whole model; "
        "or layers, scales and codes of one after the other (default: no)"
    )
    g.add_argument("--tune", nargs="?", const="scales", choices=("scales", "codes", "layers"), help=tune)
    steps = "steps to train, of 4096 tokens each (default: 64 for scales, 640 for codes, 128 for each of the layers)"
    g.add_argument("--tune-steps", type=int, metavar="N", help=steps)
    dtype = "what to compute in (default: %(default)s: bf16 where the processor is fast in it, else f32)"
    g.add_argument("--calib-dtype", choices=("auto", "f32", "bf16"), default="auto", help=dtype)
    aim = (
        "what codes aim at (default: %(default)s: half of what repairs the error of the layers before); plain is faster"
    )
    g.add_argument("--aim", choices=("half", "plain"), default="half", help=aim)
    imatrix = "importance matrix of llama-imatrix, .dat or .gguf (default: none); instead of --calib, which gains more"
    g.add_argument("--imatrix", metavar="FILE", help=imatrix)

    g = p.add_argument_group("output")
    g.add_argument("--outfile", default="{name}-{type}.gguf", help="file, folder or template (default: %(default)s)")
    g.add_argument(
        "--overwrite", action="store_true", help="replace an existing output or plan; without it one is refused"
    )
    g.add_argument("--dry-run", action="store_true", help="print the plan with sizes; write nothing but --save-plan")
    report = "write every tensor's error, over an earlier report (default: none)"
    g.add_argument("--report", metavar="JSON", help=report)
    native = "store our types with their own ids, 100 and up (default: as rows of bytes that every GGUF reader takes)"
    g.add_argument("--native-ids", dest="container", action="store_false", help=native)
    card = "also write a model card for a hub (default: no; without FILE: %(const)s beside the output)"
    g.add_argument("--card", nargs="?", const="README.md", metavar="FILE", help=card)
    check = "do not try whether llama.cpp loads the file (default: tried, where it is built)"
    g.add_argument("--no-check", dest="load", action="store_false", help=check)

    launcher = "Several GPUs: torchrun --nproc-per-node N -m gguf_splitq convert ..."
    g = p.add_argument_group("memory and speed", launcher)
    device = "what --calib runs on: cpu, cuda, cuda:1 ... (default: %(default)s: a GPU that PyTorch sees, else cpu)"
    g.add_argument("--device", default="auto", metavar="D", help=device)
    g.add_argument("--threads", type=int, metavar="N", help="worker threads (default: all CPUs)")
    ram = "memory to stay below, such as 1500M or 2G (default: no limit); what is needed is stated beforehand"
    g.add_argument("--max-ram", metavar="SIZE", help=ram)
    vram = "memory of the GPU to stay below (default: all of it); what is needed is stated beforehand"
    g.add_argument("--max-vram", metavar="SIZE", help=vram)
