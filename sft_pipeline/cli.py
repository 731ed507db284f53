"""The commands of the command line, one function each.

Each imports what it needs when it is called, so that --help loads neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft_pipeline.cli_options import build_parser
from sft_pipeline.utils.errors import SFTError, convert_file_errors

Handler = Callable[[argparse.Namespace, list[str]], None]  # (parsed options, remaining arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run a command; an SFTError is printed as one line on standard error, and its status is the exit status."""
    args, extra_args = build_parser().parse_known_args(arguments)
    from sft_pipeline.utils import console

    console.setup_console()
    try:
        with console.log_without_bars(), convert_file_errors():
            if extra_args and not args.reads_config:
                raise SFTError(f"{args.command}: unknown option {extra_args[0]}; `{args.command} --help` lists them")
            COMMANDS[args.command](args, extra_args)
    except SFTError as error:
        _print_error_once(f"sft-pipeline: {error}")
        sys.exit(error.status)
    except KeyboardInterrupt:
        _print_error_once("sft-pipeline: interrupted; everything saved so far is intact")
        sys.exit(130)


def _print_error_once(line: str) -> None:
    """Print the line on standard error, unless another process that torchrun started on this machine has printed one.

    Usually all processes fail with the same error, and torchrun ends the others as soon as the first one fails.
    """
    error_file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))  # torchrun's: attempt_N/<local rank>/error.json
    if error_file.name == "error.json":
        try:
            (error_file.parents[1] / "reported").touch(exist_ok=False)
        except FileExistsError:
            return
        except OSError:
            pass  # torchrun has exited and deleted its folder
    print(line, file=sys.stderr)


def _split_config_path(extra_args: list[str]) -> tuple[str | None, list[str]]:
    """Split the remaining arguments into the config file, if the first one is a file, and the overrides after it.

    Not a positional argument of argparse: that would take the value of an unknown `--key value` for the file.
    """
    if extra_args and not extra_args[0].startswith("-"):
        return extra_args[0], extra_args[1:]
    return None, extra_args


def _require_config_path(command: str, example: str, extra_args: list[str]) -> tuple[str, list[str]]:
    """Split the remaining arguments of a command that cannot run without a config file."""
    config, overrides = _split_config_path(extra_args)
    if config is None:
        raise SFTError(f"{command}: name a config first, such as {example}")
    return config, overrides


def _load_config_and_template(extra_args: list[str]) -> tuple[Any, Any]:
    """Parse a config and load the template that it names with its model's tokenizer, but not the model.

    Returns SFTConfig and Template.
    """
    from sft_pipeline.config import parse_config
    from sft_pipeline.data.chat_templates import build_template
    from sft_pipeline.model.loading import check_revision, load_tokenizer, resolve_model
    from sft_pipeline.model.new_tokens import add_tokens
    from sft_pipeline.utils.files import get_cache_dir

    config = parse_config(*_split_config_path(extra_args))
    path = resolve_model(str(config.model_name_or_path), get_cache_dir())
    check_revision(path, config.revision)
    tokenizer = load_tokenizer(path, config.trust_remote_code, config.revision)
    kwargs: Any = config.chat_template_kwargs
    template = build_template(config.template, tokenizer, config.chat_template, kwargs)
    add_tokens(tokenizer, config.add_tokens)
    return config, template


def _run_train(args: argparse.Namespace, extra_args: list[str]) -> None:
    from rich.console import Console

    from sft_pipeline.config import parse_config
    from sft_pipeline.train import rehearse_run, train

    run = rehearse_run if args.dry_run else train
    run(parse_config(*_split_config_path(extra_args)), Console())


def _run_preview(args: argparse.Namespace, extra_args: list[str]) -> None:
    from rich.console import Console

    from sft_pipeline.data import preview
    from sft_pipeline.data.pipeline import load_one_row

    config, template = _load_config_and_template(extra_args)
    tokenizer = template.tokenizer
    row, origin = load_one_row(config, template, args.row)
    if args.json:
        print(preview.format_row_json(row, tokenizer))
        return
    console = Console()
    # As set_special_tokens does in training; print_row recognizes the stop token by it.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(template.stop_token_id)
    preview.print_row(row, tokenizer, origin, console)
    preview.print_positions(row, tokenizer, console)


