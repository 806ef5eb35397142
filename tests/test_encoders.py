# SPDX-License-Identifier: MIT
"""Encoders, which llama.cpp runs for their vectors: what is measured of them, and that codes turn these less.

And the text part of a model that sees.
"""

import json
import re

import crafted
import pytest
import torch
import transformers
from test_calibrate import any_vocabulary, checkpoint, tokens  # noqa: F401 (fixtures)
from test_checkpoints import multimodal  # noqa: F401 (a fixture)

from gguf_splitq import convert, errors
from gguf_splitq.calibration import moments
from gguf_splitq.calibration.model import Model

TEXT = crafted.DEMO / "calib.txt"


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A random two-layer BERT without a pooler, of the words of a text."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    folder, marks = tmp_path_factory.mktemp("encoder") / "bert", ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    words = sorted({*re.findall(r"\w+|[^\w\s]", TEXT.read_text().lower())})[:2000]
    letters = sorted({letter for word in words for letter in word})
    known = dict.fromkeys([*marks, *letters, *(f"##{letter}" for letter in letters), *words])
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(known)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(known), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=512,
    )  # fmt: skip
    model = transformers.BertModel(config, add_pooling_layer=False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, float(parameter.dim() == 1 and parameter.mean() == 1), 0.1)
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **dict(zip(names, marks, strict=True))
    ).save_pretrained(folder)
    return folder


def test_hessians_are_weighted_by_what_turns_the_vectors(bert, tmp_path):
    model, text = Model(bert), tokens(10) % 900
    assert model.encoder
    whole = transformers.AutoModel.from_pretrained(bert, dtype=torch.float32).eval()
    linears = {n: m for n, m in whole.encoder.layer.named_modules() if isinstance(m, torch.nn.Linear)}
    inputs, outputs = {}, {}
    for name, module in linears.items():
        module.register_forward_pre_hook(lambda _, x, name=name: inputs.update({name: x[0][0]}))
        module.register_forward_hook(lambda _, x, y, name=name: outputs.update({name: y}))
    random, sums = torch.Generator().manual_seed(0), dict.fromkeys(linears, (0, 0))
    for sequence in text.split(1):
        mean = whole(sequence).last_hidden_state[0].mean(0)
        turned = (mean / mean.norm()) @ torch.randn(1, 64, generator=random)[0]
        for name, g in zip(linears, torch.autograd.grad(turned, list(outputs.values())), strict=True):
            x, w = inputs[name].detach().double(), g[0].double().square().sum(1)
            sums[name] = sums[name][0] + x.T @ (x * w[:, None]), sums[name][1] + w.sum()
    found = {f"{i}.{m.name}": m.hessian for i, layers in moments.run(model, text, tmp_path) for m in layers}
    for name, (total, weight) in sums.items():
        torch.testing.assert_close(found[f"{name}.weight"], total / weight, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("aim", ["half", "plain"])
def test_feedback_turns_vectors_less_than_nearest_rounding(
    runtime_library,
    bert,
    any_vocabulary,  # noqa: F811
    tmp_path,
    capsys,
    aim,  # noqa: F811
):
    report = tmp_path / "report.json"
    options = dict(calib=str(TEXT), calib_tokens=12 * 512, report=report, threads=1, load=False, aim=aim)
    convert.convert(bert, "sq2", tmp_path / "out.gguf", **options)
    found = json.loads(report.read_text())["calibration"]
    assert found["left"] == [] and len(found["errors"]) == 2 * 6
    what = "divergence" if aim == "half" else "held_out"
    assert 0 < found[what]["feedback"] < found[what]["nearest"]
    said = " ".join(capsys.readouterr().out.split())
    assert f"on other tokens: {'1 - cosine 0.' if aim == 'half' else 'output error'}" in said


def test_text_stands_between_marks(bert):
    found = Model(bert).read_tokens(TEXT, 2048)
    assert found.shape == (4, 512) and set(found[:, 0].tolist()) == {2} and set(found[:, -1].tolist()) == {3}


def test_what_an_encoder_cannot_do_is_refused(runtime_library, bert, any_vocabulary, tmp_path):  # noqa: F811
    with pytest.raises(errors.UnsupportedError, match="an encoder writes no text: give --calib TEXT"):
        convert.convert(bert, "sq4", tmp_path / "a.gguf", calib="self", load=False)
    with pytest.raises(errors.UnsupportedError, match="--tune trains what a model writes"):
        convert.convert(bert, "sq4", tmp_path / "a.gguf", calib=str(TEXT), tune="scales", load=False)
    assert list(tmp_path.glob("*.gguf")) == []


@torch.no_grad()
@pytest.mark.parametrize("kind", ["BertForMaskedLM", "RobertaModel", "ModernBertModel", "DistilBertModel"])
def test_layer_by_layer_is_the_whole_encoder(tmp_path, kind):
    torch.manual_seed(0)
    kind, text = getattr(transformers, kind), tokens(2) % 900
    options = dict(vocab_size=900, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    config = kind.config_class(max_position_embeddings=520, pad_token_id=0, **options)
    kind(config).save_pretrained(tmp_path)
    model = Model(tmp_path)
    states = model.inputs(text)
    for index in range(len(model)):
        with model.layer(index) as layer:
            states = [model.forward(layer, index, state) for state in states]
    whole = transformers.AutoModel.from_pretrained(tmp_path).eval()(text).last_hidden_state
    torch.testing.assert_close(model.head(states[0]), whole)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_what_writes_is_none(checkpoint, kind):  # noqa: F811
    assert not Model(checkpoint(kind)).encoder


def test_the_text_part_of_a_model_that_sees_is_calibrated(runtime_library, multimodal, tmp_path):  # noqa: F811
    report = tmp_path / "report.json"
    options = dict(calib=str(TEXT), calib_tokens=12 * 512, report=report, threads=1)
    convert.convert(multimodal, "sq2", tmp_path / "out.gguf", **options)
    found = json.loads(report.read_text())["calibration"]
    assert found["left"] == [] and len(found["errors"]) == 2 * 7
    assert found["divergence"]["feedback"] < found["divergence"]["nearest"]
    model = Model(multimodal)
    assert len(model) == 2 and not any("vision" in name for name, _ in model.module.named_parameters())
