"""How different a question's samples are: what a policy that is trained on its own answers may lose.

B-STaR (Zeng et al. 2024, arXiv 2412.17256) watches such figures round by round.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from flywheel.records import Solution


def diversity(samples: Mapping[str, Sequence[Solution]], correct: Mapping[str, bool]) -> dict[str, float]:
    """Means over the questions; `samples`: solutions by question, `correct`: by solution id.

    distinct_right: different right texts, white space aside. answer_entropy: of the distribution of answers, in nats; 0
    if all samples give the same one. Solutions without an answer count as one answer.
    """
    right, entropy = 0, 0.0
    for solutions in samples.values():
        right += len({" ".join(s.text.split()) for s in solutions if correct[s.id]})
        shares = [count / len(solutions) for count in Counter(s.answer for s in solutions).values()]
        entropy -= math.fsum(share * math.log(share) for share in shares)
    return {"distinct_right": right / len(samples), "answer_entropy": entropy / len(samples)}
