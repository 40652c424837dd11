"""The blocks of bench/gpu.py: each yields rows with a `case` and what was measured."""

import atexit
import gc
import os
import platform
import re
import shutil
import tempfile
import time
import types
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from features import reid_features
from gpu_checks import KINDS, compare_functions, compare_trainings
from measure import ari
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from pclclip_nb.backbones.create import create_backbone
from pclclip_nb.batches.augmentation import Augment
from pclclip_nb.batches.loading import decoded, test_loader, train_loader
from pclclip_nb.batches.samplers import PKSampler
from pclclip_nb.clip_backbone import extract_features
from pclclip_nb.clustering import jaccard_dbscan
from pclclip_nb.core.attention import set_grad_checkpoint
from pclclip_nb.core.compute import Timer
from pclclip_nb.core.neighbours import knn
from pclclip_nb.memory_loss import ClusterMemory
from pclclip_nb.synthetic.people import make_synthetic_reid
from pclclip_nb.train import train
from pclclip_nb.training.settings import TrainConfig, make_optimizer
from pclclip_nb.training.steps import Losses, Stepper

WORK = Path(tempfile.mkdtemp(prefix="gpu_bench"))  # images and runs
atexit.register(shutil.rmtree, WORK, ignore_errors=True)
VIT, RESNET, TINY = "ViT-B-16-quickgelu", "resnet50", "pclclip-tiny"
CLUSTERS, INSTANCES, EPS = 750, 16, 0.5
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}


@dataclass
class Sizes:
    "How much work each block does"

    vit: str = VIT
    size: tuple = (256, 128)  # (H, W), pixels
    batch: int = 256
    steps: int = 20  # timed, after a quarter as many
    products: int = 8192  # rows of the matrices that give the matrix rate
    images: tuple = (12936, 32621, 100000)  # to cluster
    people: int = 60  # drawn for the labels of the features, 20 images each
    epoch: int = 12936  # images
    iters: int = 200  # steps of that epoch
    kinds: tuple = tuple(KINDS)  # of trainings
    real: bool = True  # False on the simulated device

    @classmethod
    def quick(cls):
        "For a short run on a card"
        return cls(batch=64, steps=8, images=(12936,), people=15, epoch=2000, iters=20)

    @classmethod
    def simulated(cls):
        "For a run whose times say nothing"
        small = dict(vit=TINY, size=(64, 32), batch=32, steps=1, products=256, images=(600, 1000), people=4)
        return cls(**small, epoch=200, iters=3, kinds=("cluster", "hybrid", "pids", "bf16"), real=False)


# ---- Timing


def wait(sizes):
    if sizes.real:
        torch.cuda.synchronize()


