# SPDX-License-Identifier: MIT
"""`make tables`: the tables of figures in README.md and docs/, and a picture, from what docs/results/*.json keep.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`, with a line on where its figures come from.
The JSON files are written by the experiments with --keep. What no experiment measures any more is kept there
as tables with the commit that has the figures.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from . import files
from .common import RESULTS, run
from .quality import OURS, plot

PICTURE = RESULTS / "quality.svg"
PICTURED = "quality.ref-a"
DOCS = [Path("README.md"), *sorted(Path("docs").glob("*.md"))]
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
Table = tuple[list[str], list[list[str]]]  # headings, rows


def results() -> dict[str, dict]:
    """File name without .json -> content."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def tables(kept: dict[str, dict]) -> dict[str, str]:
    """Name -> Markdown, with a line on what was measured."""
    blocks = {"files": whole_files, "ends": ends}  # one table for the results of all models
    models: dict[str, list[str]] = {block: [] for block in blocks}
    found = {}
    for name, result in kept.items():
        if block := blocks.get(kind(name)):
            models[kind(name)].append(block(name, result))
            continue
        for part, table, measured in parts(name, result):
            found[part] = markdown(table) + "\n" + source(measured)
    return found | {block: "\n".join(parts) for block, parts in models.items()}


def kind(name: str) -> str:
    """Which experiment has made a result of that file name."""
    return name.partition(".")[0]


def parts(name: str, result: dict) -> Iterator[tuple[str, Table, dict]]:
    """(name, table, where it is from) of each of a file's tables."""
    if "tables" in result:
        for part, table in result["tables"].items():
            yield f"{name}.{part}", (table["headings"], table["rows"]), table["measured"]
        return
    make = {"quality": quality, "bench": bench, "paper-claq": claq}.get(kind(name), plain)
    yield name, make(result), result["measured"]
    if make is bench and any("/ read, plain" in row for row in result["0.6B"]["rows"]):
        yield f"{name}.roofline", roofline(result), result["measured"]


def quality(result: dict) -> Table:
    """A row for each type, KLD by what it was made with."""
    kinds = {"none": "KLD, no data", "imatrix": "KLD, imatrix", "plain": "KLD, plain aims", "feedback": "KLD, feedback"}
    kinds |= {"tuned": "KLD, scales trained", "trained": "KLD, codes trained", "layers": "KLD, layer by layer"}
    rows: dict[str, dict[str, dict]] = {}
    for row in result["rows"]:
        name, data = row["type"], row["data"]
        if data == "bpw":
            name, data = f"`--bpw {name.split()[0]}`", "feedback"
        elif name in OURS:
            name = f"`{name}`"
        if data == "self":
            name, data = f"{name}, own text", "feedback"
        rows.setdefault(name, {})[data] = row
    kinds = {data: heading for data, heading in kinds.items() if any(data in found for found in rows.values())}
    table = []
    for name, found in rows.items():
        fed = found.get("feedback", {})
        bits = max(row["bpw"] for row in found.values())
        klds = [significant(found[data]["mean_kld"]) if data in found else "" for data in kinds]
        ends = [f"{fed['ppl_ratio']:.4f}", f"{fed['top1']:.1%}"] if fed else ["", ""]
        table.append((bits, [name, f"{bits:.2f}", *klds, *(ends if "feedback" in kinds else [])]))
    table.sort(key=lambda entry: -entry[0])
    fed = ["perplexity / F16, feedback", "top-1, feedback"] if "feedback" in kinds else []
    return ["type", "bits per weight", *kinds.values(), *fed], [cells for _, cells in table]


