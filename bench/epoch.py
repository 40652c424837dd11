"""One epoch (features, labels, steps): the published PCL-CLIP loop, restated, against ours, each in a process of its own.

python bench/epoch.py                                  13,000 images of 128x64, tiny CLIP, 200 steps of 256, on the CPU
python bench/epoch.py --quick                          a smoke test: 600 images, 3 steps
python bench/epoch.py --ours default                   only one of our variants: fp32, default or bf16
python bench/epoch.py --settings '{"compile": true}'   settings for all of ours, see TrainConfig
python bench/epoch.py --device cuda --model ViT-B-16-quickgelu --size 256 128
                                                       random weights: labels are made, timed, then replaced by true pids

The published loop decodes every image again with PIL for every use, in worker processes that live for one pass, keeps
dense N x N distances, updates the memory one sample at a time inside backward, and reads the loss at every step.
Its precision: fp32 on a CPU; on a GPU fp32 features and fp16 steps (the search for neighbours, a GPU's in the original,
stays on the CPU, see the stages). Two sleeps of half a second are left out.
Ours are two epochs of `train`: the first decodes the images and loads compiled code, the second is what every later
epoch costs, the saved state included. Results go to bench/results/epoch.json.
"""

import argparse
import copy
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from clustering import EPS, K1, K2, MIN_SAMPLES, dense_reference
from measure import store
from PIL import Image

WORK = Path(__file__).parent.parent / "runs" / "bench_epoch"
TINY, INSTANCES, WORKERS, PER_ID = "pclclip-tiny", 16, 4, 17
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VARIANTS = {
    "fp32": dict(precision="fp32", feature_precision="fp32"),
    "default": {},
    "bf16": dict(precision="bf16", feature_precision="bf16"),
}
KEY = ("device", "model", "images", "steps", "batch", "threads")