def milliseconds(f, sizes, times=None):
    "Of one call, many made one after the other"
    times = times or sizes.steps
    for _ in range(max(1, times // 4)):
        f()
    wait(sizes)
    began = time.perf_counter()
    for _ in range(times):
        f()
    wait(sizes)
    return 1000 * (time.perf_counter() - began) / times


def free():
    "Give the memory of the last case back"
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def with_matmul(precision, f):
    "Call f with torch's precision of fp32 products set to 'highest' or 'high' (TF32)"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        return f()
    finally:
        torch.set_float32_matmul_precision(before)


# ---- Machine and correctness


def machine(sizes, out):
    "Versions, card, memory, cores and switches"
    card, backends = torch.cuda.get_device_properties(0), torch.backends
    row = dict(case="machine", torch=torch.__version__, cuda=torch.version.cuda, python=platform.python_version())
    row |= dict(
        name=card.name, gb=card.total_memory / 1e9, capability=f"{card.major}.{card.minor}", cores=os.cpu_count()
    )
    row |= dict(bf16=torch.cuda.is_bf16_supported(including_emulation=False), cudnn=backends.cudnn.version())
    row |= dict(tf32_products=torch.get_float32_matmul_precision(), tf32_convolutions=backends.cudnn.allow_tf32)
    names = ("flash", "mem_efficient", "cudnn", "math")
    yield row | {f"{name}_attention": getattr(backends.cuda, f"{name}_sdp_enabled")() for name in names}


def exact(make_rows):
    "The rows, made without TF32"
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield from make_rows
    finally:
        torch.backends.cudnn.allow_tf32 = before


def functions(sizes, out):
    "Public functions with arrays on the device against arrays on the CPU"
    yield from exact(compare_functions())


def trainings(sizes, out):
    "Small trainings of every kind against the CPU"
    yield from exact(compare_trainings(WORK / "trainings", kinds=sizes.kinds))


# ---- Labels


def on_device(n):
    "Features of n images, on the CPU and on the device"
    x = reid_features(n)[0]
    return x, torch.from_numpy(x).to("cuda")


def neighbours(sizes, out):
    "knn on the device against the exact search on the CPU"
    for n in sizes.images[:2]:
        x, z = on_device(n)
        knn(z[:500], 30)  # compiled code, the first product
        began = time.perf_counter()
        found = knn(z, 30, "torch")
        between = time.perf_counter()
        truth = knn(x, 30, "tiles")
        rows = float((found == truth).all(1).mean())
        yield dict(case=str(n), s=between - began, s_cpu=time.perf_counter() - between, rows=rows, equal=rows == 1)


def labels(sizes, out):
    "Labels of features that lie on the device, end to end; the first call loads or compiles code"
    began = time.perf_counter()
    jaccard_dbscan(on_device(500)[1], EPS)
    yield dict(case="first call", s=time.perf_counter() - began)
    for n in sizes.images:
        z, runs = on_device(n)[1], []
        for _ in range(3):
            with Timer() as timer:
                began = time.perf_counter()
                found = jaccard_dbscan(z, EPS)
                runs.append((time.perf_counter() - began, dict(timer.seconds)))
        s, stages = min(runs, key=lambda run: run[0])
        yield dict(case=str(n), s=s, stages=stages, clusters=int(found.max() + 1), outliers=int((found < 0).sum()))


# ---- Steps


@cache
def matrix_rate(kind, sizes_n, real):
    "FLOP per second of a large product of two matrices"
    a, b = (torch.randn(sizes_n, sizes_n, device="cuda").to(TYPES[kind]) for _ in range(2))
    sizes = Sizes(products=sizes_n, real=real)
    ms = with_matmul("high" if kind == "tf32" else "highest", lambda: milliseconds(lambda: a @ b, sizes, 10))
    return 2 * sizes_n**3 / ms * 1000


def rate_of(kind, sizes):
    return matrix_rate(kind, sizes.products, sizes.real)


def matrix(sizes, out):
    "The rate of large products in every precision"
    for kind in TYPES:
        yield dict(case=kind, n=sizes.products, tflops=rate_of(kind, sizes) / 1e12)


def network(name, sizes):
    "A network of random weights, on the CPU"
    torch.manual_seed(0)
    return create_backbone(name, None, sizes.size).train()


def unit_memory(d, n=CLUSTERS):
    return ClusterMemory(F.normalize(torch.randn(n, d), dim=1)).to("cuda")


def labels_of_batch(batch):
    return torch.arange(batch) // INSTANCES


def step_of(net, precision, **more):
    "A call takes a step of a batch"
    step, memory = Stepper(net, make_optimizer(net, cfg=TrainConfig()), None, precision, **more), unit_memory(net.d)

    def call(images):
        loss, feats = step(images, labels_of_batch(len(images)), memory)
        memory.update(feats, labels_of_batch(len(images)), check=False)
        return loss

    return call


@cache
def flop_of_image(name, size):
    "FLOP of the matrix products and convolutions of a training step, for an image"
    net = create_backbone(name, None, size).train()
    with FlopCounterMode(display=False) as counter:
        net(torch.randn(2, 3, *size)).sum().backward()
    return counter.get_total_flops() / 2


def measured_step(name, precision, sizes, prepare=lambda net, images: images, **more):
    "A row: ms, images per second, GB and the share of the matrix rate"
    free()
    flop = sizes.batch * flop_of_image(name, sizes.size)
    net = network(name, sizes).to("cuda")
    images = prepare(net, torch.randn(sizes.batch, 3, *sizes.size, device="cuda"))
    step = step_of(net, precision, **more)
    ms = milliseconds(lambda: step(images), sizes)
    gb = torch.cuda.max_memory_allocated() / 1e9
    share = flop / ms * 1000 / rate_of(precision, sizes)
    row = dict(case=f"{name} {precision}", ms=ms, images_per_s=1000 * sizes.batch / ms)
    return row | dict(gb=gb, tflop=flop / 1e12, share=share)


def steps(sizes, out):
    "A training step on a batch that lies on the device"
    for precision in ("bf16", "fp16", "fp32"):
        yield measured_step(sizes.vit, precision, sizes)
    for precision in ("bf16", "fp16") if sizes.real else ("bf16",):
        yield measured_step(RESNET, precision, sizes)


def random_bytes(sizes, n):
    "Decoded images of noise"
    return np.random.default_rng(0).integers(0, 256, (n, 3, *sizes.size), np.uint8)


def loader(sizes, out):
    "Steps from the real loader beside steps on a resident batch, and what waits for the device"
    iters = 2 * sizes.steps
    images, ids = random_bytes(sizes, 16 * sizes.batch), np.arange(16 * sizes.batch) // INSTANCES
    batches = train_loader(images, PKSampler(ids, None, sizes.batch, INSTANCES, iters), Augment(), device="cuda")
    step = step_of(network(sizes.vit, sizes).to("cuda"), "bf16")

    def one_pass(use):
        losses = Losses()
        wait(sizes)
        began = time.perf_counter()
        for x, _ in batches:
            use(x, losses)
        wait(sizes)
        return 1000 * (time.perf_counter() - began) / iters

    one_pass(lambda x, losses: losses.add(step(x)))
    alone = one_pass(lambda x, losses: None)
    resident = next(iter(batches))[0]
    ms = {"alone": alone, "resident": one_pass_resident(step, resident, sizes, iters)}
    ms["with loader"] = one_pass(lambda x, losses: losses.add(step(x)))
    for case, value in ms.items():
        yield dict(case=case, ms=value)
    yield dict(case="waits", share=max(0.0, ms["with loader"] / ms["resident"] - 1))
    places = waits_of(lambda: [step(x) for x, _ in take(batches, 3)], sizes)
    yield dict(case="synchronisations in 3 steps", total=sum(places.values()), places=dict(places.most_common(12)))


def one_pass_resident(step, images, sizes, iters):
    "ms of a step on the same batch again and again, its losses read as in training"
    losses = Losses()
    return milliseconds(lambda: losses.add(step(images)), sizes, iters)


def take(batches, n):
    "The first batches of a pass"
    for _, batch in zip(range(n), batches):
        yield batch


def waits_of(f, sizes):
    "Where a call waits for the device: how often each line of code does"
    if not sizes.real:
        import simulated_cuda

        with simulated_cuda.record() as log:
            f()
        return Counter(f"{entry.place} ({entry.kind})" for entry in log if entry.waits)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            f()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Counter(
        f"{'/'.join(w.filename.split('/')[-2:])}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)
    )


def profile(sizes, out):
    "The kernels that take most of a step, and those of attention"
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    step = step_of(network(sizes.vit, sizes).to("cuda"), "bf16")
    images = torch.randn(sizes.batch, 3, *sizes.size, device="cuda")
    for _ in range(3):
        step(images)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * sizes.real
    with profiler(activities=kinds) as record:
        for _ in range(3):
            step(images)
        wait(sizes)
    events, device = record.key_averages(), "device" if sizes.real else "cpu"
    (out / "profile.txt").write_text(events.table(sort_by=f"self_{device}_time_total", row_limit=60))
    on_device = [e for e in events if not sizes.real or "cuda" in str(e.device_type).lower()]
    ms = {e.key: getattr(e, f"self_{device}_time_total") / 3000 for e in on_device}
    for key in sorted(ms, key=ms.get, reverse=True)[:15]:
        yield dict(case=key[:120], ms=ms[key], share=ms[key] / sum(ms.values()))
    attention = sorted(key[:120] for key in ms if re.search("flash|fmha|attention|sdpa", key, re.I))
    yield dict(case="attention kernels", names=attention, ms=sum(ms.values()))


# ---- Features


def drawn_people(sizes):
    "Images of drawn people"
    table = make_synthetic_reid(WORK / "people", n_train=sizes.people, n_test=1, n_distractors=0, progress=False)
    return table[table.split == "train"].reset_index(drop=True)


def features(sizes, out):
    "Features in every precision: images per second, the smallest cosine to fp32, and the agreement of the labels"
    table = drawn_people(sizes)
    for name in dict.fromkeys((sizes.vit, TINY)):
        net = network(name, sizes) if name != TINY else tiny()
        net = net.to("cuda").eval()
        images, truth = decoded(table, net.size, WORK / "decoded", progress=False), None
        for case, precision in (("fp32", "fp32"), ("tf32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16")):
            free()
            how = "high" if case == "tf32" else "highest"
            run = lambda: extract_features(net, test_loader(images, sizes.batch, net.norm, device="cuda"), precision)  # noqa: E731
            with_matmul(how, run)
            began = time.perf_counter()
            found = with_matmul(how, run)
            speed = len(images) / (time.perf_counter() - began)
            row = dict(case=f"{name} {case}", images_per_s=speed, **agreement(found, truth))
            truth = found if truth is None else truth
            yield row


def tiny():
    from pclclip_nb.synthetic.tiny_clip import tiny_backbone

    return tiny_backbone()


def agreement(found, truth):
    "Smallest cosine and ARI of the labels to those of fp32"
    if truth is None:
        return {}
    cosine = float((F.normalize(found.double()) * F.normalize(truth.double())).sum(1).min())
    a, b = (jaccard_dbscan(x, EPS, 20, 4) for x in (truth, found))
    return dict(cosine=cosine, ari=ari(a, b), clusters=int(a.max() + 1))


# ---- An epoch


def noise_files(sizes, folder):
    "A table of small JPEG files, 17 of each of the identities, which differ in colour"
    folder.mkdir(parents=True, exist_ok=True)
    rng, n = np.random.default_rng(0), sizes.epoch
    pids = np.arange(n) // 17 + 1
    colours = rng.integers(0, 256, (pids[-1] + 1, 4, 2, 3))
    paths = [str(folder / f"{p:04d}_c{i % 6 + 1}_{i:06d}.jpg") for i, p in enumerate(pids)]
    for path, pid in zip(paths, pids):
        if os.path.exists(path):
            continue
        pixels = np.clip(colours[pid] + rng.normal(0, 30, (4, 2, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).resize((64, 128), Image.BILINEAR).save(path, quality=85)
    return pd.DataFrame(dict(path=paths, pid=pids, camid=np.arange(n) % 6 + 1, split="train"))


def epoch(sizes, out):
    "Two epochs of `train` on a table of Market-1501's size: features, labels, steps, and the state saved"
    table, marks = noise_files(sizes, WORK / "noise"), [time.perf_counter()]
    net = network(sizes.vit, sizes).to("cuda")

    def cluster(x):  # labels are made, timed, then replaced: random weights give no clusters to train on
        jaccard_dbscan(x.to("cuda"), EPS)
        return table.pid.to_numpy() - 1

    cfg = TrainConfig(
        epochs=2, iters=sizes.iters, batch_size=sizes.batch, workers=os.cpu_count(), cache_dir=str(WORK / "decoded")
    )
    history = train(
        net, table, WORK / "run", cfg, cluster, on_epoch=lambda _: marks.append(time.perf_counter()), progress=False
    )
    for case, s, row in zip(("first", "second"), np.diff(marks), history.to_dict("records")):
        yield dict(
            case=case,
            s=float(s),
            images=len(table),
            iters=sizes.iters,
            stages={k: float(v) for k, v in row.items() if k.startswith("t_")},
        )


def published(sizes, out):
    "The published loop, restated: parts of its epoch on the same images, with four workers, scaled to the whole"
    import epoch as restated

    table = noise_files(sizes, WORK / "noise").iloc[: 8 * sizes.batch]
    args = types.SimpleNamespace(model=sizes.vit, size=sizes.size, batch=sizes.batch, steps=max(2, sizes.steps // 2))
    args.device = "cuda" if sizes.real else "cpu"  # its loaders pin memory, which is not simulated
    net, (moves, plain) = (
        restated.published_network(network(sizes.vit, sizes).to(args.device)),
        restated.transforms(args),
    )
    began = time.perf_counter()
    found = restated.published_features(args, net, table, plain)
    s = time.perf_counter() - began
    yield dict(case="features", images_per_s=len(table) / s, s_epoch=s * sizes.epoch / len(table))
    pids = table.pid.to_numpy() - 1
    centroids = restated.centroids_of(found, pids)
    restated.published_steps(args, net, table, pids, centroids, moves)
    began = time.perf_counter()
    restated.published_steps(args, net, table, pids, centroids, moves)
    ms = 1000 * (time.perf_counter() - began) / args.steps
    yield dict(case="steps", ms=ms, s_epoch=ms * sizes.iters / 1000)


# ---- Memory, memory formats, compiled


def small_cards(sizes, out):
    "The memory of a step, by torch's own account on the card, beside the memory counted for it"
    from small_cards import SIZE, counted_rows

    rows, room = counted_rows(), torch.cuda.get_device_properties(0).total_memory / 1e9
    if not sizes.real:
        rows = [row | {"batch": 8} for row in rows if row["network"] == "pass_vit_small" and row["grad_checkpoint"]][:1]
    for row in (row for row in rows if 1.2 * row["gb"] < room):
        free()
        net = create_backbone(row["network"], None, SIZE).train().to("cuda")
        step = step_of(set_grad_checkpoint(net, row["grad_checkpoint"]), row["precision"], accumulate=row["accumulate"])
        images = torch.randn(row["batch"], 3, *SIZE, device="cuda")
        for _ in range(2):
            step(images)
        case = " ".join(str(row[k]) for k in ("network", "precision", "accumulate", "grad_checkpoint"))
        reserved = torch.cuda.max_memory_reserved() / 1e9
        yield dict(case=case, counted_gb=row["gb"], gb=torch.cuda.max_memory_allocated() / 1e9, reserved_gb=reserved)
        del net, step, images


def channels_last(sizes, out):
    "A convolutional network with its channels last"

    def prepare(net, images):
        net.to(memory_format=torch.channels_last)
        return images.contiguous(memory_format=torch.channels_last)

    yield measured_step(RESNET, "bf16", sizes, prepare)


def compiled(sizes, out):
    "Steps of a network that went through torch.compile"
    if not sizes.real:
        return [dict(case="not simulated")]
    began = time.perf_counter()
    return [measured_step(sizes.vit, "bf16", sizes, compile=True) | dict(s=time.perf_counter() - began)]


BLOCKS = dict(machine=machine, functions=functions, trainings=trainings, knn=neighbours, labels=labels, matrix=matrix)
BLOCKS |= dict(steps=steps, loader=loader, profile=profile, features=features, epoch=epoch, published=published)
BLOCKS |= dict(small_cards=small_cards, channels_last=channels_last, compiled=compiled)
