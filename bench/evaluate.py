"""mAP and CMC: the published evaluations, restated, against ours, in one process.

python bench/evaluate.py          500 x 5,000 and 1,000 x 10,000, d = 768 (about a minute)
python bench/evaluate.py --small  200 x 2,000 only
python bench/evaluate.py --full   3,368 x 19,732, the size of Market-1501 (some minutes, 2 GB)
python bench/evaluate.py --msmt   ours alone at 11,659 x 82,161, the size of MSMT17; memory without the features

Four codes take turns: `sklearn` sorts the matrix twice and calls scikit-learn once per query (Cluster Contrast), `loop`
sorts every row and sums precision at the right answers (torchreid, PCL-CLIP), both from a given matrix; `ours given D`
starts from the same matrix, `ours` from the features, without a matrix. Results go to bench/results/evaluate.json.
"""

import argparse

import numpy as np
from features import reid_features
from measure import measure, store

from pclclip_nb.eval_viz import evaluate, evaluate_distances


def test_set(Q, G, d=768):
    "Query and gallery features, identities, cameras; about 26 images of an identity"
    x, pids, camids = reid_features(Q + G, d, n_ids=max(4, (Q + G) // 26), n_cams=6)
    order = np.random.default_rng(0).permutation(Q + G)
    q, g = np.sort(order[:Q]), np.sort(order[Q:])
    return x[q], x[g], pids[q], pids[g], camids[q], camids[g]


def distance_matrix(qf, gf):
    "(Q, G) squared Euclidean distances"
    import torch

    q, g = torch.from_numpy(qf), torch.from_numpy(gf)
    return torch.addmm(q.square().sum(1)[:, None] + g.square().sum(1), q, g.T, alpha=-2).numpy()


def by_sklearn(dist, q_pids, g_pids, q_camids, g_camids):
    "Once for mAP with average_precision_score, once for CMC, each with its own sort"
    from sklearn.metrics import average_precision_score

    aps, cmc = [], np.zeros(50)
    for want_ap in (True, False):
        indices = np.argsort(dist, axis=1)
        matches = g_pids[indices] == q_pids[:, None]
        for q in range(len(dist)):
            keep = (g_pids[indices[q]] != q_pids[q]) | (g_camids[indices[q]] != q_camids[q])
            right = matches[q, keep]
            if right.any() and want_ap:
                aps.append(average_precision_score(right, -dist[q, indices[q]][keep]))
            elif right.any() and right.argmax() < len(cmc):
                cmc[right.argmax()] += 1
    return float(np.mean(aps)), float(cmc.cumsum()[0] / len(aps))


def by_loop(dist, q_pids, g_pids, q_camids, g_camids):
    "One sort of the matrix; precision at the right answers, by sums over the row"
    indices = np.argsort(dist, axis=1)
    matches = (g_pids[indices] == q_pids[:, None]).astype(np.int32)
    aps, cmcs = [], []
    for q in range(len(dist)):
        order = indices[q]
        keep = ~((g_pids[order] == q_pids[q]) & (g_camids[order] == q_camids[q]))
        right = matches[q][keep]
        if right.any():
            found = right.cumsum()
            cmcs.append(np.minimum(found[:50], 1))
            aps.append((found / np.arange(1, len(found) + 1) * right).sum() / right.sum())
    return float(np.mean(aps)), float(np.mean(cmcs, axis=0)[0])


def take_turns(codes, Q, G, repeats=3):
    "Rows for the results of (code, data) by name: each in turn, `repeats` rounds; the fastest round, the largest memory"
    best = {}
    for _ in range(repeats):
        for name, (code, data) in codes.items():
            scores, seconds, mb = measure(code, *data)
            mAP, r1 = scores if isinstance(scores, tuple) else (scores.mAP, scores.cmc[0])
            old = best.get(name, dict(seconds=np.inf, mb=0))
            best[name] = dict(seconds=min(seconds, old["seconds"]), mb=max(mb, old["mb"]), mAP=mAP, r1=float(r1))
    return [dict(queries=Q, gallery=G, code=name) | row for name, row in best.items()]


def report(rows):
    print(f"{rows[0]['queries']} queries, {rows[0]['gallery']} gallery images")
    for r in rows:
        against = "".join(
            f"   {o['code']}: {o['seconds'] / r['seconds']:.1f} times the time, {max(o['mb'], 1) / max(r['mb'], 1):.1f} times the memory"
            for o in rows
            if r["code"].startswith("ours") and not o["code"].startswith("ours")
        )
        print(
            f"  {r['code']:14s}{r['seconds']:8.3f} s {r['mb']:8.0f} MB  mAP {r['mAP']:.7f}  R1 {r['r1']:.5f}{against}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, what in (("small", "200 x 2,000"), ("full", "3,368 x 19,732"), ("msmt", "ours at 11,659 x 82,161")):
        parser.add_argument(f"--{flag}", action="store_true", help=what)
    args = parser.parse_args()
    data = test_set(60, 600)
    dist = distance_matrix(*data[:2])
    evaluate(*data)  # compile
    evaluate_distances(dist, *data[2:])
    sizes = [(200, 2000)] if args.small else [(3368, 19732)] if args.full else [(500, 5000), (1000, 10000)]
    for Q, G in [(11659, 82161)] if args.msmt else sizes:
        data = test_set(Q, G)
        codes = {"ours": (evaluate, data)}
        if not args.msmt:
            _, seconds, mb = measure(distance_matrix, *data[:2])
            print(f"distance matrix alone: {seconds:.3f} s, {mb:.0f} MB")
            given = (distance_matrix(*data[:2]), *data[2:])
            codes |= {
                n: (f, given)
                for n, f in (("ours given D", evaluate_distances), ("sklearn", by_sklearn), ("loop", by_loop))
            }
        rows = take_turns(codes, Q, G, repeats=1 if args.full or args.msmt else 3)
        report(rows)
        store("evaluate", ("queries", "gallery", "code"), rows)


if __name__ == "__main__":
    main()
