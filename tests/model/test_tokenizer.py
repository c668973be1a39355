"""Text goes to ids and back; streamed pieces join to the whole, characters never split."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitwise_llm.errors import ModelError
from splitwise_llm.model.checkpoint import locate
from splitwise_llm.model.tokenizer import TextStream, Tokenizer

TOKENIZER = Tokenizer(locate("bundled"))


@given(st.text(max_size=60))
def test_streamed_pieces_join_to_the_text(text: str) -> None:
    stream = TextStream(TOKENIZER)
    ids = TOKENIZER.encode(text)
    pieces = [stream.push(token) for token in ids]
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
    assert "".join(pieces) + stream.finish() == TOKENIZER.decode(ids)


def test_an_unfinished_character_comes_with_the_end() -> None:
    ids = TOKENIZER.encode("naïve 🙂")[:-1]
    stream = TextStream(TOKENIZER)
    text = "".join(stream.push(token) for token in ids) + stream.finish()
    assert text == TOKENIZER.decode(ids)


def test_a_directory_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="no tokenizer"):
        Tokenizer(tmp_path)
