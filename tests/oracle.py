"""DPO and SFT the long way: plain transformers, PEFT and PyTorch; one sequence a forward pass, full logits, no engine.

Slow and obvious on purpose. Nothing here calls the kernel, the packing or the loop under test.
"""

import json
import math

import torch
from conftest import make_tokenizer
from transformers import AutoModelForCausalLM

EOS = 258


def read_pairs(file):
    """train.jsonl -> prompt, chosen and rejected ids."""
    rows, encode = [json.loads(line) for line in file.read_text().splitlines()], make_tokenizer()
    return [(encode(r["prompt"]).input_ids, encode(r["chosen"]).input_ids + [EOS],
             encode(r["rejected"]).input_ids + [EOS]) for r in rows]


def sequence_logp(model, prompt, response):
    """Sum over the response of log softmax(logits at the position before)[token]."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0].double()
    logps = logits.log_softmax(-1)
    return sum(logps[len(prompt) - 1 + t, token] for t, token in enumerate(response))


def load(folder, base=None, dtype=torch.float32):
    """A checkpoint as anyone would open it: plain PEFT on its base, or plain transformers."""
    if base is None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    from peft import PeftModel

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), folder, is_trainable=True,
                                     autocast_adapter_dtype=False)


def cosine(step, steps, peak):
    return peak * (1 + math.cos(math.pi * step / steps)) / 2


def train(model, pairs, windows, loss="dpo", beta=0.1, peak=1e-3, max_norm=1.0, without=()):
    """AdamW on these windows of pairs; returns [{"loss", "grad_norm", "logps/chosen"}] and changes the model. The loss
    of a window lacks the terms of the pairs `without`, and is divided as if it had them."""
    model.eval()  # no dropout
    with torch.no_grad():
        ref = {i: [sequence_logp(model, pairs[i][0], y).item() for y in pairs[i][1:]] for w in windows for i in w}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=peak, weight_decay=0.0)
    lines = []
    for step, window in enumerate(windows):
        optimizer.param_groups[0]["lr"] = cosine(step, len(windows), peak)
        total, chosen_sum = 0.0, 0.0
        for i in window:
            prompt, *responses = pairs[i]
            chosen, rejected = (sequence_logp(model, prompt, y) for y in responses)
            chosen_sum += chosen.item()
            if i in without:
                continue
            if loss == "dpo":
                margin = (chosen - ref[i][0]) - (rejected - ref[i][1])
                total = total + torch.log1p(torch.exp(-beta * margin)) / len(window)
            else:
                total = total - chosen / sum(len(pairs[j][1]) for j in window)
        optimizer.zero_grad()
        total.backward()
        norm = torch.sqrt(sum(p.grad.double().square().sum() for p in trained if p.grad is not None)).item()
        for p in trained:
            if p.grad is not None and norm > max_norm:
                p.grad *= max_norm / (norm + 1e-6)
        optimizer.step()
        lines.append({"loss": total.item(), "grad_norm": norm, "logps/chosen": chosen_sum / len(window)})
    return lines
