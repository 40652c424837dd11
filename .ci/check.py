"""Every check of the project, then every page; ends with the line 'N passed, N failed'.

python .ci/check.py          all checks and pages
python .ci/check.py readme   write README.md from nbs/index.ipynb
python .ci/check.py normal   format, clean and export the pages, in the form in which they are stored
"""

import ast
import graphlib
import importlib
import io
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tokenize
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
WITHOUT_TORCH = (
    "data core.compute core.devices core.arrays core.files core.tiles core.neighbours core.jaccard core.reranking core.ranking clustering eval_viz "
    "synthetic.drawing synthetic.people labels.graph_clustering labels.self_paced labels.health labels.choice labels.reports results.runs results.compare "
    "core.benchmarks core.images core.own_images core.pictures training.settings experiments.recipes cli.flags cli.errors cli.published_words "
    "cli.main cli.demo cli.tools cli.closing"
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
MAX_PAGES, MAX_MODULE = 77, 400  # pages in all, lines of a module
MAX_CELLS, MAX_SOURCE = 60, 400  # of a page of the story
SLOW = (  # pages that take longest, started first; the others follow by size of the file
    "experiments/04_survival cli/03_demo cli/02_main experiments/05_gpu backbones/05_create tutorials/01_script inference/02_export tutorials/00_own_photos "
    "synthetic/01_people labels/04_graph_correction cli/04_tools labels/00_graph_clustering labels/07_sharded "
    "results/04_runs synthetic/02_tiny_clip tutorials/02_contributing"
).split()
LIBRARIES = "matplotlib.pyplot open_clip pandas sklearn.cluster timm torch torchvision tqdm.auto umap nbdev.test".split()


def run(*cmd, cwd=ROOT, **kwargs):
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # while nbdev tests a page it exports nothing
    return subprocess.run([str(c) for c in cmd], cwd=cwd, env=env, text=True, capture_output=True, **kwargs)


def failed(done):
    "Output of a command that failed, '' of one that did not"
    return (done.stdout + done.stderr).strip() or "failed" if done.returncode else ""


# ---- Pages and modules


def pages(root=ROOT):
    "Notebooks of the project, in order"
    return [p for p in sorted((root / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]


def page_name(page, root=ROOT):
    "core/05_neighbours"
    return page.relative_to(root / "nbs").with_suffix("").as_posix()


def cells_of(page):
    return json.loads(page.read_text())["cells"]


def markdown(page):
    "The text of a page"
    return "\n\n".join("".join(c["source"]) for c in cells_of(page) if c["cell_type"] == "markdown") + "\n"


def modules():
    "Name below the package and path of every exported module"
    found = sorted((ROOT / "pclclip_nb").rglob("*.py"))
    return {".".join(f.relative_to(ROOT / "pclclip_nb").with_suffix("").parts): f for f in found if f.name[0] != "_"}


# ---- Stored form


def differences(copy, pattern):
    "Files of a copy that differ from those here"
    here, there = ({p.relative_to(r): p.read_bytes() for p in r.glob(pattern)} for r in (ROOT, copy))
    return [str(p) for p in sorted(here.keys() | there.keys()) if here.get(p) != there.get(p)]


def clean_and_in_sync(copy):
    "Run nbdev's cleaner and exporter on a copy; nothing may change"
    bad = failed(run(BIN / "nbdev_clean", cwd=copy))
    if changed := differences(copy, "nbs/**/*.ipynb"): bad += f"not clean (run make normal): {changed}"
    for f in (copy / "pclclip_nb").rglob("*.py"):
        if f.name != "__init__.py": f.unlink()
    bad += failed(run(BIN / "nbdev_export", cwd=copy))
    if changed := differences(copy, "pclclip_nb/**/*.py"): bad += f"not in sync (run make normal): {changed}"
    return bad


def is_debris(output):
    "Whether a stored output is a warning or a progress bar"
    bar = "application/vnd.jupyter.widget-view+json" in output.get("data", {}) and "it/s]" in output.data.get("text/plain", "")
    return bar or output.get("name") == "stderr"


def as_saved(page):
    "Text of a notebook as JupyterLab writes it, without stored warnings and progress bars"
    import nbformat

    notebook = nbformat.read(page, as_version=4)
    for cell in notebook.cells:
        if "outputs" in cell: cell.outputs = [o for o in cell.outputs if not is_debris(o)]
    return nbformat.writes(notebook) + "\n"


def normal_form():
    "Pages are stored as JupyterLab saves and nbdev_clean cleans them, so that a save changes only what was edited"
    bad = [page_name(p) for p in pages() if p.read_text() != as_saved(p)]
    return f"not in normal form (run make normal): {bad}" if bad else ""


def normal(root=ROOT):
    "Bring all pages into the normal form and export them; the error of the first command that fails"
    for command in (["ruff", "format", "-q", "nbs"], ["nbdev_clean"]):
        if bad := failed(run(BIN / command[0], *command[1:], cwd=root)): return bad
    for page in pages(root):
        if page.read_text() != (text := as_saved(page)): page.write_text(text)
    return failed(run(BIN / "nbdev_export", cwd=root))


def readme():
    "index.ipynb as Markdown, its links pointing into nbs/"
    return re.sub(r"\]\((?!https?:|#)([^)]+)\)", r"](nbs/\1)", markdown(ROOT / "nbs/index.ipynb"))


def readme_in_sync():
    return "" if (ROOT / "README.md").read_text() == readme() else "README.md differs from nbs/index.ipynb: run make readme"


# ---- Layout


def layout():
    "Sizes: pages in all, pages of the story, modules"
    bad = []
    if len(pages()) > MAX_PAGES: bad.append(f"{len(pages())} pages, at most {MAX_PAGES}")
    for name in STORY:
        cells = cells_of(ROOT / f"nbs/{name}.ipynb")
        lines = sum(len("".join(c["source"]).splitlines()) for c in cells if c["cell_type"] == "code")
        if len(cells) > MAX_CELLS or lines > MAX_SOURCE:
            bad.append(f"{name}: {len(cells)} cells and {lines} source lines, at most {MAX_CELLS} and {MAX_SOURCE}")
    for name, file in modules().items():
        if (n := len(file.read_text().splitlines())) > MAX_MODULE: bad.append(f"{name}: {n} lines, at most {MAX_MODULE}")
    return "\n".join(bad)


def own_imports(name, file, known):
    "(module of ours, name) of every import in a file, those inside functions too"
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


def circle(graph, what):
    try: list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as e: return [f"a circle of {what}: {' -> '.join(e.args[1])}"]
    return []


def imports_and_layers():
    "Relative imports only, no private name of another module, down the layers only, no circles of modules or packages"
    rank = {unit: i for i, line in enumerate(LAYERS) for unit in line.split()}
    known, bad, packages, graph = modules(), [], {}, {}
    for name, file in known.items():
        if re.search(r"(?m)^\s*(from|import) pclclip_nb\b", file.read_text()): bad.append(f"{name}: an absolute import of the package")
        unit = name.split(".")[0]
        if unit not in rank: bad.append(f"{name}: in no layer")
        for module, what in own_imports(name, file, known):
            if what.startswith("_"): bad.append(f"{name}: {what} is private to {module}")
            if module not in known: bad.append(f"{name}: {module}.{what} is not in a module"); continue
            graph.setdefault(name, set()).add(module)
            below = module.split(".")[0]
            if below == unit: continue
            packages.setdefault(unit, set()).add(below)
            if rank.get(below, 0) > rank.get(unit, 0): bad.append(f"{name}: imports {module}, which lies above it")
    return "\n".join(bad + circle(packages, "packages") + circle(graph, "modules"))


# ---- The documentation site


def sidebar():
    "_quarto.yml lists every page once, in the order of the numbers within a section"
    import yaml

    contents = yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]
    sections = [part["contents"] if isinstance(part, dict) else [part] for part in contents]
    listed = [name.removesuffix(".ipynb") for section in sections for name in section]
    there = {page_name(p) for p in pages()}
    bad = [f"not in the sidebar: {name}" for name in sorted(there - set(listed))]
    bad += [f"in the sidebar, but no page: {name}" for name in sorted(set(listed) - there)]
    bad += [f"twice in the sidebar: {name}" for name in sorted({n for n in listed if listed.count(n) > 1})]
    return "\n".join(bad + [f"not in order: {s}" for s in sections if s != sorted(s)])


def pictures():
    "Every page has a picture, drawn by a cell or from nbs/images: the site shows what is stored"
    def number(page):
        drawn = sum("image/png" in o.get("data", {}) for c in cells_of(page) for o in c.get("outputs", []))
        return drawn + markdown(page).count("![")

    bare = [page_name(p) for p in pages() if not number(p)]
    return f"pages without a picture: {bare}" if bare else ""


def formulas():
    "pandoc, the program inside quarto, sets every formula as MathML, which browsers draw without a network"
    pandoc = ["pandoc"] if shutil.which("pandoc") else ["quarto", "pandoc"] if shutil.which("quarto") else None
    if not pandoc: return ""
    def mathml(text):
        done = run(*pandoc, "-t", "html", "--mathml", input=text)
        return done.stdout.count("<math"), done.stderr + failed(done)

    if "could not convert" not in mathml(r"$\unheard{of}$")[1].lower(): return "pandoc does not report an unknown command"
    made = {page_name(p): mathml(markdown(p)) for p in pages()}
    bad = [f"{name}: {error}" for name, (_, error) in made.items() if error]
    if (n := sum(n for n, _ in made.values())) < 500: bad.append(f"only {n} formulas found")
    return "\n".join(bad)


def entries():
    "Every public function and class has what its entry on the site is made of: a docstring of one line, a comment for each argument"
    toy = "def f(\n    x,  # (N,) numbers\n    y,\n    a=1,  # these two as in `g`\n    b=2,\n) -> int:\n    return x + y\n"
    if missing_in(toy) != ["f: docstring", "f: y", "f: result"]: return f"found {missing_in(toy)} in the toy"
    return "\n".join(f"{name}: {gap}" for name, file in modules().items() for gap in missing_in(file.read_text()))


def missing_in(source):
    "What is missing in the entries of a module's public functions and classes"
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string for t in tokens if t.type == tokenize.COMMENT}
    return [gap for node in ast.parse(source).body if is_public(node) for gap in missing_of(node, comments)]


def is_public(node):
    return isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")


def missing_of(node, comments):
    gaps = [] if (ast.get_docstring(node) or "\n").count("\n") == 0 else ["docstring"]
    if isinstance(node, ast.FunctionDef):
        gaps += missing_arguments(node, comments) + missing_result(node, comments)
    else:
        methods = [m for m in node.body if isinstance(m, ast.FunctionDef)]
        gaps += [gap for m in methods if is_public(m) for gap in missing_of(m, comments)]
        gaps += [gap for m in methods if m.name == "__init__" for gap in missing_arguments(m, comments)]
        if any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            fields = [f for f in node.body if isinstance(f, ast.AnnAssign) and not f.target.id.startswith("_")]
            gaps += [f.target.id for f in fields if not {f.lineno, f.end_lineno} & comments.keys()]
    return [f"{node.name}: {gap}" for gap in gaps]


def missing_arguments(function, comments):
    "Arguments without a comment; 'these two' in a comment covers the next argument too"
    a, gaps, covered = function.args, [], 0
    for x in [*a.posonlyargs, *a.args, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg])]:
        comment = " ".join(comments.get(line, "") for line in range(x.lineno, x.end_lineno + 1))
        counts = [n for n, words in ((4, "these four"), (3, "these three"), (2, "these two"), (1, "#")) if words in comment]
        covered = max([covered - 1, *counts])
        if covered <= 0 and x.arg not in ("self", "cls"): gaps.append(x.arg)
    return gaps


