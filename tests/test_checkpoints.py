"""What a checkpoint is, and what its files must hold: folders as people have them, made by hand."""

import crafted

from gguf_splitq.convert import convert


def test_a_folder_named_from_where_one_stands(tmp_path, monkeypatch):
    crafted.copy_demo(tmp_path / "a model")
    monkeypatch.chdir(tmp_path)
    for model in ("a model", "a model/"):
        assert len(crafted.read_gguf(convert(model, "f16", "out.gguf", overwrite=True))[1]) == 38
