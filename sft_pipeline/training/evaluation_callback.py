"""Evaluation while training: held-out prompts and checkable instructions are answered, scored, logged and kept.

    evaluation = EvaluationCallback(trainer, template, held_out_messages, sft)
    trainer.add_callback(evaluation)

The evaluation before the first step and the one of the finished model ask every question. Those on the way ask the
first ones alone, as many as `eval_answer_share` has room for. Every process answers its share of the questions. The
model is only lent (inference/eval_mode.py) and no random number is drawn, so training goes as it would without this.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from functools import cached_property
from operator import itemgetter
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from sft_pipeline.config import SFTArguments, get_output_dir
from sft_pipeline.data.chat_templates import Template
from sft_pipeline.data.messages import add_system_prompt
from sft_pipeline.evaluation.metrics.instruction_following import sample_instructions
from sft_pipeline.evaluation.metrics.words import count_utf8_bytes
from sft_pipeline.evaluation.step_results import (
    BEST_FILE,
    AnswerRow,
    EvalPrompt,
    StepResults,
    build_table_row,
    compute_held_out_metrics,
    compute_table_metrics,
    get_step_file,
    load_earlier_results,
)
from sft_pipeline.inference.answers import Answer, answer_prompts
from sft_pipeline.runs.output_dir import EVALUATION_DIR
from sft_pipeline.training.trackers import read_last_tracked_step, send_table
from sft_pipeline.training.trainer import SupervisedTrainer
from sft_pipeline.utils.constants import IGNORED
from sft_pipeline.utils.errors import SFTError

# As eval_loss, eval_perplexity and eval_token_accuracy.
LOGGED_BY_TRAINER = ("nll_nats_per_token", "perplexity", "token_accuracy")
UNMEASURED = 8  # questions asked on the way while it is not known what one costs


class EvaluationCallback(TrainerCallback):
    """Answers at every evaluation of `trainer`; `evaluations` has all of them, on every process, in order."""

    def __init__(
        self, trainer: SupervisedTrainer, template: Template, held_out: Dataset | None, sft: SFTArguments
    ) -> None:
        """held_out: conversations (`messages`), each ending with the reference answer."""
        self.trainer, self.template, self.max_new_tokens = trainer, template, sft.max_new_tokens
        self.questions = build_questions(held_out, sft)
        self.folder = get_output_dir(trainer.args) / EVALUATION_DIR
        self.evaluations: list[StepResults] = []
        self._budget = AnswerBudget(sft.eval_answer_share)
        self._ended = False
        self._step_started = 0.0

    @property
    def before(self) -> StepResults | None:
        """The evaluation at step 0."""
        return next((one for one in self.evaluations if one.step == 0), None)

    def is_complete(self, step: int) -> bool:
        """Whether the last evaluation is of this step and asked every question."""
        return bool(self.evaluations) and self.evaluations[-1].step == step and self.evaluations[-1].complete

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A resumed run goes on from what was found up to its checkpoint."""
        earlier = load_earlier_results(self.folder, state.global_step) if state.is_world_process_zero else None
        [self.evaluations] = broadcast_object_list([earlier])
        self._ended = False
        told = read_last_tracked_step(args)
        for one in self.evaluations:
            self._budget.recall(one)
            if state.is_world_process_zero and one.step > told:
                send_table(one.table, args, one.step)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._step_started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._budget.training_seconds += time.perf_counter() - self._step_started

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._ended = True

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Called inside `trainer.evaluate`, so that the seconds count as evaluation, not as training."""
        whole = state.global_step == 0 or self._of_the_finished_model(args, state)
        asked = self.questions if whole else select_first(self.questions, self._room())
        started = time.perf_counter()
        answers = self._answers(model, asked)
        seconds = time.perf_counter() - started
        self._budget.pay(len(asked), seconds, on_the_way=not whole)
        best = state.best_global_step if self._ended and args.load_best_model_at_end else None
        step = state.global_step if best is None else best
        found = self._evaluation(step, seconds, [build_table_row(*pair) for pair in zip(asked, answers)])
        self.evaluations.append(found)
        self._log(found)
        if state.is_world_process_zero:
            found.write(self.folder / (get_step_file(step) if best is None else BEST_FILE))
            send_table(found.table, args, state.global_step)
            if self.questions and not args.disable_tqdm:
                tqdm.write(f"step {step}: {describe_results(found, len(self.questions))}")

    def _of_the_finished_model(self, args: TrainingArguments, state: TrainerState) -> bool:
        """After the last step the model is finished, unless the best one is still to be brought back."""
        return self._ended or (state.global_step >= state.max_steps and not args.load_best_model_at_end)

    def _room(self) -> int:
        """Process 0 decides for all, whose clocks differ."""
        [count] = broadcast_object_list([self._budget.questions()])
        return count

    def _answers(self, model: PreTrainedModel, asked: list[EvalPrompt]) -> list[Answer]:
        """Every process answers its share; all have all the answers, in the questions' order."""
        mine = range(self.trainer.args.process_index, len(asked), self.trainer.args.world_size)
        found = self._share(model, [asked[at] for at in mine])
        return [one for _, one in sorted(gather_object(list(zip(mine, found))), key=itemgetter(0))]

    def _share(self, model: PreTrainedModel, asked: list[EvalPrompt]) -> list[Answer]:
        """A model that generation does not serve is trained all the same: the reason stands in every row."""
        if not asked:
            return []
        try:
            if self.trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
                raise SFTError("parameters that are divided among processes (FSDP, ZeRO-3) are not generated with")
            prompts = [one.messages for one in asked]
            quiet = self.trainer.args.disable_tqdm or not self.trainer.is_world_process_zero()
            return answer_prompts(model, self.template, prompts, self.max_new_tokens, disable_tqdm=quiet)
        except SFTError as refused:
            return [Answer("", False, 0, str(refused))] * len(asked)

    def _evaluation(self, step: int, seconds: float, table: list[AnswerRow]) -> StepResults:
        held_out = dict(zip(("nll_nats", "tokens", "correct"), self.trainer.row_loss_sums.T.tolist(), strict=True))
        metrics = compute_held_out_metrics(held_out, self._utf8_bytes) | compute_table_metrics(table)
        complete = len(table) == len(self.questions)
        return StepResults(step, complete, seconds, metrics, held_out, self._utf8_bytes, table)

    @cached_property
    def _utf8_bytes(self) -> int:
        return sum(count_supervised_bytes(labels, self.template) for labels in self.trainer.eval_dataset["labels"])

    def _log(self, found: StepResults) -> None:
        """To every tracker, beside the loss, perplexity and accuracy, which the trainer has logged already."""
        logged = {name: value for name, value in found.metrics.items() if name not in LOGGED_BY_TRAINER}
        logged["answer_seconds"] = round(found.seconds, 2)
        self.trainer.log({f"eval_{name}": value for name, value in logged.items()})


