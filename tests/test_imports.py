"""The import rule: neutral modules load no framework, and a file imports only what stands above it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mlx_finetune"
FRAMEWORKS = ("mlx", "mlx_lm", "torch", "transformers", "peft", "datasets", "matplotlib", "starlette", "uvicorn")
# From top to bottom: a file imports only from its own layer or one above it.
LAYERS = (
    tuple("errors allocator files config installed launched terminal sample road nearest own_code reading".split()),
    ("data",),
    ("models",),
    ("engines",),
    ("planning",),
    ("training",),
    ("export",),
    ("evaluation",),
    ("serving",),
    tuple(
        "demo init_command init_questions commands evaluating gptme_evaluating collected collecting converting exporting "
        "fusing originals prepared inspecting inspect_page inspect_terminal report reporting running".split()
    ),
    (
        "__main__",
        *"completion ending cli cli_collect cli_convert cli_evaluate cli_export cli_report cli_run cli_serve cli_start".split(),
    ),
)
MODULES = sorted(path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".") for path in PACKAGE.rglob("*.py"))
NEUTRAL = [name for name in MODULES if not name.startswith(("mlx_finetune.engines.mlx", "mlx_finetune.engines.torch"))]


def layer(module: str) -> int:
    part = module.split(".")[1] if "." in module else "errors"
    return next(number for number, names in enumerate(LAYERS) if part in names or part == "__init__")


def test_importing_every_neutral_module_loads_no_framework() -> None:
    names = [name.removesuffix(".__init__") for name in NEUTRAL]
    program = f"import sys, importlib\nfor name in {names!r}: importlib.import_module(name)\n"
    program += f"print([name for name in {FRAMEWORKS!r} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize("module", MODULES)
def test_a_file_imports_only_from_its_own_layer_or_above(module: str) -> None:
    path = PACKAGE.parent / Path(*module.split(".")).with_suffix(".py")
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))  # inside functions too
    imported = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    imported += [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    imported = [name for name in imported if name.startswith("mlx_finetune.")]
    assert [name for name in imported if layer(name) > layer(module)] == []
