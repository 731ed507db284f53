"""Evaluate during training: answer held-out prompts and verifiable instructions, score, log and store the answers.

    held_out = load_conversations("held_out.jsonl")
    evaluation = EvaluationCallback(trainer, template, held_out)
    trainer.add_callback(evaluation)

`trainer` is a `SFTTrainer`, which adds this callback itself, or any `transformers.Trainer` of a causal language model.

The evaluations before the first step and of the final model ask every question. Intermediate ones ask only the first
questions, as many as fit into `eval_answer_share` of the training time. Questions are split among the processes. The
model is restored after generation (inference/eval_mode.py) and no random number is drawn, so training computes the
same bits with and without this callback.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from operator import itemgetter
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft_pipeline.arguments import SFTArguments
from sft_pipeline.config import get_output_dir
from sft_pipeline.data.messages import Conversation, add_system_prompt, list_questions, split_answer
from sft_pipeline.data.splits import alternate
from sft_pipeline.data.template import Template
from sft_pipeline.evaluation.metrics.instruction_following import sample_instructions
from sft_pipeline.evaluation.metrics.registry import TOOL_CALLS_MATCHED
from sft_pipeline.evaluation.metrics.words import count_utf8_bytes
from sft_pipeline.evaluation.step_results import (
    BEST_FILE,
    AnswerRow,
    EvalPrompt,
    StepResults,
    build_table_row,
    compute_changes,
    compute_held_out_metrics,
    compute_set_changes,
    compute_table_metrics,
    get_step_file,
    join_answers,
    load_earlier_results,
)
from sft_pipeline.inference.answers import Answer, answer_prompts
from sft_pipeline.inference.eval_mode import use_bf16_weights
from sft_pipeline.runs.output_dir import EVALUATION_DIR
from sft_pipeline.training.sharded_answers import ShardedAnswerer, is_sharded
from sft_pipeline.training.trackers import read_last_tracked_step, send_table
from sft_pipeline.training.trainer import SupervisedTrainer
from sft_pipeline.utils.constants import IGNORED
from sft_pipeline.utils.errors import SFTError

# The trainer logs these as eval_loss, eval_perplexity and eval_token_accuracy.
LOGGED_BY_TRAINER = ("nll_nats_per_token", "perplexity", "token_accuracy")
INITIAL_QUESTIONS = 8  # asked by an intermediate evaluation while the cost of a question has not been measured


class EvaluationCallback(TrainerCallback):
    """Answer questions at every evaluation of `trainer`.

    held_out: conversations, each ending with a reference answer, or several sets of them by their names; the first
    `num_answers` questions of `list_questions` are asked, of each set, and `num_instructions` of the built-in
    instructions. system_prompt: for conversations without one.
    eval_answer_share: see AnswerBudget.

    `evaluations` holds the results so far, in order and on every process; `sharded` answers for a sharded model.
    """

    def __init__(
        self,
        trainer: Trainer,
        template: Template,
        held_out: Sequence[Conversation] | Mapping[str, Sequence[Conversation]] = (),
        *,
        system_prompt: str | None = None,
        num_answers: int = SFTArguments.num_answers,
        num_instructions: int = SFTArguments.num_instructions,
        max_new_tokens: int = SFTArguments.max_new_tokens,
        eval_answer_share: float = SFTArguments.eval_answer_share,
    ) -> None:
        self.trainer, self.template, self.max_new_tokens = trainer, template, max_new_tokens
        sets: Mapping[Any, Sequence[Conversation]] = held_out if isinstance(held_out, Mapping) else {None: held_out}
        self.set_names = [name for name in sets if name is not None]
        self.questions = build_questions(sets, num_answers, num_instructions, system_prompt)
        self.folder = get_output_dir(trainer.args) / EVALUATION_DIR
        self.evaluations: list[StepResults] = []
        self._budget = AnswerBudget(eval_answer_share)
        # Now, before the model is sharded.
        answers = bool(self.questions or getattr(trainer.args, "eval_tasks", ()))
        self.sharded = ShardedAnswerer(trainer) if answers and is_sharded(trainer) else None
        self._training_ended = False
        self._step_start = 0.0

    @property
    def first(self) -> StepResults | None:
        """The evaluation at step 0."""
        return next((results for results in self.evaluations if results.step == 0), None)

    def compare_with_start(self) -> dict[str, Any]:
        """Return the metrics of the last evaluation, their changes since step 0, and the answers of both."""
        first, last = self.first, self.evaluations[-1] if self.evaluations else None
        return {
            "metrics": last and last.metrics,
            "before_and_after": compute_changes(first, last) if first and last else {},
            "answers": join_answers(first, last) if last else [],
            **({"sets": compute_set_changes(first, last)} if last and last.sets else {}),
        }

    def is_complete(self, step: int) -> bool:
        """Whether the last evaluation was at `step` and asked every question."""
        return bool(self.evaluations) and self.evaluations[-1].step == step and self.evaluations[-1].complete

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Load the evaluations up to the checkpoint of a resumed run, and log those the trackers lack."""
        earlier = load_earlier_results(self.folder, state.global_step) if state.is_world_process_zero else None
        [self.evaluations] = broadcast_object_list([earlier])
        self._training_ended = False
        if self.sharded:
            self.sharded.log_choice()
        last_tracked_step = read_last_tracked_step(args)
        for results in self.evaluations:
            self._budget.restore(results)
            if state.is_world_process_zero and results.step > last_tracked_step:
                send_table(results.table, self.trainer, results.step)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._step_start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._budget.training_seconds += time.perf_counter() - self._step_start

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._training_ended = True

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Answer, score, log and store. Called inside `trainer.evaluate`, whose time does not count as training.

        Of rows that a program evaluates in place of the held-out ones only the trainer's metrics are known.
        """
        if getattr(self.trainer, "evaluates_other_rows", False):
            return
        ask_all = state.global_step == 0 or self._is_final_model(args, state)
        questions = self.questions if ask_all else select_first(self.questions, self._get_question_count())
        start = time.perf_counter()
        answers = self._generate_answers(model, questions)
        seconds = time.perf_counter() - start
        self._budget.add_cost(len(questions), seconds, charge=not ask_all)
        best_step = state.best_global_step if self._training_ended and args.load_best_model_at_end else None
        step = state.global_step if best_step is None else best_step
        table = [build_table_row(self.template, question, answer) for question, answer in zip(questions, answers)]
        if self.set_names:
            table = [{"set": question.held_out_set, **row} for question, row in zip(questions, table)]
        results = self._build_results(step, seconds, table)
        self.evaluations.append(results)
        self._log_metrics(results)
        if state.is_world_process_zero:
            results.write(self.folder / (get_step_file(step) if best_step is None else BEST_FILE))
            send_table(results.table, self.trainer, state.global_step)
            if self.questions and not args.disable_tqdm:
                tqdm.write(f"step {step}: {describe_results(results, len(self.questions))}")
                for name, part in results.sets.items():
                    if part["metrics"]["answers"]:
                        tqdm.write(f"step {step}, {name}: {describe_answers(part['metrics'])}")

    def _is_final_model(self, args: TrainingArguments, state: TrainerState) -> bool:
        """Whether training is over. After the last step the best model may still have to be loaded."""
        return self._training_ended or (state.global_step >= state.max_steps and not args.load_best_model_at_end)

    def _get_question_count(self) -> int:
        """Return the count that process 0 computes, since the clocks of the processes differ."""
        [count] = broadcast_object_list([self._budget.count_questions()])
        return count

    def _generate_answers(self, model: PreTrainedModel, questions: list[EvalPrompt]) -> list[Answer]:
        """Return the answers to all questions, in order, on every process.

        Each process answers a share of them; a sharded model that no process has room for answers all of them on each.
        """
        if self.sharded is None:
            is_bf16 = questions and self.trainer.accelerator.mixed_precision == "bf16"
            with use_bf16_weights(model) if is_bf16 else nullcontext():
                return self._divide_questions(model, questions)
        if not questions:
            return []
        if self.sharded.fits():
            with self.sharded.gather(model) as whole:
                return self._divide_questions(whole, questions)
        with self.sharded.keep_in_step(model):
            return self._generate_local_answers(model, questions)

    def _divide_questions(self, model: PreTrainedModel, questions: list[EvalPrompt]) -> list[Answer]:
        """Answer a share of the questions on each process; return all answers, in order, on every process."""
        indices = range(self.trainer.args.process_index, len(questions), self.trainer.args.world_size)
        answers = self._generate_local_answers(model, [questions[index] for index in indices])
        return [answer for _, answer in sorted(gather_object(list(zip(indices, answers))), key=itemgetter(0))]

    def _generate_local_answers(self, model: PreTrainedModel, questions: list[EvalPrompt]) -> list[Answer]:
        """Answer on this process. If the model cannot generate, training goes on and every row gets the error."""
        if not questions:
            return []
        try:
            prompts = [question.conversation for question in questions]
            disable_tqdm = self.trainer.args.disable_tqdm or not self.trainer.is_world_process_zero()
            return answer_prompts(model, self.template, prompts, self.max_new_tokens, disable_tqdm=disable_tqdm)
        except SFTError as error:
            return [Answer("", False, 0, str(error))] * len(questions)

    def _build_results(self, step: int, seconds: float, table: list[AnswerRow]) -> StepResults:
        complete, held_out, row_bytes = len(table) == len(self.questions), dict[str, list[float]](), list[int]()
        set_rows: Mapping[str, Any] = {}
        if isinstance(self.trainer, SupervisedTrainer):  # only it has the loss of each row
            held_out = dict(zip(("nll_nats", "tokens", "correct"), self.trainer.row_loss_sums.T.tolist(), strict=True))
            set_rows, row_bytes = self.trainer.eval_sets, self._row_bytes
        sets = {
            name: self._build_set_results(name, held_out, row_bytes, [*map(int, set_rows.get(name, ()))], table)
            for name in self.set_names
        }
        metrics = compute_table_metrics(table)
        if held_out:
            metrics = compute_held_out_metrics(held_out, sum(row_bytes)) | metrics
        return StepResults(step, complete, seconds, metrics, held_out, sum(row_bytes), table, sets)

    def _build_set_results(
        self, name: str, held_out: dict[str, list[float]], row_bytes: list[int], rows: list[int], table: list[AnswerRow]
    ) -> dict[str, Any]:
        """Return the entry of a held-out set in `StepResults.sets`. rows: the indices of its rows in `held_out`."""
        utf8_bytes = sum(row_bytes[row] for row in rows)
        metrics = compute_table_metrics([row for row in table if row["set"] == name])
        del metrics["instructions"]  # they belong to no set
        if rows:
            columns = {column: [values[row] for row in rows] for column, values in held_out.items()}
            metrics = compute_held_out_metrics(columns, utf8_bytes) | metrics
        return {"metrics": metrics, "rows": rows, "utf8_bytes": utf8_bytes}

    @cached_property
    def _row_bytes(self) -> list[int]:
        """The bytes of the supervised text of each held-out row."""
        rows: Any = self.trainer.eval_dataset
        return [count_supervised_bytes(labels, self.template) for labels in rows["labels"]]

    def _log_metrics(self, results: StepResults) -> None:
        """Log to every tracker all metrics but loss, perplexity and accuracy, which the trainer has logged already."""
        parts = {"": results.metrics} | {f"{name}_": part["metrics"] for name, part in results.sets.items()}
        metrics = {
            f"eval_{prefix}{name}": value
            for prefix, values in parts.items()
            for name, value in values.items()
            if name not in LOGGED_BY_TRAINER
        }
        self.trainer.log(metrics | {"eval_answer_seconds": round(results.seconds, 2)})


class AnswerBudget:
    """Limit the time for answers: seconds of intermediate evaluations / seconds of training is at most `share`.

    A question is estimated to cost what one cost in the previous evaluation; an estimate that was too low is made up
    for at the next evaluations. The first intermediate evaluation sets the number of questions, and later ones never
    ask more, so that all metrics are of the same questions.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.training_seconds = self.answer_seconds = 0.0
        self.seconds_per_question: float | None = None
        self.max_questions = 0

    def count_questions(self) -> int:
        """Return how many questions the next intermediate evaluation may ask."""
        if self.seconds_per_question is None:
            return INITIAL_QUESTIONS if self.share else 0
        budget = max(0.0, self.share * self.training_seconds - self.answer_seconds)
        count = int(budget / max(self.seconds_per_question, 1e-9))
        self.max_questions = self.max_questions or count
        return min(self.max_questions, count)

    def add_cost(self, num_questions: int, seconds: float, charge: bool) -> None:
        """Update the cost of a question. charge: whether the seconds count against the budget."""
        if num_questions:
            self.seconds_per_question = seconds / num_questions
        if charge:
            self.answer_seconds += seconds

    def restore(self, results: StepResults) -> None:
        """Take the cost and the number of questions from an evaluation made before the run was interrupted."""
        self.add_cost(len(results.table), results.seconds, charge=False)
        if not results.complete:
            self.max_questions = len(results.table) or self.max_questions


