"""The text tokenizer: words are single tokens, training is deterministic, every text encodes or raises.

pytest tests/test_text.py
"""

import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from worldvla.config import LayoutConfig
from worldvla.data.sample import prompt_texts
from worldvla.tokenizers.text import TextTokenizer

TASKS = ["pick up the red cube and put it in the basket", "open the drawer", "put the blue can on the plate"]
TEXTS = prompt_texts(LayoutConfig(), TASKS)


@pytest.fixture(scope="module")
def text() -> TextTokenizer:
    return TextTokenizer.train(TEXTS, 512)


def test_every_known_word_is_one_token(text: TextTokenizer):
    for sentence in TEXTS:
        words = sentence.replace("?", " ?").replace(".", " .").split()
        assert len(text.encode(sentence)) == len(words), sentence
    assert text.size <= 512


@pytest.mark.parametrize(
    "sentence",
    ["", "put the xylophone away!", "  two  spaces\n", "na\u00efve caf\u00e9 \u4f60\u597d \U0001f916"],
)
def test_any_text_round_trips(text: TextTokenizer, sentence: str):
    codes = text.encode(sentence)
    assert text.decode(codes) == sentence
    assert all(0 <= code < text.size for code in codes)


def test_training_depends_on_the_set_of_texts_alone(text: TextTokenizer):
    assert TextTokenizer.train([*TEXTS[::-1], *TEXTS, TEXTS[0]], 512).digest() == text.digest()
    assert TextTokenizer.train(TEXTS[:-1], 512).digest() != text.digest()
    assert TextTokenizer.train(TEXTS, 300).size == 300


def test_another_process_trains_the_same(text: TextTokenizer):
    code = f"from worldvla.tokenizers.text import TextTokenizer as T; print(T.train({TEXTS!r}, 512).digest())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == text.digest()


def test_save_and_load(text: TextTokenizer, tmp_path: Path):
    text.save(tmp_path / "text.json")
    loaded = TextTokenizer.load(tmp_path / "text.json")
    assert loaded.digest() == text.digest()
    assert loaded.encode(TEXTS[0]) == text.encode(TEXTS[0])
    assert [path.name for path in tmp_path.iterdir()] == ["text.json"]


@pytest.mark.parametrize("content", [None, "", "[1, 2]", '{"a": 1}', '{"model": {}}'])
def test_a_foreign_file_raises(tmp_path: Path, content: str | None):
    path = tmp_path / "text.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=r"text\.json"):
        TextTokenizer.load(path)


def test_a_vocabulary_under_256_raises():
    with pytest.raises(ValueError, match="256 bytes, got size 100"):
        TextTokenizer.train(TEXTS, 100)


@pytest.mark.parametrize("unknown", [None, "<unk>"])
def test_a_character_that_cannot_be_spelled_raises(tmp_path: Path, unknown: str | None):
    """A loaded file may have no byte alphabet; what it cannot spell must not vanish."""
    tokenizer = Tokenizer(models.BPE(unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    special = [] if unknown is None else [unknown]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["open the drawer"], trainer)
    tokenizer.save(str(tmp_path / "text.json"))
    text = TextTokenizer.load(tmp_path / "text.json")
    assert text.encode("open the door")
    with pytest.raises(ValueError, match="cannot spell"):
        text.encode("open the box")
