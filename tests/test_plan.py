"""What a run takes: sizes from config.json and headers, laws of memory and of advice, machines, and the verb."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from conftest import Answer
from published_configs import PUBLISHED
from tiny_models import SIZES, make_tiny

from mlx_finetune.config import load_config
from mlx_finetune.errors import UserError
from mlx_finetune.models.mlx_proven import PROVEN
from mlx_finetune.planning.advice import SHORTEST, Wanted, choose, needed, refuse_what_cannot_fit
from mlx_finetune.planning.architectures import KINDS
from mlx_finetune.planning.machine import CHIPS, GIB, find_chip, metal_limit, parse_memory, planned_machine, this_machine
from mlx_finetune.planning.memory import Coefficients, Dials, coefficient_names, memory
from mlx_finetune.planning.model_shape import ModelShape, model_shape, shape_of
from mlx_finetune.planning.speed import expected_speed, work_of_token

M2 = find_chip("M2")
WANTED = Wanted(8192, 0.3)
# Whose sizes are not planned yet: mixtures of experts, and all that transformers reads for us.
UNPLANNED = {"mixtral", "olmoe", "qwen3_moe"} | {name for name, one in PROVEN.items() if one.by_transformers}


def published(name: str) -> ModelShape:
    return shape_of(PUBLISHED[name][0], name, ())


@pytest.fixture(params=PUBLISHED)
def shape(request: pytest.FixtureRequest) -> ModelShape:
    return published(request.param)


@pytest.fixture
def zephyr(tmp_path: Path) -> Path:
    """A config.json alone."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PUBLISHED["zephyr-7b-beta"][0]), encoding="utf-8")
    return path


# sizes


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_counted_from_a_published_config_are_those_published(name: str) -> None:
    assert published(name).parameters == pytest.approx(PUBLISHED[name][1], rel=0.01)


@pytest.mark.parametrize("model_type", sorted(set(PROVEN) - UNPLANNED))
def test_every_architecture_that_mlx_trains_is_counted_to_the_last_parameter(model_type: str, tmp_path: Path) -> None:
    made = make_tiny(model_type, tmp_path / "model", tokenizer=False)
    found = model_shape(str(made))
    assert found.parameters * 4 == sum(found.bytes_by_dtype.values())
    file = made / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert found.weight_bytes() == found.weight_bytes(32) == file.stat().st_size - header
    (made / "model.safetensors").unlink()
    alone = model_shape(str(made))
    assert (alone.parameters, alone.weight_bytes()) == (found.parameters, found.weight_bytes())


def test_the_architecture_of_replit_is_counted_to_the_last_parameter(tmp_path: Path) -> None:
    from transformers import MptConfig, MptForCausalLM

    config = MptConfig(d_model=64, n_heads=4, n_layers=3, expansion_ratio=4, vocab_size=320, no_bias=True)
    MptForCausalLM(config).save_pretrained(tmp_path)
    assert model_shape(str(tmp_path)).parameters * 4 == model_shape(str(tmp_path)).weight_bytes()


@pytest.mark.parametrize("bits", [4, 8])
def test_predicted_bytes_of_quantised_weights_are_those_of_the_file(bits: int, tmp_path: Path) -> None:
    from mlx_lm import convert

    sizes = {"intermediate_size": 128, "vocab_size": SIZES["vocab_size"]}
    made = make_tiny("llama", tmp_path / "model", tokenizer=True, dtype="bfloat16", changes=sizes)
    convert(str(made), str(tmp_path / "packed"), quantize=True, q_bits=bits, q_group_size=64)
    packed = model_shape(str(tmp_path / "packed"))
    assert model_shape(str(made)).weight_bytes(bits) == packed.weight_bytes()
    assert packed.stored_bits == bits and packed.parameters == model_shape(str(made)).parameters


