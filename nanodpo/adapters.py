"""Adapters of checkpoints: opened on a base, or exchanged for those of the next checkpoint."""

import json
from pathlib import Path

from .errors import UserError, first_line

PLACES = ("base_model_name_or_path", "peft_version", "inference_mode", "revision")  # say nothing of the shape


def adapter_shape(adapter: str | None) -> dict | None:
    """An adapter's config without the entries that only say where things lie; None for a whole model."""
    if adapter is None:
        return None
    config = json.loads((Path(adapter) / "adapter_config.json").read_text())
    config["target_modules"] = sorted(config.get("target_modules") or [])
    return {key: value for key, value in config.items() if key not in PLACES}


def add_adapter(model, adapter: str | None):
    """The model with its adapter, in the model's dtype; without one the model itself."""
    if adapter is None:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)


def exchange_adapter(model, adapter: str) -> None:
    """Puts another adapter's weights in place of the present ones, which have the same shape. Raises UserError."""
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    try:
        set_peft_model_state_dict(model, load_peft_weights(adapter, device="cpu"))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{adapter}: can't be opened: {first_line(error)}") from error


def adapter_weights(model, path: str) -> list:
    """The adapter's parameters, made ready for gradients. Raises UserError for a model without one."""
    found = [p for name, p in model.named_parameters() if ".lora_" in name]
    if not found:
        raise UserError(f"--gradients: are by the weights of a LoRA adapter, and {path} has none")
    for parameter in found:
        parameter.requires_grad_(True)
    return found
