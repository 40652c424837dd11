"""Public functions and small trainings on a CUDA device and on the CPU, for bench/gpu.py."""

import tempfile
from importlib.util import find_spec

import numpy as np
import pandas as pd
import torch
from features import reid_features
from measure import ari
from scipy.sparse import issparse

from pclclip_nb.batches.augmentation import Augment
from pclclip_nb.clip_backbone import extract_features
from pclclip_nb.clustering import jaccard_dbscan, jaccard_graph, relabel
from pclclip_nb.core.neighbours import knn
from pclclip_nb.core.reranking import re_rank
from pclclip_nb.eval_viz import evaluate, rank_gallery
from pclclip_nb.labels.camera_refinement import camera_clusters, camera_entropy_weights, refine_by_camera
from pclclip_nb.labels.graph_clustering import infomap_clusters, jaccard_linkage
from pclclip_nb.labels.graph_correction import correct_labels
from pclclip_nb.labels.health import cluster_report, suggest_eps
from pclclip_nb.labels.reports import label_scores
from pclclip_nb.labels.self_paced import SelfPaced
from pclclip_nb.memory_loss import ClusterMemory, cluster_centroids, contrastive_loss, hard_update, running_update
from pclclip_nb.results.distances import label_distances, pair_distances
from pclclip_nb.results.protocols import camera_pairs, single_shot
from pclclip_nb.synthetic.people import make_synthetic_reid
from pclclip_nb.synthetic.tiny_clip import tiny_backbone
from pclclip_nb.train import train
from pclclip_nb.training.losses import HybridMemory, IdentityHead, soft_triplet
from pclclip_nb.training.settings import TrainConfig

EPS = 0.6
LEARNT = {"correct_labels": 0.02}  # labels of a network that is trained: how far the ARI may be from 1

# ---- Functions


def label_functions(x, y, cams):
    "Calls on features, labels and cameras"
    return {
        "knn": lambda: knn(x, 30),
        "knn flat": lambda: knn(x, 30, "flat" if find_spec("faiss") else "torch"),
        "jaccard_graph": lambda: jaccard_graph(x, eps=EPS),
        "jaccard_dbscan": lambda: jaccard_dbscan(x, EPS),
        "relabel": lambda: relabel(y),
        "infomap_clusters": lambda: infomap_clusters(x),
        "jaccard_linkage": lambda: jaccard_linkage(x, 40),
        "SelfPaced": lambda: SelfPaced(EPS)(x),
        "camera_clusters": lambda: camera_clusters(x, cams),
        "refine_by_camera": lambda: refine_by_camera(x, y, cams),
        "correct_labels": lambda: correct_labels(x, y, cams, steps=60),
        "camera_entropy_weights": lambda: camera_entropy_weights(y, cams),
        "suggest_eps": lambda: suggest_eps(x, radii=(0.5, EPS)).eps,
        "cluster_report": lambda: [value for key, value in cluster_report(y, cams).items() if key != "warnings"],
        "label_scores": lambda: pd.Series(label_scores(y, y), dtype=float).to_numpy(),
    }


def score_functions(x, y, cams):
    "Calls on queries and a gallery"
    test = (x[:100], x[100:], y[:100], y[100:], cams[:100], cams[100:])
    return {
        "re_rank": lambda: re_rank(*test[:2]),
        "evaluate": lambda: evaluate(*test).mAP,
        "evaluate, re-ranked": lambda: evaluate(*test, rerank=True).mAP,
        "rank_gallery": lambda: rank_gallery(*test),
        "camera_pairs": lambda: camera_pairs(*test).mAP.to_numpy(),
        "single_shot": lambda: single_shot(*test, trials=2).mAP,
        "pair_distances": lambda: pair_distances(*test).same,
        "label_distances": lambda: label_distances(x, y, cams).same,
    }


def loss_functions(x, y):
    "Calls of memories and losses, on the images that have a label"
    centroids, rows = cluster_centroids(x, y), np.flatnonzero(np.asarray(torch.as_tensor(y).cpu()) >= 0)[:64]
    feats, labels = x[rows], y[rows]
    near = centroids[: int(labels.max()) + 1]

    def moved(memory, *targets):
        memory = memory.to(feats.device)
        loss = memory.loss(feats, *targets)
        memory.update(feats, *targets)
        return [loss, *memory.buffers()]

    def hybrid():
        memory = HybridMemory(x)
        memory.set_labels(y)
        return moved(memory, torch.as_tensor(rows))

    torch.manual_seed(0)
    head = IdentityHead(x.shape[1], len(centroids), 1.0, 0.1, 1.0).to(feats.device)
    return {
        "cluster_centroids": lambda: centroids,
        "contrastive_loss": lambda: contrastive_loss(feats, labels, near),
        "running_update": lambda: running_update(near, feats, labels, 0.1),
        "hard_update": lambda: hard_update(near, feats, labels, 0.1),
        "ClusterMemory": lambda: moved(ClusterMemory(near), labels),
        "ClusterMemory, hard": lambda: moved(ClusterMemory(near, hard=True), labels),
        "HybridMemory": hybrid,
        "soft_triplet": lambda: soft_triplet(feats, labels),
        "IdentityHead": lambda: head(feats, feats, labels),
    }


