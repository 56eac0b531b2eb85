"""A second, independent source for the Ling fixtures: the logits of llama.cpp, all in f32.

    python llama_cpp_logits.py [--only PATTERN] [--dry-run]

Adds logits_llama_cpp to the expected.safetensors of each fixture that llama.cpp can represent, after
checking it against logits_f32. Needs llama-cpp-python. Other families are compared, but nothing is stored.
"""

import argparse
import ctypes
import fnmatch
import json
import pathlib
import sys
import tempfile

import llama_cpp
import numpy
from safetensors.numpy import load_file, save_file

import to_gguf

FIXTURES = pathlib.Path(__file__).resolve().parent.parent / "fixtures" / "parity"
LIMIT = 1e-4  # of the greatest logit


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def on_log(level, text, _):
    if level == 4:  # errors
        sys.stderr.write(text.decode(errors="replace"))


def logits_of(file, config, input_ids):
    """Of every position of every sequence, each run by itself."""
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama_cpp.llama_load_model_from_file(str(file).encode(), parameters)
    if not model:
        raise SystemExit(f"{file}: llama.cpp did not load it")
    tokens = input_ids.shape[1]
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    rows = []
    for sequence in input_ids.tolist():
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 256
        parameters.n_threads = parameters.n_threads_batch = 1
        parameters.type_k = parameters.type_v = llama_cpp.GGML_TYPE_F32
        parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        rope = to_gguf.rope_of(config)
        parameters.yarn_beta_fast = rope.get("beta_fast", 32.0)
        parameters.yarn_beta_slow = rope.get("beta_slow", 1.0)
        context = llama_cpp.llama_init_from_model(model, parameters)
        batch = llama_cpp.llama_batch_init(tokens, 0, 1)
        batch.n_tokens = tokens
        for i, token in enumerate(sequence):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
        assert llama_cpp.llama_decode(context, batch) == 0
        got = numpy.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (tokens, vocab))
        rows.append(got.copy())
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
    llama_cpp.llama_free_model(model)
    return numpy.stack(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="bailing*", help="fixtures to run, as a shell pattern")
    parser.add_argument("--dry-run", action="store_true", help="compare, but store nothing")
    arguments = parser.parse_args()
    llama_cpp.llama_log_set(on_log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    wrong = []
    for folder in sorted(FIXTURES.iterdir()):
        if not fnmatch.fnmatch(folder.name, arguments.only):
            continue
        config = json.loads((folder / "config.json").read_text())
        expected = load_file(folder / "expected.safetensors")
        with tempfile.TemporaryDirectory() as temporary:
            file = pathlib.Path(temporary) / "model.gguf"
            try:
                to_gguf.convert(folder, file)
            except to_gguf.Unsupported as reason:
                print(f"{folder.name:36} not in llama.cpp: {reason}", flush=True)
                continue
            got = logits_of(file, config, expected["input_ids"])
        reference = expected["logits_f32"]
        error = numpy.abs(got - reference).max() / numpy.abs(reference).max()
        print(f"{folder.name:36} max error {error:.1e} of the greatest logit", flush=True)
        if not error < LIMIT:
            wrong.append(folder.name)
        if config["model_type"].startswith("bailing") and not arguments.dry_run:
            save_file({**expected, "logits_llama_cpp": got}, folder / "expected.safetensors")
    if wrong:
        raise SystemExit(f"over {LIMIT}: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