def missing_result(function, comments):
    result = function.returns
    if isinstance(result, ast.Constant) or any(ast.unparse(d) == "property" for d in function.decorator_list): return []
    if {result and result.end_lineno, function.body[0].lineno - 1} & comments.keys(): return []
    gives = any(isinstance(n, (ast.Return, ast.Yield)) and n.value is not None for n in ast.walk(function))
    return ["result"] if gives else []


def site_name(path):
    "core/05_neighbours.ipynb -> core/neighbours, the name of a page on the site"
    return (path.parent / re.sub(r"^\d+_", "", path.stem)).as_posix()


def text_and_anchors(page):
    "Text of a processed page, and the anchors that its headings become"
    outputs = [o.get("data", {}).get("text/markdown", "") for c in cells_of(page) for o in c.get("outputs", [])]
    text = "\n".join([markdown(page), *map("".join, outputs)])
    anchors = {re.sub(r"[^\w\- .]", "", h.strip()).lower().replace(" ", "-") for h in re.findall(r"(?m)^#+ (.+)$", text)}
    return text, anchors | {a.lower() for a in re.findall(r"\{#([^}\s]+)", text)}


def docs(copy):
    "Process the pages as the site does, then follow every internal link, to the heading"
    bad = failed(run(sys.executable, "-c", "from nbdev.serve import proc_nbs; proc_nbs()", cwd=copy))
    if bad: return bad
    site = {site_name(p.relative_to(copy / "_proc")): text_and_anchors(p) for p in (copy / "_proc").rglob("*.ipynb")}

    def leads_somewhere(name, link):
        path, _, anchor = link.partition("#")
        if not path: return not anchor or anchor.lower() in site[name][1]
        target = Path(os.path.normpath(path[1:] if path.startswith("/") else Path(name).parent / path))
        if not path.endswith(".html") and not (copy / "nbs" / target).exists(): return False
        if not path.endswith((".html", ".ipynb")): return True
        return site_name(target) in site and (not anchor or anchor.lower() in site[site_name(target)][1])

    links = [
        (name, link)
        for name, (text, _) in site.items()
        for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"(?s)```.*?```", "", text))
        if not re.match(r"https?:|mailto:|data:", link)
    ]
    if len(links) < 200: return f"only {len(links)} internal links found: is the package installed?"
    return "\n".join(f"{name}: {link}" for name, link in links if not leads_somewhere(name, link))


