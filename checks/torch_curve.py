#!/usr/bin/env python3
# checks/torch_curve.py: trains by PyTorch what ./train_gpt trains: the same initial weights, the same
# batches in the same order (--shuffle 0), the same schedule, AdamW and clipping. Writes the loss of
# every step, and the weights at the end as a folder that ./train_gpt eval reads. So two curves can be
# laid over each other, and two models scored by one program. Needs torch and safetensors.
#
#     python3 checks/torch_curve.py --weights out/a/checkpoint-1 --shard data/stories/train_000001.bin \
#         --steps 2000 --warmup 50 --lr 3e-3 --batch 8 --seq 128 --log torch.csv --save out/torch
import argparse
import json
import math
import os
import shutil
import struct

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file


def forward(p, x, layers, heads):
    """Logits of tokens x [B, T]; linear weights are [in, out]."""
    B, T = x.shape
    C = p["wte.weight"].shape[1]
    norm = lambda z, name: F.layer_norm(z, (C,), p[name + ".weight"], p[name + ".bias"], 1e-5)
    linear = lambda z, name: z @ p[name + ".weight"] + p[name + ".bias"]
    z = p["wte.weight"][x] + p["wpe.weight"][:T]
    for i in range(layers):
        at = "h.%d." % i
        qkv = linear(norm(z, at + "ln_1"), at + "attn.c_attn")
        q, k, v = (t.view(B, T, heads, C // heads).transpose(1, 2) for t in qkv.split(C, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)
        z = z + linear(y, at + "attn.c_proj")
        y = F.gelu(linear(norm(z, at + "ln_2"), at + "mlp.c_fc"), approximate="tanh")
        z = z + linear(y, at + "mlp.c_proj")
    return norm(z, "ln_f") @ p["wte.weight"].t()


def read_shard(path):
    with open(path, "rb") as file:
        magic, version, count = struct.unpack("<3i", file.read(12))
        assert (magic, version) == (20240520, 1), path + " is no shard"
        file.seek(1024)
        return torch.tensor(struct.unpack("<%dH" % count, file.read(2 * count)))


def batch_of(tokens, s, B, T):
    """Step s: the text cut into windows of T tokens and the one to predict, in order; the last is shorter."""
    x = torch.zeros(B, T, dtype=torch.int64)
    y = torch.full((B, T), -100, dtype=torch.int64)
    predictions = len(tokens) - 1
    for b in range(B):
        begin = (s * B + b) % ((predictions + T - 1) // T) * T
        n = min(T, predictions - begin)
        x[b, :n] = tokens[begin:begin + n]
        y[b, :n] = tokens[begin + 1:begin + n + 1]
    return x, y


def rate(a, s):
    if s < a.warmup:
        return a.lr * (s + 1) / a.warmup
    r = min(max((s - a.warmup) / max(1, a.steps - a.warmup), 0), 1)
    low = a.lr * a.min_lr_fraction
    return low + (a.lr - low) * (1 + math.cos(math.pi * r)) / 2


def train(a, p, config):
    """The loss of every step."""
    groups = [{"params": [t for t in p.values() if t.dim() >= 2], "weight_decay": a.decay},
              {"params": [t for t in p.values() if t.dim() < 2], "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=a.lr, betas=(0.9, 0.95), eps=1e-8)
    tokens, losses = read_shard(a.shard), []
    for s in range(a.steps):
        x, y = (t.to(a.device) for t in batch_of(tokens, s, a.batch, a.seq))
        with torch.autocast(a.device, torch.bfloat16, enabled=a.dtype == "bf16"):
            logits = forward(p, x, config["n_layer"], config["n_head"])
        loss = F.cross_entropy(logits.float().view(-1, logits.shape[-1]), y.view(-1))
        adam.zero_grad(set_to_none=True)
        loss.backward()
        # Exactly limit / norm above the limit, and nothing below it.
        norm = torch.sqrt(sum((t.grad.double() ** 2).sum() for t in p.values()))
        for t in p.values():
            t.grad *= torch.clamp(a.clip / norm, max=1.0).float()
        for group in adam.param_groups:
            group["lr"] = rate(a, s)
        adam.step()
        losses.append(loss.detach())
    return [loss.item() for loss in losses]


def main():
    parser = argparse.ArgumentParser()
    for name, default in (
            ("weights", ""), ("shard", ""), ("log", ""), ("save", ""), ("device", "cpu"), ("dtype", "fp32"), ("batch", 8), ("seq", 128),
            ("steps", 2000), ("warmup", 50), ("lr", 3e-3), ("min-lr-fraction", 0.1), ("decay", 0.1), ("clip", 1.0)):
        parser.add_argument("--" + name, type=type(default), default=default)
    a = parser.parse_args()
    with open(a.weights + "/config.json") as file:
        config = json.load(file)
    torch.backends.cuda.matmul.allow_tf32 = a.dtype == "tf32"
    stored = load_file(a.weights + "/model.safetensors", device=a.device)
    p = {name.removeprefix("transformer."): t.requires_grad_() for name, t in stored.items()}
    losses = train(a, p, config)
    if a.log:
        with open(a.log, "w") as file:
            file.write("step,train_loss\n" + "".join("%d,%.9g\n" % one for one in enumerate(losses, 1)))
    if a.save:
        os.makedirs(a.save, exist_ok=True)
        for name in os.listdir(a.weights):
            if name not in ("model.safetensors", "optimizer.safetensors", "trainer_state.json"):
                shutil.copy(a.weights + "/" + name, a.save + "/" + name)
        save_file({name: t.detach() for name, t in stored.items()}, a.save + "/model.safetensors")
    print("torch %s on %s, %s: loss %.6f at step 1, %.6f at step %d" % (torch.__version__, a.device, a.dtype, losses[0], losses[-1], a.steps))


main()
