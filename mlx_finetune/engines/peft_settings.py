"""What adapter_config.json of peft may say where A, B and magnitudes are all: for adapters that start runs, and to be fused."""

from collections.abc import Mapping
from typing import Any

READ = {"peft_type", "task_type", "r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "init_lora_weights", "bias"}
# They change nothing in what the saved A and B mean.
IDLE = {"base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform"}
IDLE |= {"auto_mapping", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision"}
IDLE |= {"ensure_weight_tying"}  # both of the tied pairs are saved, and compared before they are used
IDLE |= {"fine_tune_type", "lora_parameters", "num_layers"}  # mlx-lm's, which peft passes over


def beyond(config: Mapping[str, Any], also: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Settings, with their values, by which an adapter is more than its A, B and magnitudes say; `also`: read by the caller."""
    parameters = config.get("target_parameters") or ()
    if all(str(name).endswith(".weight") for name in parameters):  # of linear layers, by another name
        also |= {"target_parameters"}
    found = {key: value for key, value in config.items() if value and key not in READ | IDLE | also}
    if config.get("bias", "none") != "none":
        found["bias"] = config["bias"]
    # The others (pissa, olora, loftq ...) change the base weights when peft loads them
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        found["init_lora_weights"] = config["init_lora_weights"]
    return found
