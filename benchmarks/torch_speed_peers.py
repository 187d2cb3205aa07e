"""The peers of torch_speed.py: transformers' `Trainer` and TRL's `SFTTrainer` with peft, and with unsloth's model.

Examples come as token ids with labels (-100: not learned). What goes through a Trainer is counted on its own micro-batches.
"""

import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch_speed_meter import RATE, Job, Meter
from train_speed_steps import ALPHA, RANK, Figures, adapter_of

from mlx_finetune.data.batches import Example
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.engines.adapter import LORA_A, LORA_B, Target

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOLD = """optim learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm lr_scheduler_type bf16
gradient_checkpointing gradient_checkpointing_kwargs per_device_train_batch_size gradient_accumulation_steps
train_sampling_strategy dataloader_num_workers logging_steps eval_strategy save_strategy report_to torch_compile max_length packing
padding_free loss_type completion_only_loss assistant_only_loss pad_to_multiple_of use_liger_kernel activation_offloading""".split()


def hf(job: Job, meter: Meter) -> Figures:
    """transformers' Trainer on a peft model, with the collator of its own examples."""
    from peft import get_peft_model
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    rows, kind = table(job), watched(Trainer, job, meter)
    collator = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(job["model"]), padding=True, label_pad_token_id=-100)
    model = get_peft_model(load(job, meter), lora())
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(out, **common(job, meter))
        return trained(kind(model=model, args=arguments, train_dataset=rows, data_collator=collator))


def trl(job: Job, meter: Meter) -> Figures:
    """SFTTrainer on rows that are tokenized already: it takes `labels` as they are, cuts at `max_length`, and packs nothing."""
    from transformers import AutoTokenizer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    rows, kind = table(job), watched(SFTTrainer, job, meter)
    tokenizer, peft = AutoTokenizer.from_pretrained(job["model"]), lora()
    model = load(job, meter)
    with tempfile.TemporaryDirectory() as out:
        arguments = SFTConfig(out, max_length=longest(job), **common(job, meter))
        return trained(kind(model, args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=peft))


def unsloth(job: Job, meter: Meter) -> Figures:
    """SFTTrainer with unsloth's model, adapter and checkpointing, as its README has it."""
    fast = importlib.import_module("unsloth").FastLanguageModel  # first: it patches the others
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    rows, kind = table(job), watched(SFTTrainer, job, meter)
    meter.loading()
    model, tokenizer = fast.from_pretrained(job["model"], max_seq_length=longest(job), load_in_4bit=False)
    meter.loaded()
    checkpointing = "unsloth" if job["checkpoint"] else False
    shape: dict[str, Any] = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0, "bias": "none", "target_modules": LINEARS}
    model = fast.get_peft_model(model, use_gradient_checkpointing=checkpointing, **shape)
    with tempfile.TemporaryDirectory() as out:
        arguments = SFTConfig(out, max_length=longest(job), **common(job, meter))
        return trained(kind(model, args=arguments, train_dataset=rows, processing_class=tokenizer))


def load(job: Job, meter: Meter) -> Any:
    """The frozen model alone, on a CPU yet: a Trainer moves it."""
    import torch
    from transformers import AutoModelForCausalLM

    meter.loading()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"]))
    model.config.use_cache = False
    meter.loaded()
    return model


def lora() -> Any:
    """peft's own "all-linear": everything but the head. Its adapters are float32, whatever the model is in."""
    from peft import LoraConfig

    shape: dict[str, Any] = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "bias": "none", "target_modules": "all-linear"}
    return LoraConfig(task_type="CAUSAL_LM", **shape)


