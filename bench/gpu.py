"""The first run on a GPU: correctness, then speed, in at most 8 minutes, one JSON line a measurement.

python bench/gpu.py                          all blocks on the card; on the simulated device where torch finds no card
python bench/gpu.py --blocks steps labels    only these, see BLOCKS
python bench/gpu.py --quick                  smaller sizes
python bench/gpu.py --simulate               on the simulated device although there is a card
python bench/gpu.py --merge FILE.jsonl       put the lines of a run on another machine into bench/results/gpu.json

`bash bench/gpu.sh` gathers the packages that a machine without a registry lacks. The blocks run one after the other in a
child process. A block that raises or takes too long prints its error and the next one goes on; a process that hangs or
crashes is replaced. Every line goes to stdout and at once to $OUT/gpu.jsonl (default: runs/gpu), and into
bench/results/gpu.json, by card and commit, other cards' lines kept. On the simulated device, which measures nothing,
bench/results is left as it is.
"""

import argparse
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OUT = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu")
LIMITS = {  # seconds of each block, in the order in which they run
    "machine": 30,
    "functions": 100,
    "trainings": 100,
    "knn": 60,
    "labels": 90,
    "matrix": 20,
    "steps": 60,
    "loader": 50,
    "profile": 40,
    "features": 60,
    "epoch": 110,
    "published": 50,
    "small_cards": 60,
    "channels_last": 40,
    "compiled": 120,
}
TOTAL = 480  # seconds of a run
START = 120  # seconds that a process may take for its imports
GRACE = 10  # seconds from the alarm in a block to the end of its process
VIT = "ViT-B-16-quickgelu bf16"
KEY = ("card", "commit", "block", "case")


def commit():
    "The state of the code; where there is no git, as bench/gpu.sh noted it"
    noted = ROOT / "wheels" / "commit"
    known = noted.read_text().strip() if noted.exists() else "unknown"
    if not shutil.which("git"):
        return known
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or known


# ---- The child: runs blocks


def say(**message):
    print(json.dumps(message), flush=True)


def late(*_):
    raise TimeoutError("the time of this block is over")


