"""The MLX engine: native on Apple silicon; on Linux it computes on the CPU, with a faster BLAS loaded before it."""

from mlx_finetune.engines.mlx.blas import preload_fast_blas

FAST_BLAS = preload_fast_blas()  # before anything here imports mlx
