"""Random models of every family that the tests name, two or three layers of 32, and a second way to score with them."""

import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

V = 97
COMMON = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
          "eos_token_id": 2}
GPT2_SIZE = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 256}
# A window of 7 and sequences of up to 73, so that windows matter; caps near the scores' own size, so that they do.
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "sliding_window": 100,
                  "shared_expert_intermediate_size": 16, "use_sliding_window": True, "max_window_layers": 2},
    "mistral": {"head_dim": 8, "sliding_window": 7},
    "gemma2": {"head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0,
               "final_logit_softcapping": 3.0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 8,
                    "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {},
    "olmo2": {},
    "gpt_neox": {},
    "gpt2": GPT2_SIZE,
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "phi": {},  # its output layer has a bias
    "bloom": {"n_layer": 2, "n_head": 4},  # alibi: positions come in as a bias on the scores
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48},
    "mamba": {"state_size": 4},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7,
                "layer_types": ["sliding_attention", "full_attention"]},  # attention sinks
    "falcon_h1": {"head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
                  "mamba_n_groups": 1, "lm_head_multiplier": 0.5},
}


def tiny(name: str, dtype=torch.float64, std: float | None = 0.3, **changes):
    """A model in eval mode, without dropout. `std` draws weights large enough for attention to matter; None keeps the
    family's own first draw.
    """
    config = AutoConfig.for_model(name, **COMMON | FAMILIES.get(name, {}) | changes)
    for key, value in vars(config).items():
        if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
            setattr(config, key, 0.0)
    torch.manual_seed(0)
    # The grouped expert kernels know no float64.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager")
    if std is not None:
        for key, p in model.named_parameters():
            is_scale = p.ndim == 1 and ("norm" in key or "ln_" in key) and key.endswith("weight")
            torch.nn.init.normal_(p, float(is_scale), std)
    return model.to(dtype).eval()


class KeepDouble(TorchFunctionMode):
    """Norms, softmaxes and routers of many models go through float32 whatever the model's dtype, and turn a difference
    of 1e-16 into one of 1e-7. Here a float64 tensor stays one, so that two exact computations differ by 1e-12 or less.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            if any(a is torch.float32 for a in args) or kwargs.get("dtype") is torch.float32:
                args = [torch.float64 if a is torch.float32 else a for a in args]
                kwargs |= {"dtype": torch.float64} if "dtype" in kwargs else {}
        return func(*args, **kwargs)


def naive_token_logps(model, groups) -> list[torch.Tensor]:
    """The textbook way: a forward pass for each sequence, full logits, log_softmax, gather. A tensor a response."""
    out = []
    for prompt, responses in groups:
        for response in responses:
            ids = torch.tensor([prompt + response], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0]
            logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            out.append(logps[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt):, None]).squeeze(1))
    return out


def random_groups(seed: int = 0, sizes=((1, [7, 7]), (9, [14, 5]), (16, [3, 1]), (12, [24, 33]))) -> list:
    """Prompts and responses of these lengths: ragged, one-token prompt, one-token response."""
    draw = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(V, (n,), generator=draw).tolist()

    return [(ids(p), [ids(r) for r in rs]) for p, rs in sizes]
