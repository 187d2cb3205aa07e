"""Our GGUF files beside llama.cpp's own: its converter's, and what its quantiser makes of the float32 file.

    .venv/bin/python benchmarks/gguf_files.py --llama-cpp FOLDER [--library libllama.so] [--out FOLDER]

FOLDER: the sources of llama.cpp with convert_hf_to_gguf.py, as `pip download --no-binary :all: --no-deps llama-cpp-python` brings
them (vendor/llama.cpp). Library: built of them. Without the sources nothing is compared. Writes gguf.md. The converter knows a
tokenizer by a hash of its ids; for the tiny models, whose tokenizers nobody has published, it is told the name that we found.
"""

import argparse
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
from tables import machine
from tiny_models import make_tiny

from mlx_finetune.export.gguf_write import write_gguf
from mlx_finetune.models.gguf import find_smollm2, gguf_to_hugging_face

ROPE = {"rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GEMMA = {"num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"], "query_pre_attn_scalar": 16}
# Not Phi-3, for which the converter asks for a SentencePiece model.
TINY: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3.1": ("llama", {"rope_parameters": ROPE | LLAMA3}),
    "llama, yarn": ("llama", {"rope_parameters": ROPE | {"rope_type": "yarn"}}),
    "mistral": ("mistral", {}),
    "smollm3": ("smollm3", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "granite": ("granite", {}),
    "gemma3": ("gemma3_text", GEMMA),
}
FILE_TYPES = {"q4_0": 2, "q8_0": 7, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}  # llama_ftype of llama.h
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 12, "head_dim": 64}
OURS = "import sys; from pathlib import Path; from mlx_finetune.export.gguf_write import write_gguf; {}"
MEMORY = """
from pathlib import Path
print(next(line.split()[1] for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmHWM')))
"""
CONVERT = """
import runpy, sys
sys.path[:0] = [{folder!r}, {folder!r} + '/gguf-py']
from conversion.base import TextModel
if {pre!r}:
    TextModel.get_vocab_base_pre = lambda self, tokenizer: {pre!r}
sys.argv = ['convert', {model!r}, '--outfile', {out!r}, '--outtype', {kind!r}]
runpy.run_path({folder!r} + '/convert_hf_to_gguf.py', run_name='__main__')
"""


@dataclass(frozen=True)
class Comparison:
    """Two files: how many tensors have the same type, shape and bytes, and which keys differ, with both values."""

    model: str
    kind: str
    equal: int
    tensors: int
    keys: list[str]
    seconds: tuple[float, float] = (0.0, 0.0)
    memory: tuple[float, float] = (0.0, 0.0)  # MB at the most, of a process of its own

    @property
    def row(self) -> str:
        times = f"{self.seconds[0]:.1f} / {self.seconds[1]:.1f} s, {self.memory[0]:.0f} / {self.memory[1]:.0f} MB"
        keys = "; ".join(self.keys) or "none"
        return f"| {self.model} | {self.kind} | {self.equal} of {self.tensors} | {keys} | {times if self.seconds[0] else ''} |"


def compare(ours: Path, theirs: Path, model: str, kind: str) -> Comparison:
    """Reads both files."""
    from gguf import GGUFReader

    left, right = GGUFReader(ours), GGUFReader(theirs)
    tensors = [{tensor.name: tensor for tensor in reader.tensors} for reader in (left, right)]
    same = [name for name, one in tensors[0].items() if (other := tensors[1].get(name)) is not None and _alike(one, other)]
    fields = [{name: field.contents() for name, field in reader.fields.items()} for reader in (left, right)]
    names = sorted(name for name in fields[0].keys() | fields[1].keys() if not name.startswith("GGUF."))
    differ = [name for name in names if fields[0].get(name) != fields[1].get(name)]
    keys = [f"{name}: {str(fields[0].get(name))[:40]}, theirs {str(fields[1].get(name))[:40]}" for name in differ]
    return Comparison(model, kind, len(same), len(tensors[0].keys() | tensors[1].keys()), keys)


def _alike(one: Any, other: Any) -> bool:
    return one.tensor_type == other.tensor_type and list(one.shape) == list(other.shape) and np.array_equal(one.data, other.data)


def beside_converter(sources: Path, model: Path, name: str, kind: str, pre: str, folder: Path) -> Comparison:
    """Both programs write the model, each in a process of its own."""
    ours, theirs = folder / "ours.gguf", folder / "theirs.gguf"
    call = f"write_gguf(Path({str(model)!r}), Path({str(ours)!r}), {kind!r})"
    programs = (OURS.format(call), CONVERT.format(folder=str(sources), pre=pre, model=str(model), out=str(theirs), kind=kind))
    figures = [_run(program) for program in programs]
    found = compare(ours, theirs, name, kind)
    for path in (ours, theirs):
        path.unlink()
    seconds, memory = zip(*figures, strict=True)
    return Comparison(found.model, found.kind, found.equal, found.tensors, found.keys, seconds, memory)


