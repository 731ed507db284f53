"""The verbs, a function each. What each needs is imported when it is called, so that --help answers at once."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path

from sft_pipeline.cli_options import build_parser
from sft_pipeline.utils.errors import SFTError, convert_file_errors

Handler = Callable[[argparse.Namespace, list[str]], None]


def main(arguments: list[str] | None = None) -> None:
    """Run one verb; an error of ours is one line on standard error and its exit status (errors.py), mostly 2."""
    args, rest = build_parser().parse_known_args(arguments)
    from sft_pipeline.utils import console

    console.setup_console()
    try:
        with console.log_without_bars(), convert_file_errors():
            if rest and not args.reads_config:
                raise SFTError(f"{args.verb}: unknown option {rest[0]}; `{args.verb} --help` lists them")
            COMMANDS[args.verb](args, rest)
    except SFTError as error:
        _print_error_once(f"sft-pipeline: {error}")
        sys.exit(error.status)
    except KeyboardInterrupt:
        _print_error_once("sft-pipeline: interrupted; what was saved is whole")
        sys.exit(130)


def _print_error_once(line: str) -> None:
    """On standard error, unless another of the processes that torchrun has started on this machine did so already.

    All of them mostly meet the same error, and torchrun ends the others when the first one does.
    """
    error_file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))  # torchrun's: attempt_N/<local rank>/error.json
    if error_file.name == "error.json":
        try:
            (error_file.parents[1] / "said").touch(exist_ok=False)
        except FileExistsError:
            return
        except OSError:
            pass  # torchrun is gone, and its folder with it
    print(line, file=sys.stderr)


def _split_config_path(rest: list[str]) -> tuple[str | None, list[str]]:
    """The config file, if the first word is one, and the keys after it.

    Not an argument of argparse: it would take the value of the first key, which it does not know, for the file.
    """
    return (rest[0], rest[1:]) if rest and not rest[0].startswith("-") else (None, rest)


def _run_train(args: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from sft_pipeline.config import parse_config
    from sft_pipeline.train import train

    train(*parse_config(*_split_config_path(rest)), Console())


def _run_preview(args: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from sft_pipeline.config import parse_config
    from sft_pipeline.data import preview
    from sft_pipeline.data.chat_templates import build_template
    from sft_pipeline.data.pipeline import load_one_row
    from sft_pipeline.model.loading import load_tokenizer, resolve_model
    from sft_pipeline.utils.files import get_cache_dir

    sft, _ = parse_config(*_split_config_path(rest))
    tokenizer = load_tokenizer(resolve_model(sft.model_name_or_path, get_cache_dir()), sft.trust_remote_code)
    template = build_template(sft.template, tokenizer)
    row, origin = load_one_row(sft, template, args.row)
    if args.json:
        print(preview.format_row_json(row, tokenizer))
        return
    console = Console()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(template.stop_token_id)
    preview.print_row(row, tokenizer, origin, console)
    preview.print_positions(row, tokenizer, console)


def _run_prepare(args: argparse.Namespace, rest: list[str]) -> None:
    from sft_pipeline.config import parse_config
    from sft_pipeline.data.chat_templates import build_template
    from sft_pipeline.data.shards import write_shards
    from sft_pipeline.model.loading import load_tokenizer, resolve_model
    from sft_pipeline.utils.files import get_cache_dir

    sft, training = parse_config(*_split_config_path(rest))
    tokenizer = load_tokenizer(resolve_model(sft.model_name_or_path, get_cache_dir()), sft.trust_remote_code)
    folder = sft.prepared_data or f"{training.output_dir}-prepared"
    write_shards(sft, build_template(sft.template, tokenizer), Path(folder).expanduser())
    print(f"prepared in {folder}; to train from it add --prepared_data {folder}")


def _run_chat(args: argparse.Namespace, rest: list[str]) -> None:
    from sft_pipeline.commands.chat import chat

    chat(args.model, args.max_new_tokens)


def _run_generate(args: argparse.Namespace, rest: list[str]) -> None:
    from sft_pipeline.commands.generate import GenerateOptions, generate_file
    from sft_pipeline.inference.sampling import SamplingParams

    given = {name: value for name, value in vars(args).items() if name not in ("verb", "reads_config")}
    sampling = {
        field.name: given.pop(field.name) for field in dataclasses.fields(SamplingParams) if field.name in given
    }
    drawn = not sampling.keys().isdisjoint(("temperature", "top_k", "top_p", "min_p"))
    given["output"] = Path(given["output"])
    if generate_file(GenerateOptions(sampling=SamplingParams(**sampling, do_sample=drawn), **given)):
        sys.exit(1)


def _run_evaluate(args: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from sft_pipeline.commands.evaluate import EvaluateOptions, build_judge, evaluate_models

    names = [field.name for field in dataclasses.fields(EvaluateOptions)]
    request = EvaluateOptions(**{name: getattr(args, name) for name in names})
    judge = build_judge(args.judge_base_url, args.judge_model)
    evaluate_models(args.models, request, args.output and Path(args.output), args.json, Console(), judge)


def _run_report(args: argparse.Namespace, rest: list[str]) -> None:
    from sft_pipeline.reports.html import write_report

    print(write_report(args.folders, args.output))


def _run_export(args: argparse.Namespace, rest: list[str]) -> None:
    from sft_pipeline.commands.export import export_model

    export_model(args.folder, Path(args.destination), args.dtype, args.license)
    print(f"exported to {args.destination}; serve it: transformers serve {args.destination}")


def _run_study(args: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from sft_pipeline.commands.study import run_study

    config, overrides = _split_config_path(rest)
    if config is None:
        raise SFTError("study: name a config first, such as configs/study_rows.yaml")
    run_study(config, overrides, Console())


def _run_verify_resume(args: argparse.Namespace, rest: list[str]) -> None:
    from sft_pipeline.commands.verify_resume import verify_resume

    config, overrides = _split_config_path(rest)
    if config is None:
        raise SFTError("verify-resume: name a config first, such as configs/quickstart.yaml")
    if args.steps < 1:
        raise SFTError(f"steps is {args.steps}; it has to be 1 or more")
    if verify_resume(config, args.steps, overrides):
        sys.exit(1)


def _run_doctor(args: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from sft_pipeline.commands.doctor import run_doctor

    run_doctor(args.json, Console())


def _run_dashboard(args: argparse.Namespace, rest: list[str]) -> None:
    from sft_pipeline.commands.dashboard import serve_dashboard
    from sft_pipeline.config import DEFAULTS

    serve_dashboard(args.project or DEFAULTS["project"], args.port, not args.no_browser)


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
