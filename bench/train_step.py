"""The training step alone: the published one, restated, against ours in several ways, taking turns in one process.

python bench/train_step.py                   tiny CLIP, 128x64, 64 images, on the CPU
python bench/train_step.py --quick           a smoke test: fewer rounds, nothing compiled, nothing stored
python bench/train_step.py --device cuda     ViT-B-16-quickgelu (random weights), 256x128, 256 images
python bench/train_step.py --features --model ViT-B-16-quickgelu --size 256 128
                                             features in float32 instead of steps: open_clip's own forward pass against ours

Images are random numbers that lie on the device already; one network is shared by all of ours. The published step reads the loss,
moves the memory one sample at a time inside backward, and its SGD has a group for every tensor and a loop over them; it
takes fp32 on a CPU, fp16 on a GPU. "rate" is the share of what a large product of two matrices reaches here, measured in
the same run and in the same type; the operations are counted in one step (as if attention were plain products).
Parts of a step and the loader, from a memory map of bytes to augmented batches, are measured alone.
Results go to bench/results/train_step.json.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from epoch import INSTANCES, TINY, network, published_memory, published_network, published_optimizer
from measure import store
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pclclip_nb.batches.augmentation import Augment
from pclclip_nb.batches.loading import train_loader
from pclclip_nb.batches.samplers import PKSampler
from pclclip_nb.memory_loss import ClusterMemory, running_update
from pclclip_nb.training.settings import TrainConfig

TYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
VARIANTS = {  # of ours: the precision, and what is done to it
    "cpu": ["fp32", "fp32 fused", "bf16 fused", "bf16 fused compiled"],
    "cuda": ["fp16", "fp16 fused", "fp16 fused compiled", "bf16", "bf16 fused", "bf16 fused compiled"],
}
DEFAULTS = {"cpu": dict(model=TINY, size=(128, 64), batch=64)}
DEFAULTS["cuda"] = dict(model="ViT-B-16-quickgelu", size=(256, 128), batch=256)
CLUSTERS, CFG = 650, TrainConfig()
KEY = ("device", "model", "batch", "threads")


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(f, device, times=1):
    "Of one call, when many are made one after the other"
    wait(device)
    start = time.perf_counter()
    for _ in range(times):
        f()
    wait(device)
    return (time.perf_counter() - start) / times


def batch_of(args):
    "Images and labels, 16 of each cluster; the labels on the CPU"
    images = torch.randn(args.batch, 3, *args.size, device=args.device)
    return images, torch.randperm(CLUSTERS)[: args.batch // INSTANCES].repeat_interleave(INSTANCES)


def trainable(net):
    return [p for p in net.parameters() if p.requires_grad]


def published_step(args, net, images, labels):
    "A call takes a step, with a copy of the network"
    half, centroids = args.device == "cuda", F.normalize(torch.randn(CLUSTERS, net.d, device=args.device))
    net = published_network(net).train()
    optimizer, memory, y = published_optimizer(net, CFG, CFG.lr / 100), published_memory(), labels.to(args.device)
    scaler = torch.amp.GradScaler(args.device, enabled=half)

    def step():
        with torch.autocast(args.device, torch.float16, enabled=half):
            loss = F.cross_entropy(memory.apply(net(images), y, centroids, CFG.momentum) / CFG.temp, y)
        optimizer.zero_grad(set_to_none=False)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        loss.item()

    return step


def our_step(args, net, images, labels, variant):
    "A call takes a step, and waits for nothing"
    precision, *ways = variant.split()
    dtype, how = TYPES[precision], dict(momentum=0.9, weight_decay=CFG.weight_decay)
    optimizer = torch.optim.SGD(trainable(net), CFG.lr / 100, fused="fused" in ways, **how)
    memory = ClusterMemory(F.normalize(torch.randn(CLUSTERS, net.d)), CFG.momentum, CFG.temp).to(args.device)
    scaler = torch.amp.GradScaler(args.device, enabled=precision == "fp16")
    forward = torch.compile(net) if "compiled" in ways else net

    def step():
        optimizer.zero_grad()
        with torch.autocast(args.device, dtype, enabled=dtype is not None):
            feats = forward(images)
        scaler.scale(memory.loss(feats, labels)).backward()
        scaler.step(optimizer)
        scaler.update()
        memory.centroids.copy_(running_update(memory.centroids, feats.detach(), labels, CFG.momentum))

    return step


def product_of(device, precision):
    "A call multiplies two large matrices; with it, the FLOP of that"
    n, dtype = 8192 if device == "cuda" else 2048, TYPES[precision] or torch.float32
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, 2 * n**3


def operations(step):
    "FLOP of the matrix products of one step"
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    return counter.get_total_flops()


def take_turns(steps, args):
    "Seconds of a step (lower quartile: others may use the machine), and of the first call, of each"
    first = {name: seconds(step, args.device) for name, step in steps.items()}
    taken = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            taken[name].append(seconds(step, args.device, args.times))
    return {name: float(np.quantile(t, 0.25)) for name, t in taken.items()}, first


def measured_steps(args):
    "A row per variant"
    net, (images, labels) = network(args).train(), batch_of(args)
    steps = {"published": published_step(args, net, images, labels)}
    flop = {True: operations(steps["published"]), False: operations(our_step(args, net, images, labels, "fp32"))}
    steps |= {v: our_step(args, net, images, labels, v) for v in args.variants}
    types = {v: ("fp16" if args.device == "cuda" else "fp32") if v == "published" else v.split()[0] for v in steps}
    products = {p: product_of(args.device, p) for p in sorted(set(types.values()))}
    taken, first = take_turns(steps | {f"product {p}": f for p, (f, _) in products.items()}, args)
    rates = {p: n / taken.pop(f"product {p}") for p, (_, n) in products.items()}
    rows = []
    for v, s in taken.items():
        used = flop[v == "published"] / s
        row = dict(variant=v, ms=1000 * s, images_per_s=args.batch / s, ratio=taken["published"] / s)
        rows.append(row | dict(rate=used / rates[types[v]], tflops=used / 1e12, first_s=first[v]))
    return rows, rates, flop


def measured_features(args):
    "A row for open_clip's image tower and one for our backbone around the same tower, both without gradient"
    net, (images, _) = network(args).eval(), batch_of(args)
    passes = {"features, open_clip": net.image_encoder, "features, ours": net}
    with torch.no_grad():
        taken, _ = take_turns({name: lambda f=f: f(images) for name, f in passes.items()}, args)
    slow = taken["features, open_clip"]
    return [dict(variant=v, ms=1000 * s, images_per_s=args.batch / s, ratio=slow / s) for v, s in taken.items()]


def measured_parts(args):
    "Seconds of what is not the network, the published way and ours"
    net, (_, labels) = network(args), batch_of(args)
    feats = F.normalize(torch.randn(args.batch, net.d, device=args.device))
    centroids, y = F.normalize(torch.randn(CLUSTERS, net.d, device=args.device)), labels.to(args.device)
    x = feats.clone().requires_grad_()
    for p in trainable(net):
        p.grad = torch.zeros_like(p)
    fast = {"default": {}, "fused": {"fused": True}}
    how = dict(momentum=0.9, weight_decay=CFG.weight_decay)
    parts = {
        "memory, published": lambda: published_memory().apply(x, y, centroids, CFG.momentum).sum().backward(),
        "memory, ours": lambda: running_update(centroids, feats, labels, CFG.momentum),
        "SGD, published": published_optimizer(net, CFG, CFG.lr).step,
    }
    parts |= {
        f"SGD, {name}": torch.optim.SGD(trainable(net), CFG.lr, **how, **more).step for name, more in fast.items()
    }
    return take_turns(parts, args)[0]


def measured_loader(args):
    "Images per second from a memory map of bytes to batches, on each device"
    n, rates = 4096, {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bytes.npy"
        kept = np.lib.format.open_memmap(file, "w+", np.uint8, (n, 3, *args.size))
        kept[:] = np.random.default_rng(0).integers(0, 256, (1, 3, *args.size), np.uint8)
        labels, iters = np.arange(n) // INSTANCES, max(4, 5120 // args.batch)
        for device in dict.fromkeys(("cpu", args.device)):
            sampler = PKSampler(labels, None, args.batch, INSTANCES, iters)
            loader = train_loader(np.load(file, mmap_mode="r"), sampler, Augment(), device=device)

            def one_pass(loader=loader):
                for _ in loader:
                    pass

            one_pass()
            rates[device] = args.batch * iters / min(seconds(one_pass, args.device) for _ in range(3))
    return rates


def show(args, rows, rates, flop, parts, loader):
    print(f"{args.device}, {args.model}, {args.size[0]}x{args.size[1]}, {args.batch} images, {args.threads} threads")
    print(f"operations of a step: published {flop[True] / 1e9:.0f} GFLOP, ours {flop[False] / 1e9:.0f}")
    print("matrix rate: " + ", ".join(f"{p} {r / 1e12:.2f} TFLOP/s" for p, r in rates.items()))
    table = pd.DataFrame(rows).set_index("variant")
    columns = dict(ms="ms/step {:.1f}", images_per_s="images/s {:.0f}", ratio="published/this {:.2f}x")
    columns |= dict(rate="rate {:.1%}", first_s="first call, s {:.1f}")
    names = {k: text.rsplit(" ", 1) for k, text in columns.items()}
    print(pd.DataFrame({name: table[k].map(fmt.format) for k, (name, fmt) in names.items()}).to_string())
    print("alone: " + ", ".join(f"{k} {1000 * s:.2f} ms" for k, s in parts.items()))
    best = max(r["images_per_s"] for r in rows)
    print(
        "loader alone: "
        + ", ".join(f"{d} {r:.0f} images/s, {r / best:.1f} times the fastest step's" for d, r in loader.items())
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model")
    parser.add_argument("--size", type=int, nargs=2, help="height and width")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=9, help="turns of each variant")
    parser.add_argument("--variants", nargs="+", help="such as 'bf16 fused compiled'")
    parser.add_argument("--features", action="store_true", help="features in float32 instead of steps")
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing compiled, nothing stored")
    args = parser.parse_args()
    for name, value in (DEFAULTS[args.device] | dict(variants=VARIANTS[args.device])).items():
        setattr(args, name, getattr(args, name) or value)
    args.times = 5 if args.device == "cuda" else 1
    if args.quick:
        args.rounds, args.variants = 2, [v for v in args.variants if "compiled" not in v]
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    what = {k: getattr(args, k) for k in KEY}
    if args.features:
        rows = measured_features(args)
        print(*what.values(), pd.DataFrame(rows).round(2).to_string(index=False), sep="\n")
        return None if args.quick else store("train_step", (*KEY, "variant"), [what | r for r in rows])
    rows, rates, flop = measured_steps(args)
    parts, loader = measured_parts(args), measured_loader(args)
    show(args, rows, rates, flop, parts, loader)
    if not args.quick:
        more = {
            "parts_ms": {k: 1000 * s for k, s in parts.items()},
            "loader_images_per_s": loader,
            "matrix_rate": rates,
        }
        rows.append({"variant": "around", **more})
        store("train_step", (*KEY, "variant"), [what | r for r in rows])


if __name__ == "__main__":
    main()