def build_questions(
    sets: Mapping[str | None, Iterable[Conversation]],
    num_answers: int,
    num_instructions: int,
    system_prompt: str | None,
) -> list[EvalPrompt]:
    """Return the first `num_answers` questions of each held-out set, in turn, then `num_instructions` verifiable
    instructions."""
    parts = []
    for name, conversations in sets.items():
        rows = itertools.chain.from_iterable(map(list_questions, conversations))
        pairs = [split_answer(add_system_prompt(row, system_prompt)) for row in itertools.islice(rows, num_answers)]
        parts.append([EvalPrompt(prompt, reference=reference, held_out_set=name) for prompt, reference in pairs])
    questions = list(alternate(parts))
    for instruction in sample_instructions(num_instructions):
        prompt = Conversation(messages=[{"role": "user", "content": instruction.prompt}])
        questions.append(EvalPrompt(add_system_prompt(prompt, system_prompt), instruction=instruction.id))
    return questions


def select_first(questions: list[EvalPrompt], count: int) -> list[EvalPrompt]:
    """Return the first held-out questions and the first instructions, `count` together, in the ratio of all."""
    held_out = [question for question in questions if question.instruction is None]
    instructions = [question for question in questions if question.instruction is not None]
    count = min(count, len(questions))
    num_held_out = -(-count * len(held_out) // max(len(questions), 1))
    return held_out[:num_held_out] + instructions[: count - num_held_out]


def count_supervised_bytes(labels: Sequence[int], template: Template) -> int:
    """Count the UTF-8 bytes of the supervised text of a row, without stop tokens."""
    skipped = (IGNORED, *template.stop_token_ids)
    spans = [list(span) for is_text, span in itertools.groupby(labels, lambda label: label not in skipped) if is_text]
    return sum(count_utf8_bytes(str(template.tokenizer.decode(span, skip_special_tokens=True))) for span in spans)


def describe_results(results: StepResults, num_questions: int) -> str:
    """Return one line for the terminal: answers, instructions, errors, seconds. num_questions: of all there are."""
    metrics, parts = results.metrics, []
    if metrics["answers"]:
        parts.append(describe_answers(metrics))
    if TOOL_CALLS_MATCHED in metrics:
        count = sum(row["calls_match"] is not None for row in results.table)
        parts.append(f"{metrics[TOOL_CALLS_MATCHED]:.0%} of {count} tool calls matched")
    if metrics["instructions"]:
        parts.append(f"{metrics['instructions_followed_rate']:.0%} of {metrics['instructions']} instructions followed")
    if metrics["answer_errors"]:
        error = next(row["error"] for row in results.table if row["error"])
        parts.append(f"{metrics['answer_errors']} not answered ({error})")
    if not results.complete:
        parts.append(f"the first {len(results.table)} of {num_questions} questions")
    return "; ".join([*parts, f"{results.seconds:.0f} s"])


def describe_answers(metrics: dict[str, float]) -> str:
    """Return a part of a line: how many answers there are, and how many of them end and loop."""
    return f"{metrics['answers']} answers, {metrics['stop_rate']:.0%} stop, {metrics['loop_rate']:.0%} loop"
