"""Where several prompts come from, and what is said of a file that has none."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitwise_llm.cli.several import asked_prompts, read_prompts
from splitwise_llm.errors import RequestError


def test_a_prompt_per_line_blank_lines_apart_and_texts_of_several_lines_in_json(tmp_path: Path) -> None:
    plain, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    plain.write_bytes(b"One.\n\n  Two: \r\nthree")
    assert read_prompts(str(plain)) == ["One.", "  Two: ", "three"]
    lines.write_text('"One.\\nTwo."\n\n{"prompt": "three"}\n')
    assert read_prompts(str(lines)) == ["One.\nTwo.", "three"]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("p.txt", b"\n \n", "has no prompt; write one per line"),
        ("p.txt", b"caf\xe9", "not valid UTF-8"),
        ("p.jsonl", b'"one"\n{"prompt": 2}', 'line 2: expected a text in quotes, or an object with nothing but a "pr'),
        ("p.jsonl", b'{"prompt": "one", "seed": 3}', "line 1: expected"),
        ("p.jsonl", b'"one"\n\nOnce', "line 3 is no JSON"),
        ("p.jsonl", b'"\\ud800"', "not valid UTF-8"),
    ],
)
def test_bad_files_are_refused_by_line(name: str, data: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(data)
    with pytest.raises(RequestError, match=says):
        read_prompts(str(file))


def test_one_prompt_or_a_file_of_them_and_options_that_fit(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="give a file with one prompt per line"):
        read_prompts(str(tmp_path / "none"))
    for prompt, prompts in ((None, ""), ("text", "file")):
        with pytest.raises(RequestError, match="one of the two"):
            asked_prompts(prompt, prompts, None, None)
    with pytest.raises(RequestError, match="this is one prompt"):
        asked_prompts("text", "", 3, None)
    with pytest.raises(RequestError, match="a --journal is of one answer"):
        asked_prompts(None, "file", 3, tmp_path / "journal")
    assert asked_prompts("text", "", None, None) == ["text"]
