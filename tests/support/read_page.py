"""The reader that docs/read.md gives to consumers."""

import re

from tests.support.project import REPOSITORY


def reader() -> str:
    """Return the page's first block."""
    found = re.search(r"```python\n(.*?)```", (REPOSITORY / "docs" / "read.md").read_text(), re.DOTALL)
    assert found is not None
    return found[1]
