# SPDX-License-Identifier: MIT
"""`make embeddings`: how far the vectors of a quantized embedding model turn: cosine to F16, through llama-server.

all-MiniLM-L6-v2 in full precision; its rows of 384 are no multiple of 256, so llama.cpp's K types fall back to larger
ones in most tensors, as the stored bits tell. No file has data: neither a calibration nor llama-imatrix runs such a
model. Embeddings are F16 everywhere. Each paragraph of a text is one input.
"""

import contextlib
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gguf_splitq.inspection import linear_bpw
from gguf_splitq.runtime import building

from . import public
from .common import BUILD, DEMO, convert, parser, quantize, run, save, show

OURS = ["sq4w", "sq4", "sdr4", "sq3w", "sq3", "sq2w", "sq2"]
PEERS = ["Q8_0", "Q5_K", "Q4_K", "IQ4_NL", "IQ4_XS", "Q4_0", "Q3_K", "Q2_K"]
FORMATS = {"type": "", "bpw": ".2f", "cosine": ".5f", "lowest": ".4f", "neighbour": ".1%"}
LENGTH = 200, 800  # characters of a paragraph; a text of more than 512 tokens is refused
START = 60  # seconds that the server may take to load a file of 50 MB
BATCH = 32  # inputs in a request


def paragraphs(text: str, count: int) -> list[str]:
    """`count` paragraphs, evenly from all of a text, of those whose length is right."""
    found = [" ".join(part.split()) for part in text.split("\n\n")]
    found = [part for part in found if LENGTH[0] <= len(part) <= LENGTH[1]]
    return [found[i] for i in np.linspace(0, len(found) - 1, min(count, len(found))).astype(int)]


@contextlib.contextmanager
def server(file: Path, threads: int) -> Iterator[str]:
    """The address at which llama-server answers with a file's embeddings."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--embedding", "-c", "512", "-b", "512", "-ub", "512", "-np", "1", "-t", str(threads)]
    command = [building.program("llama-server"), "-m", file, "--host", "127.0.0.1", "--port", str(port), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(10 * START):
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{address}/health", timeout=START).close()  # an error until it has loaded
                break
            if process.poll() is not None:
                raise SystemExit(f"llama-server ended with exit code {process.returncode} on {file}")
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait()


def embedded(file: Path, texts: list[str], threads: int) -> np.ndarray:
    """float64 [texts, width], each row of length 1."""
    vectors = []
    with server(file, threads) as address:
        for first in range(0, len(texts), BATCH):
            body = json.dumps({"input": texts[first : first + BATCH]}).encode()
            request = urllib.request.Request(f"{address}/v1/embeddings", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request) as answer:
                data = sorted(json.load(answer)["data"], key=lambda entry: entry["index"])
            vectors += [entry["embedding"] for entry in data]
    found = np.array(vectors)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def compared(exact: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Mean and lowest cosine, and how often the nearest other text is the same."""
    cosine = (exact * found).sum(1)
    return {"cosine": cosine.mean(), "lowest": cosine.min(), "neighbour": (nearest(exact) == nearest(found)).mean()}


def nearest(vectors: np.ndarray) -> np.ndarray:
    """int [texts]: of each vector the nearest other one."""
    similar = vectors @ vectors.T
    np.fill_diagonal(similar, -np.inf)
    return similar.argmax(1)


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--model", default="minilm", help="an embedding model's path, or minilm, a public one")
    p.add_argument("--text", type=Path, default=DEMO / "eval.txt")
    p.add_argument("--count", type=int, default=80, help="paragraphs of the text")
    args = p.parse_args()

    folder = BUILD / "embeddings"
    texts = paragraphs(args.text.read_text(), args.count)
    f16 = convert(public.model(args.model), "f16", folder / "f16.gguf", threads=args.threads)
    exact = embedded(f16, texts, args.threads)
    rows = []
    for type in [*OURS, *PEERS]:
        file = folder / f"{type}.gguf"
        if type in OURS:
            convert(f16, type, file, threads=args.threads, token_embedding_type="f16")
        else:
            quantize(f16, type, file, args.threads, "--pure", "--token-embedding-type", "f16")
        rows.append({"type": type, "bpw": linear_bpw(file)} | compared(exact, embedded(file, texts, args.threads)))
        print(f"{type}: cosine {rows[-1]['cosine']:.5f}", flush=True)
        file.unlink()
    show(f"{args.model}, {len(texts)} paragraphs of {args.text}", rows, FORMATS)
    save("embeddings", {"model": args.model, "text": args.text.name, "paragraphs": len(texts), "rows": rows}, args.keep)


if __name__ == "__main__":
    run(main)
