"""Our models in EleutherAI's lm-evaluation-harness, the optional extra [eval]."""

from __future__ import annotations

from typing import Any

import torch

from neox_native.data.tokenizers import Tokenizer
from neox_native.errors import UserError
from neox_native.evaluation.choices import fitted, pair
from neox_native.inference.generator import Generator, Limits
from neox_native.inference.sampling import Sampling
from neox_native.inference.score import Scorer, Window

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    raise UserError(
        "The tasks of lm-evaluation-harness need the package lm_eval, an optional extra: pip install -e '.[eval]'."
    ) from None

DEFAULT_ANSWER_TOKENS = 256


class HarnessModel(TemplateLM):
    """What the harness calls a model: log-likelihoods, and text until a stop string.

    On a mesh every rank runs the same harness on the same requests, so to the harness there is one process.
    """

    def __init__(self, generator: Generator, scorer: Scorer):
        super().__init__()
        self.generator, self.scorer = generator, scorer
        self.our_tokenizer: Tokenizer = generator.tokenizer
        self._device = torch.device("cpu")

    @property
    def eot_token_id(self) -> int:
        return self.our_tokenizer.eod_id

    @property
    def max_length(self) -> int:
        """Context of the model [tokens]."""
        return self.scorer.context

    @property
    def max_gen_toks(self) -> int:
        """Tokens of an answer, where a task does not say [tokens]."""
        return min(DEFAULT_ANSWER_TOKENS, self.max_length - 1)

    @property
    def tokenizer_name(self) -> str:
        return self.our_tokenizer.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.our_tokenizer.encode(string).tolist()

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return pair(self.our_tokenizer, context, continuation)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        asked = [fitted(context, continuation, self.max_length) for _, context, continuation in requests]
        scores = [(score.logprob, score.greedy) for score in self.scorer(asked)]
        for (strings, _, _), score in zip(requests, scores):
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, score)
        return scores

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        asked, counts = [], []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            found = [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            ]
            asked += [Window(context + predicted, len(predicted)) for context, predicted in found]
            counts.append(len(found))
        scores = iter(self.scorer(asked))
        totals = [sum(next(scores).logprob for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        answers: list[str] = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        for indices in alike.values():
            indices.sort(key=lambda index: -len(requests[index].args[0]))
            settings = requests[indices[0]].args[1]
            for first in range(0, len(indices), self.scorer.batch_size):
                batch = indices[first : first + self.scorer.batch_size]
                for index, answer in zip(batch, self._answers([requests[i].args[0] for i in batch], settings)):
                    answers[index] = answer
                    self.cache_hook.add_partial("generate_until", requests[index].args, answer)
        return answers

    def _answers(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        until = settings.get("until", [])
        limits = Limits(
            max_new_tokens=min(settings.get("max_gen_toks", self.max_gen_toks), self.max_length - 1),
            stops=[until] if isinstance(until, str) else until,
        )
        is_sampled = settings.get("do_sample", settings.get("temperature", 0.0) > 0)
        sampling = Sampling(
            temperature=settings.get("temperature", 1.0) if is_sampled else 0.0,
            top_k=settings.get("top_k", 0),
            top_p=settings.get("top_p", 1.0),
        )
        room = self.max_length - limits.max_new_tokens
        prompts = [tokens[-room:] for tokens in map(self.tok_encode, contexts)]
        return [row.text for row in self.generator.continue_tokens(prompts, sampling, limits)]


def evaluate_tasks(
    model: HarnessModel, names: list[str], include_path: str | None, limit: int | None, num_fewshot: int | None
) -> dict[str, Any]:
    """Metrics of the harness's tasks by name. Raises `UserError` for a name that is none.

    Args:
        include_path: a folder with more task files.
        limit: questions of each task; None takes all.
        num_fewshot: examples before each question; None takes what the task says.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise UserError(
            f"--tasks: lm-evaluation-harness has no task {', '.join(unknown)}; its own are listed by `lm_eval ls "
            "tasks`, others are found with --include-path, and a file of questions ends in .jsonl."
        )
    found = simple_evaluate(model, tasks=names, task_manager=manager, limit=limit, num_fewshot=num_fewshot, bootstrap_iters=0)
    return {
        task: {metric.removesuffix(",none"): value for metric, value in metrics.items() if metric != "alias"}
        for task, metrics in found["results"].items()
    }