def run_block(name, make_rows, seconds):
    "Send the rows of a block, then its end; false if the process is of no use afterwards"
    began, usable = time.time(), True
    signal.signal(signal.SIGALRM, late)
    signal.alarm(max(1, int(seconds)))
    try:
        for row in make_rows():
            say(row={"block": name} | row)
    except BaseException as e:
        last = traceback.extract_tb(e.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        say(row={"block": name, "case": "error", "error": f"{type(e).__name__}: {e}"[:500], "where": where})
        usable = "CUDA error" not in str(e)
    signal.alarm(0)
    say(end=name, s=round(time.time() - began, 1))
    return usable


def child(args):
    "Run blocks until one leaves the device unusable"
    sys.path[:0] = [str(ROOT), str(ROOT / ".ci")]
    if args.simulate:
        import simulated_cuda

        simulated_cuda.install()
    from gpu_blocks import BLOCKS, Sizes

    sizes = Sizes.simulated() if args.simulate else Sizes.quick() if args.quick else Sizes()
    OUT.mkdir(parents=True, exist_ok=True)
    for name in args.blocks:
        seconds = min(LIMITS[name], args.until - time.time())
        say(begin=name, seconds=seconds)
        if not run_block(name, lambda: BLOCKS[name](sizes, OUT), seconds):
            break


# ---- The parent: watches, writes


def lines_of(process):
    "A queue of the messages of a process, None at its end; other lines it prints go to stderr"
    messages = queue.Queue()

    def read():
        for line in process.stdout:
            messages.put(json.loads(line)) if line.startswith("{") else print(line, end="", file=sys.stderr)
        messages.put(None)

    threading.Thread(target=read, daemon=True).start()
    return messages


def run_child(args, names, until, emit):
    "Run blocks in a process; the names of those that are left when it ends"
    command = [sys.executable, __file__, *sys.argv[1:], "--child", "--until", str(until), "--blocks", *names]
    command += ["--simulate"] * args.simulate
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    messages, now, left, deadline = lines_of(process), "start", list(names), time.time() + START
    while True:
        try:
            message = messages.get(timeout=max(1, deadline - time.time()))
        except queue.Empty:
            process.kill()
            process.wait()
            emit({"block": now, "case": "error", "error": "no answer: the process was killed"})
            return left if now != "start" else []
        if message is None:
            if now and process.wait():
                emit({"block": now, "case": "error", "error": f"the process ended with status {process.returncode}"})
            return left if now != "start" else []
        if "row" in message:
            emit(message["row"])
        if "begin" in message:
            now = left.pop(0)
            deadline = time.time() + message["seconds"] + GRACE
        if "end" in message:
            emit({"block": message["end"], "case": "seconds", "s": message["s"]})
            now, deadline = "", time.time() + GRACE


def store_rows(rows):
    "Put rows into bench/results/gpu.json, the last of each key"
    sys.path.insert(0, str(HERE))
    from measure import store

    store("gpu", KEY, list({tuple(r[k] for k in KEY): r for r in rows}.values()))


def aims(rows):
    "Whether the aims for an H100 are met, for those that were measured"
    found = {(r["block"], r.get("case")): r for r in rows}

    def value(block, case, name):
        return found.get((block, case), {}).get(name)

    wanted = {
        "ms of a step in bf16": (value("steps", VIT, "ms"), 60),
        "share of the matrix rate of a compiled step in bf16": (value("compiled", VIT, "share"), -0.45),  # at least
        "share of a step that waits for the loader": (value("loader", "waits", "share"), 0.02),
        "s for labels of 32,621 images": (value("labels", "32621", "s"), 0.5),
        "s for labels of 100,000 images": (value("labels", "100000", "s"), 1.5),
        "s of an epoch": (value("epoch", "second", "s"), 20),
    }
    checks = [r["equal"] for r in rows if "equal" in r]
    for name, (got, aim) in wanted.items():
        if got is not None:
            yield {
                "block": "aims",
                "case": name,
                "value": got,
                "aim": abs(aim),
                "met": got <= aim if aim > 0 else got >= -aim,
            }
    yield {"block": "aims", "case": "checks that agree", "value": sum(checks), "aim": len(checks), "met": all(checks)}


def parent(args):
    "Run all blocks, in a new process after each that was lost"
    import torch

    args.simulate = args.simulate or not torch.cuda.is_available()
    card = "simulated CUDA device" if args.simulate else torch.cuda.get_device_name()
    mark, rows, until = {"card": card, "commit": commit()}, [], time.time() + args.limit
    OUT.mkdir(parents=True, exist_ok=True)
    file = OUT / "gpu.jsonl"

    def emit(row):
        row = mark | {"time": round(time.time())} | row
        rows.append(row)
        print(json.dumps(row), flush=True)
        with open(file, "a") as f:
            f.write(json.dumps(row) + "\n")
        if not args.simulate:
            store_rows([row])

    left = args.blocks
    while left and time.time() < until:
        left = run_child(args, left, until, emit)
    for name in left:
        emit({"block": name, "case": "error", "error": f"not run: the {args.limit} s of the run are over"})
    for row in list(aims(rows))[-1 if args.simulate else 0 :]:
        emit(row)
    print(
        f"{len(rows)} lines in {file}; bench/results " + ("left as it is" if args.simulate else "updated"),
        file=sys.stderr,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--quick", action="store_true", help="smaller sizes")
    parser.add_argument("--simulate", action="store_true", help="use the simulated device")
    parser.add_argument("--limit", type=int, default=TOTAL, help="seconds of the whole run")
    parser.add_argument(
        "--merge", type=Path, metavar="FILE", help="only put a file of lines into bench/results/gpu.json"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.merge:
        return store_rows([json.loads(line) for line in args.merge.read_text().splitlines()])
    child(args) if args.child else parent(args)


if __name__ == "__main__":
    main()
