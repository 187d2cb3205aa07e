"""How weights are packed: MLX's modes, bits and group sizes, and mlx-lm's recipes of several bits.

affine: a group of neighbouring weights shares a scale and a bias. mxfp4, mxfp8: the OCP Microscaling formats; nvfp4: NVIDIA's.
"""

from dataclasses import dataclass
from typing import Any

from mlx_finetune.errors import UserError

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)
FIXED = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}  # mode: the bits and the group size that its format has
MODES = ("affine", *FIXED)
RECIPES = {"mixed_2_6": (2, 6), "mixed_3_4": (3, 4), "mixed_3_6": (3, 6), "mixed_4_6": (4, 6)}  # bits of most, bits of some
GROUP = 64


@dataclass(frozen=True)
class Quantisation:
    """How a model is packed; with a recipe, `bits` is what most layers get and `more_bits` what some get."""

    bits: int
    group_size: int
    mode: str = "affine"
    recipe: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """As config.json of mlx-lm has them, and as a layer's `to_quantized` takes them."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    @property
    def more_bits(self) -> int:
        """Of the layers that a recipe favours."""
        return RECIPES[self.recipe][1] if self.recipe else self.bits

    def __str__(self) -> str:
        how = self.recipe or (f"{self.bits} bits" if self.mode == "affine" else self.mode)
        return f"{how}, groups of {self.group_size}"


def quantisation_of(bits: int | None, group_size: int | None, mode: str, recipe: str) -> Quantisation | None:
    """What the options ask for; None where they ask for no quantisation.

    Raises:
        UserError: bits, groups, modes or recipes that MLX does not have, or that do not go together.
    """
    _known("--mode", mode or "affine", MODES)
    if recipe:
        _known("--recipe", recipe, tuple(RECIPES))
        if bits or mode not in ("", "affine"):
            other = f"--bits {bits}" if bits else f"--mode {mode}"
            raise UserError(f"--recipe {recipe} and {other} do not go together", hint="a recipe says the bits: leave one out")
        _known("--group-size", group_size or GROUP, AFFINE_GROUPS)
        return Quantisation(RECIPES[recipe][0], group_size or GROUP, "affine", recipe)
    if mode in FIXED:
        fixed = Quantisation(*FIXED[mode], mode)
        for name, given, value in (("--bits", bits, fixed.bits), ("--group-size", group_size, fixed.group_size)):
            if given not in (None, value):
                raise UserError(f"{name} {given}: {mode} has {value}", hint=f"leave {name} out, or use --mode affine")
        return fixed
    if bits is None:
        if group_size or mode:
            name = f"--group-size {group_size}" if group_size else f"--mode {mode}"
            raise UserError(f"{name} without --bits", hint=f"say --bits: {', '.join(map(str, AFFINE_BITS))}")
        return None
    _known("--bits", bits, AFFINE_BITS)
    _known("--group-size", group_size or GROUP, AFFINE_GROUPS)
    return Quantisation(bits, group_size or GROUP)


def favoured(path: str, layers: int) -> bool:
    """Whether a recipe gives this module more bits: the head; v_proj and down_proj of the first and last eighth and of every third.

    The layers are those that llama.cpp chooses for Q4_K_M, and mlx-lm after it.
    """
    if "lm_head" in path:
        return True
    if not any(name in path for name in ("v_proj", "v_a_proj", "v_b_proj", "down_proj")):
        return False
    layer = next((int(part) for part in path.split(".") if part.isdecimal()), 0)
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _known(name: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        raise UserError(f"{name} {value}: MLX has {', '.join(map(str, known))}", hint=f"{name} {known[0]}, for example")
