"""Every check of the project; ends with the line 'N passed, N failed'.

python .ci/check.py          all checks
python .ci/check.py readme   write README.md from nbs/index.ipynb
"""

import ast
import graphlib
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
WITHOUT_TORCH = (
    "data core.compute core.arrays core.files core.tiles core.neighbours core.jaccard core.reranking core.ranking clustering eval_viz "
    "synthetic.drawing synthetic.people labels.graph_clustering labels.self_paced labels.health labels.reports results.runs results.compare"
).split()
LAYERS = [  # imports run down this list only, from a line to itself or to a line above it, and never in a circle
    "core data memory_loss",
    "batches clip_backbone clustering",
    "backbones synthetic labels",
    "training inference eval_viz",
    "train results",
    "experiments",
    "cli",
]
STORY = ["00_data", "01_clip_backbone", "02_clustering", "03_memory_loss", "04_train", "05_eval_viz"]
MAX_PAGES, MAX_MODULE = 64, 400  # pages in all, lines of a module
MAX_CELLS, MAX_SOURCE = 60, 400  # of a page of the story


def run(*cmd, cwd=ROOT, **env):
    return subprocess.run([str(c) for c in cmd], cwd=cwd, env=os.environ | env, text=True, capture_output=True)


def failed(done):
    "Output of a command that failed, '' of one that did not"
    return (done.stdout + done.stderr).strip() or "failed" if done.returncode else ""


def differences(copy, pattern):
    "Files of a copy that are not as they are here"
    here, there = ({p.relative_to(r): p.read_bytes() for p in r.glob(pattern)} for r in (ROOT, copy))
    return [str(p) for p in sorted(here.keys() | there.keys()) if here.get(p) != there.get(p)]


def pages(root=ROOT):
    "Notebooks of the project, in order"
    return [p for p in sorted((root / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]


def modules():
    "Name below the package and path of every exported module"
    found = sorted((ROOT / "pclclip_nb").rglob("*.py"))
    return {".".join(f.relative_to(ROOT / "pclclip_nb").with_suffix("").parts): f for f in found if f.name[0] != "_"}


def clean_and_in_sync(copy):
    "Run nbdev's cleaner and exporter on a copy; nothing may change"
    bad = failed(run(BIN / "nbdev_clean", cwd=copy))
    if changed := differences(copy, "nbs/**/*.ipynb"): bad += f"not clean (run nbdev_clean): {changed}"
    for f in (copy / "pclclip_nb").rglob("*.py"):
        if f.name != "__init__.py": f.unlink()
    bad += failed(run(BIN / "nbdev_export", cwd=copy))
    if changed := differences(copy, "pclclip_nb/**/*.py"): bad += f"not in sync (run nbdev_export): {changed}"
    return bad


def normal_form():
    "Notebooks are stored as JupyterLab saves them, so that saving one changes only what was edited"
    import nbformat

    bad = [str(p.relative_to(ROOT)) for p in pages() if p.read_text() != nbformat.writes(nbformat.read(p, as_version=4)) + "\n"]
    return f"not as JupyterLab saves them (open and save, or run make normal): {bad}" if bad else ""


def layout():
    "Sizes: pages in all, pages of the story, modules"
    bad = []
    if len(pages()) > MAX_PAGES: bad.append(f"{len(pages())} pages, at most {MAX_PAGES}")
    for name in STORY:
        cells = json.loads((ROOT / f"nbs/{name}.ipynb").read_text())["cells"]
        lines = sum(len("".join(c["source"]).splitlines()) for c in cells if c["cell_type"] == "code")
        if len(cells) > MAX_CELLS or lines > MAX_SOURCE:
            bad.append(f"{name}: {len(cells)} cells and {lines} source lines, at most {MAX_CELLS} and {MAX_SOURCE}")
    for name, file in modules().items():
        if (n := len(file.read_text().splitlines())) > MAX_MODULE: bad.append(f"{name}: {n} lines, at most {MAX_MODULE}")
    return "\n".join(bad)


def own_imports(name, file, known):
    "(module of ours, names) of every import in a file, those inside functions too"
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom): continue
        path = package[: len(package) - node.level + 1] if node.level else []
        path = [*path, *(node.module or "").split(".")] if node.module else path
        if not node.level and path[0] == "pclclip_nb": path = path[1:]
        elif not node.level: continue
        for alias in node.names:
            whole = ".".join([*path, alias.name])
            yield (whole, "") if whole in known else (".".join(path), alias.name)


def imports_and_layers():
    "Relative imports only, no private name of another module, down the layers only, no circles between packages"
    rank = {unit: i for i, line in enumerate(LAYERS) for unit in line.split()}
    known, bad, edges = modules(), [], {}
    for name, file in known.items():
        if re.search(r"(?m)^\s*(from|import) pclclip_nb\b", file.read_text()): bad.append(f"{name}: an absolute import of the package")
        unit = name.split(".")[0]
        if unit not in rank: bad.append(f"{name}: in no layer")
        for module, what in own_imports(name, file, known):
            if what.startswith("_"): bad.append(f"{name}: {what} is private to {module}")
            if module not in known: bad.append(f"{name}: {module}.{what} is not in a module"); continue
            below = module.split(".")[0]
            if below == unit: continue
            edges.setdefault(unit, set()).add(below)
            if rank.get(below, 0) > rank.get(unit, 0): bad.append(f"{name}: imports {module}, which lies above it")
    try: list(graphlib.TopologicalSorter(edges).static_order())
    except graphlib.CycleError as e: bad.append(f"a circle of packages: {' -> '.join(e.args[1])}")
    return "\n".join(bad)


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
    names = list(modules())
    done = run(sys.executable, "-W", "error::SyntaxWarning", "-c", FORKED, *names)
    bad = [done.stdout + done.stderr] if done.returncode or done.stdout or done.stderr else []
    for name in WITHOUT_TORCH:
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
    site = {page_name(p.relative_to(copy / "_proc")): headings(json.loads(p.read_text())) for p in (copy / "_proc").rglob("*.ipynb")}
    broken, n = [], 0
    for name, (_, text) in site.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"(?s)```.*?```", "", text)):
            if re.match(r"https?:|mailto:|data:", link): continue
            n += 1
            path, _, anchor = link.partition("#")
            target = Path(os.path.normpath(path[1:] if path.startswith("/") else Path(name).parent / path)) if path else Path(name)
            page = page_name(target)
            if path and not path.endswith((".ipynb", ".html")):
                if not (copy / "nbs" / target).exists(): broken.append(f"{name}: {link}")
            elif page not in site or anchor and anchor.lower() not in site[page][0]: broken.append(f"{name}: {link}")
            elif path.endswith(".ipynb") and not (copy / "nbs" / target).exists(): broken.append(f"{name}: {link}")
    return "\n".join(broken) if broken else "" if n > 20 else f"only {n} internal links found: is the package installed?"


