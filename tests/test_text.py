# SPDX-License-Identifier: MIT
"""Calibration texts: what counts as text, and where what does not goes wrong."""

import gzip
import json
import shutil

import crafted
import pytest
import transformers

from gguf_splitq import convert
from gguf_splitq.calibration import text
from gguf_splitq.calibration.model import Model
from gguf_splitq.errors import InputError

WORDS = "Grüße aus Köln,\nund aus Zürich.\n"
PIECE = (crafted.DEMO / "calib.txt").read_text()[:60_000]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-be-sig", "utf-32-be-sig"])
def test_a_byte_order_mark_says_what_the_text_is(tmp_path, encoding):
    path, name = tmp_path / "a.txt", encoding.removesuffix("-sig")
    path.write_bytes((("\ufeff" if encoding != "utf-8" and encoding != name else "") + WORDS).encode(name))
    assert text.read(path) == {1: WORDS} and text.whole(path) == WORDS


def test_lines_end_alike(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\rthree\n")
    assert text.whole(path) == "one\ntwo\nthree\n"


@pytest.mark.parametrize(
    ("name", "data", "causes"),
    [
        ("a.parquet", b"PAR1\x15\x04", ["a Parquet file", "read_parquet('a.parquet').to_json('a.jsonl'"]),
        ("a.txt", gzip.compress(WORDS.encode(), mtime=0), ["compressed by gzip", "unpack"]),
        ("a.docx", b"PK\3\4rest", ["zip archive"]),
        ("a.pdf", b"%PDF-1.7\n", ["a PDF", "pdftotext"]),
        ("a.txt", WORDS.encode("latin-1"), ["not UTF-8 at byte 2 (line 1)", "iconv -f LATIN1"]),
        ("a.txt", b"plain\n" * 100 + b"caf\xe9\n", ["not UTF-8 at byte 603 (line 101)"]),
        ("a.txt", b"\xef\xbb\xbfok\n\xff", ["byte order mark says at byte 6 (line 2)"]),
        ("a.txt", WORDS.encode("utf-16-le"), ["not UTF-8 at byte 4 (line 1)", "iconv"]),
        ("a.txt", "plain\n".encode("utf-16-be"), ["zero byte at byte 0 (line 1)", "iconv -f UTF-16BE"]),
        ("a.txt", b"\x89PNG\r\n", ["a PNG image"]),
        ("a.txt", "plain\n".encode("utf-16-le"), ["zero byte at byte 1 (line 1)", "iconv -f UTF-16LE"]),
        ("a.txt", "one\ntwo ü\0".encode(), ["zero byte at byte 10 (line 2)"]),
        ("a.txt", b"\xff\xfea\0\n\0b", ["UTF-16-LE that its byte order mark says at byte 6 (line 2)"]),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', ["line 3: not JSON", "`text`, or with `messages`"]),
        ("a.jsonl", b'["a"]', ["line 1: not an object"]),
        ("a.jsonl", b'{"prompt": "a"}', ["line 1: it has neither `text` nor `messages`"]),
        ("a.jsonl", b'{"text": 5}', ["line 1: `text` is not a string"]),
        ("a.jsonl", b'{"text": "\\ud800"}', ["line 1: ", "surrogate"]),
        ("a.jsonl", b"[" * 100_000, ["line 1: not JSON"]),
        ("a.jsonl", b'{"messages": "a"}', ["`messages` is not a list"]),
        ("a.jsonl", b'{"messages": [{"content": "a"}]}', ["a message without a `role`"]),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": null}]}', ["`content` is not a string"]),
    ],
)
def test_what_is_no_text_is_refused_where_it_is_not(tmp_path, name, data, causes):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        convert.convert(crafted.DEMO, "sq4", tmp_path / "out.gguf", calib=path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    for cause in causes:
        assert cause in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


def test_documents_of_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": [{"type": "text", "text": "I."}]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in ({"text": "a\u2028b"}, {"messages": turns, "id": 1})))
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
    assert text.read(path) == {1: "a\u2028b", 2: chat}
    assert text.whole(path) == "a\u2028b\nWho?\nI."


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """The demo with a chat template."""
    folder = shutil.copytree(crafted.DEMO, tmp_path_factory.mktemp("model") / "chatty")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no systems') }}{% endif %}"
    config["chat_template"] = template + "<<{{ m.role }}>> {{ m.content }}\n{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def chats(path, *roles):
    """A file of a chat per paragraph."""
    parts = [part for part in PIECE.split("\n\n") if part.strip()]
    lines = [{"messages": [{"role": role, "content": part} for role in roles]} for part in parts]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_chats_go_through_the_models_own_template(chatty, tmp_path):
    tokens = Model(chatty).read_tokens(chats(tmp_path / "a.jsonl", "user", "assistant"), 4096)
    words = transformers.AutoTokenizer.from_pretrained(chatty).batch_decode(tokens)
    assert tokens.shape == (8, 512) and all("<<user>>" in part or "<<assistant>>" in part for part in words)
    with pytest.raises(InputError, match=r"a.jsonl: line 1: .*does not take this chat \(no systems\)"):
        Model(chatty).read_tokens(chats(tmp_path / "a.jsonl", "system"), 4096)
    with pytest.raises(InputError, match=r"a.jsonl: line 1: a chat, and the tokenizer of .* has no chat template"):
        Model(crafted.DEMO).read_tokens(chats(tmp_path / "a.jsonl", "user"), 4096)


def test_texts_of_lines_and_of_another_encoding_give_the_same_tokens(tmp_path):
    model, expected = Model(crafted.DEMO), None
    forms = {"a.txt": PIECE.encode(), "b.txt": PIECE.encode("utf-16"), "c.txt": PIECE.encode("utf-8-sig")}
    forms["d.jsonl"] = "".join(json.dumps({"text": part}) + "\n" for part in PIECE.split("\n")).encode()
    for name, data in forms.items():
        (tmp_path / name).write_bytes(data)
        tokens = model.read_tokens(tmp_path / name, 4096).tolist()
        expected = expected or tokens
        assert tokens == expected


def test_calls_of_tools_reach_the_template(tmp_path):
    turn = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [turn]}))
    assert text.read(path) == {1: [turn | {"content": ""}]} and text.whole(path) == ""
