"""The histogram of pair distances against the matrix product that it contains: seconds and memory

python bench/pair_distances.py              a tenth of MSMT17's queries and gallery
python bench/pair_distances.py --full       11,659 × 82,161 × 768, and the 32,621 training images as one set

Product and histogram take turns in one process; the fastest of each is printed. Memory is the most that
numpy held at once during one histogram, without the features.
"""

import argparse
import time
import tracemalloc

import numpy as np

from pclclip_nb.results.distances import label_distances, pair_distances, threshold_equal_error

D, BLOCK = 768, 256


def people(n, ids, cams, seed):
    "Unit features of n images, their persons and cameras"
    rng = np.random.default_rng(seed)
    who = rng.integers(0, ids, n)
    cam = rng.integers(0, cams, n)
    x = rng.standard_normal((n, D), dtype=np.float32)
    x += np.random.default_rng(0).standard_normal((ids, D), dtype=np.float32)[who]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x, who, cam


def product(qf, gf, one_set=False):
    "The dot products alone, in the same blocks"
    for start in range(0, len(qf), BLOCK):
        qf[start : start + BLOCK] @ gf[start if one_set else 0 :].T


def seconds(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def measure(name, histogram, alone, runs):
    tracemalloc.start()
    result = histogram()
    added = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    times = [(seconds(alone), seconds(histogram)) for _ in range(runs)]
    gemm, ours = (min(t) for t in zip(*times, strict=True))
    print(
        f"{name}: product {gemm:.2f} s, histogram {ours:.2f} s, {ours / gemm:.2f} times; {added:.0f} MB without the features"
    )
    print(f"  {result}, equal error {threshold_equal_error(result).false_match:.3f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the size of MSMT17")
    parser.add_argument("--runs", type=int, default=3, help="turns (default: 3)")
    args = parser.parse_args()
    share = 1 if args.full else 10
    (qf, qp, qc), (gf, gp, gc) = (people(n // share, 3060 // share, 15, s) for s, n in ((1, 11659), (2, 82161)))
    small = slice(0, 300)
    pair_distances(qf[small], gf[small], qp[small], gp[small], qc[small], gc[small])  # compiles
    measure("query × gallery", lambda: pair_distances(qf, gf, qp, gp, qc, gc), lambda: product(qf, gf), args.runs)
    n = 32621 // share
    set_ = gf[:n], gp[:n], gc[:n]
    measure("one set", lambda: label_distances(*set_), lambda: product(set_[0], set_[0], True), args.runs)


if __name__ == "__main__":
    main()