def page_name(path):
    "core/05_neighbours.ipynb -> core/neighbours, the name of a page on the site"
    return (path.parent / re.sub(r"^\d+_", "", path.stem)).as_posix()


def notebooks():
    "Run every notebook as a test; (name, error, seconds) of each as it ends, the longest first"
    from concurrent.futures import ProcessPoolExecutor, as_completed

    from nbdev.config import get_config
    from nbdev.doclinks import nbglob
    from nbdev.test import test_nb

    cfg = get_config()
    files = sorted((f.absolute() for f in nbglob(as_path=True)), key=lambda f: -f.stat().st_size)
    with ProcessPoolExecutor(2) as pool:
        jobs = {pool.submit(test_nb, f, skip_flags=cfg.tst_flags.split(), basepath=cfg.config_path): f for f in files}
        for job in as_completed(jobs):
            ok, seconds = job.result()
            yield str(jobs[job].relative_to(ROOT / "nbs")), "" if ok else "see above", seconds


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
            "notebooks in normal form": normal_form,
            "layout and sizes": layout,
            "imports and layers": imports_and_layers,
            "README in sync": readme_in_sync,
            "ruff check": lambda: failed(run(BIN / "ruff", "check", "-q", ".")),
            "ruff format": lambda: failed(run(BIN / "ruff", "format", "-q", "--check", "nbs")),
            "imports in a fresh process": fresh_imports,
            "docs processed, internal links": lambda: docs(copy),
        }
        for name, check in checks.items():
            t0 = time.perf_counter()
            record(name, check(), time.perf_counter() - t0)
    total, began = 0, time.perf_counter()
    for name, error, seconds in notebooks():
        record(name, error, seconds)
        total += seconds
    print(f"pages: {total / 60:.1f} minutes in all, {(time.perf_counter() - began) / 60:.1f} in two processes")
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    return int(not all(results))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    if sys.argv[1:] == ["readme"]: (ROOT / "README.md").write_text(readme())
    else: sys.exit(main())
