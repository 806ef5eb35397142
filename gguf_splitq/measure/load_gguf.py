# SPDX-License-Identifier: MIT
"""Loads the header of a GGUF file in llama.cpp and makes a context of it, without memory for weights or reading any.

usage: load_gguf.py FOLDER FILE

FOLDER holds the built libraries. The last line is a JSON object: `error` is llama.cpp's reason or null. A failed
assertion of llama.cpp's ends the process instead. FILE may be sparse: only its header and its length count. Standard
library only; the structures are those of include/llama.h at the pin.
"""

import ctypes
import json
import os
import sys
from ctypes import c_bool, c_char_p, c_float, c_int, c_int32, c_uint32, c_void_p
from pathlib import Path

LOG_ERROR = 4  # GGML_LOG_LEVEL_ERROR


KINDS = {"ptr": c_void_p, "i32": c_int32, "enum": c_int, "u32": c_uint32, "float": c_float, "bool": c_bool}


def structure(*groups: str) -> type[ctypes.Structure]:
    """The fields in order, those of one type that follow each other in one group: "TYPE NAME NAME ..."."""
    fields = [(name, KINDS[kind]) for kind, *names in map(str.split, groups) for name in names]
    return type("Structure", (ctypes.Structure,), {"_fields_": fields})


ModelParams = structure(
    "ptr devices tensor_buft_overrides",
    "i32 n_gpu_layers",
    "enum split_mode load_mode lazy_mode",
    "i32 main_gpu",
    "ptr tensor_split progress_callback progress_callback_user_data kv_overrides",
    "bool vocab_only check_tensors use_extra_bufts no_host no_alloc load_mtp",
)
ContextParams = structure(
    "u32 n_ctx n_batch n_ubatch n_seq_max n_rs_seq n_outputs_max n_outputs_max_per_seq",
    "i32 n_threads n_threads_batch",
    "enum ctx_type rope_scaling_type pooling_type attention_type flash_attn_type",
    "float rope_freq_base rope_freq_scale yarn_ext_factor yarn_attn_factor yarn_beta_fast yarn_beta_slow",
    "u32 yarn_orig_ctx",
    "float defrag_thold",
    "ptr cb_eval cb_eval_user_data",
    "enum type_k type_v",
    "ptr abort_callback abort_callback_data",
    "bool embeddings offload_kqv no_perf op_offload swa_full kv_unified",
    "ptr samplers n_samplers ctx_other",
)


def load(folder: Path, file: str) -> str | None:
    """Why llama.cpp refuses the file, None when it takes it."""
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    ggml, llama = (ctypes.CDLL(str(folder / f"{name}{suffix}")) for name in ("libggml", "libllama"))
    reasons = []

    @ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
    def log(level: int, text: bytes, _: object) -> None:
        if level == LOG_ERROR:
            reasons.append(text.decode(errors="replace").strip())

    llama.llama_log_set(log, None)
    ggml.ggml_backend_load_all()
    llama.llama_model_default_params.restype = ModelParams
    llama.llama_context_default_params.restype = ContextParams
    llama.llama_model_load_from_file.argtypes = [c_char_p, ModelParams]
    llama.llama_model_load_from_file.restype = c_void_p
    llama.llama_init_from_model.argtypes = [c_void_p, ContextParams]
    llama.llama_init_from_model.restype = c_void_p
    params = llama.llama_model_default_params()
    params.n_gpu_layers, params.load_mode, params.no_alloc, params.load_mtp = 0, 0, True, True
    model = llama.llama_model_load_from_file(file.encode(), params)
    if model:
        params = llama.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 32
        if llama.llama_init_from_model(model, params):
            return None
    # The first one says why, those after it that something failed.
    return reasons[0].rpartition("error loading model: ")[2] if reasons else "no reason was given"


if __name__ == "__main__":
    print(json.dumps({"error": load(Path(sys.argv[1]), sys.argv[2])}), flush=True)
    os._exit(0)  # nothing is freed: the system does that
