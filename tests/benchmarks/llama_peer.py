"""llama.cpp's side of fidelity.py: runs in a Python that has llama-cpp-python and nothing of ours.

    python llama_peer.py quantize IN.gguf OUT.gguf TYPE      TYPE as in llama.cpp: Q4_0, Q4_K_M, …
    python llama_peer.py logits MODEL.gguf                   token ids in, logits out

`logits` reads one JSON list of documents (lists of token ids) from standard input and writes, for
each document in turn, the float32 logits of all its positions, (S, V), to standard output.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys

import llama_cpp
import numpy as np

GGML_TYPE_F32 = 0


def quantize(source: str, target: str, kind: str) -> None:
    """Quantise an F32 GGUF file with llama.cpp's own defaults (no importance matrix)."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = os.cpu_count() or 1
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    if status:
        sys.exit(f"llama.cpp could not quantise to {kind} (status {status})")


def logits(path: str, out: int) -> None:
    """Write the logits of the documents on standard input to the file descriptor `out`."""
    documents = json.load(sys.stdin)
    longest = max(len(tokens) for tokens in documents)
    model = llama_cpp.Llama(
        path,
        n_ctx=longest + 8,
        n_batch=longest,
        n_ubatch=longest,
        logits_all=True,
        verbose=False,
        type_k=GGML_TYPE_F32,  # its default, float16, would add an error that is not the weights'
        type_v=GGML_TYPE_F32,
    )
    with os.fdopen(out, "wb") as stream:
        for tokens in documents:
            model.reset()
            model.eval(tokens)
            scores = np.ascontiguousarray(model.scores[: len(tokens)], np.float32)
            stream.write(scores.data)


def main() -> None:
    """Run one of the two commands; standard output carries logits alone."""
    out = os.dup(1)
    os.dup2(2, 1)
    if sys.argv[1] == "quantize":
        quantize(*sys.argv[2:5])
    else:
        logits(sys.argv[2], out)


if __name__ == "__main__":
    main()
