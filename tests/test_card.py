# SPDX-License-Identifier: MIT
"""The model card: what tools read of it, what it says, what is escaped, and the numbers that `validate` puts in."""

import json
import os
import shlex
from pathlib import Path

import crafted
import pytest
from huggingface_hub import ModelCard

from gguf_splitq import card, cli, options
from gguf_splitq.convert import convert
from gguf_splitq.errors import InputError, UsageError, printable
from gguf_splitq.files import gguf_file
from gguf_splitq.files.gguf_file import Value
from gguf_splitq.measure import validate

RESULT = dict(ppl=34.587, ppl_ratio=1.0458, mean_kld=0.08602, p99_kld=0.7, top1=0.82, chunks=20, ctx=512)


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    return crafted.write_gguf(tmp_path / "m.gguf", crafted.llama_tensors())


def with_metadata(path, **more):
    """The file again, with more keys under general."""
    with gguf_file.read(path) as file:
        kv = file.kv | {f"general.{key.replace('__', '.')}": Value.of(value) for key, value in more.items()}
        rows = [b"".join(map(bytes, file.pieces(t))) for t in file.tensors]
        head = gguf_file.header(kv, file.infos)
        path.write_bytes(head + b"".join(row.ljust(gguf_file.padded(len(row)), b"\0") for row in rows))
    return path


def test_what_tools_and_people_read(model, tmp_path):
    with_metadata(model, license="other", license__name="my-own", license__link="https://example.org/LICENSE")
    rules = ["ffn_down=q8_0", "attn_[qk]=sq3"]
    made = convert(model, "sq4", "out/m-sq4.gguf", tensor_type=rules, card="README.md", threads=2)
    text = (tmp_path / "out" / "README.md").read_text()
    data = ModelCard(text).data.to_dict()
    assert data == {
        "license": "other",
        "license_name": "my-own",
        "license_link": "https://example.org/LICENSE",
        "library_name": "gguf",
        "tags": ["gguf", "sq4", "gguf-splitq"],
    }
    assert "# Tiny, sq4\n" in text and "| calibration | none |" in text and "Not measured yet." in text
    (line,) = [line for line in text.splitlines() if line.startswith("gguf-splitq convert ")]
    assert line == "gguf-splitq convert MODEL --type sq4 --tensor-type ffn_down=q8_0 --tensor-type 'attn_[qk]=sq3'"
    cli._parser().parse_args(shlex.split(line)[1:])
    assert f"gguf-splitq ollama create m-sq4 {made.name}" in text


def test_a_stock_type_runs_everywhere(model, tmp_path):
    convert(model, "q8_0", "out/m-q8_0.gguf", card="card.md", threads=2)
    text = Path("card.md").read_text()
    assert "LM Studio" in text and "gguf-splitq serve" not in text and ModelCard(text).data.tags == ["gguf", "q8_0"]


@pytest.mark.parametrize(
    ("given", "base", "line", "words"),
    [
        (dict(calib="a b.txt", calib_tokens=4096, calib_dtype="f32", hessians=True, tune="codes"), "owner/name",
         "gguf-splitq convert owner/name --type sq4 --calib 'a b.txt' --calib-tokens 4096 --calib-dtype f32 "
         "--tune codes",
         "error feedback on 4096 tokens of a b.txt"),
        (dict(calib="self", calib_tokens=4096, sampling={"n": 1}, bpw=3.5), None,
         "gguf-splitq convert MODEL --bpw 3.5 --calib self --calib-tokens 4096",
         "error feedback on 4096 tokens of text that the model wrote"),
        (dict(calib="self", calib_tokens=4096, sampling={"n": 1}, file_bpw=4.5), None,
         "gguf-splitq convert MODEL --file-bpw 4.5 --calib self --calib-tokens 4096",
         "error feedback on 4096 tokens of text that the model wrote"),
        (dict(plan="p.json", bpw=3.5, imatrix="i.dat"), None,
         "gguf-splitq convert MODEL --plan p.json --imatrix i.dat", "importance matrix i.dat"),
    ],
)  # fmt: skip
def test_the_command_that_made_it(tmp_path, given, base, line, words):
    kv = {"gguf_splitq.type": "sq4", "gguf_splitq.options": json.dumps(given)}
    (tmp_path / "m.gguf").write_bytes(gguf_file.header({k: Value.of(v) for k, v in kv.items()}, []))
    with gguf_file.read(tmp_path / "m.gguf") as file:
        text = card.text(file, base)
    assert f"```\n{line}\n```" in text and f"| calibration | {words} |" in text
    if base:
        data = ModelCard(text).data
        assert (
            data.base_model == base and data.base_model_relation == "quantized" and f"| base model | `{base}` |" in text
        )


