"""Test-time search about one question: strategies, selection, plans. It never sees a gold answer."""

from flywheel.search.run import search, smaller
from flywheel.search.tools import Tools

__all__ = ["Tools", "search", "smaller"]
