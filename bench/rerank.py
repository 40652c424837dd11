"""k-reciprocal re-ranking and its scores: the published dense code, restated, against ours, in one process.

python bench/rerank.py           842 + 4,933 and 1,684 + 9,866 images, d = 768 (about three minutes, 3 GB)
python bench/rerank.py --small   421 + 2,466 only
python bench/rerank.py --full    3,368 + 19,732, the size of Market-1501 (some minutes, 12 GB)
python bench/rerank.py --msmt    ours alone at 11,659 + 82,161, the size of MSMT17

Both make the scores from the features: re-ranked distances, then mAP and CMC. The two take turns. Results go to
bench/results/rerank.json, which page core/07_reranking draws.
"""

import argparse

import numpy as np
from evaluate import report, take_turns, test_set
from measure import store

from pclclip_nb.eval_viz import evaluate, evaluate_distances

K1, K2, LAMBDA = 20, 6, 0.3


def mutual(rank, i, k):
    "The k neighbours of i that have i among theirs"
    ahead = rank[i, : k + 1]
    return ahead[(rank[ahead, : k + 1] == i).any(1)]


def dense_re_rank(qf, gf, power=2):
    "All pairs of query and gallery images as matrices, a loop over the images for each step"
    import torch

    x = torch.from_numpy(np.concatenate([qf, gf]))
    n = len(x)
    Q = len(qf)
    distance = torch.addmm(x.square().sum(1) + x.square().sum(1)[:, None], x, x.T, alpha=-2).clamp_(min=0).numpy()
    if power == 4:
        distance **= 2
    distance = np.transpose(distance / distance.max(0))
    rank = np.argpartition(distance, range(1, K1 + 1))
    v = np.zeros_like(distance)

    for i in range(n):
        own = members = mutual(rank, i, K1)
        for q in own:
            near = mutual(rank, q, round(K1 / 2))
            if len(np.intersect1d(near, own)) > 2 / 3 * len(near):
                members = np.append(members, near)
        members = np.unique(members)
        weight = np.exp(-distance[i, members])
        v[i, members] = weight / weight.sum()
    distance = distance[:Q]
    mean = np.zeros_like(v)
    for i in range(n):
        mean[i] = v[rank[i, :K2]].mean(0)
    v = mean
    del rank, mean
    holders = [np.flatnonzero(v[:, c]) for c in range(n)]
    jaccard = np.zeros_like(distance)
    for i in range(Q):
        shared = np.zeros(n, np.float32)
        for c in np.flatnonzero(v[i]):
            shared[holders[c]] += np.minimum(v[i, c], v[holders[c], c])
        jaccard[i] = 1 - shared / (2 - shared)
    return (jaccard * (1 - LAMBDA) + distance * LAMBDA)[:, Q:]


def dense(qf, gf, *ids):
    "Re-ranked matrix, then its scores; those by our own count, so that the ratio is one of re-ranking"
    return evaluate_distances(dense_re_rank(qf, gf), *ids)


def ours(qf, gf, *ids):
    return evaluate(qf, gf, *ids, rerank=dict(k1=K1, k2=K2, lambda_value=LAMBDA))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, what in (("small", "421 + 2,466"), ("full", "3,368 + 19,732"), ("msmt", "ours at 11,659 + 82,161")):
        parser.add_argument(f"--{flag}", action="store_true", help=what)
    args = parser.parse_args()
    ours(*test_set(100, 600))  # compile
    sizes = [(421, 2466)] if args.small else [(3368, 19732)] if args.full else [(842, 4933), (1684, 9866)]
    for Q, G in [(11659, 82161)] if args.msmt else sizes:
        data = test_set(Q, G)
        codes = {"ours": (ours, data)} if args.msmt else {"ours": (ours, data), "dense": (dense, data)}
        rows = take_turns(codes, Q, G, repeats=1 if args.full or args.msmt else 3)
        report(rows)
        store("rerank", ("queries", "gallery", "code"), rows)


if __name__ == "__main__":
    main()
