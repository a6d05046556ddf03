"""llama.cpp's HTTP server in this process; run with the Python of an environment that has xllamacpp.

Usage: llamacpp_server.py MODEL.gguf PORT NUM_SLOTS SLOT_TOKENS NUM_THREADS
"""

import sys
import threading

import xllamacpp


def main() -> None:
    model, port, num_slots, slot_tokens, num_threads = sys.argv[1], *map(int, sys.argv[2:6])
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_parallel = num_slots
    params.n_ctx = num_slots * slot_tokens
    params.cpuparams.n_threads = num_threads
    params.cpuparams_batch.n_threads = num_threads
    params.n_gpu_layers = 0
    server = xllamacpp.Server(params)
    print(f"listening on {server.listening_address}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
