#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""`gguf-splitq convert` under the name and the options of llama.cpp's convert_hf_to_gguf.py, where they mean the same.

    python convert/convert_hf_to_gguf.py MODEL --outtype sq4 --outfile 'model-{ftype}.gguf'

All other options are those of `gguf-splitq convert`. The logic is in the package: gguf_splitq/convert.py.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

from gguf_splitq.cli import main  # noqa: E402


def arguments(given: list[str]) -> list[str]:
    """The arguments of `gguf-splitq` for those of upstream's script."""
    parser = argparse.ArgumentParser(
        description="Convert a checkpoint to a GGUF file.",
        epilog="Other options are those of `gguf-splitq convert`.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="a Hugging Face folder, or a Hub id")
    parser.add_argument("--outtype", required=True, metavar="TYPE", help="tensor type, see `gguf-splitq types`")
    parser.add_argument("--outfile", help="path to write to; {ftype} becomes the type")
    parser.add_argument("--remote", action="store_true", help="MODEL is a Hub id; not needed")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    args, others = parser.parse_known_args(given)
    out = ["--outfile", args.outfile.replace("{ftype}", "{type}")] if args.outfile else []
    return [*["--debug"] * args.verbose, "convert", args.model, "--type", args.outtype.lower(), *out, *others]


if __name__ == "__main__":
    sys.exit(main(arguments(sys.argv[1:])))
