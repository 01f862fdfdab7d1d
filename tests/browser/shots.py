"""A notebook as a reader sees it: real JupyterLab, driven in Chromium.

    python tests/browser/shots.py notebooks/00_start_here.ipynb OUT_DIR          # the stored outputs
    python tests/browser/shots.py --run notebooks/00_start_here.ipynb OUT_DIR    # run all cells first

writes the whole page, screen by screen, as PNGs for people to look at. JupyterLab works on a
copy, so the notebook itself is never touched. Nothing outside this machine is asked for anything.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from kvlab.course.kernel import kernel_environment

if TYPE_CHECKING:  # playwright may be missing; then only who runs this notices
    from playwright.sync_api import Page, Route

BROWSERS = ("chromium", "google-chrome", "chromium-browser", "chrome")
CHROMIUM = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"),
]
SETTINGS = {
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},  # cells out of sight are in the page too
}
READY = "n => document.querySelectorAll('.jp-Notebook .jp-Cell').length >= n && !document.querySelector('.jp-Spinner')"
STARTED = "() => [...document.querySelectorAll('.jp-InputArea-prompt')].some(e => /[*0-9]/.test(e.innerText))"
PROMPTS = "els => els.map(e => e.innerText.trim())"
EXTENT = """e => {  // below the last cell JupyterLab leaves a screen of empty space
    const last = [...e.querySelectorAll('.jp-Cell')].pop().getBoundingClientRect();
    return [Math.ceil(last.bottom - e.getBoundingClientRect().top + e.scrollTop), e.clientHeight];
}"""
SCROLLER = ".jp-NotebookPanel .jp-WindowedPanel-outer"


# --- JupyterLab ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: its address, ending in a slash, its token, and the folder that it serves."""

    url: str
    token: str
    folder: Path

    def page_of(self, notebook: str, mode: str = "lab") -> str:
        """Where a notebook opens: `mode` "lab" with menus and side bar, "doc" alone on the page."""
        return f"{self.url}{mode}/tree/{quote(notebook)}?reset&token={self.token}"

    def idle(self) -> bool:
        """Whether there are kernels, somebody listens to each, and all wait for work."""
        request = urllib.request.Request(f"{self.url}api/kernels", headers={"Authorization": f"token {self.token}"})
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                kernels = json.load(answer)
        except urllib.error.HTTPError:  # asked while a kernel starts, the server may answer 500
            return False
        return bool(kernels) and all(k["execution_state"] == "idle" and k["connections"] for k in kernels)

    def end_kernels(self) -> None:
        """End all kernels: `idle` waits for those of notebooks that are no longer open too."""
        headers = {"Authorization": f"token {self.token}"}
        address = f"{self.url}api/sessions"
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=30) as answer:
            sessions = json.load(answer)
        for session in sessions:
            end = urllib.request.Request(f"{address}/{session['id']}", headers=headers, method="DELETE")
            urllib.request.urlopen(end, timeout=30).close()


@contextlib.contextmanager
def jupyter_lab(notebooks: Sequence[Path]) -> Iterator[Lab]:
    """JupyterLab on a free port of this machine, serving copies of some notebooks, with settings of its own.

    Its kernels get the environment in which notebooks are built: an empty work folder, no settings of the user.
    """
    with tempfile.TemporaryDirectory(prefix="kvlab-lab-", ignore_cleanup_errors=True) as name:
        home = Path(name)
        folder = home / "notebooks"
        folder.mkdir()
        for path in notebooks:
            shutil.copy(path, folder)
        token = secrets.token_hex(16)
        with _server(home, folder, token) as port:
            yield Lab(f"http://127.0.0.1:{port}/", token, folder)


@contextlib.contextmanager
def _server(home: Path, folder: Path, token: str) -> Iterator[int]:
    """Start the server, wait until it listens, yield its port, end it and its kernels."""
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--port=0"]
    command.append(f"--ServerApp.root_dir={folder}")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")  # as in most containers
    log = home / "log.txt"
    with log.open("w") as file:
        server = subprocess.Popen(command, env=_environment(home, token), cwd=folder, stdout=file, stderr=file)
    try:
        yield _port_of(server, home / "runtime", log)
    finally:
        server.terminate()  # it ends its kernels before itself
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _environment(home: Path, token: str) -> dict[str, str]:
    """The server's environment: the kernels' one, and all of Jupyter's own folders under `home`."""
    environment = kernel_environment(home)
    environment |= {f"JUPYTERLAB_{name}_DIR": str(home / name.lower()) for name in ("SETTINGS", "WORKSPACES")}
    for plugin, values in SETTINGS.items():
        file = home / "settings" / f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    return environment | {"JUPYTER_TOKEN": token}


