"""One training run of the command line, from its config to its report.

    sft-pipeline train configs/quickstart.yaml

The loss is three hops away: training/trainer.py (`SupervisedTrainer`, whose inherited `compute_loss` calls the model),
model/loss_forward.py (`patch_loss_forward`: the model's forward pass returns the loss), model/linear_cross_entropy.py
(`linear_cross_entropy`: the loss and its gradient, without a matrix of all logits).
"""

from __future__ import annotations

from typing import Any

from rich.console import Console

from sft_pipeline.config import SFTConfig, get_output_dir
from sft_pipeline.data.preview import print_row
from sft_pipeline.reports.console_summary import print_results
from sft_pipeline.reports.html import write_report
from sft_pipeline.runs.output_dir import check_output_dir
from sft_pipeline.training.hub import upload_model
from sft_pipeline.training.rank_failures import report_lost_ranks
from sft_pipeline.training.sft_trainer import SFTTrainer
from sft_pipeline.utils.console import print_line
from sft_pipeline.utils.progress import show_elapsed_time


@report_lost_ranks()
def rehearse_run(args: SFTConfig, console: Console) -> None:
    """Do everything of a run but its steps, and print what it would do. Writes nothing to the output folder.

    Raises what the run would raise before its first step.
    """
    check_output_dir(args)
    folder = get_output_dir(args)
    has_folder = folder.exists()
    trainer = SFTTrainer(args=args)
    if trainer.is_world_process_zero():
        print_row(trainer.data.train[0], trainer.template.tokenizer, "first training row", console)
    plan = trainer.dry_run()
    if trainer.is_world_process_zero():
        print_line(console, f"dry run: {plan}")
        if not has_folder:
            folder.rmdir()  # the library creates it with the trainer


@report_lost_ranks()
def train(args: SFTConfig, console: Console) -> dict[str, Any]:
    """Fine-tune a model as the config says, save it and write the report; return what is written to results.json.

    The output folder gets the model, its tokenizer and all files that runs/output_dir.py lists.
    """
    check_output_dir(args)  # before rows and model are loaded, which may take minutes
    trainer = SFTTrainer(args=args)
    if trainer.is_world_process_zero():
        print_row(trainer.data.train[0], trainer.template.tokenizer, "first training row", console)
    trainer.train()
    with trainer.times.measure("saving"), show_elapsed_time(f"saving {args.output_dir}", bool(args.disable_tqdm)):
        if not args.eval_tasks:  # before these, `train` has saved it
            trainer.save_model(push=False)
        trainer.save_state()
    results = trainer.save_results()
    if trainer.is_world_process_zero():
        folder = get_output_dir(args)
        print_results(results, str(folder), console)
        print_line(console, f"report: {write_report([folder])}")
    if args.push_to_hub:
        upload_model(trainer)  # last: a failure of the network costs nothing but the upload
    return results
