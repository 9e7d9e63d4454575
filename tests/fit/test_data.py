# SPDX-License-Identifier: Apache-2.0
"""Windows of tokens: exact, seeded, apart from each other, and errors that name the source."""

import json

import numpy as np
import pytest

from vllm_mkv.fit.data import batches, leading_tokens, token_windows


def windows(text, tokenizer, n=4, context=32, **options):
    return token_windows([str(name) for name in text], tokenizer, num_windows=n, context=context, **options)


def test_windows_have_the_shape_asked_for_and_are_the_files_tokens(text_file, tiny_tokenizer):
    found = windows([text_file], tiny_tokenizer, 7, 63)
    assert found.shape == (7, 63)
    assert found.dtype == np.int64
    text = text_file.read_text()
    assert all(tiny_tokenizer.decode(window) in text for window in found)


def test_the_same_seed_gives_the_same_windows_and_another_gives_others(tmp_path, tiny_tokenizer):
    file = tmp_path / "long.txt"
    file.write_text(" ".join(str(number) for number in range(30_000)))
    a, b, c = (windows([file], tiny_tokenizer, 3, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_windows_do_not_overlap(tmp_path, tiny_tokenizer):
    file = tmp_path / "numbers.txt"
    file.write_text(" ".join(f"{number:05d}" for number in range(2000)))
    found = windows([file], tiny_tokenizer, 40, 32)
    numbers = [n for window in found for n in tiny_tokenizer.decode(window).split() if len(n) == 5]
    assert len(numbers) == len(set(numbers)) > 100


def test_sources_give_equal_shares_while_they_last(tmp_path, text_file, tiny_tokenizer):
    short = tmp_path / "short.txt"
    short.write_text("zzzzz " * 60)
    found = windows([short, text_file], tiny_tokenizer, 20, 64)
    of_short = [("zz" in tiny_tokenizer.decode(window)) for window in found]
    assert of_short[:4] == [True, False, True, False]
    assert 2 <= sum(of_short) < 8


def test_a_folder_is_all_its_text_files(tmp_path, text_file, tiny_tokenizer):
    (tmp_path / "inner").mkdir()
    for name in ("a.txt", "inner/b.txt"):
        (tmp_path / name).write_text(text_file.read_text()[:300])
    assert windows([tmp_path], tiny_tokenizer, 3).shape == (3, 32)


def test_a_local_dataset_is_read_by_its_text_column(tmp_path, text_file, tiny_tokenizer):
    rows = [{"id": str(i), "text": text_file.read_text()[i * 100 : i * 100 + 90]} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert windows([tmp_path], tiny_tokenizer, 6).shape == (6, 32)


def test_rows_of_a_dataset_are_shuffled_by_the_seed(tmp_path, tiny_tokenizer):
    rows = [json.dumps({"text": f"{number:05d} " * 40}) for number in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    a, b, c = (windows([tmp_path], tiny_tokenizer, 5, 32, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_a_folder_without_text_is_not_said_to_be_missing(tmp_path, tiny_tokenizer):
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    with pytest.raises(ValueError, match=rf"^{tmp_path} holds no .txt files, and no dataset could be read from it"):
        windows([tmp_path], tiny_tokenizer)


def test_a_dataset_without_one_text_column_is_refused(tmp_path, tiny_tokenizer):
    (tmp_path / "rows.jsonl").write_text('{"question": "who", "answer": "he"}\n')
    with pytest.raises(ValueError, match=r"no column `text`.*question.*answer"):
        windows([tmp_path], tiny_tokenizer)


class WithBos:
    """A tokenizer that begins every text with token 1, as Llama's does."""

    eos_token_id = None

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [1] * add_special_tokens + [ord(character) for character in text]}


def test_windows_begin_as_the_tokenizer_begins_a_text(text_file, tiny_tokenizer):
    assert leading_tokens(tiny_tokenizer) == []
    assert leading_tokens(WithBos()) == [1]
    found = windows([text_file], WithBos(), 5, 17)
    assert (found[:, 0] == 1).all()
    assert (found[:, 1:] != 1).all()


def test_fewer_windows_are_the_first_of_more(tmp_path, text_file, tiny_tokenizer):
    short = tmp_path / "short.txt"
    short.write_text("zzzzz " * 60)
    few, many = (windows([short, text_file], tiny_tokenizer, n, 64) for n in (5, 30))
    assert np.array_equal(few, many[:5])


def test_an_end_of_text_token_stands_between_documents_and_nowhere_else(tmp_path, text_file, tiny_tokenizer):
    words = text_file.read_text().split()
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(" ".join(words[:50]))
    tokens = windows([tmp_path], tiny_tokenizer, 8, 32).flatten().tolist()
    document = tiny_tokenizer(" ".join(words[:50]), add_special_tokens=False)["input_ids"]
    expected = [*document, tiny_tokenizer.eos_token_id] * 4
    assert len(document) < 8 * 32
    assert tokens == expected[: 8 * 32]


def test_batches_cover_all_windows():
    rows = np.arange(14).reshape(7, 2)
    parts = list(batches(rows, 3))
    assert [len(part) for part in parts] == [3, 3, 1]
    assert np.array_equal(np.concatenate(parts), rows)


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("missing.txt", None, "there is no file .*missing.txt"),
        ("empty.txt", b"", "empty.txt is empty"),
        ("blank.txt", b" \n\n", "blank.txt is empty"),
        ("latin.txt", "caf\xe9 ".encode("latin-1") * 99, "latin.txt is not UTF-8 .*iconv"),
        ("short.txt", b"too short", "short.txt is shorter than one window of 32 tokens"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text_file, tiny_tokenizer, name, content, reason):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        windows([text_file, tmp_path / name], tiny_tokenizer)


def test_too_little_text_says_how_much_there_is(text_file, tiny_tokenizer):
    with pytest.raises(ValueError, match=r"text.txt: \d+ windows of 32 tokens, and 100000 are needed.*--tokens"):
        windows([text_file], tiny_tokenizer, 100_000)


def test_no_text_and_no_context_are_refused(text_file, tiny_tokenizer):
    with pytest.raises(ValueError, match="no text to read"):
        windows([], tiny_tokenizer)
    with pytest.raises(ValueError, match="nothing to predict"):
        windows([text_file], tiny_tokenizer, context=1)
