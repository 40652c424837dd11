"""The explorer at full size: time of each part, and the weight of the page.

python bench/explorer.py                              2,000 images, 6 epochs
python bench/explorer.py --images 13000 --epochs 60   the size of Market-1501; its features take 2 x images x epochs x d bytes of disk
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from pclclip_nb.core.pictures import image_paths, thumbnail_sheets, tile_size
from pclclip_nb.labels.reports import match_clusters, spread_colours
from pclclip_nb.results.explorer import explorer_data, write_explorer
from pclclip_nb.results.runs import read_run, run_layouts


def make_run(folder, N, E, d, per_id, seed=0):
    "Write a run: features gather around their person, labels are the persons with fewer mistakes each epoch"
    rng = np.random.default_rng(seed)
    pids = np.arange(N) // per_id
    centre = rng.normal(size=(pids[-1] + 1, d)).astype(np.float32)
    noise = rng.normal(size=(N, d)).astype(np.float32)
    (folder / "labels").mkdir(parents=True)
    (folder / "images").mkdir()
    for i in range(200):  # 200 files stand for all
        pixels = rng.integers(0, 255, (16, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 128), Image.Resampling.BICUBIC).save(folder / f"images/{i}.jpg")
    paths = [str(folder / f"images/{i % 200}.jpg") for i in range(N)]
    table = pd.DataFrame({"path": paths, "pid": pids, "camid": rng.integers(0, 6, N), "split": "train"})
    table.to_csv(folder / "images.csv", index=False)
    pd.DataFrame({"epoch": np.arange(1, E + 1)}).to_csv(folder / "history.csv", index=False)
    (folder / "config.json").write_text("{}")
    for e in range(1, E + 1):
        left = 1 - e / E
        f = centre[pids] + (0.6 + 1.2 * left) * noise
        f /= np.linalg.norm(f, axis=1, keepdims=True)
        y = np.where(rng.random(N) < 0.05 + 0.3 * left, rng.integers(0, pids[-1] + 1, N), pids)
        y = np.where(rng.random(N) < 0.05 + 0.3 * left, -1, y)
        y[y >= 0] = rng.permutation(y.max() + 1)[y[y >= 0]]
        np.savez(folder / f"labels/epoch_{e:03d}.npz", labels=y, rows=np.arange(N), features=f.astype(np.float16))


def timed(name, f, *args, **kwargs):
    "The result of a call; prints its seconds of wall and of processor time"
    start = time.perf_counter()
    cpu = time.process_time()
    result = f(*args, **kwargs)
    wall = time.perf_counter() - start
    print(f"{name:32s}{wall:8.2f} s{time.process_time() - cpu:10.2f} s of processor", flush=True)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("images", 2000), ("epochs", 6), ("d", 256), ("per-id", 17)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", default=None, help="keep the page here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp) / "run"
        make_run(folder, args.images, args.epochs, args.d, args.per_id)
        run = timed("open the run", read_run, folder)
        numbers = timed("follow the clusters", match_clusters, run.labels)
        layouts = timed("layouts, the first time", run_layouts, run, progress=True)
        timed("layouts, kept", run_layouts, run)
        timed(f"colours of {max(y.max() for y in numbers) + 1} numbers", spread_colours, numbers, layouts[-1])
        timed("what the picture needs", explorer_data, run, layouts)
        paths = image_paths(run.images, folder)
        timed("thumbnails", thumbnail_sheets, paths, run.rows, tile_size(paths))
        page = timed("the page, all in all", write_explorer, run, args.out or folder / "explorer.html")
        print(f"{'its weight':32s}{page.stat().st_size / 1e6:8.2f} MB")


if __name__ == "__main__":
    main()
