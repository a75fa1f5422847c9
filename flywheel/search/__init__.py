"""Test-time search on one question: strategies, answer selection, plans. It never sees a gold answer."""
