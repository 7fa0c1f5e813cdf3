"""Multiple choice: which continuation the model finds most probable.

A task file has one JSON object per line: {"context": "2 + 2 =", "choices": [" 4", " 5"], "answer": 0}.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from neox_native.data.tokenizers import Tokenizer
from neox_native.errors import UserError
from neox_native.inference.score import Scorer, Window


@dataclass(frozen=True)
class Question:
    """One line of a task file."""

    context: str
    choices: list[str]
    answer: int
    """Index of the right choice."""


def read_questions(path: Path) -> list[Question]:
    """The questions of a task file. Raises `UserError` naming the line that is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"The task file {path} cannot be read: {error.strerror}.") from None
    questions = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            question = Question(**json.loads(line))
            valid = isinstance(question.context, str) and all(isinstance(choice, str) and choice for choice in question.choices)
            valid = valid and 0 <= question.answer < len(question.choices)
        except (TypeError, ValueError):
            valid = False
        if not valid:
            raise UserError(
                f'{path}, line {number}: a question is {{"context": text, "choices": [texts], '
                '"answer": index of the right one}.'
            )
        questions.append(question)
    if not questions:
        raise UserError(f"The task file {path} holds no question.")
    return questions


def pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of a context and of what follows it, cut apart where the whole text is encoded.

    White space at the end of a context belongs to the continuation, as tokenizers join it to the next word; an empty
    context is the end of the document before.
    """
    kept = context.rstrip()
    context, continuation = kept, context[len(kept) :] + continuation
    if not context:
        return [tokenizer.eod_id], tokenizer.encode(continuation).tolist()
    whole, length = tokenizer.encode(context + continuation).tolist(), len(tokenizer.encode(context))
    return whole[:length], whole[length:]


def fitted(context: list[int], continuation: list[int], limit: int) -> Window:
    """A window over the end of both, at most `limit` + 1 tokens. Raises `UserError` where the continuation alone is
    longer."""
    if len(continuation) > limit:
        raise UserError(
            f"A continuation of {len(continuation)} tokens is longer than the model's context of {limit}; shorten it."
        )
    return Window((context + continuation)[-(limit + 1) :], len(continuation))


def accuracy(scorer: Scorer, tokenizer: Tokenizer, questions: list[Question]) -> dict[str, float | int]:
    """Share of questions whose right choice has the highest log-probability, as it is (`acc`) and per byte (`acc_norm`)."""
    asked = [
        fitted(*pair(tokenizer, question.context, choice), scorer.context)
        for question in questions
        for choice in question.choices
    ]
    scores = iter(scorer(asked))
    right = right_per_byte = 0
    for question in questions:
        logprobs = [next(scores).logprob for _ in question.choices]
        per_byte = [logprob / len(choice.encode()) for logprob, choice in zip(logprobs, question.choices)]
        right += logprobs.index(max(logprobs)) == question.answer
        right_per_byte += per_byte.index(max(per_byte)) == question.answer
    return {"acc": right / len(questions), "acc_norm": right_per_byte / len(questions), "questions": len(questions)}