def whole_files(name: str, result: dict) -> str:
    """A model's whole files: a row for each size, what of the claim was missed, and the picture."""
    at = {(row["type"], row["data"]): row for row in result["rows"]}
    sizes = [size for size in files.SIZES if (size, "imatrix") in at and (size, "ours") in at]
    timed = any("tg" in row for row in result["rows"])
    table, missed = [], []
    for size in sizes:
        theirs, ours = at[size, "imatrix"], at[size, "ours"]
        below = files.next_smaller(size, at)
        ratios = [row["mean_kld"] / theirs["mean_kld"] if row else None for row in (ours, below)]
        if ratios[0] > files.AT_MOST and (ratios[1] is None or ratios[1] > 1):
            missed.append(f"{size} ({ratios[0]:.2f})")
        klds = [significant(row["mean_kld"]) for row in (theirs, ours)]
        shares = ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        rates = [f"{row['tg']:.0f}" if "tg" in row else "" for row in (theirs, ours)] if timed else []
        table.append([size, f"{theirs['file_bpw']:.2f}", *klds, *shares, *rates])
    headings = ["size of", "bits per weight of the file", "KLD, imatrix", "KLD, `--file-bpw`", "of theirs"]
    headings += ["next smaller, of theirs", *(["tokens per second, theirs", "ours"] if timed else [])]
    claim = f"{files.AT_MOST:g} of llama-quantize's divergence at most, or no more of it at the next smaller size:"
    verdict = f"missed at the size of {', '.join(missed)}" if missed else f"kept at {len(sizes)} of {len(sizes)} sizes"
    model = result["model"]
    return (
        titled(result, (headings, table))
        + f"\n{claim} {verdict}.\n\n"
        + source(result["measured"])
        + f"\n![{model}: KL divergence over bits per weight of whole files]({RESULTS.name}/{name}.svg)\n"
    )


def ends(_: str, result: dict) -> str:
    """A row for each type and what embedding and output have, beside those with Q8_0."""
    at = {(row["type"], row["data"]): row for row in result["rows"]}
    table = []
    for (type, data), row in at.items():
        base = at[type, "q8_0"]
        ratios = [f"{row[key] / base[key]:.2f}" for key in ("file_bpw", "mean_kld")]
        kind = " and ".join(f"`{end}`" for end in data.replace("same", type).split("+"))
        table.append([f"`{type}`", kind, f"{row['file_bpw']:.2f}", significant(row["mean_kld"]), *ratios])
    headings = ["linear layers", "embedding and output", "bits per weight of the file", "KLD"]
    return (
        titled(result, ([*headings, "bits / with `q8_0`", "KLD / with `q8_0`"], table))
        + "\n"
        + source(result["measured"])
    )


def titled(result: dict, table: Table) -> str:
    """A table below its model's name."""
    return f"**{result['model']}**, {result['chunks']} chunks, {result['tokens']} tokens\n\n" + markdown(table)


def bench(result: dict) -> Table:
    """A column for each type, tokens per second and their ratio to Q4_K_S."""
    rows = result["0.6B"]["rows"]
    types = list(dict.fromkeys(row["type"] for row in rows))
    kinds = {key: key.removesuffix(" t/s") for row in rows for key in row if key.endswith(" t/s")}
    table = []
    for threads in sorted({row["threads"] for row in rows}):
        for what, heading in kinds.items():
            rates = {row["type"]: row.get(what) for row in rows if row["threads"] == threads}
            if not any(rates.values()):
                continue
            many = f"{threads} thread{'s' * (threads > 1)}"
            table.append([f"{heading}, {many}", *(f"{rates[t]:.3g}" if rates.get(t) else "" for t in types)])
            if base := rates.get("Q4_K_S"):
                ratios = (f"{rates[t] / base:.2f}" if rates.get(t) else "" for t in types)
                table.append([f"{heading}, {many} / Q4_K_S", *ratios])
    return ["tokens per second", *(f"`{t}`" if t.islower() else t for t in types)], table


def roofline(result: dict) -> Table:
    """What each type reaches of what memory gives, in large pages, and of what its kernel's instruction multiplies."""
    rows = result["0.6B"]["rows"]
    columns = {"decode GB/s": ("decode, GB/s", ".1f"), "/ read, large pages": ("of a plain read", ".0%")}
    columns |= {"prompt GMAC/s": ("prompt, GMAC/s", ".0f"), "/ peak": ("of the instruction", ".0%")}
    columns = {key: found for key, found in columns.items() if any(row.get(key) for row in rows)}
    by_type: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["threads"]):
        by_type.setdefault(row["type"], []).append(row)
    threads = [row["threads"] for row in next(iter(by_type.values()))]
    headings = ["type", *(f"{heading}, {n}" for n in threads for heading, _ in columns.values())]
    table = []
    for type, found in by_type.items():
        cells = [format(row[key], form) if row.get(key) else "" for row in found for key, (_, form) in columns.items()]
        table.append([f"`{type}`" if type.islower() else type, *cells])
    return headings, table