def training_table(args):
    "The images, drawn once"
    from pclclip_nb.synthetic.people import make_synthetic_reid

    ids = -(-args.images // PER_ID)
    table = make_synthetic_reid(WORK / f"data{ids}", n_train=ids, n_test=1, per_id=PER_ID, n_distractors=0)
    return table[table.split == "train"].iloc[: args.images].reset_index(drop=True)


def network(args):
    import torch

    from pclclip_nb.clip_backbone import clip_backbone
    from pclclip_nb.synthetic.tiny_clip import tiny_backbone

    torch.manual_seed(0)
    net = tiny_backbone() if args.model == TINY else clip_backbone(args.model, size=tuple(args.size))
    return net.to(args.device)


def cpu_seconds():
    "Of this process and of its ended children"
    return sum(os.times()[:4])


def peak_mb(who):
    return resource.getrusage(who).ru_maxrss / 1024


# the published loop


class Erase:
    "A rectangle of the normalised image set to the mean, half of the time"

    def __call__(self, x):
        if random.random() > 0.5:
            return x
        _, H, W = x.shape
        for _ in range(100):
            area, aspect = random.uniform(0.02, 0.4) * H * W, random.uniform(0.3, 1 / 0.3)
            h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if h < H and w < W:
                top, left = random.randint(0, H - h), random.randint(0, W - w)
                for c in range(3):
                    x[c, top : top + h, left : left + w] = MEAN[c]
                return x
        return x


class OneByOne:
    "Dataset: open, transform, return with everything that is known of the image"

    def __init__(self, items, transform):
        self.items, self.transform = items, transform

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        path, label, cam = self.items[i]
        return self.transform(Image.open(path).convert("RGB")), path, label, cam, i


class OtherCameras:
    "Sampler: clusters in random order, of each an anchor and images of other cameras"

    def __init__(self, items):
        self.members, self.cams = {}, [cam for _, _, cam in items]
        for i, (_, label, _) in enumerate(items):
            self.members.setdefault(label, []).append(i)

    def __len__(self):
        return len(self.members) * INSTANCES

    def __iter__(self):
        import torch

        labels, out = list(self.members), []
        for c in torch.randperm(len(labels)).tolist():
            rows = self.members[labels[c]]
            anchor = random.choice(rows)
            pool = [r for r in rows if self.cams[r] != self.cams[anchor]] or [r for r in rows if r != anchor]
            out.append(anchor)
            if pool:
                out += np.random.choice(pool, INSTANCES - 1, replace=len(pool) < INSTANCES).tolist()
        return iter(out)


def transforms(args):
    "For training and for features"
    from torchvision import transforms as T

    size, end = tuple(args.size), [T.ToTensor(), T.Normalize(MEAN, STD)]
    squash = T.Resize(size, interpolation=T.InterpolationMode.BICUBIC)
    moves = [T.RandomHorizontalFlip(0.5), T.Pad(10), T.RandomCrop(size)]
    return T.Compose([squash, *moves, *end, Erase()]), T.Compose([squash, *end])


def published_network(net):
    "Images to unit features: open_clip's own tower with the weights of `net`; the end of it goes over all tokens though one is used"
    import open_clip
    import torch
    import torch.nn.functional as F

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = open_clip.model.CLIP(**open_clip.get_model_config(net.name)).visual
            self.tower.positional_embedding = copy.deepcopy(net.image_encoder.positional_embedding)
            self.tower.load_state_dict(net.image_encoder.state_dict())
            self.tower.conv1.weight.requires_grad_(False)
            self.necks = copy.deepcopy(torch.nn.ModuleList([net.bottleneck, net.bottleneck_proj]))

        def forward(self, images):
            tokens = self.tower.ln_post(self.tower.transformer(self.tower._embeds(images)))
            ends = tokens, tokens @ self.tower.proj
            return F.normalize(torch.cat([neck(x[:, 0]) for neck, x in zip(self.necks, ends)], dim=1))

    return Network().to(next(net.parameters()).device)


def loader_of(args, items, transform, **more):
    from torch.utils.data import DataLoader

    more |= dict(batch_size=args.batch, num_workers=WORKERS, pin_memory=args.device == "cuda")
    return DataLoader(OneByOne(items, transform), **more)


def published_features(args, net, table, transform):
    import torch

    items, by_path = list(zip(table.path, table.pid, table.camid)), {}
    net.eval()
    with torch.no_grad():
        for images, paths, *_ in loader_of(args, items, transform):
            for path, x in zip(paths, net(images.to(args.device)).cpu()):
                by_path[path] = x
    return torch.stack([by_path[path] for path in table.path])


def centroids_of(features, labels):
    import torch
    import torch.nn.functional as F

    members = {}
    for i, label in enumerate(labels):
        if label >= 0:
            members.setdefault(label, []).append(features[i])
    return F.normalize(torch.stack([torch.stack(members[c]).mean(0) for c in sorted(members)]))


def published_memory():
    "An autograd function: products with the centroids, which move during backward, a sample at a time"
    import torch

    class Memory(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cuda")
        def forward(ctx, x, y, centroids, momentum):
            ctx.centroids, ctx.momentum = centroids, momentum
            ctx.save_for_backward(x, y)
            return x.mm(centroids.t())

        @staticmethod
        @torch.amp.custom_bwd(device_type="cuda")
        def backward(ctx, grad):
            x, y = ctx.saved_tensors
            grad_x = grad.mm(ctx.centroids)
            for xi, yi in zip(x, y):
                ctx.centroids[yi] = ctx.momentum * ctx.centroids[yi] + (1 - ctx.momentum) * xi
                ctx.centroids[yi] /= ctx.centroids[yi].norm()
            return grad_x, None, None, None

    return Memory


def endless(loader):
    "Passes over a loader, whose workers start anew for each"
    while True:
        yield from loader


def published_optimizer(net, cfg, lr):
    "A group for every tensor, a loop over all of them"
    import torch

    groups = [{"params": [p]} for p in net.parameters() if p.requires_grad]
    return torch.optim.SGD(groups, lr, momentum=0.9, weight_decay=cfg.weight_decay, foreach=False)


def published_steps(args, net, table, labels, centroids, transform):
    "Mean loss"
    import torch
    import torch.nn.functional as F

    from pclclip_nb.training.settings import TrainConfig, learning_rate

    cfg, half = TrainConfig(), args.device == "cuda"
    optimizer, memory = published_optimizer(net, cfg, learning_rate(1, cfg)), published_memory()
    scaler, centroids = torch.amp.GradScaler(args.device, enabled=half), centroids.to(args.device)
    items = [(p, y, c) for p, y, c in zip(table.path, labels.tolist(), table.camid) if y >= 0]
    loader, losses = loader_of(args, items, transform, sampler=OtherCameras(items), drop_last=True), []
    batches = endless(loader)
    net.train()
    for _ in range(args.steps):
        images, _, y, _, _ = next(batches)
        images, y = images.to(args.device), y.to(args.device)
        with torch.autocast(args.device, torch.float16, enabled=half):
            logits = memory.apply(net(images), y, centroids, cfg.momentum) / cfg.temp
            loss = F.cross_entropy(logits, y)
        optimizer.zero_grad(set_to_none=False)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    batches.close()
    return float(np.mean(losses))


def published(args):
    import faiss  # noqa: F401
    import sklearn.cluster  # noqa: F401
    import torch

    torch.backends.cudnn.deterministic = True
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(1)
    table, net, (train, test) = training_table(args), published_network(network(args)), transforms(args)
    cpu, clock = [cpu_seconds()], [time.perf_counter()]
    features = published_features(args, net, table, test)
    clock.append(time.perf_counter())
    labels, stages = dense_reference(features.numpy())
    used = labels if args.model == TINY else table.pid.to_numpy() - 1
    centroids = centroids_of(features, used)
    clock.append(time.perf_counter())
    loss = published_steps(args, net, table, used, centroids, train)
    clock.append(time.perf_counter())
    cpu.append(cpu_seconds())
    np.savez(WORK / "published.npz", features=features.numpy(), labels=labels)
    row = dict(zip(("extract", "cluster", "train"), np.diff(clock).tolist()))
    row |= dict(other=0.0, loss=loss, stages=stages, worker_mb=peak_mb(resource.RUSAGE_CHILDREN))
    seconds, used = clock[-1] - clock[0], cpu[1] - cpu[0]
    return row | dict(epoch=seconds, first=seconds, cpu=used, first_cpu=used)


# ours


def clusterer_of(args, table):
    "None = that of the settings; with random weights true pids after the same work"
    from pclclip_nb.clustering import jaccard_dbscan

    if args.model == TINY:
        return None

    def cluster(features):
        jaccard_dbscan(features, EPS, K1, K2, MIN_SAMPLES)
        return table.pid.to_numpy() - 1

    return cluster


def ours(args, variant):
    from pclclip_nb.train import train
    from pclclip_nb.training.settings import TrainConfig

    own = dict(eps=EPS, k1=K1, k2=K2, min_samples=MIN_SAMPLES, batch_size=args.batch, num_instances=INSTANCES)
    own |= dict(iters=args.steps, epochs=2, cache_dir=str(WORK / "decoded"))
    cfg = TrainConfig(**own | VARIANTS[variant] | args.settings)
    for folder in (WORK / "run", WORK / "decoded"):
        shutil.rmtree(folder, ignore_errors=True)
    table, net, marks = training_table(args), network(args), []

    def mark(result=None):
        if result is not None and result.epoch == 1:
            np.save(WORK / "ours.npy", result.features.numpy())
        marks.append((time.perf_counter(), cpu_seconds()))

    mark()
    history = train(net, table, WORK / "run", cfg, clusterer_of(args, table), on_epoch=mark, progress=False)
    (first, first_cpu), (epoch, cpu) = np.diff(marks, axis=0).tolist()
    times = {k.removeprefix("t_"): float(t) for k, t in history.iloc[-1].filter(like="t_").items()}
    row = dict(zip(("extract", "cluster", "train"), (times.pop(k) for k in ("features", "cluster", "train"))))
    row |= dict(other=epoch - sum(row.values()), loss=float(history.loss[0]), stages=times)
    return row | dict(epoch=epoch, first=first, cpu=cpu, first_cpu=first_cpu)


# both


def labels_compared():
    "Our labels of the features that the published loop clustered"
    from pclclip_nb.clustering import jaccard_dbscan

    stored = np.load(WORK / "published.npz")
    times = [time.perf_counter()]
    for _ in range(2):  # the first call loads compiled code
        labels = jaccard_dbscan(stored["features"], EPS, K1, K2, MIN_SAMPLES)
        times.append(time.perf_counter())
    a, b = stored["labels"], labels
    pairs = np.unique(np.stack([a, b]), axis=1).shape[1]
    same = np.array_equal(a < 0, b < 0) and pairs == len(np.unique(a)) == len(np.unique(b))
    return dict(same=same, clusters=int(a.max() + 1), outliers=int((a < 0).sum()), seconds=times[2] - times[1])


def one_side(args):
    "Run one side here, and write what it measured"
    import torch

    torch.set_num_threads(args.threads)
    row = published(args) if args.side == "published" else ours(args, args.side)
    row["mb"] = peak_mb(resource.RUSAGE_SELF)
    if args.device == "cuda":
        row["gpu_mb"] = torch.cuda.max_memory_allocated() / 2**20
    if args.side != "published":
        row["labels"] = labels_compared()
    (WORK / f"{args.side}.json").write_text(json.dumps(row))


def in_process(args, side):
    "The same in a process of its own"
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "NUMBA_NUM_THREADS": str(args.threads)}
    subprocess.run([sys.executable, __file__, *sys.argv[1:], "--side", side], env=env, check=True)
    return json.loads((WORK / f"{side}.json").read_text())


LINES = {  # what is printed, in this order
    "extract": "extract, s",
    "cluster": "cluster, s",
    "train": "train, s",
    "other": "state saved, s",
    "epoch": "an epoch, s",
    "first": "the first epoch, s",
    "cpu": "an epoch, CPU s",
    "first_cpu": "the first, CPU s",
    "mb": "peak, MB",
    "gpu_mb": "peak on the GPU, MB",
}


def show(rows, apart):
    "Seconds and megabytes, and how many times less ours take"
    slow, table = rows["published"], {}
    for key, text in ((k, text) for k, text in LINES.items() if k in slow):
        times = {side: f" ({slow[key] / row[key]:.1f}x)" if slow[key] else "" for side, row in rows.items()}
        table[text] = {side: f"{row[key]:.2f}{times[side] * (side != 'published')}" for side, row in rows.items()}
    table["mean loss"] = {side: f"{row['loss']:.3f}" for side, row in rows.items()}
    print(pd.DataFrame(table).T.to_string())
    print(
        f"each of the published loop's {WORKERS} workers takes up to {slow['worker_mb']:.0f} MB, shared pages included"
    )
    for side, row in rows.items():
        print(f"stages, {side}: " + ", ".join(f"{k} {t:.2f}" for k, t in row["stages"].items()))
    print(f"features of the first epoch apart by {apart:.1e} at most")
    labels = rows[list(rows)[-1]]["labels"]
    words = "equal" if labels["same"] else "NOT equal"
    print(
        f"labels of the same features {words}: {labels['clusters']} clusters, {labels['outliers']} outliers; ours {labels['seconds']:.2f} s"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=13000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", default=TINY)
    parser.add_argument("--size", type=int, nargs=2, default=(128, 64), help="height and width")
    parser.add_argument("--ours", nargs="+", default=["fp32", "default"], choices=VARIANTS)
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON of TrainConfig fields")
    parser.add_argument("--quick", action="store_true", help="small sizes, one thread, nothing stored")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.images, args.steps, args.batch, args.ours = 600, 3, 64, args.ours[-1:]
        args.threads = 1
    WORK.mkdir(parents=True, exist_ok=True)
    if args.side:
        return one_side(args)
    training_table(args)
    rows = {side: in_process(args, side) for side in ("published", *args.ours)}
    apart = float(abs(np.load(WORK / "ours.npy") - np.load(WORK / "published.npz")["features"]).max())
    what = {k: getattr(args, k) for k in KEY}
    print("  ".join(f"{k} {v}" for k, v in what.items()), f" settings {args.settings}" * bool(args.settings))
    show(rows, apart)
    if not args.quick:
        settings = dict(settings=json.dumps(args.settings))
        rows = [what | dict(side=side) | settings | row for side, row in rows.items()]
        store("epoch", (*KEY, "settings", "side"), rows)


if __name__ == "__main__":
    main()
