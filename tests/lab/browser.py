"""A real browser for the tests of pages: chromium or Chrome, without a window and without a network."""

import contextlib
import shutil

import pytest

# What a reader would notice. Everything that is folded away is unfolded first.
LOOK = """
for (const part of document.querySelectorAll("details")) { part.removeAttribute("name"); part.open = true; }
const found = [], root = document.documentElement, name = e => e.outerHTML.slice(0, 60);
if (root.scrollWidth > innerWidth) found.push(`it scrolls sideways: ${root.scrollWidth} > ${innerWidth}`);
for (const figure of document.querySelectorAll("svg:not(.strip), table")) {
  const { width, height } = figure.getBoundingClientRect();
  if (!(width > 20 && height > 20)) found.push(`nothing to see: ${width} x ${height}: ${name(figure)}`);
}
for (const text of document.querySelectorAll("td, th, p, summary, pre, svg text")) {
  let size = parseFloat(getComputedStyle(text).fontSize);
  if (text.getScreenCTM) { const m = text.getScreenCTM(); size *= Math.hypot(m.a, m.b); }
  if (!(size >= 10.9)) found.push(`text of ${size} px: ${text.textContent}`);
}
for (const { name } of performance.getEntriesByType("resource"))
  if (!name.startsWith("data:")) found.push(`wants ${name}`);
return found;
"""


@contextlib.contextmanager
def open_browser():
    """A driver of selenium's; the test is skipped where there is no browser."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: requirements-dev.txt")
    chromium = shutil.which("google-chrome") or shutil.which("chromium")
    chromedriver = shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)  # root has no sandbox, and a container little shared memory
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    try:
        yield driver
    finally:
        driver.quit()


def open_page(driver, path, width):
    """Open a file in a window of that many pixels; one that is narrow is a phone's."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get(path.as_uri())


def look(driver, path, width):
    """What is wrong with a page at a width: a list that should be empty."""
    driver.get_log("browser")  # of the page before
    open_page(driver, path, width)
    return [*driver.execute_script(LOOK), *(entry["message"] for entry in driver.get_log("browser"))]
