"""Mutation testing of what decides which tokens are learned and how: each operator, comparison and constant is changed, one at a
time, and the tests named for the file must fail.

    .venv/bin/python benchmarks/mutants.py [FILE ...] [--list] [--seconds 60] [--jobs 1] [--again FILE]

A process that has imported the libraries is forked for each change, so that one takes about a second. Prints the survivors: lines
`file:line: before -> after`, to be killed by a test or explained in benchmarks/results/mutants.md. Not for Windows.
"""

import argparse
import ast
import copy
import gc
import importlib
import importlib.abc
import importlib.util
import math
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = "mlx_finetune"
NEUTRAL = "not sample and not genuine"  # these take long, and others say the same
TESTS = {
    "training/schedule.py": ["tests/test_schedule.py"],
    "data/batches.py": ["tests/test_batches.py"],
    "data/trees.py": ["tests/test_trees.py"],
    "data/windows.py": [
        *("tests/test_windows_room.py", "tests/test_windows.py", "tests/test_native_calls.py"),
        *("-k", f"{NEUTRAL} and not tokenized_fast and not depend_on and not keep_to_the_length"),
    ],
    "data/encoding.py": [
        *("tests/test_encoding.py", "tests/test_template.py", "tests/test_native_calls.py", "tests/test_exact.py", "-k"),
        "test_encoding or (not real_tokenizer and (secret or straddl or placeholders or would_join or newline or read_but_not"
        " or stays_text or masked_wrongly or adds_before or test_a_call or test_several or test_the_header or never_lost))",
    ],
    "data/rows.py": ["tests/test_rows.py"],
    "data/token_roles.py": ["tests/test_token_roles.py"],
    "engines/mlx/loss.py": ["tests/test_loss.py"],
    "engines/torch/loss.py": ["tests/test_loss.py"],
}
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Pow: ast.Mult, ast.MatMult: ast.Add,
}  # fmt: skip
PYTEST = [
    "-x",
    "-q",
    "-n0",
    "--assert=plain",
    *"-p no:cacheprovider -p no:hypothesispytest -p no:anyio -p no:unraisableexception".split(),
]
LIBRARIES = "jinja2 numpy pydantic pytest regex tokenizers transformers torch mlx_finetune.engines.mlx mlx.core mlx.nn".split()
CALLS = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list", "ceil": "floor"}
DECORATION = {"annotation", "returns", "decorator_list", "bases"}


@dataclass(frozen=True)
class Mutant:
    """A changed file, and what was changed where."""

    line: int
    before: str
    after: str
    code: str


def mutants_of(source: str) -> list[Mutant]:
    """All of one file. Not changed: docstrings, annotations, assertions (our own checks), texts of errors, imports."""
    tree = ast.parse(source)
    found = []
    for parent, name, place, line in list(_places(tree)):
        held = getattr(parent, name)
        old = held if place is None else held[place]
        for new in _changed(old):
            before = _said(old, parent)
            _put(parent, name, place, new)
            found.append(Mutant(line, before, _said(new, parent), ast.unparse(ast.fix_missing_locations(tree))))
            _put(parent, name, place, old)
    return found


def _said(node: ast.AST, parent: ast.AST) -> str:
    """The first line of it; an operator alone says nothing, nor does a constant."""
    whole = isinstance(node, ast.stmt) or (isinstance(node, ast.expr) and not isinstance(node, ast.Constant))
    return ast.unparse(ast.fix_missing_locations(node if whole or isinstance(parent, ast.Module) else parent)).splitlines()[0]


def _put(parent: ast.AST, name: str, place: int | None, value: ast.AST) -> None:
    if place is None:
        setattr(parent, name, value)
    else:
        getattr(parent, name)[place] = value


def _places(node: ast.AST, line: int = 0) -> Iterator[tuple[ast.AST, str, int | None, int]]:
    """(parent, field, index or None, line) of every node that may be changed."""
    line = getattr(node, "lineno", line)
    if isinstance(node, ast.Assert | ast.Raise | ast.Import | ast.ImportFrom | ast.JoinedStr):
        return
    for name, value in ast.iter_fields(node):
        if name in DECORATION or (isinstance(node, ast.AnnAssign) and name == "target"):
            continue
        for place, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and not _is_docstring(child):
                yield node, name, place, getattr(child, "lineno", line)
                yield from _places(child, line)


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _changed(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in its place."""
    if (other := SWAPS.get(type(node))) is not None:
        yield other()
    elif isinstance(node, ast.Constant):
        yield from (ast.Constant(value) for value in _values(node.value))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.Call) and isinstance(called := node.func, ast.Name | ast.Attribute):
        if (other_name := CALLS.get(called.id if isinstance(called, ast.Name) else called.attr)) is not None:
            yield _renamed(node, other_name)
    elif isinstance(node, ast.Slice):
        yield from (replaced(node, **{end: None}) for end in ("lower", "upper") if getattr(node, end) is not None)
    elif isinstance(node, ast.Break | ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield ast.Pass()
    elif isinstance(node, ast.If | ast.While):
        yield replaced(node, test=ast.UnaryOp(ast.Not(), node.test))


def _values(value: object) -> Iterator[Any]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield value + 1
        if value > 0:
            yield value - 1
    elif isinstance(value, float):
        yield value * 2 if value else 1.0
    elif isinstance(value, str) and value:
        yield value + "?"


def _renamed(call: ast.Call, name: str) -> ast.Call:
    called = call.func
    other: ast.expr = ast.Name(name) if isinstance(called, ast.Name) else replaced(called, attr=name)
    if name == "list":  # it takes no key
        return ast.Call(other, call.args, [])
    return ast.Call(other, call.args, call.keywords)


def replaced(node: Any, **fields: Any) -> Any:
    """A copy of the node with other fields."""
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


class Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives one module of the package from changed code."""

    def __init__(self, name: str, path: Path, code: str) -> None:
        self.name, self.path, self.code = name, path, code

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self) if fullname == self.name else None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.code, str(self.path), "exec"), module.__dict__)


