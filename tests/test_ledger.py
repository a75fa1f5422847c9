"""The FLOPs of inference and training, by hand."""

from __future__ import annotations

from flywheel.ledger import Ledger, pairs


def flops(ledger: Ledger) -> float:
    return sum(row["flops"] for row in ledger.rows())


def test_a_token_attends_to_itself_and_all_before_it():
    assert pairs(0, 3) == 1 + 2 + 3 and pairs(2, 4) == 3 + 4
    assert pairs(0, 4) + pairs(4, 9) == pairs(0, 9) and pairs(5, 5) == 0


def test_inference_costs_its_weights_and_its_attention_but_nothing_that_was_cached():
    ledger = Ledger("sample", 1)
    ledger.charge("policy", "x", parameters=100, prompt=4, cached=2, generated=3, attention=8, attended=pairs(2, 7))
    assert flops(ledger) == 2 * 100 * 5 + 4 * 8 * (3 + 4 + 5 + 6 + 7)


def test_lora_spares_the_gradients_of_the_frozen_weights():
    whole, lora = Ledger("distill", 1), Ledger("distill", 1)
    whole.train("policy", "x", parameters=100, trained=100, tokens=10)
    lora.train("policy", "x", parameters=100, trained=4, tokens=10, attention=8, attended=pairs(0, 10))
    assert flops(whole) == 6 * 100 * 10  # Kaplan's 6N
    assert flops(lora) == (4 * 100 + 2 * 4) * 10 + 12 * 8 * 55