def image_functions(images, net):
    "Calls on images: bytes to batches, batches to features"
    rows = np.arange(len(images))
    x = Augment()(images, rows, rows)
    return {
        "Augment": lambda: x,
        "extract_features": lambda: extract_features(net, [(x, torch.from_numpy(rows))], "fp32"),
    }


def all_functions(device):
    "Name and call of every function, with its arrays on a device"
    x, pids, cams = reid_features(600, 128, n_ids=40)
    labels = relabel(np.where(np.arange(len(pids)) % 11, pids, -1))
    x, y, cams = (torch.from_numpy(a).to(device) for a in (x, labels, cams))
    net = tiny_backbone().to(device)
    images = np.random.default_rng(0).integers(0, 256, (16, 3, *net.size), np.uint8)
    images = torch.from_numpy(images).to(device)
    calls = label_functions(x, y, cams) | score_functions(x, y.clamp(min=0), cams) | loss_functions(x, y)
    return calls | image_functions(images, net)


def arrays_of(result):
    "A result as a list of numpy arrays"
    if isinstance(result, (tuple, list)):
        return [a for part in result for a in arrays_of(part)]
    if issparse(result):
        return [result.toarray()]
    return [result.detach().cpu().numpy() if isinstance(result, torch.Tensor) else np.asarray(result)]


def difference(a, b):
    "The largest difference of two results; infinite where shapes or whole numbers differ"
    a, b = arrays_of(a), arrays_of(b)
    if [x.shape for x in a] != [x.shape for x in b]:
        return float("inf")
    gaps = [np.abs(x.astype(float) - y.astype(float)).max(initial=0) for x, y in zip(a, b)]
    whole = [x.dtype.kind in "iub" and gap > 0 for x, gap in zip(a, gaps)]
    return float("inf") if any(whole) else float(max(gaps))


def compare_functions(device="cuda"):
    "A row for each function: the largest difference to the CPU's result, or the error"
    on_cpu, on_device = all_functions("cpu"), all_functions(device)
    for name, call in on_device.items():
        try:
            if name in LEARNT:
                gap = 1 - ari(on_cpu[name](), call())
            else:
                gap = difference(on_cpu[name](), call())
            yield {"case": name, "difference": gap, "equal": gap < LEARNT.get(name, 1e-4)}
        except Exception as e:
            yield {"case": name, "equal": False, "error": f"{type(e).__name__}: {e}"[:300]}


# ---- Trainings

BASE = dict(epochs=2, iters=3, batch_size=16, num_instances=4, k1=10, k2=3, eps=0.6, warmup_epochs=0, precision="fp32")
KINDS = {
    "cluster": {},
    "adam": dict(optimizer="adam"),
    "hard": dict(use_hard=True),
    "hybrid": dict(memory="hybrid"),
    "hybrid, reextract": dict(memory="hybrid", reextract=True),
    "self-paced": dict(self_paced=True),
    "pids": dict(clusterer="pids", id_loss=0.25, triplet=1.0),
    "infomap": dict(clusterer="infomap"),
    "average": dict(clusterer="average", n_clusters=12),
    "eps auto": dict(eps="auto"),
    "icsr, camera weights": dict(refine="icsr", camera_weights=1),
    "glc": dict(refine="glc", glc_steps=5),
    "ghost batch norm": dict(bn_chunks=2),
    "accumulate": dict(accumulate=2),
    "recomputation": dict(grad_checkpoint=True),
    "frozen": dict(frozen=(2, 2)),
    "restart": dict(restart_epoch=2),
    "bf16": dict(precision="bf16"),
    "fp16": dict(precision="fp16"),
}
TOLERANCE = {"bf16": 0.05, "fp16": 0.05}  # of the losses; 0.001 for fp32


def losses_of(table, folder, device, settings):
    "Mean loss of each epoch"
    torch.manual_seed(0)
    cfg = TrainConfig(**BASE | {"cache_dir": str(folder / "decoded")} | settings)
    run_dir = tempfile.mkdtemp(dir=folder)
    history = train(tiny_backbone().to(device), table, run_dir, cfg, progress=False)
    return history.loss.to_numpy()


def compare_trainings(folder, device="cuda", kinds=tuple(KINDS)):
    "A row for each kind of training: the largest difference of its losses to those of the CPU in fp32, or the error"
    table = make_synthetic_reid(folder / "people", n_train=12, n_test=1, per_id=8, n_distractors=0, progress=False)
    for kind in kinds:
        settings = KINDS[kind]
        try:
            there = losses_of(table, folder, device, settings)
            here = losses_of(table, folder, "cpu", settings | {"precision": "fp32"})
            gap = float(np.abs(there - here).max())
            yield {"case": kind, "loss": float(there[-1]), "difference": gap, "equal": gap < TOLERANCE.get(kind, 1e-3)}
        except Exception as e:
            yield {"case": kind, "equal": False, "error": f"{type(e).__name__}: {e}"[:300]}