def _run(program: str) -> tuple[float, float]:
    """Seconds, and MB of memory at the most; a process begins with what its parent has, so the kernel's own figure is read."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program + MEMORY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-400:]
    return time.perf_counter() - start, int(done.stdout.split()[-1]) / 1024


class _Settings(ctypes.Structure):
    """llama_model_quantize_params of llama.h."""

    _fields_ = [
        ("threads", ctypes.c_int32), ("kind", ctypes.c_int), ("head", ctypes.c_int), ("embeddings", ctypes.c_int),
        *((name, ctypes.c_bool) for name in ("again", "with_head", "copy", "pure", "split", "dry")),
        *((name, ctypes.c_void_p) for name in ("importance", "keys", "types", "layers")), ("room", ctypes.c_size_t),
    ]  # fmt: skip


def beside_quantiser(library: Path, model: Path, name: str, folder: Path) -> Iterator[Comparison]:
    """Our quantised files and those that llama_model_quantize makes of our float32 file."""
    llama = ctypes.CDLL(str(library))
    llama.llama_model_quantize_default_params.restype = _Settings
    llama.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Settings)]
    llama.llama_backend_init()
    whole, ours, theirs = folder / "f32.gguf", folder / "ours.gguf", folder / "theirs.gguf"
    write_gguf(model, whole, "f32")
    for kind, number in FILE_TYPES.items():
        write_gguf(model, ours, kind)
        settings = llama.llama_model_quantize_default_params()
        settings.kind, settings.threads = number, 1
        assert llama.llama_model_quantize(str(whole).encode(), str(theirs).encode(), ctypes.byref(settings)) == 0
        yield compare(ours, theirs, name, kind)
        ours.unlink()
        theirs.unlink()
    whole.unlink()


TITLES = ("model", "kind", "tensors equal in type, shape and bytes", "keys that differ", "seconds and memory, ours / theirs")
HEAD = f"| {' | '.join(TITLES)} |\n|{' --- |' * len(TITLES)}"
BY_CONVERTER = """\
Every tensor and every key beside those of llama.cpp's convert_hf_to_gguf.py on the same folder. `add_eos_token` and
`add_bos_token` are always written here, so that nothing rests on a reader's own default."""
BY_QUANTISER = """\
Every tensor beside those of llama_model_quantize. With q4_0 the head, or the embeddings that are the head, are q8_0 here and
q6_k there: q6_k takes llama.cpp, which q4_0 shall not need."""


def report(sources: Path, library: Path | None) -> Iterator[str]:
    """The paragraphs of gguf.md."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        smollm2 = folder / "SmolLM2-135M-Instruct"
        gguf_to_hugging_face(find_smollm2(), smollm2)
        rows = [beside_converter(sources, smollm2, smollm2.name, kind, "", folder).row for kind in ("f16", "q8_0")]
        for label, (architecture, changes) in TINY.items():
            model = make_tiny(architecture, folder / f"tiny-{architecture}-{len(rows)}", tokenizer=True, changes=changes)
            pre = write_gguf(model, folder / "pre.gguf", "f32").pre_tokenizer
            (folder / "pre.gguf").unlink()
            rows.append(beside_converter(sources, model, f"tiny {label}", "f16", pre, folder).row)
        yield f"## Beside llama.cpp's converter\n\n{BY_CONVERTER}\n\n{HEAD}\n" + "\n".join(rows)
        if library is not None:
            wide = [make_tiny(one, folder / f"wide-{one}", tokenizer=True, changes=WIDE) for one in ("llama", "phi3")]
            wide.append(make_tiny("qwen3", folder / "wide-qwen3", tokenizer=True, changes=WIDE | {"tie_word_embeddings": True}))
            rows = [found.row for model in (*wide, smollm2) for found in beside_quantiser(library, model, model.name, folder)]
            yield f"## Beside llama.cpp's quantiser\n\n{BY_QUANTISER}\n\n{HEAD}\n" + "\n".join(rows)


def main() -> None:
    """Reads the options and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--library", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.llama_cpp is None or not (options.llama_cpp / "convert_hf_to_gguf.py").is_file():
        print("skipped: --llama-cpp names no folder with convert_hf_to_gguf.py (see --help for where to get it)")
        return
    start = time.perf_counter()
    parts = list(report(options.llama_cpp.resolve(), options.library))
    where, packages = machine()["machine"], ("gguf", "numpy", "torch", "transformers")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    made = f"Made by `benchmarks/gguf_files.py` in {(time.perf_counter() - start) / 60:.1f} minutes: {where}; {versions}."
    (options.out / "gguf.md").write_text("\n\n".join(["# GGUF files beside llama.cpp's own", made, *parts]) + "\n")
    print(options.out / "gguf.md")


if __name__ == "__main__":
    main()
