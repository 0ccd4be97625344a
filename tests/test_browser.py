"""Notebooks in a real browser: Debian's Chromium, driven by Playwright, on a JupyterLab of its own.

`pip install -e '.[browser]'` and `apt-get install chromium`; elsewhere a skip says what is missing.
With `MDMRL_SCREENSHOTS` naming a folder, pictures are left there.
"""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from mdmrl.runs import read_rows
from mdmrl.study.notebooks import load_profile

FOLDER = Path(__file__).parents[1] / "notebooks"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MISSING = [] if importlib.util.find_spec("playwright") else ["the package playwright"]
MISSING += [] if CHROMIUM else ["chromium"]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"no browser: {' and '.join(MISSING)} missing"),
    pytest.mark.browser,
]
QUICK = {"01_masked_diffusion", "02_rewards"}  # these and the tour run with each change
PATIENCE = 300  # seconds for what takes one on an idle machine
NOTHING_EMPTY = """() => {
    const shown = document.querySelector(".jp-Notebook");
    const images = [...shown.querySelectorAll("img")];
    return images.every(image => image.complete && image.naturalWidth)
        && !/(Loading|Error displaying) widget/.test(shown.innerText);
}"""
UPDATES = 400  # more than the test waits for
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # cells out of sight are there too
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "docmanager-extension/plugin": {"autosave": False},
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab and its root, with the notebooks at the size of `smoke`."""
    root = tmp_path_factory.mktemp("lab")
    (root / "notebooks").mkdir()
    shutil.copytree(FOLDER.parent / "figures", root / "figures")  # a link would not be served
    for name, parameters in load_profile("smoke").items():
        notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        (place,) = [
            number
            for number, cell in enumerate(notebook.cells)
            if "parameters" in cell.metadata.get("tags", [])
        ]
        parameters = parameters | {"profile": "smoke"}
        if name == "00_tour":
            parameters["max_steps"] = UPDATES
        text = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
        notebook.cells.insert(place + 1, new_code_cell(text))
        nbformat.write(notebook, root / "notebooks" / f"{name}.ipynb")
    for name, settings in SETTINGS.items():
        path = root / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {f"JUPYTER_{kind}_DIR": str(root / kind.lower()) for kind in ("RUNTIME", "CONFIG")}
    own |= {"JUPYTERLAB_SETTINGS_DIR": str(root / "settings"), "MDMRL_ROOT": str(root)}
    own["IPYTHONDIR"] = str(root / "ipython")
    own["PYTHONPATH"] = os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--ServerApp.root_dir={root}", f"--port={port}", "--ServerApp.ip=127.0.0.1"]
    command += ["--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True"]
    with open(root / "log", "w") as log:
        said = {"stdout": log, "stderr": log, "env": os.environ | own, "cwd": root}
        server = subprocess.Popen(command, **said)
    try:
        deadline = time.monotonic() + PATIENCE
        while "is running at" not in (root / "log").read_text():
            assert server.poll() is None and time.monotonic() < deadline, (root / "log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/lab", root
    finally:
        server.terminate()  # which ends its kernels
        server.wait(60)


@pytest.fixture(scope="module")
def browser(lab):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_notebook(lab, browser):
    """Opens a notebook on a page of its own."""
    pages = []

    def opened(name):
        page = browser.new_page(viewport={"width": 1200, "height": 1500})
        page.set_default_timeout(1000 * PATIENCE)
        page.goto(f"{lab[0]}/workspaces/{name}/tree/notebooks/{name}.ipynb")
        pages.append(page)
        kernel_is_there(page)
        return page

    yield opened
    if pages:
        pages[0].evaluate("() => window.jupyterapp.serviceManager.sessions.shutdownAll()")
    for page in pages:
        page.close()


def kernel_is_there(page):
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    page.locator("#jp-main-statusbar", has_text="(ipykernel) | Idle").wait_for()


def command(page, name):
    page.evaluate("name => window.jupyterapp.commands.execute(name)", name)


def screenshot(page, name):
    if folder := os.environ.get("MDMRL_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png")


def pictures(page, name):
    """Of the whole notebook but its code, from top to bottom."""
    command(page, "notebook:hide-all-cell-code")
    panel = page.locator(".jp-Notebook .jp-WindowedPanel-outer")
    height, seen = panel.evaluate("panel => [panel.scrollHeight, panel.clientHeight]")
    for number, top in enumerate(range(0, height, seen)):
        panel.evaluate("(panel, top) => panel.scrollTo(0, top)", top)
        screenshot(page, f"{name}-{number}")


def write_notebook(root, name, source):
    notebook = new_notebook(cells=[new_code_cell(source)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, root / "notebooks" / f"{name}.ipynb")


def all_run(page):
    """Run all cells, and wait until the last has run without an error in any."""
    command(page, "notebook:run-all-cells")
    folded = ":not(.jp-Placeholder-prompt)"  # whose prompt stays empty
    prompts = page.locator(f".jp-CodeCell .jp-InputPrompt{folded}")
    deadline = time.monotonic() + 3 * PATIENCE
    while any(not re.match(r"\[\d+\]", said) for said in prompts.all_inner_texts()):
        assert not page.locator("[data-mime-type='application/vnd.jupyter.error']").count()
        assert time.monotonic() < deadline, prompts.all_inner_texts()
        time.sleep(0.5)
    assert not page.locator("[data-mime-type='application/vnd.jupyter.error']").count()


def updates_shown(page, state):
    """How many updates a view says there are, once it is in that state."""
    view = page.locator(".widget-html-content", has_text=f"{state}, ").first
    view.wait_for()
    said = re.search(rf"{state}, (\d+) of \d+ updates", view.inner_text())
    return int(said[1]) if said else 0


def grows(page):
    """Wait until a running view has gone on by two updates."""
    begun, deadline = updates_shown(page, "running"), time.monotonic() + PATIENCE
    while updates_shown(page, "running") < begun + 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_the_tour(lab, open_notebook):
    page, root = open_notebook("00_tour"), lab[1]
    all_run(page)

    player = page.locator(".jp-OutputArea", has_text="shade: early").first
    assert "step 0 of 4" in player.inner_text()
    slider = player.locator(".noUi-handle")
    before = player.locator(".widget-html-content").first.inner_text()
    slider.focus()
    slider.press("ArrowRight")
    player.get_by_text("step 1 of 4").wait_for()
    assert player.locator(".widget-html-content").first.inner_text() != before
    screenshot(page, "player")

    grows(page)
    bench = page.locator(".jp-OutputArea", has_text="forward passes").last
    bench.locator(".noUi-handle").first.focus()
    bench.locator(".noUi-handle").first.press("ArrowLeft")
    bench.get_by_text("8 forward passes").wait_for()  # while the policy is being trained
    screenshot(page, "bench")
    command(page, "docmanager:save")
    page.reload()
    kernel_is_there(page)
    grows(page)
    screenshot(page, "live")

    (folder,) = (root / "runs" / "smoke" / "grpo").iterdir()
    write_notebook(root, "other", f"from mdmrl.study.live import Live\nLive({str(folder)!r})")
    other = open_notebook("other")
    all_run(other)
    grows(other)
    screenshot(other, "other")

    clicked = time.time()
    page.get_by_role("button", name="stop").first.click()
    made = updates_shown(page, "stopped")
    rows = read_rows(folder / "metrics.jsonl")
    kept = folder / "checkpoints" / f"step-{made:06d}"
    assert len(rows) == made and (kept / "manifest.json").exists()
    assert kept.stat().st_mtime - clicked < 2 + rows[-1]["step_time"]
    assert updates_shown(other, "stopped") == made
    screenshot(page, "stopped")
    page.get_by_role("button", name="resume").first.click()
    grows(other)
    other.get_by_role("button", name="stop").first.click()
    assert updates_shown(page, "stopped") > made


BUSY = """
from mdmrl import GRPOConfig, load_policy, load_task, train_grpo
from mdmrl.study.live import watched

