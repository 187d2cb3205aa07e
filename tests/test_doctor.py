"""doctor: readings of machines become lines that say what to do; what can crash is asked in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_finetune.engines.mlx.blas import VARIABLE
from mlx_finetune.planning.doctor import command, engines, mac, machine, model, software
from mlx_finetune.planning.doctor.findings import Finding
from mlx_finetune.planning.doctor.probe import error_of, matrices
from mlx_finetune.planning.machine import GIB, find_chip, planned_machine

LOGS = Path(__file__).parents[1] / "mlx_finetune" / "sample" / "gptme-logs"
# As `sysctl NAME…` answers on a Mac with 16 GB; a name that it does not know goes to stderr.
M2 = """machdep.cpu.brand_string: Apple M2
hw.memsize: 17179869184
hw.optional.arm64: 1
sysctl.proc_translated: 0
iogpu.wired_limit_mb: 0
kern.osproductversion: 15.6.1
"""
MPS = {"device": "Apple M2", "metal": True, "errors": {"float32": 1e-6}, "gflops": 2900.0, "blas": None, "usable": 12 * GIB}
CPU = {"device": "CPU", "metal": False, "errors": {"float32": 1e-7}, "gflops": 30.0, "blas": None, "usable": 0}
NO_CUDA = {"device": "CPU", "cuda": False, "reason": "torch is built without CUDA", "errors": {"float32": 1e-7}, "bf16": False}
H100 = {"device": "NVIDIA H100", "cuda": True, "reason": None, "errors": {"float32": 1e-4, "bfloat16": 1e-2}, "bf16": True}
H100 |= {"capability": [9, 0], "free": 77 * GIB, "total": 79 * GIB, "devices": 2}


def of_mac(**changes: str) -> dict[str, Finding]:
    values = mac.sysctl_values(M2) | {name.replace("__", "."): value for name, value in changes.items()}
    return {each.what: each for each in mac.mac_findings(values, {})}


def test_a_mac_as_it_comes_is_ok_and_its_lines_say_how_to_give_the_gpu_more() -> None:
    found = of_mac()
    assert {each.state for each in found.values()} == {"ok"}
    assert found["chip"].found == "Apple M2" and found["macOS"].found == "15.6.1"
    assert found["memory of the GPU"].found.startswith("about 10.7 GB")
    assert "sudo sysctl iogpu.wired_limit_mb=12288 gives 12 GB until the next start" in found["memory of the GPU"].advice
    assert "caffeinate -s" in found["GPU watchdog"].advice and "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1" in found["GPU watchdog"].advice


@pytest.mark.parametrize(
    ("changes", "what", "state", "said"),
    [
        ({"sysctl__proc_translated": "1"}, "chip", "fails", "made for Intel"),
        ({"hw__optional__arm64": "0"}, "chip", "fails", "no Apple silicon"),
        ({"kern__osproductversion": "13.7"}, "macOS", "fails", "13.7"),
        ({"iogpu__wired_limit_mb": "12288"}, "memory of the GPU", "ok", "up to 12.0 GB"),
        ({"iogpu__wired_limit_mb": "15800"}, "memory of the GPU", "note", "leaves macOS 0.6 GB"),
        ({"hw__memsize": "8589934592"}, "memory of the GPU", "ok", "about 5.3 GB"),
    ],
)
def test_each_reading_of_a_mac_means_something(changes: dict[str, str], what: str, state: str, said: str) -> None:
    found = of_mac(**changes)[what]
    assert found.state == state and said in found.found
    assert found.state == "ok" or found.advice


def test_a_watchdog_that_was_relaxed_needs_no_advice() -> None:
    assert mac.watchdog({"AGX_RELAX_CDM_CTXSTORE_TIMEOUT": "1"}).advice == ""


@pytest.mark.parametrize(
    ("found", "state", "said"),
    [
        (machine.memory(24 * GIB, 20 * GIB, None), "ok", "24.0 GB, 20.0 GB free"),
        (machine.memory(24 * GIB, GIB, None), "note", "1.0 GB free"),
        (machine.memory(24 * GIB, 20 * GIB, 4 * GIB), "note", "this container may hold 4.0 GB"),
        (machine.disk("disk", Path("x"), GIB // 2), "fails", "0.5 GB"),
        (machine.disk("disk", Path("x"), 5 * GIB), "note", "5.0 GB"),
        (machine.python((3, 10, 2)), "fails", "3.10.2"),
        (machine.encoding("ascii"), "note", "ascii"),
        (machine.encoding("utf8"), "ok", "UTF-8"),
        (machine.open_files(256), "note", "256"),
        (machine.system("Windows", {}), "note", "Windows"),
    ],
)
def test_each_reading_of_a_machine_means_something(found: Finding, state: str, said: str) -> None:
    assert found.state == state and said in found.found
    assert found.state == "ok" or found.advice


def test_a_folder_that_is_not_ours_is_named_with_what_to_export(tmp_path: Path) -> None:
    assert [each.state for each in machine.writable({"Hub's cache": tmp_path / "not" / "yet"})] == ["ok"]
    (found,) = machine.writable({"Hub's cache": Path("/proc/1")})
    assert found.state == "note" and "HF_HOME" in found.advice


@pytest.mark.parametrize(
    ("name", "probed", "nvidia", "states", "said"),
    [
        ("mlx", {"mlx": MPS}, False, ["ok", "ok"], "Apple M2 with Metal, up to 12.0 GB; 2.9 TFLOP/s"),
        ("torch", {"mlx": CPU, "torch": NO_CUDA}, False, ["ok", "ok", "ok"], "its own BLAS: 30 GFLOP/s"),
        ("torch", {"mlx": CPU, "torch": NO_CUDA}, True, ["ok", "ok", "note"], "although there is an NVIDIA GPU"),
        ("torch", {"mlx": CPU | {"gflops": 4.0}, "torch": NO_CUDA}, False, ["ok", "note", "ok"], "which is slow"),
        ("torch", {"mlx": CPU, "torch": H100}, True, ["ok"] * 3, "compute 9.0, bfloat16; 77.0 of 79.0 GB free"),
        ("torch", {"mlx": {"failed": "ended by signal 6"}, "torch": H100}, True, ["ok", "note", "ok"], "ended by signal 6"),
        ("torch", {"mlx": CPU, "torch": {"failed": "no answer"}}, True, ["ok", "ok", "fails"], "no answer"),
        ("torch", {"torch": H100 | {"errors": {"float32": 0.5}}}, True, ["ok", "fails"], "multiplies wrongly"),
        ("torch", {"torch": H100 | {"errors": {"float32": float("nan")}}}, True, ["ok", "fails"], "multiplies wrongly"),
    ],
)
def test_an_engine_fails_only_where_auto_takes_it(name: str, probed: dict, nvidia: bool, states: list[str], said: str) -> None:
    found = list(engines.engine_findings(name, probed, nvidia))
    assert [each.state for each in found] == states
    assert any(said in each.found for each in found)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import os; os.abort()", "ended by signal 6"),
        ("raise ImportError('libcuda.so.1')", "status 1: ImportError: libcuda.so.1"),
        ("import time; time.sleep(60)", "no answer within 0.5 seconds"),
    ],
)
def test_an_engine_that_crashes_or_hangs_is_a_line_like_any_other(program: str, said: str) -> None:
    assert engines.probe("mlx", (sys.executable, "-c", program), seconds=0.5 if "sleep" in program else 60) == {"failed": said}


def test_the_probe_computes_on_this_machine_and_sees_a_wrong_product() -> None:
    found = engines.probe("mlx")
    assert found["errors"]["float32"] < 1e-3 and found["gflops"] > 0.1
    a, b, expected = matrices(64)
    assert error_of(a @ b, expected) < 1e-5 < error_of(b @ a, expected)


def test_packages_that_are_missing_or_too_old_are_named_with_what_installs_them() -> None:
    wanted = {"mlx": ">=0.32.4", "typer": ">=0.29", "psutil": ">=7"}
    found = list(software.packages(wanted, {"mlx": "0.20.0", "typer": "0.30"}))
    assert [each.state for each in found] == ["fails", "fails"]
    assert found[0].advice == "pip install -U 'mlx>=0.32.4'" and "psutil is not installed" in found[1].found
    assert [each.state for each in software.packages(wanted, {"mlx": "0.33", "typer": "1.0", "psutil": "7.0"})] == ["ok"]
    assert {"mlx", "typer", "psutil"} <= software.needs().keys() and "torch" not in software.needs()


def test_what_is_optional_says_what_it_is_for() -> None:
    there, missing = software.extras({name: software.EXTRAS[name] for name in ("gguf", "serve")}, ["gguf", "uvicorn"])
    assert there.state == "ok" and missing.state == "optional"
    assert "starlette" in missing.found and "uvicorn" not in missing.found and missing.advice == "pip install 'mlx-finetune[serve]'"


def test_gptme_and_its_logs_are_found_each_by_itself(tmp_path: Path) -> None:
    package = tmp_path / "lib" / "python3.12" / "site-packages" / "gptme-0.35.1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: gptme\nVersion: 0.35.1\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gptme").write_text("")
    program, logs = software.gptme(LOGS, str(tmp_path / "bin" / "gptme"))
    assert program.found.startswith("0.35.1, ") and logs.found.startswith("11 conversations, ")
    program, logs = software.gptme(tmp_path / "none", None)
    assert (program.state, logs.state) == ("optional", "note") and "demo" in logs.advice


def test_the_text_of_a_token_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_quokka")
    found = software.hub_token({})
    assert found.state == "ok" and "quokka" not in repr(found)


def test_a_model_is_looked_at_without_a_network(small_model: Path) -> None:
    found = {each.what: each for each in model.model_findings(str(small_model), "torch")}
    assert found["chat template"].state != "fails" and found["fits"].state == "ok"
    assert found["trained by mlx"].found == "yes" and found["trained by torch"].found == "yes, which auto takes"
    (absent,) = model.model_findings("org/quokka", "mlx")
    assert absent.state == "note" and "plan --model org/quokka" in absent.advice


def test_a_model_that_only_one_engine_trains_or_none_is_said() -> None:
    unknown, packed = {"model_type": "quokka"}, {"model_type": "llama", "quantization": {"bits": 4}}
    assert [each.state for each in model.trained_by(unknown, "torch")] == ["ok", "fails"]
    assert "quantised by MLX" in list(model.trained_by(packed, "mlx"))[1].found


def test_a_model_that_does_not_fit_fails_and_one_that_fits_tightly_gets_its_settings(small_model: Path) -> None:
    small = planned_machine(find_chip("M1"), 2**14)
    assert model.fits(str(small_model), small).state == "fails"


def test_the_table_ends_with_what_it_comes_to(capsys: pytest.CaptureFixture[str]) -> None:
    broken = Finding("mlx", "fails", "does not compute", "pip install mlx")
    command.show([broken, Finding("text", "note", "x" * 200, "export y")])
    out = capsys.readouterr().out
    assert "-> pip install mlx" in out and out.endswith("1 will fail: mlx; 1 to note\n")
    assert max(map(len, out.splitlines())) <= 120
    command.show([Finding("text", "ok", "UTF-8")])
    assert capsys.readouterr().out.endswith("nothing will fail\n")


def test_the_whole_verb_says_what_it_found_in_any_encoding_and_changes_nothing(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii", VARIABLE: str(tmp_path / "none.so")}
    program = [sys.executable, "-m", "mlx_finetune", "doctor", "--json"]
    done = subprocess.run(program, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
    told = json.loads(done.stdout)
    states = {each["what"]: each["state"] for each in told["findings"]}
    assert (states["engine"], states["mlx"], states["torch"], states["text"]) == ("ok", "note", "ok", "note")
    assert done.returncode == (1 if told["fails"] else 0)
    assert not any(tmp_path.iterdir())