def claq(result: dict) -> Table:
    """KLD of every method, of the model as it is and with outlier channels."""
    pairs = zip(result["rows"]["plain"], result["rows"]["outliers"], strict=True)
    headings = ["method", "bits per weight", "KLD, as it is", "KLD, with outlier channels"]
    return headings, [
        [one["method"], f"{one['bpw']:.2f}", significant(one["mean_kld"]), significant(other["mean_kld"])]
        for one, other in pairs
        if one["method"] != "F16"
    ]


def plain(result: dict) -> Table:
    """The rows as they are, of the columns that are known."""
    formats = {
        "command": ("command", "{}"),
        "method": ("method", "{}"),
        "file": ("file", "{}"),
        "type": ("type", "{}"),
        "options": ("options", "{}"),
        "weights": ("bits per weight", "{:.2f}"),
        "bpw": ("bits per weight", "{:.2f}"),
        "cache": ("bits in the cache", "{:.2f}"),
        "minutes": ("minutes of processor time", "{:.2g}"),
        "seconds": ("seconds", "{:.0f}"),
        "peak": ("memory, MB", "{:.0f}"),
        "MB": ("MB", "{:.4g}"),
        "file_bpw": ("bits per weight of the file", "{:.2f}"),
        "ppl": ("perplexity", "{:.3f}"),
        "ppl_ratio": ("perplexity / F16", "{:.4f}"),
        "mean_kld": ("KLD", ""),
        "of_none": ("of that without a text", "{:.2f}"),
        "shape": ("shape", "{}"),
        "each layer s": ("seconds of a layer", "{:.1f}"),
        "once s": ("seconds once", "{:.0f}"),
        "layers": ("layers", "{}"),
        "all min": ("minutes in all", "{:.1f}"),
        "GPU GiB": ("GPU memory, GiB", "{:.0f}"),
        "top1": ("top-1", "{:.1%}"),
        "cosine": ("mean cosine to F16", "{:.5f}"),
        "lowest": ("lowest cosine", "{:.4f}"),
        "neighbour": ("same nearest text", "{:.1%}"),
    }
    rows = result["rows"]
    known = {key: value for key, value in formats.items() if any(row.get(key) is not None for row in rows)}
    if "weights" in known:
        known.pop("bpw", None)

    def cell(row: dict, key: str, form: str) -> str:
        value = row.get(key)
        if value is None:
            return ""
        name = f"`{value}`" if key == "type" and value in OURS else form.format(value)
        return significant(value) if key == "mean_kld" else name

    return [h for h, _ in known.values()], [[cell(row, k, form) for k, (_, form) in known.items()] for row in rows]


def significant(value: float) -> str:
    """Three digits that count, never as a power of ten; F16's own divergence is 0."""
    if value < 1e-5:
        return "0"
    digits = f"{value:#.3g}"
    return f"{float(digits):.7f}".rstrip("0") if "e" in digits else digits.rstrip(".")


def markdown(table: Table) -> str:
    headings, rows = table
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def source(measured: dict[str, str]) -> str:
    """Where the figures come from, as a line below a table."""
    command = f"`{measured['command']}`" if measured.get("command") else "by hand"
    return f"<sub>{command}, {measured['date']}, {measured['machine']}, commit {measured['commit']}</sub>\n"


def filled(text: str, found: dict[str, str]) -> str:
    """A document with all its marked tables as they should be; KeyError for a table that nothing is kept of."""
    return MARKED.sub(lambda match: f"{match[1]}\n{found[match[2]]}\n{match[3]}", text)


def draw(kept: dict[str, dict], folder: Path) -> None:
    """KLD over stored bits: of linear layers, and of whole files for each model that is kept."""
    pictures = {PICTURE.name: (plot, kept[PICTURED])}
    pictures |= {f"{name}.svg": (files.plot, result) for name, result in kept.items() if kind(name) == "files"}
    for picture, (drawn, result) in pictures.items():
        title = f"{result['model']} on {result['chunks']} chunks of {result['text']}"
        drawn(result["rows"], title, folder / picture)


def main() -> None:
    kept = results()
    found = tables(kept)
    for path in DOCS:
        before = path.read_text()
        if (after := filled(before, found)) != before:
            path.write_text(after)
            print(f"written: {path}")
    draw(kept, RESULTS)


if __name__ == "__main__":
    run(main)
