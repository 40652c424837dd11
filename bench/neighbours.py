"""Exact against approximate neighbours: time, recall of the 30 nearest, and what it does to the labels.

python bench/neighbours.py                                                   50,000 x 1280: tiles, flat, hnsw, ivf
python bench/neighbours.py --n 1000000 --d 512 --methods tiles hnsw          a million, features in float16

The first method is the truth for the others. Results go to bench/results/neighbours.json, which page 02_clustering draws.
"""

import argparse
import time

import numpy as np
from features import reid_features
from measure import ari, measure, store

from pclclip_nb.clustering import dbscan, jaccard_graph
from pclclip_nb.core.neighbours import knn

K1, K2, EPS = 30, 6, 0.5


def labels_of(x, ranks):
    return dbscan(jaccard_graph(x, K1, K2, EPS, ranks, progress=True), EPS)


def recall(found, truth):
    "Share of the true neighbours that were found, of 20,000 images"
    rows = np.random.default_rng(0).permutation(len(truth))[:20000]
    return np.mean([np.isin(truth[i], found[i]).mean() for i in rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=50000)
    parser.add_argument("--d", type=int, default=1280)
    parser.add_argument("--methods", nargs="+", default=["tiles", "flat", "hnsw", "ivf"])
    args = parser.parse_args()
    x, pids, _ = reid_features(args.n, args.d, dtype=np.float16)
    labels_of(x[:2000], knn(x[:2000], K1))  # compile
    truth = None
    for method in args.methods:
        start = time.process_time()
        ranks, seconds, mb = measure(knn, x, K1, method, progress=True)
        cpu = time.process_time() - start
        labels, rest, rest_mb = measure(labels_of, x, ranks)
        truth = truth or (ranks, labels)
        row = dict(n=args.n, d=args.d, method=method, knn=seconds, knn_cpu=cpu, rest=rest, mb=max(mb, rest_mb))
        row |= dict(recall=float(recall(ranks, truth[0])), ari=ari(truth[1], labels))
        row |= dict(ari_ids=ari(pids, labels), clusters=int(labels.max() + 1), outliers=int((labels < 0).sum()))
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
        store("neighbours", ("n", "d", "method"), [row])


if __name__ == "__main__":
    main()
