"""Every check of the project; ends with the line 'N passed, N failed'.

python .ci/check.py          all checks
python .ci/check.py readme   write README.md from nbs/index.ipynb
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
MODULES = ("data", "synthetic", "neighbours", "clustering", "cluster_quality", "graph_clustering", "self_paced")  # without torch


def run(*cmd, cwd=ROOT, **env):
    return subprocess.run([str(c) for c in cmd], cwd=cwd, env=os.environ | env, text=True, capture_output=True)


def failed(done):
    "Output of a command that failed, '' of one that did not"
    return (done.stdout + done.stderr).strip() or "failed" if done.returncode else ""


def differences(copy, pattern):
    "Files of a copy that are not as they are here"
    here, there = ({p.relative_to(r): p.read_bytes() for p in r.glob(pattern)} for r in (ROOT, copy))
    return [str(p) for p in sorted(here.keys() | there.keys()) if here.get(p) != there.get(p)]


def clean_and_in_sync(copy):
    "Run nbdev's cleaner and exporter on a copy; nothing may change"
    bad = failed(run(BIN / "nbdev_clean", cwd=copy))
    if changed := differences(copy, "nbs/*.ipynb"): bad += f"not clean (run nbdev_clean): {changed}"
    for f in (copy / "pclclip_nb").glob("*.py"):
        if f.name != "__init__.py": f.unlink()
    bad += failed(run(BIN / "nbdev_export", cwd=copy))
    if changed := differences(copy, "pclclip_nb/*.py"): bad += f"not in sync (run nbdev_export): {changed}"
    return bad


def readme():
    "index.ipynb as Markdown, its links pointing into nbs/"
    cells = json.loads((ROOT / "nbs/index.ipynb").read_text())["cells"]
    text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown") + "\n"
    return re.sub(r"\]\((?!https?:|#)([^)]+)\)", r"](nbs/\1)", text)


def readme_in_sync():
    return "" if (ROOT / "README.md").read_text() == readme() else "README.md differs from nbs/index.ipynb: run make readme"


FORKED = """
import contextlib, importlib, io, os, sys, traceback
import matplotlib.pyplot, open_clip, pandas, sklearn.cluster, timm, torch, torchvision, tqdm.auto, umap
for name in sys.argv[1:]:
    if os.fork(): os.wait(); continue
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try: importlib.import_module(f"pclclip_nb.{name}")
        except BaseException: traceback.print_exc()
    if said.getvalue(): print(f"{name}: {said.getvalue()}")
    sys.stdout.flush(); os._exit(0)
"""


def fresh_imports():
    "Every module imports by itself and prints nothing; those without torch do so in a process that has not loaded it"
    names = [f.stem for f in sorted((ROOT / "pclclip_nb").glob("[!_]*.py"))]
    done = run(sys.executable, "-W", "error::SyntaxWarning", "-c", FORKED, *names)
    bad = [done.stdout + done.stderr] if done.returncode or done.stdout or done.stderr else []
    for name in MODULES:
        done = run(sys.executable, "-c", f"import sys, pclclip_nb.{name}; sys.exit('torch' in sys.modules)")
        if done.returncode: bad.append(f"{name}: {done.stderr or 'imports torch'}")
    return "\n".join(bad)


def headings(nb):
    "Anchors of a processed page"
    text = []
    for c in nb["cells"]:
        if c["cell_type"] == "markdown": text.append("".join(c["source"]))
        for o in c.get("outputs", []): text.append("".join(o.get("data", {}).get("text/markdown", "")))
    text = "\n".join(text)
    names = {re.sub(r"[^\w\- .]", "", h.strip()).lower().replace(" ", "-") for h in re.findall(r"(?m)^#+ (.+)$", text)}
    return names | {a.lower() for a in re.findall(r"\{#([^}\s]+)", text)}, text


def docs(copy):
    "Process the pages as the site does, then follow every internal link"
    bad = failed(run(sys.executable, "-c", "from nbdev.serve import proc_nbs; proc_nbs()", cwd=copy))
    if bad: return bad
    pages = {re.sub(r"^\d+[a-z]?_", "", p.stem): headings(json.loads(p.read_text())) for p in (copy / "_proc").glob("*.ipynb")}
    broken, n = [], 0
    for name, (_, text) in pages.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"(?s)```.*?```", "", text)):
            if re.match(r"https?:|mailto:|data:", link): continue
            n += 1
            path, _, anchor = link.partition("#")
            page = re.sub(r"^\d+[a-z]?_", "", Path(path).stem) if path else name
            if path and not path.endswith((".ipynb", ".html")):
                if not (copy / "nbs" / path).exists(): broken.append(f"{name}: {link}")
            elif page not in pages or anchor and anchor.lower() not in pages[page][0]: broken.append(f"{name}: {link}")
    return "\n".join(broken) if broken else "" if n > 20 else f"only {n} internal links found: is the package installed?"


def notebooks():
    "Run every notebook as a test; (name, error) of each"
    from fastcore.parallel import parallel
    from nbdev.config import get_config
    from nbdev.doclinks import nbglob
    from nbdev.test import test_nb

    cfg = get_config()
    files = sorted((f.absolute() for f in nbglob(as_path=True)), key=lambda f: -f.stat().st_size)
    done = parallel(test_nb, files, skip_flags=cfg.tst_flags.split(), n_workers=2, basepath=cfg.config_path)
    return [(f"{f.name}", "" if ok else "see above", t) for f, (ok, t) in zip(files, done)]


def main():
    os.chdir(ROOT)
    results = []

    def record(name, error, seconds):
        results.append(not error)
        print(f"{'FAIL' if error else 'ok  '} {seconds:6.1f}s  {name}" + (f"\n{error}" if error else ""), flush=True)

    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp) / "copy"
        shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".venv", "runs", "_proc", "_docs", ".git", "*cache*"))
        checks = {
            "notebooks clean, exports in sync": lambda: clean_and_in_sync(copy),
            "README in sync": readme_in_sync,
            "ruff check": lambda: failed(run(BIN / "ruff", "check", "-q", ".")),
            "ruff format": lambda: failed(run(BIN / "ruff", "format", "-q", "--check", "nbs")),
            "imports in a fresh process": fresh_imports,
            "docs processed, internal links": lambda: docs(copy),
        }
        for name, check in checks.items():
            t0 = time.perf_counter()
            record(name, check(), time.perf_counter() - t0)
    for name, error, seconds in notebooks(): record(name, error, seconds)
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    return int(not all(results))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    if sys.argv[1:] == ["readme"]: (ROOT / "README.md").write_text(readme())
    else: sys.exit(main())
