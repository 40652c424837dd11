"""Pseudo labels: the dense pipeline of the published code, restated, against ours, in one process.

python bench/clustering.py              N = 2,000 to 12,936, d = 1280 (about two minutes)
python bench/clustering.py --full       also 32,621, the size of MSMT17 (needs 12 GB and some minutes)
python bench/clustering.py --ours N ..  only ours, at these sizes
python bench/clustering.py --first      the first call in a fresh process, compiler included

Results go to bench/results/clustering.json, which page 02_clustering draws.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

import numpy as np
from features import reid_features
from measure import ari, measure, store

K1, K2, EPS, MIN_SAMPLES = 30, 6, 0.5, 4


def dense_reference(x):
    "faiss, then N x N arrays and a Python loop per image, as every toolbox of the field has it; labels, seconds by stage"
    import faiss
    import torch
    from sklearn.cluster import DBSCAN

    n, stages, clock = len(x), {}, time.perf_counter()

    def lap(name):
        nonlocal clock
        stages[name] = time.perf_counter() - clock
        clock = time.perf_counter()

    index = faiss.IndexFlatL2(x.shape[1])
    index.add(x)
    rank = index.search(x, K1)[1]
    lap("knn")

    def mutual(i, width):
        ahead = rank[i, :width]
        return ahead[(rank[ahead, :width] == i).any(1)]

    full, half = ([mutual(i, w) for i in range(n)] for w in (K1 + 1, round(K1 / 2) + 1))
    lap("reciprocal")
    rows, v = torch.from_numpy(x), np.zeros((n, n), np.float32)
    for i in range(n):
        members = full[i]
        for q in full[i]:
            if len(np.intersect1d(half[q], full[i])) > 2 / 3 * len(half[q]):
                members = np.append(members, half[q])
        members = np.unique(members)
        distance = 2 - 2 * torch.mm(rows[i][None], rows[members].T)
        v[i, members] = torch.softmax(-distance, 1)[0].numpy()
    lap("expansion")
    if K2 > 1:
        mean = np.zeros_like(v)
        for i in range(n):
            mean[i] = v[rank[i, :K2]].mean(0)
        v = mean
    lap("query expansion")
    holders = [np.flatnonzero(v[:, c]) for c in range(n)]
    lap("inverted index")
    distance = np.zeros((n, n), np.float32)
    for i in range(n):
        shared = np.zeros(n, np.float32)
        for c in np.flatnonzero(v[i]):
            shared[holders[c]] += np.minimum(v[i, c], v[holders[c], c])
        distance[i] = 1 - shared / (2 - shared)
    distance[distance < 0] = 0
    del v
    lap("jaccard")
    labels = DBSCAN(eps=EPS + 1e-6, min_samples=MIN_SAMPLES, metric="precomputed", n_jobs=-1).fit_predict(distance)
    lap("dbscan")
    return labels, stages


def ours(x):
    from pclclip_nb.clustering import dbscan, jaccard_graph
    from pclclip_nb.core.neighbours import knn

    times = [time.perf_counter()]
    ranks = knn(x, K1)
    times.append(time.perf_counter())
    graph = jaccard_graph(x, K1, K2, EPS, ranks)
    times.append(time.perf_counter())
    labels = dbscan(graph, EPS, MIN_SAMPLES)
    times.append(time.perf_counter())
    return labels, dict(zip(("knn", "graph", "dbscan"), np.diff(times).tolist()))


def median_run(f, x, repeats):
    "The run of median time: labels, and a row for the results, with the largest memory of all runs"
    runs = sorted((measure(f, x) for _ in range(repeats)), key=lambda r: r[1])
    (labels, stages), seconds, _ = runs[len(runs) // 2]
    return labels, dict(seconds=seconds, mb=max(run[2] for run in runs), stages=stages)


def show(name, row):
    stages = "  ".join(f"{k} {s:.3f}" for k, s in row["stages"].items())
    print(f"  {name:6s} {row['seconds']:8.2f} s {row['mb']:8.0f} MB   {stages}", flush=True)


def compare(n, with_reference):
    x, pids, _ = reid_features(n, n_ids=1041 if n > 20000 else max(4, n * 752 // 12936))
    labels, fast = median_run(ours, x, 5 if n < 50000 else 1)
    rows = [dict(n=n, code="ours", ari=ari(pids, labels), **fast)]
    print(f"N = {n}: {labels.max() + 1} clusters, {(labels < 0).sum()} outliers")
    show("ours", fast)
    if with_reference:
        theirs, slow = median_run(dense_reference, x, 3 if n < 10000 else 1)
        rows.append(dict(n=n, code="dense", **slow))
        show("dense", slow)
        print(
            f"  {slow['seconds'] / fast['seconds']:.1f} times faster, {slow['mb'] / max(fast['mb'], 1):.0f} times smaller, "
            f"ARI of the two {ari(theirs, labels):.6f}, equal {np.array_equal(theirs, labels)}"
        )
    store("clustering", ("n", "code"), rows)


FIRST = """
import sys, time; sys.path.insert(0, sys.argv[1]); import torch
from features import reid_features
from pclclip_nb.clustering import jaccard_dbscan
x = reid_features(4000)[0]
for _ in range(2):
    start = time.perf_counter(); jaccard_dbscan(x, 0.5); print(time.perf_counter() - start)
"""


def first_call():
    "Seconds of the first and the second call, without and with machine code on disk"
    with tempfile.TemporaryDirectory() as cache:
        for name in ("compiled", "from disk"):
            command = [sys.executable, "-c", FIRST, os.path.dirname(__file__)]
            out = subprocess.run(
                command, env=os.environ | {"NUMBA_CACHE_DIR": cache}, capture_output=True, text=True, check=True
            )
            first, second = map(float, out.stdout.split())
            print(f"{name}: first call {first:.2f} s, second {second:.2f} s, difference {first - second:.2f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="also 32,621 images")
    parser.add_argument("--first", action="store_true", help="time the first call in a fresh process")
    parser.add_argument("--ours", type=int, nargs="+", help="only ours, at these sizes")
    args = parser.parse_args()
    if args.first:
        return first_call()
    ours(reid_features(2000)[0])  # compile
    for n in args.ours or [2000, 4000, 8000, 12936] + [32621] * args.full:
        compare(n, not args.ours)


if __name__ == "__main__":
    main()
