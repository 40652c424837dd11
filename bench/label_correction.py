"""Label correction at the size of Market-1501: quality against the number of steps, and the published training beside it

python bench/label_correction.py                the curve: 50 to 800 steps (a few minutes on two cores)
python bench/label_correction.py --published    as many edges as the published training looks at, and its own steps restated
python bench/label_correction.py --device cuda  the same on a GPU

Features: 12,936 x 768 of 751 people in 6 cameras, some far harder to tell apart. Labels: the truth with 15 % noise, and
what DBSCAN makes of the features. Results go to bench/results/label_correction.json.
"""

import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F
from measure import store
from torch import nn

from pclclip_nb.clustering import jaccard_dbscan, relabel
from pclclip_nb.labels.graph_correction import (
    focal_loss,
    link_scores,
    neighbour_graph,
    parse_links,
    subgraphs,
    train_edges,
)
from pclclip_nb.labels.reports import label_scores

N, D, IDS, CAMS = 12_936, 768, 751, 6
PUBLISHED_STEPS = 32_240


def people(seed=0, cam=0.5, seen=0.7, blur=0.8):
    "Unit rows sorted by identity: people in families of three that look alike, cameras, heavy-tailed noise"
    rng, latent = np.random.default_rng(seed), 96
    pids, camids = np.sort(rng.integers(0, IDS, N)), rng.integers(0, CAMS, N)
    ids = (rng.normal(size=(IDS, latent)) + rng.normal(size=(IDS // 3 + 1, latent))[np.arange(IDS) // 3]) / 2**0.5
    shift = cam * rng.normal(size=(CAMS, latent))[camids]
    shift = shift + seen * rng.normal(size=(IDS * CAMS, latent))[pids * CAMS + camids]
    noise = (0.3 + blur * np.minimum(abs(rng.standard_t(4, size=(N, 1))), 3)) * rng.normal(size=(N, latent))
    x = (ids[pids] + shift + noise) @ rng.normal(size=(latent, D)) / D**0.5 + rng.normal(size=(N, D)) * 0.8 / D**0.5
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), pids


def spoil(pids, share, seed=0):
    "A third of the noise each: clusters split, pairs of clusters merged, images moved at random"
    rng, labels, C, each = np.random.default_rng(seed), pids.copy(), pids.max() + 1, share / 3
    some = rng.permutation(C)[: 3 * round(each * C)]
    third = len(some) // 3
    for c in some[:third]:
        mine = rng.permutation(np.flatnonzero(labels == c))
        labels[mine[: len(mine) // 2]] = labels.max() + 1
    for a, b in some[third:][: third // 2 * 2].reshape(-1, 2):
        labels[labels == b] = a
    moved = rng.permutation(N)[: round(each * N)]
    labels[moved] = rng.integers(0, labels.max() + 1, len(moved))
    return relabel(labels)


def cases():
    "(name, features, identities, labels)"
    x, pids = people(blur=0.5, seen=0.5)
    yield "truth, 15 % spoilt", x, pids, spoil(pids, 0.15)
    yield "DBSCAN, good features", x, pids, jaccard_dbscan(x, 0.6)
    x, pids = people()
    yield "DBSCAN, poor features", x, pids, jaccard_dbscan(x, 0.6)


def scored(labels, pids):
    r = label_scores(labels, pids)
    return {k: round(r[k], 4) for k in ("precision", "recall", "F", "n_clusters", "n_outliers")}


def correct(x, labels, device, **how):
    "Labels, and the seconds of training and of the rest"
    t0 = time.perf_counter()
    net = train_edges(x, labels, device=device, **how)
    t1 = time.perf_counter()
    features = torch.from_numpy(x).to(device)
    links, averaging = neighbour_graph(features)
    made = parse_links(links, link_scores(net, x, links, averaging))
    return made, t1 - t0, time.perf_counter() - t1


class Published(nn.Module):
    "The network as published: the graph convolution of all images at every step, pairs concatenated"

    def __init__(self, d, hidden=512):
        super().__init__()
        self.conv = nn.Linear(2 * d, hidden)
        nn.init.xavier_uniform_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)
        self.head = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.PReLU(hidden), nn.Linear(hidden, 2))

    def forward(self, x, A, u, v):
        h = F.relu(self.conv(torch.cat([x, torch.sparse.mm(A, x)], 1)))
        return self.head(torch.cat([h[u], h[v]], 1)).diff(dim=1).squeeze(1)


def published_steps(x, labels, device, steps=40):
    "Seconds per step of the published training restated: SGD .1, a fortieth of a part's edges in each step"
    torch.manual_seed(0)
    net = Published(x.shape[1]).to(device)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=1e-5)
    rows, part = next(subgraphs(x, labels))
    coo, y = part.tocoo(), torch.from_numpy(labels[rows])
    u, v = (torch.from_numpy(a.astype(np.int64)) for a in coo.coords)
    A = torch.sparse_coo_tensor(
        torch.stack([u, v]), torch.from_numpy(coo.data).float(), part.shape, device=device, check_invariants=False
    )
    z, same = torch.from_numpy(x[rows]).to(device), y[u] == y[v]
    order, size = torch.randperm(len(u)), len(u) // 40
    for i in range(steps + 3):
        if i == 3:
            t0 = time.perf_counter()
        e = order[(i % 40) * size :][:size]
        loss = focal_loss(net(z, A, u[e].to(device), v[e].to(device)), same[e].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loss.item()
    return (time.perf_counter() - t0) / steps, size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", action="store_true", help="the number of edges of the published training")
    parser.add_argument("--edges", type=int, default=240_000, help="edges per step for --published")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.published:
        _, x, pids, labels = next(iter(cases()))
        seconds, size = published_steps(x, labels, args.device)
        print(
            f"published step ({size} edges): {1e3 * seconds:.0f} ms, all {PUBLISHED_STEPS}: {PUBLISHED_STEPS * seconds / 60:.0f} minutes"
        )
        steps = PUBLISHED_STEPS * size // args.edges
        made, t, rest = correct(x, labels, args.device, steps=steps, edges=args.edges, per_part=8)
        row = dict(case="published number of edges", device=args.device, steps=steps, edges=args.edges)
        row |= dict(
            seconds=round(t, 1), rest=round(rest, 1), published_seconds=round(PUBLISHED_STEPS * seconds)
        ) | scored(made, pids)
        print(row)
        store("label_correction", ("case", "device", "steps"), [row])
        return
    for name, x, pids, labels in cases():
        rows = [dict(case=name, device=args.device, steps=0, seconds=0.0) | scored(labels, pids)]
        for steps in (50, 100, 200, 400, 800):
            made, t, rest = correct(x, labels, args.device, steps=steps)
            rows.append(
                dict(case=name, device=args.device, steps=steps, seconds=round(t, 1), rest=round(rest, 1))
                | scored(made, pids)
            )
            print(rows[-1], flush=True)
        store("label_correction", ("case", "device", "steps"), rows)


if __name__ == "__main__":
    main()
