"""Test-time search about one question: strategies, selection, plans. It never sees a gold answer."""
