"""Label refiners on a hard drawn data set: plain, + ICSR, + GLC, + both, on PCL-CLIP and on Cluster Contrast

python bench/refiners.py                  all rows, seeds 1 2 3 (about an hour on two cores)
python bench/refiners.py --only plain     rows whose name ends so
python bench/refiners.py --table          what was measured so far

The cameras differ more than in the demo, so that plain training leaves room. Rows as in bench/methods.py, with its
networks and its number of steps; ICSR clusters each camera with the same features, GLC corrects every epoch but the
first. A row that is in bench/results/refiners.json already is not run again.
"""

import argparse
import json
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
from methods import BASE, HERE, RESNET, RUNS, backbone, scores

from pclclip_nb.synthetic.people import make_synthetic_reid
from pclclip_nb.train import train

RESULTS = HERE / "results" / "refiners.json"
METHODS = {"PCL-CLIP": ("clip", BASE), "Cluster Contrast": ("resnet", RESNET)}
REFINERS = {"plain": "", "+ ICSR": "icsr", "+ GLC": "glc", "+ ICSR + GLC": "icsr,glc"}
SHIFT = 1.15  # at 1.3 and more, clusters of the small CLIP follow cameras from the start


def data(seed):
    return make_synthetic_reid(RUNS / f"hard{seed}", n_train=100, camera_shift=SHIFT, seed=seed, progress=False)


@cache
def before(kind, seed):
    return scores(backbone(kind), data(seed))["mAP"]


def run(method, refine, seed):
    "One row, one seed"
    kind, cfg = METHODS[method]
    cfg = replace(cfg, refine=refine, glc_start=2, seed=seed)
    folder = RUNS / "refiners" / f"{method}-{refine or 'plain'}".replace(" ", "_").replace(",", "_") / str(seed)
    net = backbone(kind)
    history = train(net, data(seed), folder, cfg, resume=True, progress=False)
    spent = history.filter(regex="^t_(features|cluster|train)$").to_numpy().sum()
    cost = sum(history[f"t_{name}"].sum() for name in ("icsr", "glc") if f"t_{name}" in history)
    last = history.iloc[-1]
    row = {"mAP before": before(kind, seed), **scores(net, data(seed))}
    row |= {n: last[n] for n in ("clusters", "outliers", "precision", "recall", "f")}
    return {k: round(float(v), 3) for k, v in row.items()} | {"seconds": round(spent, 1), "refining": round(cost, 1)}


def table_of(results):
    "Mean and sd over the seeds, a row per method and refiner"
    frames = {tuple(n.split(" | ")): pd.DataFrame(by_seed.values()) for n, by_seed in results.items()}
    rows = {
        n: {c: f"{f[c].mean():.2f} ± {f[c].std():.2f}" for c in ("mAP before", "mAP", "R1", "precision", "recall", "f")}
        | {"refining s": f"{f.refining.mean():.0f}", "all s": f"{f.seconds.mean():.0f}", "seeds": len(f)}
        for n, f in frames.items()
    }
    return pd.DataFrame(rows).T.rename(columns={"f": "F"})


def gains(results):
    "mAP over plain, seed by seed"
    rows = {}
    for name, by_seed in results.items():
        plain = results[name.split(" | ")[0] + " | plain"]
        rows[name] = [by_seed[s]["mAP"] - plain[s]["mAP"] for s in by_seed if s in plain]
    return {n: f"{np.mean(g):+.2f} ± {np.std(g, ddof=1):.2f}" for n, g in rows.items() if len(g) > 1}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="how the names of the rows to run end")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--table", action="store_true", help="only print what was measured")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    RUNS.mkdir(parents=True, exist_ok=True)
    for seed in [] if args.table else args.seeds:
        for name in (f"{m} | {r}" for m in METHODS for r in REFINERS):
            if name.endswith(args.only) and str(seed) not in results.get(name, {}):
                method, refiner = name.split(" | ")
                results.setdefault(name, {})[str(seed)] = run(method, REFINERS[refiner], seed)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                print(name, seed, results[name][str(seed)], flush=True)
    print(table_of(results).to_string())
    print(gains(results))


if __name__ == "__main__":
    main()