class AnswerBudget:
    """How many questions an evaluation on the way may ask: seconds of answers / seconds of training is at most `share`.

    A question is taken to cost what it did in the evaluation before; what was taken wrongly is paid back later. The
    number is set at the first evaluation on the way and never rises above that: metrics are of the same questions.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.training_seconds = self.answer_seconds = 0.0
        self.seconds_a_question: float | None = None
        self.planned = 0

    def questions(self) -> int:
        if self.seconds_a_question is None:
            return UNMEASURED if self.share else 0
        room = max(0.0, self.share * self.training_seconds - self.answer_seconds)
        count = int(room / max(self.seconds_a_question, 1e-9))
        self.planned = self.planned or count
        return min(self.planned, count)

    def pay(self, asked: int, seconds: float, on_the_way: bool) -> None:
        if asked:
            self.seconds_a_question = seconds / asked
        if on_the_way:
            self.answer_seconds += seconds

    def recall(self, earlier: StepResults) -> None:
        """What an evaluation before the run was interrupted says about the costs, and how many were asked then."""
        self.pay(len(earlier.table), earlier.seconds, on_the_way=False)
        if not earlier.complete:
            self.planned = len(earlier.table) or self.planned


def build_questions(held_out: Dataset | None, sft: SFTArguments) -> list[EvalPrompt]:
    """The first `num_answers` held-out conversations, then `num_instructions` checkable instructions."""
    rows = [] if held_out is None else held_out[: sft.num_answers]["messages"]
    rows = [add_system_prompt(messages, sft.system_prompt) for messages in rows]
    questions = [EvalPrompt(messages[:-1], reference=messages[-1]["content"]) for messages in rows]
    for one in sample_instructions(sft.num_instructions):
        messages = add_system_prompt([{"role": "user", "content": one.prompt}], sft.system_prompt)
        questions.append(EvalPrompt(messages, instruction=one.id))
    return questions


def select_first(questions: list[EvalPrompt], count: int) -> list[EvalPrompt]:
    """`count` of the questions: the first held-out ones and the first instructions, in the proportion of the whole."""
    held_out = [one for one in questions if one.instruction is None]
    instructions = [one for one in questions if one.instruction is not None]
    count = min(count, len(questions))
    rows = -(-count * len(held_out) // max(len(questions), 1))
    return held_out[:rows] + instructions[: count - rows]


def count_supervised_bytes(labels: Sequence[int], template: Template) -> int:
    """UTF-8 bytes of the text that a row's labels spell: its supervised answers, without their stop tokens."""
    outside = (IGNORED, template.stop_token_id)
    runs = [list(run) for is_text, run in itertools.groupby(labels, key=lambda label: label not in outside) if is_text]
    return sum(count_utf8_bytes(str(template.tokenizer.decode(run, skip_special_tokens=True))) for run in runs)


def describe_results(found: StepResults, questions: int) -> str:
    """One line: how many were asked and what came of it."""
    metrics, parts = found.metrics, []
    if metrics["answers"]:
        parts.append(f"{metrics['answers']} answers, {metrics['stop_rate']:.0%} stop, {metrics['loop_rate']:.0%} loop")
    if metrics["instructions"]:
        parts.append(f"{metrics['instructions_followed_rate']:.0%} of {metrics['instructions']} instructions followed")
    if metrics["answer_errors"]:
        error = next(row["error"] for row in found.table if row["error"])
        parts.append(f"{metrics['answer_errors']} not answered ({error})")
    if not found.complete:
        parts.append(f"the first {len(found.table)} of {questions} questions")
    return "; ".join([*parts, f"{found.seconds:.0f} s"])
