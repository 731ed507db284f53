"""The verbs, a function each. What each needs is imported when it is called, so that --help answers at once."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path

from sft_pipeline.cli_options import build_parser
from sft_pipeline.utils.errors import SFTError, failures_of_files

Handler = Callable[[argparse.Namespace, list[str]], None]


def main(arguments: list[str] | None = None) -> None:
    """Run one verb; an error of ours is one line on standard error and its exit status (errors.py), mostly 2."""
    args, rest = build_parser().parse_known_args(arguments)
    from sft_pipeline.utils import console

    console.prepare()
    try:
        with console.log_without_bars(), failures_of_files():
            if rest and not args.reads_config:
                raise SFTError(f"{args.verb}: unknown option {rest[0]}; `{args.verb} --help` lists them")
            VERBS[args.verb](args, rest)
    except SFTError as error:
        _say_once(f"sft-pipeline: {error}")
        sys.exit(error.status)
    except KeyboardInterrupt:
        _say_once("sft-pipeline: interrupted; what was saved is whole")
        sys.exit(130)


def _say_once(line: str) -> None:
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


def _config(rest: list[str]) -> tuple[str | None, list[str]]:
    """The config file, if the first word is one, and the keys after it.

    Not an argument of argparse: it would take the value of the first key, which it does not know, for the file.
    """
    return (rest[0], rest[1:]) if rest and not rest[0].startswith("-") else (None, rest)


def _train(args: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from sft_pipeline.config import parse
    from sft_pipeline.train import train

    train(*parse(*_config(rest)), Console())


def _preview(args: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from sft_pipeline.config import parse
    from sft_pipeline.data import preview
    from sft_pipeline.data.chat_templates import build_template
    from sft_pipeline.data.pipeline import one_row
    from sft_pipeline.model.loading import load_tokenizer, resolve
    from sft_pipeline.utils.files import cache_dir

    sft, _ = parse(*_config(rest))
    tokenizer = load_tokenizer(resolve(sft.model_name_or_path, cache_dir()), sft.trust_remote_code)
    template = build_template(sft.template, tokenizer)
    row, origin = one_row(sft, template, args.row)
    if args.json:
        print(preview.as_json(row, tokenizer))
        return
    console = Console()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(template.stop_token_id)
    preview.show(row, tokenizer, origin, console)
    preview.show_positions(row, tokenizer, console)


def _prepare(args: argparse.Namespace, rest: list[str]) -> None:
    from sft_pipeline.config import parse
    from sft_pipeline.data.chat_templates import build_template
    from sft_pipeline.data.shards import write_shards
    from sft_pipeline.model.loading import load_tokenizer, resolve
    from sft_pipeline.utils.files import cache_dir

    sft, training = parse(*_config(rest))
    tokenizer = load_tokenizer(resolve(sft.model_name_or_path, cache_dir()), sft.trust_remote_code)
    folder = sft.prepared_data or f"{training.output_dir}-prepared"
    write_shards(sft, build_template(sft.template, tokenizer), Path(folder).expanduser())
    print(f"prepared in {folder}; to train from it add --prepared_data {folder}")


def _chat(args: argparse.Namespace, rest: list[str]) -> None:
    from sft_pipeline.commands.chat import chat

    chat(args.model, args.max_new_tokens)


def _generate(args: argparse.Namespace, rest: list[str]) -> None:
    from sft_pipeline.commands.generate import Request, generate_file
    from sft_pipeline.inference.sampling import Sampling

    given = {name: value for name, value in vars(args).items() if name not in ("verb", "reads_config")}
    sampling = {field.name: given.pop(field.name) for field in dataclasses.fields(Sampling) if field.name in given}
    drawn = not sampling.keys().isdisjoint(("temperature", "top_k", "top_p", "min_p"))
    given["output"] = Path(given["output"])
    if generate_file(Request(sampling=Sampling(**sampling, do_sample=drawn), **given)):
        sys.exit(1)


def _evaluate(args: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from sft_pipeline.commands.evaluate import Request, build_judge, evaluate

    names = [field.name for field in dataclasses.fields(Request)]
    request = Request(**{name: getattr(args, name) for name in names})
    judge = build_judge(args.judge_base_url, args.judge_model)
    evaluate(args.models, request, args.output and Path(args.output), args.json, Console(), judge)


def _report(args: argparse.Namespace, rest: list[str]) -> None:
    from sft_pipeline.reports.html import write_report

    print(write_report(args.folders, args.output))


def _export(args: argparse.Namespace, rest: list[str]) -> None:
    from sft_pipeline.commands.export import export

    export(args.folder, Path(args.destination), args.dtype, args.license)
    print(f"exported to {args.destination}; serve it: transformers serve {args.destination}")


def _study(args: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from sft_pipeline.commands.study import study

    config, overrides = _config(rest)
    if config is None:
        raise SFTError("study: name a config first, such as configs/study_rows.yaml")
    study(config, overrides, Console())


def _verify_resume(args: argparse.Namespace, rest: list[str]) -> None:
    from sft_pipeline.commands.verify_resume import verify_resume

    config, overrides = _config(rest)
    if config is None:
        raise SFTError("verify-resume: name a config first, such as configs/quickstart.yaml")
    if args.steps < 1:
        raise SFTError(f"steps is {args.steps}; it has to be 1 or more")
    if verify_resume(config, args.steps, overrides):
        sys.exit(1)


def _doctor(args: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from sft_pipeline.commands.doctor import doctor

    doctor(args.json, Console())


def _dashboard(args: argparse.Namespace, rest: list[str]) -> None:
    from sft_pipeline.commands.dashboard import dashboard
    from sft_pipeline.config import DEFAULTS

    dashboard(args.project or DEFAULTS["project"], args.port, not args.no_browser)


VERBS: dict[str, Handler] = {
    "train": _train,
    "preview": _preview,
    "prepare": _prepare,
    "chat": _chat,
    "generate": _generate,
    "evaluate": _evaluate,
    "report": _report,
    "export": _export,
    "study": _study,
    "verify-resume": _verify_resume,
    "doctor": _doctor,
    "dashboard": _dashboard,
}
