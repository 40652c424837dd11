"""JupyterLab in a real browser: pages run from top to bottom, are saved unchanged, and the explorer is clicked.

A widget can pass every check in Python and still show nothing, because half of it runs in the browser. So this program
starts JupyterLab on a copy of the project, drives Chromium with a mouse, and checks what the browser shows:

1. the home page and a page with figures: every cell runs, its pictures are drawn, its formulas are set;
2. pages saved with Ctrl+S and brought into normal form (`make normal`) are equal to the stored ones;
3. the explorer of a small run: it fits in the cell and warns of nothing; a click on a dot shows the images of its cluster,
   another dot other images; the slider moves the dots to another epoch and keeps the selected images;
   Python knows the selection; the stand-alone HTML file shows the same.

python .ci/browser.py     needs Chromium, its driver and selenium; the first line says how to install what is missing

The cells with a flag (`slow`, `gpu`) are left out, as in the default test. Screenshots stay in runs/browser.
"""

import ast
import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import check

ROOT = check.ROOT
RUN_PAGES = ["index", "05_eval_viz"]
SAVED_PAGES = ["00_data", "02_clustering", "results/05_explorer"]
FLAGS = ("#| slow", "#| gpu", "#| notest")
SETTINGS = {  # of JupyterLab: draw cells that are out of sight too, and open no dialog about news
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
CHROMIUM = (
    "headless=new no-sandbox disable-gpu disable-quic disable-dev-shm-usage no-first-run disable-background-networking "
    "disable-component-update disable-sync window-size=1400,1000"
).split()


def find_programs(*programs):
    "Paths of programs. Raises FileNotFoundError that says how to install the missing ones."
    missing = [p for p in programs if not shutil.which(p)]
    if missing or not importlib.util.find_spec("selenium"):
        raise FileNotFoundError(
            f"the browser test needs {', '.join(missing) or 'selenium'}: "
            "on Debian or Ubuntu apt-get install chromium chromium-driver, and pip install selenium"
        )
    return [shutil.which(p) for p in programs]


def until(condition, seconds, what):
    "Wait until condition() is true and return its value. Raises TimeoutError that names what was waited for."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.2)
    raise TimeoutError(f"waited {seconds} s for {what}")


def equal(found, expected):
    if found != expected:
        raise AssertionError(f"found {found!r}, expected {expected!r}")


# ---- JupyterLab on a copy of the project


def copy_project(dest):
    "Copy pages, package and what they read; outputs and flagged cells go, except on the pages that are saved unchanged"
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*.tmp")
    for folder in ("nbs", "pclclip_nb", "bench"):
        shutil.copytree(ROOT / folder, dest / folder, ignore=ignore)
    for file in ("settings.ini", "ruff.toml", "README.md", "_quarto.yml"):
        shutil.copy(ROOT / file, dest)
    for page in check.pages(dest):
        if check.page_name(page, dest) in SAVED_PAGES:
            continue
        nb = json.loads(page.read_text())
        nb["cells"] = [c for c in nb["cells"] if not "".join(c["source"]).startswith(FLAGS)]
        for cell in nb["cells"]:
            if cell["cell_type"] == "code":
                cell |= {"outputs": [], "execution_count": None}
        page.write_text(json.dumps(nb))
    for name, values in SETTINGS.items():
        file = dest / f"settings/@jupyterlab/{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    return dest


class Lab:
    "JupyterLab on a free port of this computer, with a token of its own; closed to other computers"

    def __init__(self, folder):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.token = secrets.token_hex(16)
        self.log = folder / "lab.log"
        env = os.environ | {
            "PYTHONPATH": str(folder),
            "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
            "OMP_NUM_THREADS": "1",
        }
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
            env[name] = str(folder / "jupyter" / name)
        options = ["--no-browser", "--ip=127.0.0.1", f"--port={self.port}", "--port-retries=0", "--allow-root"]
        options += [f"--IdentityProvider.token={self.token}", "--expose-app-in-browser"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            cwd=folder,
            env=env,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        until(self.answers, 120, f"JupyterLab to answer, see {self.log}")

    def answers(self):
        if self.process.poll() is not None:
            raise RuntimeError(f"JupyterLab ended at once:\n{self.log.read_text()[-2000:]}")
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api?token={self.token}", timeout=5).status == 200
        except OSError:
            return False

    def url(self, page):
        return f"http://127.0.0.1:{self.port}/lab/workspaces/{secrets.token_hex(4)}/tree/nbs/{page}.ipynb?token={self.token}"

    def stop(self):
        os.killpg(self.process.pid, signal.SIGINT)
        os.killpg(self.process.pid, signal.SIGINT)  # twice: the first asks whether it is meant
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)


