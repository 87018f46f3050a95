"""DoRA of layers under the names of the original code, as LyCORIS saves it, and what PEFT makes of their weights."""

from collections.abc import Mapping, Sequence

import numpy as np
import peft
import torch

RANK, ALPHA = 4, 3


def adapters(
    state: Mapping[str, np.ndarray], layers: Sequence[str], side: str
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(a file's tensors, the state with the adapters merged by PEFT) for random adapters of linear layers.

    side: "outputs", then magnitudes are [O, 1]; or "inputs", then they are [1, I], and PEFT is given the layer's
    transpose, as its own magnitudes are those of outputs.
    """
    file, merged = {}, dict(state)
    for layer in layers:
        name, kernel = f"lora_unet_{layer.replace('.', '_')}", state[f"{layer}.weight"]
        down, up, scale, result = _merged(kernel if side == "outputs" else kernel.T)
        if side == "inputs":
            down, up, scale, result = up.T, down.T, scale.T, result.T
        file |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.dora_scale": scale}
        file[f"{name}.alpha"] = np.array(ALPHA, np.float32)
        merged[f"{layer}.weight"] = result
    return {key: np.ascontiguousarray(value) for key, value in file.items()}, merged


def _merged(kernel: np.ndarray) -> tuple[np.ndarray, ...]:
    """(down [R, I], up [O, R], magnitudes [O, 1], the merged weight [O, I]) of a linear layer [O, I]."""
    linear = torch.nn.Linear(kernel.shape[1], kernel.shape[0], bias=False)
    linear.weight.data = torch.tensor(kernel)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, use_dora=True, target_modules=["linear"])
    model = peft.get_peft_model(torch.nn.ModuleDict({"linear": linear}), config)
    own, found = dict(model.named_parameters()), []
    torch.manual_seed(0)
    for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
        (parameter,) = (value for name, value in own.items() if part in name)
        changed = 0.3 * torch.randn_like(parameter)
        parameter.data = parameter * (1 + changed) if part == "lora_magnitude_vector" else changed
        found.append(parameter.detach().numpy().copy())
    down, up, scale = found
    return down, up, scale.reshape(-1, 1), model.merge_and_unload()["linear"].weight.detach().numpy()