def test_files_of_another_model_than_config_json_speaks_of_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_llama / "config.json").read_text()) | {"num_hidden_layers": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((tiny_llama / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"config\.json speaks of .* parameters, the files hold"):
        model_shape(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mixtral"}, "no plan for architecture 'mixtral'"),
        ({}, "no plan for architecture 'None'"),
        ({"model_type": "llama", "hidden_size": 64}, "no num_hidden_layers"),
        ({"model_type": "mpt", "d_model": 64}, "no n_heads"),
        (PUBLISHED["zephyr-7b-beta"][0] | {"quantization_config": {"quant_method": "gptq"}}, r"quantised checkpoint \(gptq\)"),
        ([], "not a JSON object"),
    ],
)
def test_what_cannot_be_planned_for_is_refused_by_name(config: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        shape_of(config, "model", ())


# memory


def test_weights_adapter_and_optimizer_are_exact(tiny_llama: Path) -> None:
    from mlx_finetune.config import RunConfig
    from mlx_finetune.engines.mlx.engine import MlxEngine

    engine = MlxEngine(tiny_llama, RunConfig(rank=8, num_layers=3, target_modules=("q_proj", "down_proj")))
    found = memory(model_shape(str(tiny_llama)), Dials(32, 128, 1, 3, 8, ("q_proj", "down_proj"), "float32"))
    state = engine.state()
    assert found.adapter == sum(array.nbytes for name, array in state.items() if name.startswith("adapter/"))
    assert found.optimizer == sum(array.nbytes for name, array in state.items() if not name.startswith("adapter/"))


@pytest.mark.parametrize("attention", ["fused", "blocks"])
@pytest.mark.parametrize("again", [0, 1, 2])
def test_more_to_hold_never_takes_less_memory(shape: ModelShape, attention: str, again: int) -> None:
    small = Dials(4, 1024, num_layers=8, attention=attention, grad_checkpoint=again)  # type: ignore[arg-type]
    changes = [{"max_length": length} for length in (1025, 2048, 8192, 65536)]
    changes += [{"batch_size": 2}, {"num_layers": 9}, {"num_layers": None}, {"rank": 64}, {"bits": 8}, {"bits": 16}]
    changes += [{"dtype": "float32"}, {"learned_share": 1.0}]
    for change in changes:
        assert memory(shape, replace(small, **change)).peak >= memory(shape, small).peak, change  # type: ignore[arg-type]


def test_what_costs_time_saves_memory(shape: ModelShape) -> None:
    steps = [("fused", 0), ("blocks", 0), ("blocks", 4), ("blocks", 2), ("blocks", 1)]
    dials = [Dials(4, 4096, attention=attention, grad_checkpoint=again) for attention, again in steps]  # type: ignore[arg-type]
    peaks = [memory(shape, one).peak for one in dials]
    assert peaks == sorted(peaks, reverse=True)
    times = [work_of_token(shape, one, 4096).operations for one in dials[1:]]
    assert times == sorted(times)


def test_each_coefficient_counts_somewhere() -> None:
    shapes = [replace(published(name), dtype="F32") for name in ("zephyr-7b-beta", "Replit-v2-CodeInstruct-3B")]
    cases = [
        (shape, Dials(16, length, attention=attention, grad_checkpoint=again))  # type: ignore[arg-type]
        for shape in shapes for length in (64, 8192) for attention in ("fused", "blocks") for again in (0, 1)
    ]  # fmt: skip
    for name in coefficient_names():
        more = replace(Coefficients(), **{name: 1000.0})
        assert any(memory(*case, more).phases != memory(*case).phases for case in cases), name


def test_a_matrix_or_a_layer_that_is_not_there_is_refused() -> None:
    zephyr = published("zephyr-7b-beta")
    with pytest.raises(UserError, match="called 'q_projj'") as error:
        memory(zephyr, Dials(4, 1024, target_modules=("q_projj",)))
    assert error.value.hint == "did you mean q_proj?"
    with pytest.raises(UserError, match="num_layers = 33: zephyr-7b-beta has 32"):
        memory(zephyr, Dials(4, 1024, num_layers=33))


# machines


@pytest.mark.parametrize("text", ["16GB", "16", "16GiB", "16 gb", "16G", "16384MB", " 16.0 Gb "])
def test_memory_is_said_as_people_say_it(text: str) -> None:
    assert parse_memory(text) == 16 * GIB


@pytest.mark.parametrize("text", ["", "much", "16XB", "-16GB", "0", "16 GB of", "16GBB", "1e9", "100000GB", "512MB"])
def test_what_is_no_memory_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="not a size of memory"):
        parse_memory(text)


@pytest.mark.parametrize("text", ["M2 Pro", "m2 pro", "Apple M2 Pro", "M2Pro", "m2pro", " M2  Pro chip"])
def test_a_chip_is_named_as_people_name_it(text: str) -> None:
    assert find_chip(text).name == "M2 Pro"


def test_an_unknown_chip_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(UserError, match="--chip M0: not in the table") as error:
        find_chip("M0")
    assert "M1, M1 Pro" in error.value.hint


def test_metal_gets_what_was_reported_of_16_32_and_64_gb() -> None:
    mebibytes = [metal_limit(size * GIB)[0] / 2**20 for size in (16, 32, 64)]
    assert mebibytes == [pytest.approx(10922.67, abs=1), pytest.approx(21845.34, abs=1), 49152]


def test_the_table_of_chips_is_in_order_and_this_machine_is_recognised() -> None:
    assert len({chip.name for chip in CHIPS}) == len(CHIPS) == 18
    assert all(list(chip.memories) == sorted(chip.memories) and chip.tflops > 1 for chip in CHIPS)
    here = this_machine()
    assert here.memory > here.usable > GIB and here.name


# speed


def test_a_published_run_is_within_the_range() -> None:
    """mlx-lm's LORA.md: Mistral-7B, 4 layers, one row, M1 Max, 250 tokens a second; rows of a few hundred tokens."""
    mistral, m1_max = published("zephyr-7b-beta"), planned_machine(find_chip("M1 Max"), 32 * GIB)
    speed = expected_speed(mistral, Dials(16, 512, num_layers=4, learned_share=1, attention="fused"), 256, m1_max)
    assert speed and speed.low < 250 < speed.high


def test_operations_of_mistral_are_those_of_the_facts() -> None:
    """31.7 GFLOP a token at 2,048 with all layers, 46.7 with all of them computed again, 23.6 and 31.1 with 16."""
    mistral = published("zephyr-7b-beta")
    for layers, again, expected in ((None, 0, 31.7), (None, 1, 46.7), (16, 0, 23.6), (16, 1, 31.1)):
        dials = Dials(4, 2048, num_layers=layers, grad_checkpoint=again, attention="fused", learned_share=1.0)
        assert work_of_token(mistral, dials, 2048).operations / 1e9 == pytest.approx(expected, rel=0.02)


# advice


def test_more_memory_never_gives_a_worse_plan(shape: ModelShape) -> None:
    choices = [choose(shape, planned_machine(M2, size * GIB), WANTED) for size in (4, 8, 12, 16, 18, 24, 32, 48, 64, 128, 512)]
    fitting = [choice for choice in choices if choice.fits]
    assert choices[-len(fitting) :] == fitting
    ranks = [choice.rank for choice in choices]
    assert ranks == sorted(ranks, reverse=True) and ranks[-1] == 0


def test_what_is_advised_fits(shape: ModelShape) -> None:
    for size in (8, 16, 24, 32, 64):
        machine = planned_machine(M2, size * GIB)
        choice = choose(shape, machine, WANTED)
        assert choice.fits and needed(choice.memory) <= machine.usable
        refuse_what_cannot_fit(shape, choice.dials, machine)


def test_quality_is_given_up_in_order() -> None:
    zephyr = published("zephyr-7b-beta")
    choices = [choose(zephyr, planned_machine(M2, size * GIB), Wanted(4096, 0.3)) for size in (96, 32, 24, 16, 10, 8)]
    told = [(c.dials.bits, c.dials.max_length, c.dials.num_layers) for c in choices]
    assert told[0] == (16, 4096, None)
    for better, worse in pairwise(told):
        assert better[0] >= worse[0] and better[1] >= worse[1] and (better[2] or 99) >= (worse[2] or 99)
        if worse[1] < 4096:
            assert worse[0] == 4
        if worse[2]:
            assert worse[1] == SHORTEST


def test_a_run_that_cannot_fit_is_refused_with_the_knob_that_makes_it_fit() -> None:
    zephyr, machine = published("zephyr-7b-beta"), planned_machine(M2, 16 * GIB)
    with pytest.raises(UserError, match=r"zephyr-7b-beta: the run needs .* GB, 10.7 GB may be used") as error:
        refuse_what_cannot_fit(zephyr, Dials(4, 4096, attention="fused"), machine)
    assert error.value.hint.startswith("set attention=blocks, grad_checkpoint=1;")
    refuse_what_cannot_fit(zephyr, Dials(4, 4096, attention="blocks", grad_checkpoint=1), machine)
    with pytest.raises(UserError) as error:
        refuse_what_cannot_fit(zephyr, Dials(16, 4096), machine)
    assert error.value.hint.startswith("no setting makes it fit")


def test_what_a_container_may_hold_is_all_that_is_planned_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr("mlx_finetune.planning.machine.CGROUPS", (limit,))
    whole = this_machine().memory
    limit.write_text("max\n")
    assert this_machine().memory == whole
    limit.write_text("1073741824\n")
    assert this_machine().memory == GIB


# the verb


def test_the_advice_for_16_gb_names_bits_window_reasons_and_commands(cli: Callable[..., Answer], zephyr: Path) -> None:
    status, out, err = cli("plan", "--model", zephyr, "--chip", "M2", "--memory", "16GB")
    assert status == 0
    for text in ("7.24 billion parameters", "10.7 GB may be used", "weights in 4 bits", "max_length", "about", "hours"):
        assert text in out
    for size in (8, 16, 24, 32, 64):
        assert f"{size} GB " in out
    assert "1. mlx-finetune convert " in out and " --bits 4" in out and "mlx-finetune train" in out
    assert "next: " in err


def test_json_is_one_object_and_the_config_is_one_that_train_reads(
    cli: Callable[..., Answer], zephyr: Path, tmp_path: Path
) -> None:
    written = tmp_path / "plan.yaml"
    status, out, _ = cli("plan", "--model", zephyr, "--chip", "m2", "--memory", "16", "--write", written, "--json")
    result = json.loads(out)
    assert status == 0 and result["config"] == str(written)
    assert result["model"]["parameters"] == published("zephyr-7b-beta").parameters
    assert [each["machine"]["memory"] for each in result["sizes"]] == [size * GIB for size in (8, 16, 24, 32, 64)]
    plan = result["plan"]
    assert plan["fits"] and plan["bits"] == 4 and plan["needed"] <= plan["machine"]["usable"]
    assert plan["hours"]["least"] < plan["hours"]["likely"] < plan["hours"]["most"]
    config = load_config(written, {})
    for name, value in plan["settings"].items():
        assert getattr(config, name) == value
    assert written.read_text().startswith("# planned for Mac with M2 and 16 GB\n# weights in 4 bits")
    assert set(yaml.safe_load(written.read_text())) <= set(type(config).model_fields)


def test_a_data_set_gives_the_window_and_the_time(
    cli: Callable[..., Answer], zephyr: Path, tmp_path: Path, tiny_llama: Path
) -> None:
    data = tmp_path / "dataset"
    data.mkdir()
    train = {"tokens": 3_000_000, "learned_tokens": 600_000, "examples": 1500}
    (data / "dataset.json").write_text(json.dumps({"max_length": 2048, "train": train}))
    options = ("plan", "--model", zephyr, "--chip", "M2", "--memory", "16GB", "--json")
    million, three = (json.loads(cli(*options, *more)[1]) for more in ((), ("--data", data)))
    assert three["plan"]["settings"]["max_length"] == 2048
    assert three["data"]["learned"] == 600_000
    assert three["plan"]["hours"]["likely"] < 3 * million["plan"]["hours"]["likely"]  # windows are shorter, and so is attention


def test_twenty_seconds_are_one_in_a_test_and_give_a_rate(tiny_llama: Path) -> None:
    from mlx_finetune.planning.calibrate import calibrate

    shape = model_shape(str(tiny_llama))
    measured = calibrate(tiny_llama, shape, Dials(32, 128, dtype="float32"), seconds=0.5)
    assert measured.steps >= 2 and measured.tokens_per_second > 1
    assert measured.operations_per_second == pytest.approx(
        measured.tokens_per_second * work_of_token(shape, Dials(32, 128, dtype="float32"), 128).operations
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "nowhere/at/all"), "nowhere/at/all: no such model folder"),
        (("--model", "config.json", "--chip", "M0"), "--chip M0: not in the table"),
        (("--model", "config.json", "--chip", "M2"), "--chip M2: with how much memory?"),
        (("--model", "config.json", "--memory", "much"), "--memory much: not a size of memory"),
        (("--model", "config.json", "--data", "nothing"), "nothing: not a prepared data set"),
        (("--model", "config.json", "--calibrate"), "config.json: --calibrate runs the model"),
        (("--model", "config.json", "--calibrate", "--memory", "16"), "--calibrate measures this machine"),
        (("--model", "config.json", "--write", "config.json"), "config.json exists already"),
        (("--model", "config.json", "--memory", "2GB", "--write", "x.yaml"), "config.json: it does not fit"),
    ],
)
def test_a_mistake_is_one_line_and_a_hint(cli: Callable[..., Answer], zephyr: Path, options: tuple[str, ...], message: str) -> None:
    status, out, err = cli("plan", *options)  # in the folder of zephyr's config.json
    lines = [line for line in err.splitlines() if line.startswith(("error: ", "hint: "))]
    assert status == 2 and out == "" and len(lines) == 2, err
    assert lines[0].startswith(f"error: {message}")
    assert not Path("x.yaml").exists()


def test_every_kind_of_layer_is_one_that_mlx_trains_or_replits() -> None:
    assert set(KINDS) == set(PROVEN) - UNPLANNED


@pytest.mark.parametrize("model_type", sorted(UNPLANNED))
def test_a_mixture_of_experts_has_no_plan_and_the_known_ones_are_named(model_type: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no plan for architecture '{model_type}'") as error:
        model_shape(str(make_tiny(model_type, tmp_path / "model", tokenizer=False)))
    assert "llama" in error.value.hint
