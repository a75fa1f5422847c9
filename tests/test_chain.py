"""Claims about the laboratory's domain, problem set, tokenizer, corpus and seed model."""

import random
from collections import Counter

import pytest

from data.chain import corpus, domain, problems, tokenizer, unseen
from data.chain.check import SEED_MODEL, encode, select

TEXT = "Q 5 +3 *2 ?\nTry 5 +3 =8\n8 *2 =16\nAnswer 16"


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_the_derivation_is_the_only_right_solution():
    question = "5 +3 *2 -6"
    assert domain.derivation(question) == ["5 +3 =8", "8 *2 =16", "16 -6 =10", "Answer 10"]
    assert domain.parse_solution("5 +3 =8\n8 *2 =16\n16 -6 =10\nAnswer 10") == (domain.derivation(question)[:-1], "10")
    assert all(domain.right_so_far(question, domain.derivation(question)))
    # A step that is right in itself, but follows a wrong one, is not right so far.
    assert domain.right_so_far(question, ["5 +3 =9", "9 *2 =18"]) == [False, False]
    assert domain.step_is_right("9 *2 =18") and not domain.step_is_right("5 +3 =9") and not domain.step_is_right("5 +3")
    assert domain.parse_solution("5 +3 =8\nAnswer") == (["5 +3 =8"], None)


def test_facts_fall_into_their_classes_and_no_misconception_is_right():
    assert len(domain.FACTS) == domain.P * len(domain.OPS)
    counts = Counter(fact.class_.author for fact in domain.FACTS.values())
    for class_ in domain.CLASSES:
        assert counts[class_.author] / len(domain.FACTS) == pytest.approx(class_.share, abs=0.002)
    for fact in domain.FACTS.values():
        assert fact.right == domain.apply(fact.value, fact.op) != fact.misconception


def test_the_author_errs_as_declared():
    rng = random.Random(0)
    for class_ in domain.CLASSES:
        facts = [fact for fact in domain.FACTS.values() if fact.class_ == class_]
        said = [(fact, corpus.Author(rng).result(fact)) for fact in rng.choices(facts, k=8000)]
        assert sum(f.right == r for f, r in said) / 8000 == pytest.approx(class_.author, abs=0.02)
        wrong = [(f, r) for f, r in said if f.right != r]
        share = domain.MISCONCEPTION_SHARE + (1 - domain.MISCONCEPTION_SHARE) / (domain.P - 1)
        assert sum(f.misconception == r for f, r in wrong) / len(wrong) == pytest.approx(share, abs=0.1)


def test_the_problem_set_is_what_its_builder_makes_with_right_answers_and_disjoint_splits():
    built = problems.build()
    questions = [row["question"] for rows in built.values() for row in rows]
    assert len(questions) == len(set(questions)) == sum(problems.SIZES.values())
    for split, rows in built.items():
        assert problems.read(split) == rows
        for row in rows:
            assert row["split"] == split and row["answer"] == domain.answer_of(row["question"])
            assert row["k"] == len(row["question"].split()) - 1


def test_withheld_facts_are_needed_by_unseen_questions_alone():
    hidden, known = unseen.withheld()
    assert not hidden & known and len(hidden) > 50 and abs(len(hidden) - len(known)) <= 1
    files = unseen.build()
    texts = [row["question"] for rows in files.values() for row in rows]
    assert len(set(texts)) == len(texts) == sum(unseen.SIZES.values())
    for name, rows in files.items():
        for row in rows:
            facts = unseen.needed(row["question"])
            assert bool(facts & hidden) == (row["level"] == "unseen") and row["split"] == name
            assert row["level"] != "seen" or facts & known
    trained = {pair for row in files["train"] for pair in unseen.needed(row["question"])}
    assert len(trained) > 0.98 * (658 - len(hidden))  # the training questions hold nearly all the others


@pytest.mark.parametrize("split", problems.SIZES)
@pytest.mark.parametrize("n", [10, 16, 100, 150])
def test_every_prefix_of_a_split_is_balanced_over_k(split, n):
    counts = Counter(row["k"] for row in problems.read(split)[:n])
    assert max(counts.values()) - min(counts.get(k, 0) for k in range(1, domain.MAX_K + 1)) <= 1


def test_text_survives_the_tokenizer_and_splits_at_any_word(fast):
    ids = fast.encode(TEXT)
    assert fast.decode(ids) == TEXT and ids == encode(TEXT)
    assert len(ids) == 6 + 4 + 4 + 3  # no bos, no eos
    for cut in range(1, len(TEXT)):
        if TEXT[cut] in " \n" or TEXT[cut - 1] in " \n":
            assert fast.encode(TEXT[:cut]) + fast.encode(TEXT[cut:]) == ids
    for cut in range(len(ids) + 1):
        for part in (ids[:cut], ids[cut:]):
            assert fast.decode(part) == tokenizer.to_text([tokenizer.WORDS[i] for i in part])
            assert fast.encode(fast.decode(part)) == part


def test_special_tokens_and_labels_are_single_tokens(fast):
    assert fast.eos_token_id == tokenizer.ID["<eos>"] and fast.pad_token_id == tokenizer.ID["<pad>"]
    assert [len(fast.encode(word)) for word in ("ok", "no", "\n", "Try", "Check", "Again", "Answer")] == [1] * 7
    assert fast.decode(fast.encode(TEXT + "<eos>"), skip_special_tokens=True) == TEXT


def test_documents_are_encodable_and_learned_after_the_question():
    rng = random.Random(1)
    for _ in range(300):
        words, start = corpus.document(rng)
        assert words[start - 2 : start] == ["?", "\n"] and words[-1] == tokenizer.EOS
        assert words[start] in ("Try", "Check") and all(word in tokenizer.ID for word in words)
        assert len(words) < 1024


def test_a_mark_speaks_of_everything_since_the_one_before():
    """Without slips and misconceptions of the grader, marks agree with the lines they cover."""
    rng = random.Random(2)
    agree = total = 0
    for _ in range(1500):
        question = domain.make_question(rng, 4)
        lines = " ".join(corpus.graded_words(rng, question)).split(" \n ")
        good = True
        for line in lines:
            words = line.split()
            good = good and (words[0] == "Answer" or domain.step_is_right(" ".join(words[:3])))
            if words[-1] in ("ok", "no"):
                agree, total, good = agree + (good == (words[-1] == "ok")), total + 1, True
    assert 0.75 < agree / total < 0.95  # wrong in 5% to 25%, as the README declares


def test_no_attempt_of_a_thread_knows_of_gold():
    rng = random.Random(3)
    right = [0, 0]
    for _ in range(4000):
        author, question = corpus.Author(rng, repeats=rng.random()), domain.make_question(rng, 3)
        for i in range(2):
            lines, _ = author.attempt(question)
            right[i] += str(lines[-1].result) == domain.answer_of(question)
    assert abs(right[0] - right[1]) / 4000 < 0.03


def test_weighted_selection_sums_over_equal_answers():
    assert select(["1", "2", "2", None], [0.5, 0.3, 0.3, 9.0]) == "2"
    assert select([None], [1.0]) is None


def test_the_seed_model_is_small_and_loads_with_its_tokenizer():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert (SEED_MODEL / "model.safetensors").stat().st_size <= 10e6
    model, fast = AutoModelForCausalLM.from_pretrained(SEED_MODEL), AutoTokenizer.from_pretrained(SEED_MODEL)
    assert fast.encode(TEXT) == encode(TEXT) and model.config.vocab_size == len(tokenizer.WORDS)
    assert model.config.max_position_embeddings >= 1024 and model.config.eos_token_id == fast.eos_token_id
