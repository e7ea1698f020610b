"""A real browser for the tests of pages: chromium or Chrome, without a window and without a network."""

import contextlib
import shutil

import pytest

LOOK = """
for (const part of document.querySelectorAll("details")) part.open = true;
const found = [], root = document.documentElement;
if (root.scrollWidth > innerWidth) found.push(`it scrolls sideways: ${root.scrollWidth} > ${innerWidth}`);
for (const part of document.querySelectorAll("img, table, .frames")) {
  const { width, height } = part.getBoundingClientRect();
  if (!(width > 20 && height > 20)) found.push(`nothing to see: ${part.outerHTML.slice(0, 60)}`);
}
for (const text of document.querySelectorAll("td, th, p, span, pre"))
  if (!(parseFloat(getComputedStyle(text).fontSize) > 10.9)) found.push(`small text: ${text.textContent}`);
for (const { name } of performance.getEntriesByType("resource"))
  if (!name.startsWith("data:")) found.push(`wants ${name}`);
return found;
"""


@contextlib.contextmanager
def open_browser():
    """Yield a driver of selenium's; skip the test where there is no browser."""
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


def look(driver, path, width):
    """Open a page in a window `width` pixels wide; return what a reader would complain of."""
    driver.get_log("browser")  # of the page before
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get(path.as_uri())
    return [*driver.execute_script(LOOK), *(entry["message"] for entry in driver.get_log("browser"))]
