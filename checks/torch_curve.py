#!/usr/bin/env python3
# checks/torch_curve.py: trains by PyTorch what ./train_gpt trains: the same initial weights, the same
# batches in the same order (--shuffle 0), the same schedule, AdamW and clipping. Writes the loss of
# every step, and the weights at the end as a folder that ./train_gpt eval reads. So two curves can be
# laid over each other, and two models scored by one program.
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


def read_safetensors(path):
    with open(path, "rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(size))
        data = file.read()
    tensors = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        assert info["dtype"] == "F32", name + " is not fp32"
        begin, end = info["data_offsets"]
        tensors[name] = torch.frombuffer(bytearray(data[begin:end]), dtype=torch.float32).reshape(info["shape"]).clone()
    return tensors


def write_safetensors(path, tensors):
    header, at = {}, 0
    for name, t in tensors.items():
        size = t.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for t in tensors.values():
            file.write(t.detach().float().cpu().contiguous().numpy().tobytes())


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


class Batches:
    """The shard, cut into blocks of T tokens and the one to predict, in order; the last is shorter."""

    def __init__(self, path, B, T):
        with open(path, "rb") as file:
            magic, version, count = struct.unpack("<3i", file.read(12))
            assert (magic, version) == (20240520, 1), path + " is no shard"
            file.seek(1024)
            raw = torch.frombuffer(bytearray(file.read(2 * count)), dtype=torch.int16)
        self.tokens = raw.to(torch.int64) & 0xFFFF
        self.B, self.T, self.predictions = B, T, count - 1
        self.blocks = (self.predictions + T - 1) // T

    def step(self, s):
        x = torch.zeros(self.B, self.T, dtype=torch.int64)
        y = torch.full((self.B, self.T), -100, dtype=torch.int64)
        for b in range(self.B):
            begin = (s * self.B + b) % self.blocks * self.T
            n = min(self.T, self.predictions - begin)
            x[b, :n] = self.tokens[begin:begin + n]
            y[b, :n] = self.tokens[begin + 1:begin + n + 1]
        return x, y


def rate(a, s):
    if s < a.warmup:
        return a.lr * (s + 1) / a.warmup
    r = min(max((s - a.warmup) / max(1, a.steps - a.warmup), 0), 1)
    low = a.lr * a.min_lr_fraction
    return low + (a.lr - low) * (1 + math.cos(math.pi * r)) / 2


def main():
    parser = argparse.ArgumentParser()
    for name, kind, default in (
            ("weights", str, None), ("shard", str, None), ("log", str, None), ("save", str, None), ("device", str, "cpu"),
            ("dtype", str, "fp32"), ("batch", int, 8), ("seq", int, 128), ("steps", int, 2000), ("warmup", int, 50),
            ("lr", float, 3e-3), ("min-lr-fraction", float, 0.1), ("decay", float, 0.1), ("clip", float, 1.0)):
        parser.add_argument("--" + name, type=kind, default=default)
    a = parser.parse_args()
    with open(a.weights + "/config.json") as file:
        config = json.load(file)
    stored = read_safetensors(a.weights + "/model.safetensors")
    short = lambda name: name[len("transformer."):] if name.startswith("transformer.") else name
    torch.backends.cuda.matmul.allow_tf32 = a.dtype == "tf32"
    p = {short(name): t.to(a.device).requires_grad_() for name, t in stored.items()}
    groups = [{"params": [t for t in p.values() if t.dim() >= 2], "weight_decay": a.decay},
              {"params": [t for t in p.values() if t.dim() < 2], "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=a.lr, betas=(0.9, 0.95), eps=1e-8)
    batches = Batches(a.shard, a.batch, a.seq)
    losses = []
    for s in range(a.steps):
        x, y = (t.to(a.device) for t in batches.step(s))
        with torch.autocast(a.device, torch.bfloat16, enabled=a.dtype == "bf16"):
            logits = forward(p, x, config["n_layer"], config["n_head"])
        loss = F.cross_entropy(logits.float().view(-1, logits.shape[-1]), y.view(-1))
        adam.zero_grad(set_to_none=True)
        loss.backward()
        # Exactly limit / norm above the limit, and nothing below it.
        norm = torch.sqrt(sum((t.grad.double() ** 2).sum() for t in p.values()))
        scale = torch.clamp(a.clip / norm, max=1.0).float()
        for t in p.values():
            t.grad *= scale
        for group in adam.param_groups:
            group["lr"] = rate(a, s)
        adam.step()
        losses.append(loss.detach())
    if a.log:
        with open(a.log, "w") as file:
            file.write("step,train_loss\n")
            for s, loss in enumerate(losses):
                file.write("%d,%.9g\n" % (s + 1, loss.item()))
    if a.save:
        os.makedirs(a.save, exist_ok=True)
        for name in os.listdir(a.weights):
            if name not in ("model.safetensors", "optimizer.safetensors", "trainer_state.json"):
                shutil.copy(a.weights + "/" + name, a.save + "/" + name)
        write_safetensors(a.save + "/model.safetensors", {name: p[short(name)] for name in stored})
    print("torch %s on %s, %s: loss %.6f at step 1, %.6f at step %d" %
          (torch.__version__, a.device, a.dtype, losses[0].item(), losses[-1].item(), a.steps))


main()