task, small = load_task("medcot"), {"max_completion_length": 16, "sampler": {"steps": 2}}
config = GRPOConfig(output_dir="busy", max_steps=400, save_steps=400, **small)
with watched(config.output_dir):
    train_grpo(load_policy("tiny-mdm"), task.rewards, task.rows("rl", 8), config)
"""


@pytest.mark.slow
def test_an_interrupt_stops_a_cell_that_trains_softly(lab, open_notebook):
    write_notebook(lab[1], "busy", BUSY.strip())
    page = open_notebook("busy")
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
    grows(page)
    screenshot(page, "busy")
    command(page, "kernelmenu:interrupt")
    page.get_by_text("stopped as asked after").first.wait_for()
    made = len(read_rows(lab[1] / "notebooks" / "busy" / "metrics.jsonl"))
    page.get_by_text(f"stopped, {made} of 400 updates").wait_for()
    assert (lab[1] / "notebooks" / "busy" / "checkpoints" / f"step-{made:06d}").exists()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(path.stem, marks=[] if path.stem in QUICK else pytest.mark.slow)
        for path in sorted(FOLDER.glob("*.ipynb"))[1:]
    ],
)
def test_a_notebook_runs(open_notebook, name):
    """Without an error, an image or a widget that is an empty box, or a bare `repr`."""
    page = open_notebook(name)
    all_run(page)
    page.wait_for_function(NOTHING_EMPTY)
    pictures(page, name)
    bare = page.locator(".jp-OutputArea-executeResult [data-mime-type='text/plain']")
    assert bare.all_inner_texts() == []
