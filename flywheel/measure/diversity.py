"""How different a question's samples are: what a policy that is trained on its own answers may lose.

B-STaR (Zeng et al. 2024, arXiv 2412.17256) watches such figures round by round.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

from flywheel.records import Solution


def diversity(samples: Sequence[tuple[Solution, bool]], key: Callable[[str], object]) -> dict[str, float]:
    """Figures of one question; `samples`: its solutions, each with whether it is right.

    distinct_right: different right texts, white space aside. answer_entropy: of the distribution of answers, in nats; 0
    if all samples give the same one. Answers with one `key` are one, and so are solutions without an answer.
    """
    right = len({" ".join(s.text.split()) for s, correct in samples if correct})
    shares = [count / len(samples) for count in Counter(s.answer and key(s.answer) for s, _ in samples).values()]
    return {"distinct_right": right, "answer_entropy": -math.fsum(share * math.log(share) for share in shares)}
