"""Label-free choice of a state: the table of runs with known truth that `nbs/labels/08_choice.ipynb` reads

python bench/choice.py saved OUT.csv FILE.npz ...       states that were saved: f0, f1, ... features of the training images (N, d), f0 of
                                                        the start, and cam (N,) cameras; beside it FILE.json: {"mAP": [one per state]},
                                                        and if known "data", "network", "settings"
python bench/choice.py drawn OUT.csv SHIFT ...          runs on drawn people, at these camera shifts (a minute each on a core)

A row per state: run, data, network, settings, state (0 = the start), mAP in per cent on identities that were not trained on,
the numbers of `state_numbers`, and of four criteria to compare with: `joined` (silhouette at radius 0.5 times the share of clusters
that join cameras), `density` (soft neighbourhood density, Saito et al., 2021), `rank` (RankMe, Garrido et al., 2023) and `halves`
(share of the ten nearest neighbours that two random halves of the dimensions agree on). Rows of runs that OUT.csv already holds are replaced.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import softmax
from scipy.stats import entropy

from pclclip_nb.batches.augmentation import image_norm
from pclclip_nb.batches.loading import Files, test_loader
from pclclip_nb.clip_backbone import extract_features
from pclclip_nb.clustering import dbscan, jaccard_graph
from pclclip_nb.core.neighbours import knn
from pclclip_nb.labels.choice import state_numbers
from pclclip_nb.labels.health import cluster_report
from pclclip_nb.results.testing import score_backbone
from pclclip_nb.synthetic.people import make_synthetic_reid
from pclclip_nb.synthetic.tiny_clip import tiny_backbone
from pclclip_nb.train import train
from pclclip_nb.training.settings import TrainConfig


def unit(features):
    "Rows scaled to length 1 in float32"
    features = np.asarray(features, np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def other_numbers(x, camids):
    "Known criteria for choosing a state, larger = better"
    n, d = x.shape
    graph = jaccard_graph(x, 10, 6, 0.5)
    report = cluster_report(dbscan(graph, 0.5), camids, graph=graph)
    likeness = x @ x.T / 0.05
    np.fill_diagonal(likeness, -np.inf)
    values = np.linalg.svd(x, compute_uv=False)
    order = np.random.default_rng(0).permutation(d)
    pairs = [
        knn(unit(x[:, half]), 11)[:, 1:] + n * np.arange(n)[:, None] for half in (order[: d // 2], order[d // 2 :])
    ]
    return {
        "joined": report["silhouette"] * (1 - report.get("single_camera_share", 0)),
        "density": float(entropy(softmax(likeness, axis=1), axis=1).mean()),
        "rank": float(np.exp(entropy(values / values.sum()))),
        "halves": len(np.intersect1d(*pairs)) / (10 * n),
    }


def numbers(state, mAP, features, camids):
    "The columns of a state"
    x = unit(features)
    return {"state": state, "mAP": mAP} | state_numbers(x, camids) | other_numbers(x, camids)


def saved_rows(file):
    "Rows of a run whose features were saved"
    run = json.loads(file.with_suffix(".json").read_text())
    named = {"run": file.stem} | {name: run.get(name, "") for name in ("data", "network", "settings")}
    with np.load(file) as states:
        return [named | numbers(s, mAP, states[f"f{s}"], states["cam"]) for s, mAP in enumerate(run["mAP"])]


def drawn_rows(shift, epochs):
    "Rows of a run on drawn people"
    named = {"run": f"people_{shift:g}", "data": f"people {shift:g}", "network": "tiny CLIP", "settings": "defaults"}
    with tempfile.TemporaryDirectory() as folder:
        table = make_synthetic_reid(f"{folder}/people", 60, 40, per_id=16, camera_shift=shift, progress=False)
        images = table[table.split == "train"].reset_index(drop=True)
        backbone = tiny_backbone()
        rows = []

        def measure(result=None):
            if result is not None and result.epoch == 0:  # the start, measured already
                return
            loader = test_loader(Files(images, backbone.size), 128, image_norm(backbone))
            features = extract_features(backbone, loader, "fp32")
            mAP = 100 * score_backbone(backbone, table, 1).mAP
            rows.append(named | numbers(len(rows), mAP, features, images.camid.to_numpy()))

        measure()
        cfg = TrainConfig(batch_size=64, num_instances=8, epochs=epochs, iters=20, eps="auto", precision="fp32")
        train(backbone, table, f"{folder}/run", cfg, on_epoch=measure, progress=False)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", choices=("saved", "drawn"))
    parser.add_argument("out", type=Path)
    parser.add_argument("items", nargs="+", help="files, or camera shifts")
    parser.add_argument("--epochs", type=int, default=4, help="of a drawn run")
    args = parser.parse_args()
    rows = []
    for item in args.items:
        rows += saved_rows(Path(item)) if args.source == "saved" else drawn_rows(float(item), args.epochs)
    new = pd.DataFrame(rows).round(4)
    old = pd.read_csv(args.out) if args.out.exists() else new[:0]
    pd.concat([old[~old.run.isin(new.run)], new]).to_csv(args.out, index=False)


if __name__ == "__main__":
    main()
