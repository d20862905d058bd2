"""Debian's headless Chromium, and a newcomer's clicks on Dagster's pages."""

import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
WINDOW = (1360, 1100)
PATIENCE = 120.0
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    f"--window-size={WINDOW[0]},{WINDOW[1]}",
)


class Page:
    """A browser window on one deployment."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver, self.url = driver, url

    def open(self, path: str) -> None:
        """Go to a page of the deployment."""
        self.driver.get(f"{self.url}{path}")

    def text(self) -> str:
        """Return the text of the page."""
        return self.driver.find_element(By.TAG_NAME, "body").text

    def wait(self, true: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
        """Wait until a condition holds, and return its result."""
        deadline = time.monotonic() + patience
        while True:
            try:
                found = true()
            except StaleElementReferenceException:
                found = None
            if found:
                return found
            if time.monotonic() > deadline:
                raise AssertionError(f"waited in vain for {what}; the page shows:\n{self.text()[:3000]}")
            time.sleep(0.3)

    def shows(self, pattern: str, patience: float = PATIENCE) -> None:
        """Wait until the page shows a text."""
        self.wait(lambda: re.search(pattern, self.text()), f"{pattern!r}", patience)

    def click(self, xpath: str) -> None:
        """Click on the first visible, enabled element of an XPath, when there is one."""

        def pressed() -> bool:
            for one in self._found(xpath):
                if one.is_displayed() and one.is_enabled():
                    self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", one)
                    one.click()
                    return True
            return False

        self.wait(pressed, f"something to click: {xpath}")

    def button(self, text: str) -> None:
        """Click on a button by its text."""
        self.click(f"//*[self::button or self::a][contains(normalize-space(.), '{text}')]")

    def picture(self, path: Path) -> None:
        """Save a picture of the window."""
        # Whatever still fades in.
        time.sleep(1.5)
        self.driver.save_screenshot(str(path))

    def _found(self, xpath: str) -> list[WebElement]:
        return self.driver.find_elements(By.XPATH, xpath)


@contextmanager
def browser(url: str, profile: Path) -> Iterator[Page]:
    """Open a browser with an empty profile."""
    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.binary_location = str(CHROMIUM)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=str(DRIVER)))
    try:
        yield Page(driver, url)
    finally:
        driver.quit()