def _port_of(server: subprocess.Popen[bytes], runtime: Path, log: Path, patience: float = 120) -> int:
    """The port, from the file that the server writes once it listens."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and server.poll() is None:
        for file in runtime.glob("jpserver-*.json"):
            with contextlib.suppress(ValueError):  # half written
                return int(json.loads(file.read_text())["port"])
        time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()}")


# --- Chromium -----------------------------------------------------------------------------------
@contextlib.contextmanager
def browser_page(width: int = 1280, height: int = 900) -> Iterator[Page]:
    """A page of a headless Chromium that reaches this machine only."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, BROWSERS)), None)  # else the one that playwright downloaded
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=CHROMIUM)
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.route(lambda url: urlsplit(url).hostname != "127.0.0.1", _refuse)
            page.set_default_timeout(120_000)
            yield page
        finally:
            browser.close()


def _refuse(route: Route) -> None:
    route.abort()


def open_notebook(page: Page, lab: Lab, notebook: str, mode: str = "lab") -> None:
    """Open a notebook and wait until its cells are there and its kernel is ready."""
    page.goto(lab.page_of(notebook, mode), wait_until="domcontentloaded")
    cells = len(json.loads((lab.folder / notebook).read_text(encoding="utf-8"))["cells"])
    page.wait_for_function(READY, arg=cells)
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]')
    wait_until_idle(page, lab, patience=120)


def run_all(page: Page, lab: Lab, patience: float = 600) -> list[str]:
    """Run → Run All Cells; wait until nothing runs any more; return the cells' prompts, "[1]:" and so on."""
    choose(page, "Edit", "Clear Outputs of All Cells")
    choose(page, "Run", "Run All Cells")
    page.wait_for_function(STARTED)
    wait_until_idle(page, lab, patience)
    return prompts(page)


def wait_until_idle(page: Page, lab: Lab, patience: float) -> None:
    """Wait until page and server have agreed for two seconds that nothing runs: between two cells it only looks so."""
    deadline = time.monotonic() + patience
    quiet = 0
    while quiet < 5:
        if time.monotonic() > deadline:
            raise TimeoutError(f"cells are still running after {patience} s: {prompts(page)}")
        page.wait_for_timeout(400)
        quiet = quiet + 1 if lab.idle() and "[*]:" not in prompts(page) else 0


def choose(page: Page, menu: str, entry: str) -> None:
    """Choose an entry of the menu bar."""
    page.get_by_role("menuitem", name=menu, exact=True).click()
    page.get_by_text(entry, exact=True).click()


def prompts(page: Page) -> list[str]:
    """What stands beside the code cells."""
    found: list[str] = page.locator(".jp-CodeCell .jp-InputArea-prompt").evaluate_all(PROMPTS)
    return found


def saved(page: Page, lab: Lab, notebook: str) -> dict[str, Any]:
    """Save the open notebook and return what JupyterLab wrote."""
    path = lab.folder / notebook
    before = path.stat().st_mtime_ns
    page.keyboard.press("Control+s")
    for _ in range(100):
        if path.stat().st_mtime_ns != before:
            with contextlib.suppress(json.JSONDecodeError):  # half of it is written
                content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
                return content
        page.wait_for_timeout(100)
    raise AssertionError(f"JupyterLab does not save {notebook}")


# --- Pictures for people ------------------------------------------------------------------------
def screens(page: Page, folder: Path, stem: str) -> list[Path]:
    """Scroll through the open notebook and write a PNG of each screen; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    scroller = page.locator(SCROLLER).first
    total, step = scroller.evaluate(EXTENT)
    files = []
    for i, top in enumerate(range(0, total, max(step - 40, 1))):  # a little overlap, so that no line is cut twice
        scroller.evaluate("(e, top) => e.scrollTo(0, top)", top)
        page.wait_for_timeout(300)
        files.append(folder / f"{stem}_{i:02}.png")
        scroller.screenshot(path=files[-1])
    return files


def screenshot(notebook: Path, folder: Path, run: bool = False) -> list[Path]:
    """PNGs of a whole notebook, top to bottom, with its stored outputs or, with `run`, after running it."""
    with jupyter_lab([notebook]) as lab, browser_page() as page:
        open_notebook(page, lab, notebook.name, "lab" if run else "doc")
        if run:
            run_all(page, lab)
        return screens(page, folder, notebook.stem)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("folder", type=Path, help="where the PNGs go")
    parser.add_argument("--run", action="store_true", help="run all cells first")
    args = parser.parse_args()
    for file in screenshot(args.notebook, args.folder, args.run):
        print(file)


if __name__ == "__main__":
    main()
