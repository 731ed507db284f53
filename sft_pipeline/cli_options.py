"""The commands, their options, and the texts of --help."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn, TypeAlias

Subparsers: TypeAlias = "argparse._SubParsersAction[CommandParser]"

EXIT_STATUS = """exit status:
  0    success
  1    some prompts have no answer (generate), the resumed run differs
       (verify-resume), or an unexpected error
  2    invalid input, or a machine that cannot train (doctor): one line on
       standard error says what to change
  75   stopped by SIGTERM after saving a checkpoint: run the same command with
       --resume_from_checkpoint auto to continue
  130  interrupted (Ctrl-C)
output for scripts: preview, evaluate and doctor have --json; train and study
write results.json and study.json"""


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all errors of this package; argparse prints the usage too."""

    def error(self, message: str) -> NoReturn:
        command = self.prog.partition(" ")[2]
        self.exit(2, f"sft-pipeline: {message}; see `{f'{command} --help'.strip()}`\n")


def build_parser() -> CommandParser:
    """Build the parser of all commands. It parses to `command`, `reads_config` and the command's options."""
    parser = CommandParser(
        prog="sft-pipeline",
        description="Supervised fine-tuning of causal language models.",
        epilog=EXIT_STATUS,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    _add_train(subparsers)
    _add_preview(subparsers)
    prepare = "encode the rows of a config once, into shards for the key prepared_data"
    _add_command(subparsers, "prepare", prepare, "[CONFIG] [--key value ...]")
    _add_chat(subparsers)
    _add_generate(subparsers)
    _add_evaluate(subparsers)
    _add_report(subparsers)
    _add_export(subparsers)
    study = "train and compare variants of a config; skips finished ones"
    _add_command(subparsers, "study", study, "CONFIG [--key value ...]")
    _add_verify_resume(subparsers)
    doctor = _add_command(subparsers, "doctor", "report what this machine can train with and what is missing")
    doctor.add_argument("--json", action="store_true", help="print one line of JSON")
    _add_dashboard(subparsers)
    return parser


class _HelpAction(argparse.Action):
    """Print the help with the keys: those that people set, or `all`. Only this imports transformers."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, *_: Any) -> None:
        from sft_pipeline.key_help import describe_keys

        parser.epilog = describe_keys(all_keys=value == "all")
        parser.print_help()
        parser.exit()


def _add_train(subparsers: Subparsers) -> None:
    usage = "[CONFIG] [--dry_run] [--key value ...]"
    parser = _add_command(subparsers, "train", "fine-tune a model as a config says", usage, add_help=False)
    help = "list the keys that people set, or all keys"
    parser.add_argument("-h", "--help", action=_HelpAction, nargs="?", choices=["all"], metavar="all", help=help)
    help = "do all but the steps: report rows, memory and time of the run, or its error"
    parser.add_argument("--dry_run", action="store_true", help=help)


def _add_preview(subparsers: Subparsers) -> None:
    usage = "[CONFIG] [--row N] [--json] [--key value ...]"
    parser = _add_command(subparsers, "preview", "show a row token by token, as it is trained", usage)
    parser.add_argument("--row", type=int, default=0, help="index of the row in train_data (0)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON: input_ids, labels, text")


def _add_chat(subparsers: Subparsers) -> None:
    parser = _add_command(subparsers, "chat", "chat with a model in the terminal, or through a pipe")
    parser.add_argument("model", help="a run's output folder, a model folder or a hub name")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="token limit of an answer (256)")
    parser.add_argument("--tools", help="a JSON file of tools that the model may call; you type the results")
    _add_loading_options(parser)


def _add_generate(subparsers: Subparsers) -> None:
    """Options have the names of transformers' GenerationConfig, and the defaults of GenerateOptions and SamplingParams.

    Those of the dataclasses, not of argparse: an option that is not given is not in the parsed namespace.
    """
    parser = _add_command(subparsers, "generate", "generate answers to a file of prompts, as training rows")
    parser.add_argument("prompts", help="a .txt file with a prompt per line, or rows in any format of train_data")
    parser.add_argument("--model", required=True, help="a run's output folder, a model folder or a hub name")
    parser.add_argument("--output", required=True, help="a .jsonl file; FILE.errors lists prompts without an answer")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    _add_loading_options(parser)
    absent = argparse.SUPPRESS
    parser.add_argument("--samples", type=int, default=absent, help="answers to each prompt (1)")
    parser.add_argument("--batch_size", type=int, default=absent, help="answers generated in parallel (16)")
    parser.add_argument("--max_length", type=int, default=absent, help="token limit of prompt and answer together")
    parser.add_argument("--stop_strings", nargs="+", default=absent, help="texts that end an answer")
    parser.add_argument("--system_prompt", default=absent, help="replaces the one that the model was trained with")
    parser.add_argument("--max_new_tokens", type=int, default=absent, help="token limit of an answer (256)")
    parser.add_argument("--repetition_penalty", type=float, default=absent, help="above 1 reduces repetition (1)")
    parser.add_argument("--seed", type=int, default=absent, help="random seed (0)")
    sampling = parser.add_argument_group("sampling", "decoding is greedy unless one of these is given")
    sampling.add_argument("--temperature", type=float, default=absent, help="divides the logits (1)")
    sampling.add_argument("--top_k", type=int, default=absent, help="sample from the k likeliest tokens (50; 0: all)")
    sampling.add_argument(
        "--top_p", type=float, default=absent, help="sample from the likeliest tokens up to this sum (1)"
    )
    sampling.add_argument(
        "--min_p", type=float, default=absent, help="drop tokens below this fraction of the highest probability"
    )


def _add_evaluate(subparsers: Subparsers) -> None:
    parser = _add_command(subparsers, "evaluate", "compare models on held-out rows and checkable instructions")
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="a run's output folder, a model folder or a hub name; the first is the baseline",
    )
    parser.add_argument(
        "--data", help="a run's output folder (its held-out rows), or a file, folder or hub name of rows"
    )
    parser.add_argument("--num_prompts", type=int, default=50, help="maximum number of rows (50)")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="token limit of an answer (128)")
    parser.add_argument(
        "--few_shot",
        type=int,
        default=0,
        help="evaluate each model also with this many rows as examples in the prompt (0)",
    )
    parser.add_argument(
        "--tasks", help="tasks of lm-evaluation-harness besides: names with commas between, YAML files or folders"
    )
    parser.add_argument("--include_path", help="a folder of task files, whose tasks --tasks then knows by name")
    parser.add_argument("--limit", type=float, help="questions of each task (all); below 1 a share of them")
    parser.add_argument("--num_fewshot", type=int, help="examples in the prompts of tasks (as each task says)")
    parser.add_argument(
        "--template", choices=("role", "chat"), default="chat", help="for models that no run has saved (chat)"
    )
    parser.add_argument("--system_prompt", help="for models that no run has saved")
    parser.add_argument(
        "--judge_base_url", help="OpenAI-compatible endpoint that compares answers, such as https://api.openai.com/v1"
    )
    parser.add_argument("--judge_model", help="model at that endpoint; the API key is read from OPENAI_API_KEY")
    _add_loading_options(parser)
    parser.add_argument("--output", help="folder for JSON, Markdown, a picture and all answers")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of tables")


def _add_report(subparsers: Subparsers) -> None:
    parser = _add_command(subparsers, "report", "write an HTML page about a run, or one that compares runs")
    parser.add_argument(
        "folders", nargs="+", metavar="OUTPUT_DIR", help="output folder of a run; the first is the baseline"
    )
    parser.add_argument(
        "--output", help="file to write (report.html in OUTPUT_DIR; for several runs comparison.html in the first)"
    )


def _add_export(subparsers: Subparsers) -> None:
    parser = _add_command(subparsers, "export", "export a run's model for other tools, with a model card")
    parser.add_argument("folder", metavar="OUTPUT_DIR", help="output folder of a finished run; adapters are merged")
    parser.add_argument("destination", metavar="DEST", help="folder to write; must not exist")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="dtype of the weights (float32, as trained)")
    parser.add_argument(
        "--license", help="license of the model as the hub names it, such as apache-2.0 (the base model's, if known)"
    )
    parser.add_argument("--ollama", action="store_true", help="also write a Modelfile: template, stop, system prompt")
    _add_loading_options(parser)


def _add_loading_options(parser: CommandParser) -> None:
    """Add the two keys of a config that commands without a config need to load some models."""
    parser.add_argument("--trust_remote_code", action="store_true", help="run the Python code that the model contains")
    parser.add_argument(
        "--revision", help="branch, tag or commit of the model on the hub, or of the base model of adapters"
    )


def _add_verify_resume(subparsers: Subparsers) -> None:
    description = "check that a killed and resumed run ends bit-identical to an uninterrupted one"
    parser = _add_command(subparsers, "verify-resume", description, "CONFIG [--steps N] [--key value ...]")
    parser.add_argument("--steps", type=int, default=4, help="steps before the kill, and after it (4)")


def _add_dashboard(subparsers: Subparsers) -> None:
    parser = _add_command(subparsers, "dashboard", "open trackio's page of the runs trained with --report_to trackio")
    parser.add_argument("project", nargs="?", default=None, help="the key `project` of the runs (sft_pipeline)")
    parser.add_argument("--port", type=int, help="port on this machine (the first free one from 7860)")
    parser.add_argument("--no_browser", action="store_true", help="print the address, open no browser")


def _add_command(
    subparsers: Subparsers, name: str, description: str, usage: str | None = None, add_help: bool = True
) -> CommandParser:
    """Add a command's parser. `usage` is for commands that read a config: all other arguments are then its keys."""
    parser = subparsers.add_parser(
        name,
        help=description,
        description=f"{description}\n\nCONFIG is a YAML file and comes first" if usage else description,
        usage=usage and f"%(prog)s {usage}",
        epilog="`sft-pipeline train --help` lists the keys" if usage and add_help else None,
        add_help=add_help,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(reads_config=usage is not None)
    return parser
