"""The torch engine: transformers' models on CUDA, or on a CPU."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded: waiting threads leave shared cores to others
