"""The demo data under every kind of method: mAP, rank 1 and clusters, mean and sd over seeds

python bench/methods.py                     all rows, seeds 1 2 3 (about an hour on two cores)
python bench/methods.py --only SpCL         rows whose name holds these words
python bench/methods.py --table             what was measured so far

A row that is in bench/results/methods.json already is not run again.
"""

import argparse
import json
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from pclclip_nb.backbones.batch_norm import reset_necks
from pclclip_nb.backbones.create import create_backbone
from pclclip_nb.cli.demo import DEMO
from pclclip_nb.core.devices import autocast_dtype
from pclclip_nb.results.testing import score_backbone
from pclclip_nb.synthetic.drawing import ATTRIBUTES
from pclclip_nb.synthetic.people import make_synthetic_reid
from pclclip_nb.synthetic.tiny_clip import draw_pairs, tiny_backbone, to_input
from pclclip_nb.train import train

HERE = Path(__file__).parent
RESULTS, RUNS = HERE / "results" / "methods.json", HERE.parent / "runs" / "methods"
BASE = replace(DEMO, batch_size=64, epochs=5, iters=30, milestones=(4,))  # a sixth of the demo's images
SMALL = ("resnet18", (64, 32))  # the small ResNet and its input
RESNET = replace(BASE, eps=0.5, lr=3.5e-4)
HYBRID = dict(memory="hybrid", momentum=0.2)
SPCL = HYBRID | {"self_paced": True}
JOINT = HYBRID | {"domain_bn": True}
SUPERVISED = replace(RESNET, clusterer="pids", id_loss=0.25, epochs=4, milestones=())

ROWS = {  # name -> (network, settings, what the source is for)
    "PCL-CLIP": ("clip", BASE, ""),
    "PCL-CLIP, Infomap": ("clip", replace(BASE, clusterer="infomap"), ""),
    "PCL-CLIP, ghost batch norm": ("clip", replace(BASE, bn_chunks=4), ""),
    "PCL-CLIP, self-paced": ("clip", replace(BASE, self_paced=True), ""),
    "PCL-CLIP, hybrid memory": ("clip", replace(BASE, **HYBRID), ""),
    "PCL-CLIP, hybrid memory, reextract": ("clip", replace(BASE, reextract=True, **HYBRID), ""),
    "Cluster Contrast": ("resnet", RESNET, ""),
    "Cluster Contrast, Infomap": ("resnet", replace(RESNET, clusterer="infomap"), ""),
    "SpCL": ("resnet", replace(RESNET, **SPCL), ""),
    "SpCL, reextract": ("resnet", replace(RESNET, reextract=True, **SPCL), ""),
    "source only": ("resnet", None, "first"),
    "source, then Cluster Contrast": ("resnet", RESNET, "first"),
    "source beside, SpCL's memory": ("resnet", replace(RESNET, **JOINT), "beside"),
    "source beside, reextract": ("resnet", replace(RESNET, reextract=True, **JOINT), "beside"),
}


def data(seed, people=100):
    return make_synthetic_reid(RUNS / f"data{seed}", n_train=people, seed=seed, progress=False)


def source_data(seed):
    "Three times as many other people, in other cameras"
    return data(100 + seed, 300)


@cache
def pretrained_resnet(steps=300, batch=128):
    "Weights of the small ResNet after learning to tell the attributes of drawn people, in place of ImageNet"
    file = RUNS / "resnet.pt"
    if file.is_file():
        return torch.load(file, weights_only=True)
    torch.manual_seed(0)
    rng, net = np.random.default_rng(0), create_backbone(*SMALL[:1], None, SMALL[1])
    images, people = draw_pairs(1000, 8, seed=0)
    names = [a for a in ATTRIBUTES if not a.endswith(("second", "hat_colour", "bag_colour"))]
    truth = {a: torch.tensor([ATTRIBUTES[a].index(getattr(p, a)) for p in people]) for a in names}
    heads = nn.ModuleDict({a: nn.Linear(net.d, len(ATTRIBUTES[a])) for a in names})
    optimizer = torch.optim.Adam([*net.parameters(), *heads.parameters()], 1e-3)
    for step in range(steps):
        ids = rng.integers(len(people), size=batch)
        x = F.interpolate(to_input(images[ids, rng.integers(8, size=batch)]), SMALL[1], mode="area")
        x = x.flip(3) if rng.random() < 0.5 else x
        with torch.autocast("cpu", autocast_dtype(), enabled=autocast_dtype() is not None):
            neck = net.embed(x)[1]
        loss = sum(F.cross_entropy(h(neck.float()), truth[a][ids]) for a, h in heads.items()) / len(heads)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"pre-training step {step}: loss {loss.item():.3f}", flush=True)
    torch.save(net.state_dict(), file)
    return net.state_dict()


def backbone(kind):
    if kind == "clip":
        return tiny_backbone()
    net = create_backbone(*SMALL[:1], None, SMALL[1])
    net.load_state_dict(pretrained_resnet())
    return reset_necks(net)


def scores(net, table):
    ranking = score_backbone(net, table, workers=0, precision="auto")
    return {"mAP": 100 * ranking.mAP, "R1": 100 * float(ranking.cmc[0])}


@cache
def before(kind, seed):
    return scores(backbone(kind), data(seed))


def run(name, seed):
    "One row, one seed"
    kind, cfg, use = ROWS[name]
    table, net, t0 = data(seed), backbone(kind), time.perf_counter()
    start = before(kind, seed)
    folder = RUNS / name.replace(", ", "-").replace(" ", "_") / str(seed)
    if use == "first":
        first = RUNS / "source" / str(seed)
        train(net, source_data(seed), first, replace(SUPERVISED, seed=seed), resume=True, progress=False)
        reset_necks(net)
    history = pd.DataFrame({"clusters": [np.nan], "ari": [np.nan]})
    if cfg is not None:
        source = source_data(seed) if use == "beside" else None
        history = train(net, table, folder, replace(cfg, seed=seed), resume=True, source=source, progress=False)
    end, last = scores(net, table), history.iloc[-1]
    row = {"mAP before": start["mAP"], **end, "clusters": last.clusters, "ARI": last.ari}
    return {k: round(float(v), 3) for k, v in row.items()} | {"minutes": round((time.perf_counter() - t0) / 60, 1)}


def table_of(results):
    "Mean and sd over the seeds, a row per method"
    frames = {n: pd.DataFrame(by_seed.values()) for n, by_seed in results.items()}
    columns = ("mAP before", "mAP", "R1", "clusters", "ARI")
    return pd.DataFrame(
        {
            n: {c: f"{f[c].mean():.2f} ± {f[c].std():.2f}" for c in columns} | {"seeds": len(f)}
            for n, f in frames.items()
        }
    ).T


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="words in the names of the rows to run")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--table", action="store_true", help="only print what was measured")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    RUNS.mkdir(parents=True, exist_ok=True)
    for seed in [] if args.table else args.seeds:
        for name in ROWS:
            if args.only in name and str(seed) not in results.get(name, {}):
                results.setdefault(name, {})[str(seed)] = run(name, seed)
                RESULTS.write_text(json.dumps(results, indent=1))
                print(name, seed, results[name][str(seed)], flush=True)
    print(table_of(results).to_string())


if __name__ == "__main__":
    main()