def module_of(file: str) -> str:
    return f"{PACKAGE}.{file.removesuffix('.py').replace('/', '.')}"


def forget(name: str) -> None:
    """As if the module and all that import it, at their top or not, were not imported yet."""
    loaded = {other: module for other, module in sys.modules.items() if other.startswith(f"{PACKAGE}.")}
    imports = {other: _imported(Path(str(module.__file__))) for other, module in loaded.items()}
    found = {name}
    while more := {other for other, named in imports.items() if named & found} - found:
        found |= more
    for other in found & loaded.keys():
        package, _, last = other.rpartition(".")
        vars(loaded.get(package, sys.modules[PACKAGE])).pop(last, None)
        del sys.modules[other]


def _imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {f"{node.module}.{alias.name}" for node in found for alias in node.names} | {str(node.module) for node in found}


def _fails(file: str, code: str) -> bool:
    """Whether the tests fail, in a process that is only for this."""
    import pytest

    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    name = module_of(file)
    forget(name)
    sys.meta_path.insert(0, Changed(name, ROOT / PACKAGE / file, code))
    return pytest.main([*PYTEST, *TESTS[file]]) != 0


def verdict(file: str, code: str, seconds: float) -> str:
    """killed, survived, or timeout: of the tests of `file` with `code` in its place, in a forked process."""
    child = os.fork()
    if not child:
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds) + 1))
            failed = _fails(file, code)
        except BaseException:  # noqa: BLE001  whatever it is, this process must not go on as its parent does
            failed = True
        os._exit(failed)
    until = time.monotonic() + 20 * seconds  # beside others, or asleep
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return "timeout" if os.WIFSIGNALED(status) else "killed" if status else "survived"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def run(file: str, seconds: float, jobs: int, again: set[str]) -> Counter[str]:
    """Prints what survives, of all or of `again`; how many of each verdict."""
    source = (ROOT / PACKAGE / file).read_text(encoding="utf-8")
    if verdict(file, source, 10 * seconds) != "survived":
        sys.exit(f"{file}: its tests fail as it is: {' '.join(TESTS[file])}")
    mutants = [one for one in mutants_of(source) if not again or f"{file}:{one.line}: {one.before} -> {one.after}" in again]
    verdicts = Counter[str]()
    with ThreadPoolExecutor(jobs) as pool:
        for mutant, found in zip(mutants, pool.map(lambda each: verdict(file, each.code, seconds), mutants), strict=True):
            verdicts[found] += 1
            if found == "survived":
                print(f"{file}:{mutant.line}: {mutant.before} -> {mutant.after}", flush=True)
    print(f"{file}: {len(mutants)} mutants: {', '.join(f'{count} {name}' for name, count in verdicts.most_common())}", flush=True)
    return verdicts


def _first_layers() -> list[str]:
    """What the command line imports to prepare, which most tests do."""
    return [f"{PACKAGE}.data.prepare", f"{PACKAGE}.cli"]


def main(arguments: Sequence[str] | None = None) -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help=f"below {PACKAGE}/; all of {', '.join(TESTS)} where none is named")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument("--seconds", type=float, default=60, help="of CPU time; a mutant that takes more is found too")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--again", type=Path, help="the output of a run: only what survived it")
    chosen = parser.parse_args(arguments)
    files = chosen.files or list(TESTS)
    if unknown := [file for file in files if file not in TESTS]:
        parser.error(f"no tests are named for {', '.join(unknown)}; there are {', '.join(TESTS)}")
    if chosen.list:
        for file in files:
            for mutant in mutants_of((ROOT / PACKAGE / file).read_text(encoding="utf-8")):
                print(f"{file}:{mutant.line}: {mutant.before} -> {mutant.after}")
        return
    again = set(chosen.again.read_text(encoding="utf-8").splitlines()) if chosen.again else set[str]()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for name in [*LIBRARIES, *_first_layers()]:  # once, for all that are forked
        importlib.import_module(name)
    gc.freeze()  # a forked process looks through its own objects alone

    total = sum((run(file, chosen.seconds, chosen.jobs, again) for file in files), Counter[str]())
    print(f"{sum(total.values())} mutants: {', '.join(f'{count} {name}' for name, count in total.most_common())}")


if __name__ == "__main__":
    main()
