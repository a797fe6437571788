"""The embedded LLM server: llama.cpp in a process of its own.

    python tasks/llama_server.py '{"weights": "FILE.gguf", "slots": 20, "slot_tokens": 768}'

Prints one JSON line with its URL once it answers and stops when its standard input is closed, so it
never outlives the process that started it, however that one ends. A process of its own gives all
memory back, cannot take the caller down with it, and sees OMP_WAIT_POLICY=passive before OpenMP is
loaded: llama.cpp's threads otherwise spin while they wait for each other, which cost a factor of
four in responses per second when other work shared the two cores.
"""

import json
import sys
from typing import Any

# The sampling that llama.cpp applies on top of a request's temperature and top_p. Stated here, and
# part of a response's address, so that another llama.cpp cannot change it silently.
SAMPLING: dict[str, Any] = {"top_k": 40, "min_p": 0.05}


def serve(options: dict[str, Any]) -> None:
    """Serve until standard input ends. Problems are written to standard error."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = options["weights"]
    parameters.n_parallel = options["slots"]
    parameters.n_ctx = options["slots"] * options["slot_tokens"]
    parameters.cpuparams.n_threads = options["threads"]
    parameters.cpuparams_batch.n_threads = options["threads"]
    parameters.sampling.top_k = SAMPLING["top_k"]
    parameters.sampling.min_p = SAMPLING["min_p"]
    # Without it a model with sliding-window attention (Gemma 3) reads every prompt anew.
    parameters.swa_full = True
    parameters.kv_unified = options["kv_unified"]
    parameters.cache_ram_mib = 0  # copies of idle slots: time spent for nothing here
    parameters.ui = False
    parameters.verbosity = 1  # errors only
    server = xllamacpp.Server(parameters)
    sys.stdout.write(json.dumps({"url": server.listening_address}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    del server


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