HOSTILE = [
    "\x1b[2J",
    "a\n---\nlicense: mit",
    "```\nrm",
    "| x | [a](http://b) <b>",
    '"\\',
    "- a: b",
    "ä",
    "a\u2028---\x85b",
    "{",
    "$(x)",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_metadata_cannot_say_more_than_words(model, text):
    with_metadata(model, name=text, license=text)
    plain = card.text(gguf_file.read(model))
    kv = {"general.name": text, "general.license": text, "general.license.name": text, "gguf_splitq.type": text}
    kv |= {
        "gguf_splitq.options": json.dumps({"calib": text, "tensor_type": [text], "bpw": text}),
        "gguf_splitq.version": text,
    }
    Path("h.gguf").write_bytes(gguf_file.header({k: Value.of(v) for k, v in kv.items()}, []))
    found = card.text(gguf_file.read("h.gguf"))
    assert all(line.isprintable() for line in found.splitlines())
    assert ModelCard(found).data.to_dict()["license"] == printable(text) and "mit" not in found.splitlines()
    assert found.count("\n```") == plain.count("\n```") and not {"---", "rm"} & set(found.splitlines()[8:])
    assert len(found.splitlines()) == len(plain.splitlines()) + 1  # a licence's name


def test_options_that_are_no_json(tmp_path):
    for text in ("[", "[1]", "[" * 100_000):
        (tmp_path / "m.gguf").write_bytes(gguf_file.header({"gguf_splitq.options": Value.of(text)}, []))
        with gguf_file.read(tmp_path / "m.gguf") as file:
            assert "| calibration | none |" in card.text(file)


def test_a_card_is_an_output_like_others(model, capsys):
    Path("out/README.md").write_text("mine")
    args = ["convert", "m.gguf", "--type", "sq4", "--outfile", "out/m-sq4.gguf", "--threads", "2"]
    for more in (["--card"], ["--card", "m.gguf"], ["--card", "m.gguf", "--overwrite"], ["--card", "out/m-sq4.gguf"]):
        assert cli.main([*args, *more]) == 2
        assert not Path("out/m-sq4.gguf").exists() and len(capsys.readouterr().err.splitlines()) == 1
    assert cli.main([*args, "--card", "--dry-run"]) == 0 and Path("out/README.md").read_text() == "mine"
    assert cli.main([*args, "--card", "--overwrite"]) == 0
    assert options.is_earlier("--card", Path("out/README.md"))


@pytest.fixture
def measured(model, monkeypatch):
    """`validate` on a card, with numbers that are given."""
    convert(model, "sq4", "m-sq4.gguf", card="README.md", threads=2)
    Path("a|b.txt").write_text("a text")
    Path("other.txt").write_text("a text")

    def run(text, **numbers):
        class Baseline:
            def __init__(self, *_):
                pass

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

            def compare(self, file):
                return RESULT | {"file_bpw": 4.5, "bpw": 4.25, "size": 1} | numbers

        monkeypatch.setattr(validate, "Baseline", Baseline)
        return cli.main(["validate", "m-sq4.gguf", "--baseline", "m.gguf", "--text", text, "--card", "README.md"])

    return run


def test_numbers_are_put_in_and_replaced(measured):
    empty = Path("README.md").read_text()
    assert measured("a|b.txt") == 0 and measured("other.txt") == 0 and measured("a|b.txt", mean_kld=0.05) == 0
    text = Path("README.md").read_text()
    before, _, rest = text.partition(card.START)
    block, _, after = rest.partition(card.END)
    assert empty == before + card.START + "\nNot measured yet.\n" + card.END + after
    rows = [line for line in block.splitlines() if line.startswith("| m-sq4")]
    assert rows == [
        r"| m-sq4.gguf | other.txt | 34.587 | 1.0458 | 0.08602 | 0.7000 | 82.0% | 20 of 512 tokens |",
        r"| m-sq4.gguf | a\|b.txt | 34.587 | 1.0458 | 0.05000 | 0.7000 | 82.0% | 20 of 512 tokens |",
    ]
    assert block.count("| file |") == 1


@pytest.mark.parametrize("content", [b"", b"# mine\n", b"\xff"])
def test_what_is_no_card_is_not_changed(measured, content, capsys):
    Path("README.md").write_bytes(content)
    assert measured("other.txt") == 2 and "no card" in capsys.readouterr().err
    assert Path("README.md").read_bytes() == content
    os.unlink("README.md")
    assert measured("other.txt") == 2 and not Path("README.md").exists()


@pytest.mark.parametrize("content", [card.START.encode(), card.START.encode() + b"\xff" + card.END.encode()])
def test_a_card_that_is_damaged_is_not_changed(tmp_path, content):
    path = tmp_path / "README.md"
    path.write_bytes(content)
    with pytest.raises(InputError, match="convert --card"):
        card.add(path, RESULT | {"file": "m", "text": "t"})
    assert path.read_bytes() == content


def test_the_card_is_no_input(measured):
    for path in ("m.gguf", "m-sq4.gguf", "other.txt"):
        with pytest.raises(UsageError, match="its own input"):
            options.Validate("m-sq4.gguf", "m.gguf", "other.txt", card=path).check()