# ---- Running modules and pages


def in_own_process(function, *args):
    "Run function(*args) in a process that has the libraries loaded and nothing of ours: (passed, what it printed, seconds)"
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(LIBRARIES)
    with tempfile.NamedTemporaryFile() as file:
        process = server.Process(target=print_into, args=(file.name, function, *args))
        began = time.perf_counter()
        process.start()
        process.join()
        seconds = time.perf_counter() - began
        text = Path(file.name).read_text(errors="replace").strip()
    if process.exitcode < 0: text += f"\nkilled by signal {-process.exitcode}"
    return process.exitcode == 0, text, seconds


def print_into(file, function, *args):
    "Call a function with its output in a file; the process ends with status 1 unless the result is true"
    out = os.open(file, os.O_WRONLY)
    for stream in (1, 2): os.dup2(out, stream)
    try: good = function(*args)
    except BaseException: good = traceback.print_exc()
    sys.stdout.flush()
    sys.exit(not good)


def import_module(name):
    warnings.simplefilter("error", SyntaxWarning)
    return importlib.import_module(name)


NO_TORCH = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(f"pclclip_nb.{name}")
    if "torch" in sys.modules: sys.exit(f"{name} imports torch")
"""


def fresh_imports():
    "Every module imports by itself and prints nothing; those in WITHOUT_TORCH do not import torch"
    bad = []
    for name in modules():
        good, text, _ = in_own_process(import_module, f"pclclip_nb.{name}")
        if text or not good: bad.append(f"{name}: {text}")
    return "\n".join(bad) + failed(run(sys.executable, "-c", NO_TORCH, *WITHOUT_TORCH))


def test_page(page):
    "Run the cells of a page, without those that have a flag of tst_flags"
    from nbdev.config import get_config
    from nbdev.test import test_nb

    return test_nb(page, skip_flags=get_config().tst_flags.split(), basepath=ROOT)[0]


def test_pages(names):
    "Run pages, two at a time, each in its own process; (name, error, seconds) of each as it ends"
    with ThreadPoolExecutor(2) as two:
        jobs = {two.submit(in_own_process, test_page, ROOT / f"nbs/{name}.ipynb"): name for name in names}
        for job in as_completed(jobs):
            passed, printed, seconds = job.result()
            yield jobs[job], "" if passed else printed or "failed", seconds


def slow_first():
    "Names of all pages, in the order in which they are started"
    size = {page_name(p): p.stat().st_size for p in pages()}
    return sorted(size, key=lambda name: (name not in SLOW, -size[name]))


def checks(copy):
    "The checks in the order in which they run; each returns what is wrong, or ''"
    return {
        "pages clean, exports in sync": lambda: clean_and_in_sync(copy),
        "pages in normal form": normal_form,
        "README in sync": readme_in_sync,
        "layout and sizes": layout,
        "imports and layers": imports_and_layers,
        "ruff check": lambda: failed(run(BIN / "ruff", "check", "-q", ".")),
        "ruff format": lambda: failed(run(BIN / "ruff", "format", "-q", "--check", "nbs")),
        "imports in a fresh process": fresh_imports,
        "sidebar complete": sidebar,
        "a picture on every page": pictures,
        "formulas as MathML": formulas,
        "entries of public names": entries,
        "docs processed, internal links": lambda: docs(copy),
    }


def main():
    os.chdir(ROOT)
    results = []

    def record(name, error, seconds):
        results.append(not error)
        print(f"{'FAIL' if error else 'ok  '} {seconds:6.1f}s  {name}" + (f"\n{error}" if error else ""), flush=True)

    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp) / "copy"
        shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".venv", "runs", "_proc", "_docs", ".git", "*cache*"))
        for name, check in checks(copy).items():
            began = time.perf_counter()
            record(name, check(), time.perf_counter() - began)
    began, total = time.perf_counter(), 0
    for name, error, seconds in test_pages(slow_first()):
        record(name, error, seconds)
        total += seconds
    print(f"pages: {total / 60:.1f} minutes in all, {(time.perf_counter() - began) / 60:.1f} with two at a time")
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    return int(not all(results))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    commands = {"readme": lambda: (ROOT / "README.md").write_text(readme()) and "", "normal": normal}
    if len(sys.argv) > 1: sys.exit(commands[sys.argv[1]]() or 0)
    sys.exit(main())