def _run_prepare(args: argparse.Namespace, extra_args: list[str]) -> None:
    from sft_pipeline.data.shards import write_shards

    config, template = _load_config_and_template(extra_args)
    folder = config.prepared_data or f"{config.output_dir}-prepared"
    write_shards(config, template, Path(folder).expanduser())
    print(f"prepared in {folder}; to train from it add --prepared_data {folder}")


def _run_chat(args: argparse.Namespace, extra_args: list[str]) -> None:
    from sft_pipeline.commands.chat import chat

    chat(args.model, args.max_new_tokens, args.tools, args.trust_remote_code, args.revision)


def _run_generate(args: argparse.Namespace, extra_args: list[str]) -> None:
    from sft_pipeline.commands.generate import GenerateOptions, generate_file
    from sft_pipeline.inference.sampling import SamplingParams

    # An option that is not on the command line is not in args: the dataclasses have the defaults.
    options = {name: value for name, value in vars(args).items() if name not in ("command", "reads_config")}
    names = [field.name for field in dataclasses.fields(SamplingParams) if field.name in options]
    sampling = {name: options.pop(name) for name in names}
    do_sample = not sampling.keys().isdisjoint(("temperature", "top_k", "top_p", "min_p"))
    options["output"] = Path(options["output"])
    missing = generate_file(GenerateOptions(sampling=SamplingParams(**sampling, do_sample=do_sample), **options))
    if missing:
        sys.exit(1)


def _run_evaluate(args: argparse.Namespace, extra_args: list[str]) -> None:
    from rich.console import Console

    from sft_pipeline.commands.evaluate import EvaluateOptions, build_judge, evaluate_models
    from sft_pipeline.evaluation.harness import TaskOptions

    names = [field.name for field in dataclasses.fields(EvaluateOptions) if field.name != "tasks"]
    tasks = TaskOptions.parse(args.tasks, args.include_path, args.limit, args.num_fewshot)
    options = EvaluateOptions(**{name: getattr(args, name) for name in names}, tasks=tasks)
    judge = build_judge(args.judge_base_url, args.judge_model)
    evaluate_models(args.models, options, args.output and Path(args.output), args.json, Console(), judge)


def _run_report(args: argparse.Namespace, extra_args: list[str]) -> None:
    from sft_pipeline.reports.html import write_report

    print(write_report(args.folders, args.output))


def _run_export(args: argparse.Namespace, extra_args: list[str]) -> None:
    from sft_pipeline.commands.export import export_model

    loading = args.trust_remote_code, args.revision
    export_model(args.folder, Path(args.destination), args.dtype, args.license, *loading, ollama=args.ollama)
    print(f"exported to {args.destination}; serve it: transformers serve {args.destination}")


def _run_study(args: argparse.Namespace, extra_args: list[str]) -> None:
    from rich.console import Console

    from sft_pipeline.commands.study import run_study

    config, overrides = _require_config_path("study", "configs/study_rows.yaml", extra_args)
    run_study(config, overrides, Console())


def _run_verify_resume(args: argparse.Namespace, extra_args: list[str]) -> None:
    from sft_pipeline.commands.verify_resume import verify_resume

    config, overrides = _require_config_path("verify-resume", "configs/quickstart.yaml", extra_args)
    if args.steps < 1:
        raise SFTError(f"steps is {args.steps}; it has to be 1 or more")
    differences = verify_resume(config, args.steps, overrides)
    if differences:
        sys.exit(1)


def _run_doctor(args: argparse.Namespace, extra_args: list[str]) -> None:
    from rich.console import Console

    from sft_pipeline.commands.doctor import run_doctor

    run_doctor(args.json, Console())


def _run_dashboard(args: argparse.Namespace, extra_args: list[str]) -> None:
    from sft_pipeline.arguments import DEFAULT_PROJECT
    from sft_pipeline.commands.dashboard import serve_dashboard

    serve_dashboard(args.project or DEFAULT_PROJECT, args.port, not args.no_browser)


COMMANDS: dict[str, Handler] = {
    "train": _run_train,
    "preview": _run_preview,
    "prepare": _run_prepare,
    "chat": _run_chat,
    "generate": _run_generate,
    "evaluate": _run_evaluate,
    "report": _run_report,
    "export": _run_export,
    "study": _run_study,
    "verify-resume": _run_verify_resume,
    "doctor": _run_doctor,
    "dashboard": _run_dashboard,
}