def common(job: Job, meter: Meter) -> dict[str, Any]:
    """What all Trainers are told; the rest are their defaults. On a GPU, bf16 is autocast, which keeps the adapter float32."""
    values: dict[str, Any] = {"num_train_epochs": 1, "per_device_train_batch_size": job["batch"], "seed": 0}
    values |= {"gradient_accumulation_steps": job["accumulation"], "gradient_checkpointing": job["checkpoint"]}
    values |= {"learning_rate": RATE, "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0}
    values |= {"bf16": meter.cuda, "use_cpu": not meter.cuda, "dataloader_pin_memory": meter.cuda, "dataloader_num_workers": 0}
    return values | {"logging_steps": 1, "save_strategy": "no", "eval_strategy": "no", "report_to": "none", "disable_tqdm": True}


def table(job: Job) -> Any:
    """The warm-up, then what is timed as often as asked for: token ids and labels."""
    from datasets import Dataset as Table

    dataset = Dataset.open(Path(job["data"]))
    examples = [*dataset.valid, *list(dataset.train) * job["repeat"]]
    return Table.from_list([{"input_ids": e.tokens.tolist(), "labels": labels_of(e)} for e in examples])


def labels_of(example: Example) -> list[int]:
    """The token where it is learned, else -100; a Trainer shifts them itself."""
    assert set(np.unique(example.weights)) <= {0, 1}  # labels know no other weights
    labels: list[int] = np.where(example.weights > 0, example.tokens, -100).tolist()
    return labels


def longest(job: Job) -> int:
    """Tokens of the longest example, so that TRL cuts none."""
    dataset = Dataset.open(Path(job["data"]))
    return max(dataset.train.lengths + dataset.valid.lengths)


def watched(base: Any, job: Job, meter: Meter) -> Any:
    """The Trainer class `base`, with the examples of the warm-up first, and what goes through it counted."""
    from transformers import TrainerCallback

    first = job["batch"] * job["accumulation"]

    class Marks(TrainerCallback):
        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            meter.mark()

    class Watched(base):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, callbacks=[Marks()], **named)
            self.seen: list[tuple[int, int]] = []  # of each micro-batch: learned, computed
            self.accumulation = job["accumulation"]

        def _get_train_sampler(self, *arguments: Any) -> Any:
            own = super()._get_train_sampler(*arguments)
            return InOrder(len(own)) if job["in_order"] else WarmFirst(own, first)

        def training_step(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
            self.seen.append((int((inputs["labels"][:, 1:] != -100).sum()), inputs["input_ids"].numel()))
            return super().training_step(model, inputs, *arguments, **named)

    return Watched


class InOrder:
    """Rows that are all alike, one behind the other, so that the losses of all sides can be compared step by step."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))

    def __len__(self) -> int:
        return self.count


class WarmFirst(InOrder):
    """A Trainer's own order of its examples, behind the `first` that warm it up."""

    def __init__(self, own: Any, first: int) -> None:
        super().__init__(len(own))
        self.own, self.first = own, first

    def __iter__(self) -> Iterator[int]:
        yield from range(self.first)
        yield from (place for place in self.own if place >= self.first)


def trained(trainer: Any) -> Figures:
    """Trains from our adapter; what a Trainer logs as loss is the mean over the learned tokens of a step."""
    parameters = set_adapter(trainer.model)
    prepared = [sum(label != -100 for label in row["labels"]) for row in trainer.train_dataset]
    trainer.train()
    timed = trainer.seen[trainer.accumulation :]
    assert sum(learned for learned, _ in trainer.seen) == sum(prepared)
    arguments, config = trainer.args.to_dict(), trainer.model.config
    told = {name: arguments[name] for name in TOLD if name in arguments} | {"attention": config._attn_implementation}
    told |= {"use_cache": config.use_cache, "data_collator": type(trainer.data_collator).__name__}
    told |= {"adapter": ", ".join({str(parameter.dtype) for parameter in parameters.values()})}
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "learned": sum(learned for learned, _ in timed),
        "computed": sum(computed for _, computed in timed),
        "adapted": sum(parameter.numel() for parameter in parameters.values()),
        "settings": told,
    }


def set_adapter(model: Any) -> dict[str, Any]:
    """Gives a peft model the numbers that ours starts from, by the same names; its trained parameters."""
    import torch

    parameters = {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    modules = sorted({name.rsplit(".lora_", 1)[0] for name in parameters})
    arrays = adapter_of({n: Target(len(parameters[n + LORA_B]), parameters[n + LORA_A].shape[1]) for n in modules})
    assert arrays.keys() == parameters.keys()
    with torch.no_grad():
        for name, array in arrays.items():
            parameters[name].copy_(torch.from_numpy(array))
    return parameters