# ---- Chromium


class Browser:
    "Chromium without a screen, with a profile that is deleted at the end"

    def __init__(self, shots):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        chromium, driver = find_programs("chromium", "chromedriver")
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.shots = shots
        self.n = 0
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for word in [*CHROMIUM, f"user-data-dir={self.profile.name}"]:
            options.add_argument(f"--{word}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, Service(driver))
        self.run = self.driver.execute_script

    def all(self, css):
        return self.driver.find_elements("css selector", css)

    def one(self, css, seconds=60):
        return until(lambda: next(iter(self.all(css)), None), seconds, css)

    def mouse(self):
        from selenium.webdriver import ActionChains

        return ActionChains(self.driver, duration=100)

    def mouse_at(self, css, x, y):
        "A mouse over an element, x and y in pixels from its upper left corner"
        element = self.one(css)
        self.run("arguments[0].scrollIntoView({block: 'nearest'})", self.one(".pclx"))
        dx = round(x - element.size["width"] / 2)
        dy = round(y - element.size["height"] / 2)
        return self.mouse().move_to_element_with_offset(element, dx, dy)

    def shot(self, name):
        "Write a screenshot of the window"
        self.n += 1
        self.shots.mkdir(parents=True, exist_ok=True)
        assert self.driver.save_screenshot(str(self.shots / f"{self.n:02d}_{name}.png"))

    def errors(self):
        "Errors in the console of the page"
        return [e["message"] for e in self.driver.get_log("browser") if e["level"] == "SEVERE"]

    def stop(self):
        self.driver.quit()
        self.profile.cleanup()


@contextlib.contextmanager
def stopped_at_the_end(browser, lab):
    "A failure leaves a screenshot, and nothing leaves a process"
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            browser.shot("failed")
        raise
    finally:
        browser.stop()
        lab.stop()


# ---- Notebooks in JupyterLab

STATE = """
const panel = window.jupyterapp.shell.currentWidget, cells = panel.content.widgets.filter((c) => c.model.type === 'code');
const kernel = panel.sessionContext.session?.kernel;
const of = (c) => [...Array(c.model.outputs.length).keys()].map((i) => c.model.outputs.get(i).toJSON());
return {path: panel.context.path, status: kernel ? kernel.status : 'none', cells: cells.filter((c) => c.model.sharedModel.getSource().trim())
  .map((c) => ({count: c.model.executionCount, state: c.model.executionState, outputs: of(c)}))};
"""  # of the open notebook: path, status of the kernel, and for each code cell its number of execution and its outputs


def open_page(browser, lab, name):
    "Open a notebook and wait for its kernel"
    browser.driver.get(lab.url(name))
    browser.one(".jp-NotebookPanel .jp-Cell")
    until(lambda: browser.run(STATE)["status"] == "idle", 120, f"the kernel of {name}")


def run_all(browser, seconds=300):
    "Click Run All Cells, wait for the last, return the cells. Raises AssertionError with the first error output."
    next(e for e in browser.all("#jp-MainMenu .lm-MenuBar-itemLabel") if e.text == "Run").click()
    items = until(lambda: [e for e in browser.all(".lm-Menu-itemLabel") if e.text == "Run All Cells"], 20, "the menu Run")
    items[0].click()
    until(lambda: finished(browser.run(STATE)), seconds, "all cells to finish")
    return browser.run(STATE)["cells"]


def finished(state):
    "True when every cell has run and the kernel is idle. Raises AssertionError with the first error output."
    errors = [o for c in state["cells"] for o in c["outputs"] if o["output_type"] == "error"]
    if errors:
        raise AssertionError(f"{state['path']}: {errors[0]['ename']}: {errors[0]['evalue']}")
    return state["status"] == "idle" and all(c["count"] for c in state["cells"])


def result_after(cell, count):
    "The text of a cell's last result if it has run more often than count, else None"
    texts = [o["data"]["text/plain"] for o in cell["outputs"] if o["output_type"] == "execute_result"]
    return texts[-1] if texts and cell["count"] > count else None


def write_notebook(path, *sources):
    "Write a notebook of code cells"
    code = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    cells = [code | {"id": f"cell{i}", "source": source} for i, source in enumerate(sources)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": kernel, "cells": cells}))


# ---- The explorer

DOTS = """
const c = document.querySelector('.pclx-canvas'); if (!c || !c.width) return null;
const px = c.getContext('2d').getImageData(0, 0, c.width, c.height).data, ratio = c.width / c.getBoundingClientRect().width, found = [];
const strong = (x, y) => { const o = 4 * (y * c.width + x); return Math.max(px[o], px[o + 1], px[o + 2]) - Math.min(px[o], px[o + 1], px[o + 2]) > 60; };
for (let x = 4; x < c.width - 4; x++) for (let y = 4; y < c.height - 4; y++)
  if ([[0, 0], [-2, 0], [2, 0], [0, -2], [0, 2]].every(([u, v]) => strong(x + u, y + v))) found.push([x / ratio, y / ratio]);
return found.length ? found : null;
"""  # the centres of coloured dots in what the canvas shows, in pixels of the page, from left to right
LOOK = """
const all = (css) => [...document.querySelectorAll(css)], c = document.querySelector('.pclx-canvas');
return {epoch: document.querySelector('.pclx-epoch-name').textContent, head: all('.pclx-selection b, .pclx-selection span').map((e) => e.textContent).join(': '),
  caption: document.querySelector('.pclx-caption').textContent, tip: document.querySelector('.pclx-tip').textContent, picture: c.toDataURL(),
  box: ['.pclx-canvas', '.pclx-side', '.pclx-time'].map((css) => document.querySelector(css).getBoundingClientRect().toJSON()),
  text: [...document.querySelector('.pclx').childNodes].filter((n) => n.nodeType === 3).map((n) => n.textContent),
  rows: all('.pclx-images .pclx-thumb').map((e) => +e.dataset.row), loaded: all('.pclx-images .pclx-photo').filter((e) => e.style.backgroundImage).length};
"""  # everything the explorer shows


def click_dot(browser, which):
    "Click a coloured dot (0 the first from the left, -1 the last); what the explorer shows when the images have loaded"
    for close in browser.all(".pclx-clear"):
        close.click()  # otherwise the dots of other clusters are pale
    until(lambda: not browser.run(LOOK)["rows"], 20, "the selection to go")
    x, y = until(lambda: browser.run(DOTS), 20, "dots in the picture")[which]
    browser.mouse_at(".pclx-canvas", x, y).click().perform()
    until(lambda: (s := browser.run(LOOK))["rows"] and s["loaded"] == len(s["rows"]), 30, "the images of the dot")
    return browser.run(LOOK)


def drag_slider(browser, start, end):
    "Drag the epoch slider, positions from 0 (left) to 1 (right); what the explorer shows when the dots have come to rest"
    slider = browser.one(".pclx-epoch").size
    first, last = (8 + position * (slider["width"] - 16) for position in (start, end))
    mouse = browser.mouse_at(".pclx-epoch", first, slider["height"] / 2)
    mouse.click_and_hold().move_by_offset(round(last - first), 0).release().perform()
    looks = [browser.run(LOOK)]

    def at_rest():
        looks.append(browser.run(LOOK))
        return looks[-1]["picture"] == looks[-2]["picture"]

    until(at_rest, 30, "the dots to come to rest")
    return looks[-1]


def train_small_run(folder):
    "Train three short epochs on twenty drawn people, into folder/run"
    import torch

    from pclclip_nb.synthetic.people import make_synthetic_reid
    from pclclip_nb.synthetic.tiny_clip import tiny_backbone
    from pclclip_nb.train import train
    from pclclip_nb.training.settings import TrainConfig

    torch.manual_seed(0)
    table = make_synthetic_reid(folder / "data", n_train=20, n_test=2, n_cams=4, per_id=10, progress=False)
    cfg = TrainConfig(
        eps=0.5, k1=10, k2=3, epochs=3, iters=8, batch_size=32, num_instances=4, optimizer="adam", lr=1e-4,
        warmup_epochs=0, workers=0,
    )  # fmt: skip
    return train(tiny_backbone(), table, folder / "run", cfg, progress=False)


# ---- The checks, in the order in which they run


def check_pages_run(browser, lab):
    "The home page and a page with figures: every cell runs, the pictures are drawn, the formulas are set"
    cells = {}
    for name in RUN_PAGES:
        open_page(browser, lab, name)
        browser.shot(f"{name}_opened")
        cells[name] = run_all(browser)
        browser.shot(f"{name}_ran")
    equal(len(cells["index"]), 1)
    images = [o for c in cells[RUN_PAGES[-1]] for o in c["outputs"] if "image/png" in o.get("data", {})]
    assert len(images) >= 3, f"{len(images)} pictures"
    image = ".jp-NotebookPanel .jp-OutputArea-output img"
    widths = browser.run(f"return [...document.querySelectorAll('{image}')].map((i) => i.complete && i.naturalWidth)")
    assert len(widths) >= 3 and all(w > 50 for w in widths), f"widths of the pictures: {widths}"
    formulas = len(browser.all(".jp-NotebookPanel mjx-container"))
    assert formulas > 3, f"{formulas} formulas"
    browser.run(f"document.querySelectorAll('{image}')[2].scrollIntoView({{block: 'center'}})")
    browser.shot(f"{RUN_PAGES[-1]}_third_picture")


def check_pages_saved(browser, lab, work):
    "Pages saved with Ctrl+S, then brought into normal form, are equal to the stored ones"
    from selenium.webdriver.common.keys import Keys

    for name in SAVED_PAGES:
        file = work / f"nbs/{name}.ipynb"
        open_page(browser, lab, name)
        browser.one(".jp-NotebookPanel .jp-Cell").click()
        browser.mouse().key_down(Keys.CONTROL).send_keys("s").key_up(Keys.CONTROL).perform()
        until(lambda: "language_info" in file.read_text(), 60, f"JupyterLab to write {name}")  # noqa: B023
    equal(check.normal(work), "")
    stored, saved = ({n: (root / f"nbs/{n}.ipynb").read_text() for n in SAVED_PAGES} for root in (ROOT, work))
    equal([n for n in SAVED_PAGES if saved[n] != stored[n]], [])


def check_explorer_opens(browser, lab, work):
    "The explorer of a run is the result of a cell: it shows the last epoch, fits in the cell, and warns of nothing"
    equal(len(train_small_run(work)), 3)
    write_notebook(
        work / "nbs/look.ipynb",
        "from pclclip_nb.results.explorer import explore\n\nlook = explore('../run', progress=False)\nlook",
        "(look.epoch, sorted(look.selected), int(look.images.cluster.nunique()))",
    )
    open_page(browser, lab, "look")
    cells = run_all(browser)
    browser.run("arguments[0].scrollIntoView({block: 'end'})", browser.one(".pclx"))
    until(lambda: browser.run(DOTS), 60, "dots in the picture")
    browser.shot("explorer_opened")
    equal([o for c in cells for o in c["outputs"] if o["output_type"] == "stream"], [])  # no warning
    look = browser.run(LOOK)
    equal((look["epoch"], look["rows"], look["text"]), ("epoch 3 of 3", [], []))
    picture, side, time_line = look["box"]
    assert picture["width"] > 400 and picture["height"] > 300, picture
    assert picture["right"] <= side["left"] and picture["bottom"] <= time_line["top"], look["box"]


def check_explorer_clicked(browser):
    "A click on a dot shows its cluster; the slider shows another epoch and keeps the selection; Python knows both"
    opened = browser.run(LOOK)
    left = click_dot(browser, 0)
    browser.shot("explorer_left_cluster")
    right = click_dot(browser, -1)
    browser.shot("explorer_right_cluster")
    for look in (left, right):
        assert look["head"].startswith("cluster ") and len(look["rows"]) >= 4, look["head"]
    equal(set(left["rows"]) & set(right["rows"]), set())
    equal(len({opened["picture"], left["picture"], right["picture"]}), 3)

    first = drag_slider(browser, 1, 0)
    browser.shot("explorer_first_epoch")
    equal(first["epoch"], "epoch 1 of 3")
    equal(sorted(first["rows"]), sorted(right["rows"]))
    assert first["picture"] != right["picture"] and first["caption"] != right["caption"], first["caption"]
    again = click_dot(browser, 0)
    browser.shot("explorer_first_epoch_cluster")
    assert set(again["rows"]) != set(first["rows"]), "the same images in both epochs"

    browser.run("window.jupyterapp.shell.currentWidget.content.activeCellIndex = 1")
    browser.run("window.jupyterapp.commands.execute('notebook:run-cell')")
    answer = until(lambda: result_after(browser.run(STATE)["cells"][1], 2), 60, "the second cell")
    equal(ast.literal_eval(answer), (1, sorted(again["rows"]), 1))
    return again["caption"]


def check_explorer_file(browser, work, caption):
    "The same run as one HTML file, opened from disk: the same clicks, and the same caption of the first epoch"
    from pclclip_nb.results.explorer import write_explorer

    browser.driver.get(write_explorer(work / "run", work / "run.html").as_uri())
    alone = click_dot(browser, 0)
    browser.shot("stand_alone")
    assert alone["epoch"] == "epoch 3 of 3" and alone["head"].startswith("cluster "), alone["head"]
    first = drag_slider(browser, 1, 0)
    equal((first["epoch"], first["caption"]), ("epoch 1 of 3", caption))
    equal(browser.errors(), [])


def check_this_program():
    "The functions above on toys: messages, waiting, errors of cells, the last screenshot"

    def message(kind, function, *args):
        try:
            function(*args)
        except kind as e:
            return str(e)
        raise AssertionError(f"no {kind.__name__}")

    assert "needs no-such-browser: on Debian" in message(FileNotFoundError, find_programs, "no-such-browser")
    values = iter([0, 0, 7])
    equal(until(lambda: next(values), 9, "the third"), 7)
    assert "waited 0 s for nothing" in message(TimeoutError, until, lambda: False, 0, "nothing")

    done = {"path": "toy.ipynb", "status": "idle", "cells": [{"count": 1, "outputs": []}, {"count": 2, "outputs": []}]}
    assert finished(done) and not finished(done | {"status": "busy"})
    assert not finished(done | {"cells": [{"count": 1, "outputs": []}, {"count": None, "outputs": []}]})
    error = {"output_type": "error", "ename": "ValueError", "evalue": "eps = 2"}
    failed = done | {"cells": [{"count": 1, "outputs": [error]}]}
    assert "toy.ipynb: ValueError: eps = 2" in message(AssertionError, finished, failed)

    class Toy:
        calls = []

        def shot(self, name):
            self.calls.append(name)

        def stop(self):
            self.calls.append("stop")

    def fail():
        with stopped_at_the_end(Toy(), Toy()):
            raise ZeroDivisionError

    message(ZeroDivisionError, fail)
    equal(Toy.calls, ["failed", "stop", "stop"])


def main():
    check_this_program()
    find_programs("chromium", "chromedriver")
    shots = ROOT / "runs/browser"
    shutil.rmtree(shots, ignore_errors=True)
    os.environ.pop("IN_TEST", None)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as tmp:
        work = copy_project(Path(tmp))
        lab = Lab(work)
        browser = Browser(shots)
        with stopped_at_the_end(browser, lab):
            timed(check_pages_run, browser, lab)
            timed(check_pages_saved, browser, lab, work)
            timed(check_explorer_opens, browser, lab, work)
            caption = timed(check_explorer_clicked, browser)
            timed(check_explorer_file, browser, work, caption)
    print("5 passed, 0 failed")


def timed(step, *args):
    "Run a step and print how long it took"
    began = time.perf_counter()
    result = step(*args)
    print(f"ok   {time.perf_counter() - began:6.1f}s  {step.__doc__}", flush=True)
    return result


if __name__ == "__main__":
    main()
