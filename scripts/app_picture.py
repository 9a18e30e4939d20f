"""A picture of the page that `surgery app` opens: `python -m surgery.scripts.app_picture DIR --text "…" --out app.png`.

Needs chromium, chromedriver and selenium (extra `dev`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.errors import MissingDependency
from surgery.scripts import options
from surgery.scripts.loading import Machine

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
)


@contextmanager
def browser(width: int, height: int, *, dark: bool = False) -> Iterator[Any]:
    """A headless Chromium with a window of that many points.

    Raises:
        MissingDependency: If there is none, or no selenium to steer it.
    """
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError as error:
        raise MissingDependency('a browser is steered by selenium: pip install "bypass-surgery[dev]"') from error
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        raise MissingDependency("chromium and chromedriver are not installed")
    settings = webdriver.ChromeOptions()
    settings.binary_location = program
    for flag in FLAGS:
        settings.add_argument(flag)
    window = webdriver.Chrome(options=settings, service=Service(driver))
    try:
        resize(window, width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield window
    finally:
        window.quit()


def resize(window: Any, width: int, height: int) -> None:
    """Give the page that many points, as a phone has them where it is narrow."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def main(
    directory: options.DirectoryArgument,
    text: Annotated[str | None, typer.Option("--text", help="What to type.")] = None,
    image: Annotated[Path | None, typer.Option("--image", help="What to drop.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Picture to write.")] = Path("app.png"),
    width: Annotated[int, typer.Option("--width", help="Points; 390 is a phone.")] = 1100,
    dark: Annotated[bool, typer.Option("--dark", help="A dark page.")] = False,
    budget: Annotated[float | None, typer.Option("--budget", help="Per cent that is typed beside the slider.")] = None,
) -> None:
    """Give the page an input, run it, and take a picture."""
    from surgery.scripts.explore import build

    gated, loaded = Machine("cpu").load_converted(directory, None)
    page = build(gated, loaded, directory.name)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", server_port=None)
    try:
        with browser(width, 900, dark=dark) as window:
            window.get(address)
            run(window, text, image, budget)
            resize(window, width, window.execute_script("return document.documentElement.scrollHeight"))
            out.parent.mkdir(parents=True, exist_ok=True)
            window.save_screenshot(str(out))
    finally:
        page.close()


def run(window: Any, text: str | None, image: Path | None, budget: float | None = None) -> None:
    """Type or drop the input, set the budget, press the button, and wait for what it says."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    wait = WebDriverWait(window, 120)
    if text is not None:
        wait.until(lambda w: w.find_elements(By.CSS_SELECTOR, "textarea"))[0].send_keys(text)
    if image is not None:
        wait.until(lambda w: w.find_elements(By.CSS_SELECTOR, "input[type=file]"))[0].send_keys(str(image.resolve()))
        wait.until(lambda w: w.find_elements(By.CSS_SELECTOR, "img[src*='/file=']"))
    if budget is not None:
        number = wait.until(lambda w: w.find_elements(By.CSS_SELECTOR, "#budget input[type=number]"))[0]
        number.send_keys(Keys.CONTROL, "a")
        number.send_keys(f"{budget:g}", Keys.TAB)
    wait.until(lambda w: w.find_elements(By.CSS_SELECTOR, "#run"))[0].click()
    wait.until(lambda w: "of dense" in w.find_element(By.CSS_SELECTOR, "#summary").text)


if __name__ == "__main__":
    typer.run(main)
