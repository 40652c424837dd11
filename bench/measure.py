"""Time and peak memory of a call (Linux)."""

import ctypes
import gc
import json
import time
from pathlib import Path

import numpy as np
from sklearn.metrics import adjusted_rand_score

RESULTS = Path(__file__).parent / "results"


def _kb(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1])


def measure(f, *args, **kwargs):
    "Result, seconds, and MB of resident memory above what was held before the call"
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # give freed memory back, so that it counts when it is taken again
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    held, start = _kb("VmRSS"), time.perf_counter()
    out = f(*args, **kwargs)
    seconds = time.perf_counter() - start
    return out, seconds, (_kb("VmHWM") - held) / 1024


def ari(truth, labels):
    "Adjusted Rand index, every outlier a cluster of its own"
    return adjusted_rand_score(*(np.where(y < 0, y.max() + 1 + np.arange(len(y)), y) for y in (truth, labels)))


def store(name, key, rows):
    "Replace the rows of results/NAME.json that have the same `key`, keep the others"
    path = RESULTS / f"{name}.json"
    old = json.loads(path.read_text()) if path.exists() else []
    keys = {tuple(r[k] for k in key) for r in rows}
    rows = [r for r in old if tuple(r[k] for k in key) not in keys] + rows
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(sorted(rows, key=lambda r: tuple(str(r[k]).zfill(12) for k in key)), indent=1) + "\n")
