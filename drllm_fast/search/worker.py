"""Searching paths for prompts: many searches side by side, whose paths share forwards.

For each prompt the dense path is evaluated first, with the probes; then its search, and the control towards a wrong
answer, ask for a few paths at a time. A path that both ask for is run once.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

from drllm_fast.search.base import BlockWeights, Outcome
from drllm_fast.search.evaluator import PathEvaluator
from drllm_fast.search.grading import cut_at_stop, grade, grader_version
from drllm_fast.search.paths import LayerPath, dense_path, edits, encode, visits
from drllm_fast.search.rewards import Agreement, Evaluation, check_reward, reward, right_prediction, wrong_answer
from drllm_fast.search.searcher import Searcher, make_searcher
from drllm_fast.search.unit import Item, SearchConfig, UnitKey, UnitResult, prompt_hash

NEEDS_SCORES = ("margin", "loglik")


class SearchWorker:
    """Searches items on one evaluator; what a `drllm_fast.search.work.Worker` is.

    model_hash  of the store that the results go to, if there is one
    prior       as `priors.edit_prior` gives it, with `config.prior`
    together    prompts searched side by side
    """

    def __init__(
        self,
        evaluator: PathEvaluator,
        config: SearchConfig,
        *,
        model_hash: str = "",
        seed: int = 0,
        prior: Sequence[BlockWeights] | None = None,
        together: int = 16,
    ):
        self.evaluator, self.config, self.prior = evaluator, config, prior
        self.model_hash, self.seed, self.together = model_hash, seed, together

    def run(self, items: Sequence[Item]) -> Iterator[UnitResult]:
        for item in items:
            check_reward(self.config, item)
        waiting, active = deque(items), []
        while waiting or active:
            while waiting and len(active) < self.together:
                active.append(ItemSearch(waiting.popleft(), self))
            wanted = [search.ask() for search in active]
            before = self._visits()
            self._evaluate(active, wanted)
            run, alone = (after - old for after, old in zip(self._visits(), before, strict=True))
            for search, paths in zip(active, wanted, strict=True):  # shared forwards are shared out by their paths
                own = sum(map(visits, paths))
                search.visits_alone += own
                search.visits += run * own / alone if alone else 0
                search.tell()
            for search in [search for search in active if search.done]:
                active.remove(search)
                for choices in (search.item.choices, search.answers, search.answers[:1]):
                    self.evaluator.forget(search.item.prompt, choices)
                yield search.result()

    def _visits(self) -> tuple[int, int]:
        return self.evaluator.stats.visits, self.evaluator.stats.visits_alone

    def _evaluate(self, active: list[ItemSearch], wanted: list[list[LayerPath]]) -> None:
        """Evaluate the wanted paths of each search, in forwards shared by those that are alike."""
        busy = [(search, paths) for search, paths in zip(active, wanted, strict=True) if paths]
        choosing = [(s, p) for s, p in busy if s.item.choices is not None]
        requests = [(s.item.prompt, s.item.choices, p) for s, p in choosing]
        if self.config.reward == "kl":
            scored = [(scores.tolist(), kl.tolist()) for scores, kl in self.evaluator.measure_many(requests)]
        else:
            scored = [(scores.tolist(), [None] * len(scores)) for scores in self.evaluator.score_many(requests)]
        for (search, paths), (scores, divergence) in zip(choosing, scored, strict=True):
            for path, row, kl in zip(paths, scores, divergence, strict=True):
                prediction = str(max(range(len(row)), key=row.__getitem__))
                search.known[path] = Evaluation(prediction, tuple(row), kl)
        writing: dict[tuple, list[tuple[ItemSearch, list[LayerPath]]]] = {}
        for search, paths in busy:
            if search.item.choices is None:
                room = self.config.max_new_tokens or search.item.max_new_tokens
                writing.setdefault((room, search.item.stop), []).append((search, paths))
        for (room, stop), some in writing.items():
            answers = self.evaluator.greedy_many([(s.item.prompt, p) for s, p in some], room, stop=stop)
            for (search, paths), tokens in zip(some, answers, strict=True):
                scores, divergence = self._likelihoods(search, paths), self._divergence(search, paths)
                for path, answer, row, kl in zip(paths, tokens, scores, divergence, strict=True):
                    text = self.evaluator.tokenizer.decode(answer, skip_special_tokens=True)
                    search.known[path] = Evaluation(cut_at_stop(text, stop), row, kl)

    def _likelihoods(self, search: ItemSearch, paths: list[LayerPath]) -> list[tuple[float, ...] | None]:
        """Of a free answer, that of the right answer's tokens, and of the control's."""
        if self.config.reward not in NEEDS_SCORES:
            return [None] * len(paths)
        return [tuple(row) for row in self.evaluator.score_choices(search.item.prompt, search.answers, paths).tolist()]

    def rescore(self, search: ItemSearch) -> None:
        """Of a free answer, what is known already, now that the control has an answer as well."""
        paths = list(search.known)
        for path, row in zip(paths, self._likelihoods(search, paths), strict=True):
            search.known[path] = replace(search.known[path], scores=row)

    def _divergence(self, search: ItemSearch, paths: list[LayerPath]) -> list[float | None]:
        if self.config.reward != "kl":
            return [None] * len(paths)
        return self.evaluator.divergence(search.item.prompt, search.answers[:1], paths).tolist()


class _Aim:
    """A search of one item towards one answer: the right one, or a wrong one for the control."""

    def __init__(self, search: ItemSearch, target: str | None, seed: int):
        worker, item = search.worker, search.item
        self.config, self.known, self.target = worker.config, search.known, target
        self.right = right_prediction(item, target, lambda text, aimed: grade(worker.config.grader, text, aimed))
        if self.config.reward == "kl" and target is None:
            dense = search.known[search.dense].prediction
            self.right = right_prediction(item, dense, lambda text, aimed: text.strip() == str(aimed.answer).strip())
        if item.choices is None:
            self.choice = len(search.answers) - 1
        else:
            self.choice = int(item.answer if target is None else target)
        self.agreement = Agreement(self.config.agree if self.config.reward == "agreement" else 1)
        first = self.outcome(search.dense)
        self.agreement(first)
        self.searcher: Searcher = make_searcher(self.config, len(search.dense), first, seed, worker.prior)
        self.told = {search.dense: first}
        self.waiting: list[LayerPath] = []

    def outcome(self, path: LayerPath) -> Outcome:
        evaluation = self.known[path]
        right = self.right(evaluation.prediction)
        return Outcome(reward(self.config, evaluation, right, self.choice), right)

    def ask(self) -> list[LayerPath]:
        """Asks until there is something that is not known yet, and returns that."""
        while not self.searcher.done:
            self.waiting = self.searcher.ask(self.config.leaves)
            if missing := [path for path in self.waiting if path not in self.known]:
                return missing
            if not self.waiting:
                break
            self.tell()
        return []

    def tell(self) -> None:
        for path in self.waiting:
            self.told[path] = self.outcome(path)
            self.searcher.tell(path, self.agreement(self.told[path]))
        self.waiting = []


class ItemSearch:
    """The search of one item: its aims, and all that is known of its paths."""

    def __init__(self, item: Item, worker: SearchWorker):
        self.item, self.worker = item, worker
        self.key = UnitKey(item.task, item.id, prompt_hash(item), worker.model_hash, worker.config.hash(), worker.seed)
        # Not of the configuration: a search with another reward, or without a control, draws alike.
        self.rng = random.Random("|".join((str(worker.seed), self.key.task, self.key.item, self.key.prompt)))
        self.dense = dense_path(worker.evaluator.num_layers)
        self.known: dict[LayerPath, Evaluation] = {}
        single = edits(self.dense)
        self.probes = self.rng.sample(single, min(worker.config.probes, len(single)))
        self.aims: list[_Aim] = []
        self.answers = [f" {item.answer}"]  # the right one as a continuation, and the control's; without choices
        self.visits = 0.0
        self.visits_alone = 0
        self._begun = time.perf_counter()

    @property
    def done(self) -> bool:
        return bool(self.aims) and all(aim.searcher.done for aim in self.aims)

    def ask(self) -> list[LayerPath]:
        if not self.aims:
            return [self.dense, *self.probes]
        return list(dict.fromkeys(path for aim in self.aims for path in aim.ask()))

    def tell(self) -> None:
        if self.aims:
            for aim in self.aims:
                aim.tell()
            return
        config, seed = self.worker.config, self.rng.randrange(1 << 62)
        self.aims = [_Aim(self, None, seed)]
        if config.control and not self.aims[0].told[self.dense].correct:
            if (target := wrong_answer(self.item, self.known[self.dense].prediction, self.rng.choice)) is not None:
                if self.item.choices is None:
                    self.answers.append(f" {target}")
                    self.worker.rescore(self)
                self.aims.append(_Aim(self, target, seed))

    def result(self) -> UnitResult:
        aim, control = self.aims[0], self.aims[1] if len(self.aims) > 1 else None
        dense_right = aim.told[self.dense].correct
        best, scored = self._best(aim), len(self.item.choices or self.answers[:1])
        return UnitResult(
            key=self.key,
            prompt=self.item.prompt,
            choices=None if self.item.choices is None else list(self.item.choices),
            answer=str(self.item.answer),
            level=self.item.level,
            paths=[encode(path) for path in aim.told],
            rewards=[outcome.reward for outcome in aim.told.values()],
            correct=[outcome.correct for outcome in aim.told.values()],
            predictions=[self.known[path].prediction for path in aim.told],
            scores=None if self._unscored(aim) else [list(self.known[path].scores)[:scored] for path in aim.told],
            best=encode(best),
            kept=best != self.dense and (not dense_right or visits(best) < visits(self.dense)),
            control_target=None if control is None else control.target,
            control_reached=None if control is None else self._best(control) != self.dense,
            probes=[encode(path) for path in self.probes],
            probes_correct=[aim.outcome(path).correct for path in self.probes],
            forwards=len(self.known),
            visits=round(self.visits),
            visits_alone=self.visits_alone,
            grader="choice" if self.item.choices is not None else grader_version(self.worker.config.grader),
            seconds=time.perf_counter() - self._begun,
        )

    def _unscored(self, aim: _Aim) -> bool:
        return any(self.known[path].scores is None for path in aim.told)

    def _best(self, aim: _Aim) -> LayerPath:
        """The shortest correct path, of equally short ones that of the largest reward; the dense one if none is, or if
        too few agree."""
        right = [path for path, outcome in aim.told.items() if outcome.correct]
        if len(right) < aim.agreement.needed:
            return self.dense
        return min(right, key=lambda path: (visits(path), -aim.told[path].reward))
