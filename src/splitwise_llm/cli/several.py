"""Several prompts of one command: where they come from, and how their answers are told. Who answers, it is given."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from splitwise_llm.cli.options import keep_records, note, read_prompt, valid_text, write_json
from splitwise_llm.errors import RequestError, SplitwiseError

if TYPE_CHECKING:
    from splitwise_llm.engine.generation import Generation

IN_FLIGHT = 4
"""Under way at a time, unless said otherwise: so many explain EdgeShard's published figures (docs/pipelines.md)."""


def asked_prompts(prompt: str | None, prompts: str, in_flight: int | None, journal: Path | None) -> list[str]:
    """The prompt, or those of a file. Raises RequestError."""
    if (prompt is None) == (not prompts):
        raise RequestError("give a prompt, or --prompts FILE with one per line; one of the two")
    if prompt is not None:
        if in_flight is not None:
            raise RequestError("--in-flight says how many of --prompts FILE are under way; this is one prompt")
        return [read_prompt(prompt)]
    if journal is not None:
        raise RequestError("a --journal is of one answer; with --prompts leave it out, or ask for one prompt at a time")
    return read_prompts(prompts)


def read_prompts(file: str) -> list[str]:
    """One per line, blank lines apart; of a .jsonl file a JSON text each, or an object with a `prompt`. Raises
    RequestError that names the line."""
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        lines = data.decode().split("\n")
    except OSError as error:
        raise RequestError(f"--prompts {file}: {error.strerror}; give a file with one prompt per line") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"--prompts {file} is not valid UTF-8 ({error}); convert it with iconv -t UTF-8") from None
    as_json = file.endswith(".jsonl")
    found = [
        _from_json(line, f"--prompts {file}, line {number}") if as_json else line.removesuffix("\r")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise RequestError(f"--prompts {file} has no prompt; write one per line")
    return found


def _from_json(line: str, where: str) -> str:
    try:
        said = json.loads(line)
    except ValueError as error:
        raise RequestError(f'{where} is no JSON ({error}); write a text in quotes, or {{"prompt": "..."}}') from None
    text = said.get("prompt") if isinstance(said, dict) else said
    if not isinstance(text, str) or (isinstance(said, dict) and len(said) > 1):
        raise RequestError(f'{where}: expected a text in quotes, or an object with nothing but a "prompt"')
    return valid_text(text)


async def show_answers(
    begin: Callable[[int], Generation],
    count: int,
    in_flight: int,
    json_file: Path | None,
    quiet: bool,
    unsaid: Sequence[str],
    records_file: Path | None = None,
) -> None:
    """Print each answer whole, with its number from 1, as it is complete, and in the end what all took together. Raises
    the first error, once the others are answered."""
    from splitwise_llm.engine.flight import Flight, idling

    def tell(kind: str, text: str, of: str = "") -> None:
        if not quiet and kind not in unsaid:
            note(f"{of}[{kind}] {text}")

    def begun(number: int) -> Generation:
        generation = begin(number)
        generation.on_event = partial(tell, of=f"[{number + 1}] ")
        return generation

    flight = Flight(begun, count, min(in_flight, count), tell)
    failed: dict[int, SplitwiseError] = {}
    records = {}
    async with aclosing(flight.answers()) as answers:
        async for answer in answers:
            if answer.error is not None:
                failed[answer.number] = answer.error
                note(f"[{answer.number + 1}] failed: {answer.error}")
            elif answer.record is not None:
                records[answer.number] = answer.record
                keep_records(records_file, [answer.record])
                print(f"[{answer.number + 1}] {answer.record.text}", flush=True)
    done = [records[number] for number in sorted(records)]
    tokens = sum(len(record.token_ids) for record in done)
    per_s, idle = tokens / flight.seconds if flight.seconds else 0.0, idling(done)
    write_json(
        json_file,
        {
            "answers": [{"number": number + 1, **records[number].to_dict()} for number in sorted(records)],
            "failed": {str(number + 1): str(error) for number, error in sorted(failed.items())},
            "in_flight": flight.room, "tokens": tokens, "seconds": flight.seconds, "tokens_per_s": per_s,
            "slowest_machine": idle.machine, "bubble_share": idle.bubble_share,
        },
    )  # fmt: skip
    if not quiet and done:
        where = " | ".join(sorted({record.partition for record in done}))
        emulated = " (emulated)" if any(record.is_emulated for record in done) else ""
        note(
            f"[{where}] {len(done)} answers, {flight.room} in flight: {tokens} tokens in {flight.seconds:.1f} s, "
            f"{per_s:.1f} tokens/s; {idle.machine} computed most and idled {100 * idle.bubble_share:.0f} %{emulated}"
        )
    if failed:
        raise failed[min(failed)]
