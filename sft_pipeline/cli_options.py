"""What can be said on the command line: the verbs and their options, with the texts of --help."""

from __future__ import annotations

import argparse
import dataclasses
from typing import NoReturn, TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[CommandParser]"

STATUSES = """exit status:
  0    done
  1    some prompts got no answer (generate), a resumed run differs
       (verify-resume), or an error of a library's
  2    bad input, or a machine that cannot train (doctor): one line says what
       to do
  75   told to end (SIGTERM), and saved: the same command with
       --resume_from_checkpoint auto goes on
  130  interrupted
results for scripts: preview, evaluate and doctor have --json; train and study
leave results.json and study.json"""


class CommandParser(argparse.ArgumentParser):
    """Its errors are one line, as all of ours; argparse prints the usage of the verb before it."""

    def error(self, message: str) -> NoReturn:
        verb = self.prog.partition(" ")[2]
        self.exit(2, f"sft-pipeline: {message}; see `{f'{verb} --help'.strip()}`\n")


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="sft-pipeline",
        description="Fine-tune a causal language model on instruction rows.",
        epilog=STATUSES,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(required=True, dest="verb", metavar="VERB")

    _add_command(verbs, "train", "fine-tune as a config says", "[CONFIG] [--key value ...]")
    usage = "[CONFIG] [--row N] [--json] [--key value ...]"
    preview = _add_command(verbs, "preview", "show a row as it will be trained", usage)
    preview.add_argument("--row", type=int, default=0, help="which row of train_data, from 0")
    preview.add_argument("--json", action="store_true", help="one line of JSON: input_ids, labels, text")

    prepare = "encode the rows of a config once, into shards that training maps: see prepared_data"
    _add_command(verbs, "prepare", prepare, "[CONFIG] [--key value ...]")
    chat = _add_command(verbs, "chat", "talk to a model in the terminal, or answer lines from a pipe")
    chat.add_argument("model", help="a run's output folder, a model folder or a hub name")
    chat.add_argument("--max_new_tokens", type=int, default=256, help="most tokens an answer may have (256)")

    _add_generate_options(_add_command(verbs, "generate", "answer a file of prompts; the answers are rows to train on"))
    _add_evaluate(verbs)
    _add_report(verbs)
    _add_export(verbs)
    study = "train the variants of a config and compare them; what is done is not done again"
    _add_command(verbs, "study", study, "CONFIG [--key value ...]")
    resumed = "prove for a config that a run killed on its way ends with the bits of one that was not"
    verify = _add_command(verbs, "verify-resume", resumed, "CONFIG [--steps N] [--key value ...]")
    verify.add_argument("--steps", type=int, default=4, help="steps before the kill, and after it (4)")
    doctor = _add_command(verbs, "doctor", "tell what this machine trains with, and what is missing")
    doctor.add_argument("--json", action="store_true", help="one line of JSON")
    _add_dashboard(verbs)
    return parser


def _add_generate_options(parser: argparse.ArgumentParser) -> None:
    """The names of transformers' GenerationConfig. What is left out has the defaults of `Sampling` and `Request`."""
    parser.add_argument("prompts", help="a text file (.txt) with a prompt a line, or rows as train_data takes them")
    parser.add_argument("--model", required=True, help="a run's output folder, a model folder or a hub name")
    parser.add_argument("--output", required=True, help="a .jsonl file; FILE.errors tells of prompts without an answer")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that is there")
    options = argparse.SUPPRESS  # absent unless given
    parser.add_argument("--samples", type=int, default=options, help="answers to each prompt (1)")
    parser.add_argument("--batch_size", type=int, default=options, help="answers written side by side (16)")
    parser.add_argument("--max_length", type=int, default=options, help="most tokens of prompt and answer together")
    parser.add_argument("--stop_strings", nargs="+", default=options, help="texts that end an answer")
    parser.add_argument("--system_prompt", default=options, help="instead of the one the model was trained with")
    parser.add_argument("--max_new_tokens", type=int, default=options, help="most tokens of an answer (256)")
    parser.add_argument("--repetition_penalty", type=float, default=options, help="above 1: repeat less")
    parser.add_argument("--seed", type=int, default=options, help="of all that is drawn (0)")
    drawn = parser.add_argument_group("drawing", "answers are greedy unless one of these is given")
    drawn.add_argument("--temperature", type=float, default=options, help="1 draws as the model says, less is surer")
    drawn.add_argument("--top_k", type=int, default=options, help="only from so many of the likeliest (50; 0: all)")
    drawn.add_argument("--top_p", type=float, default=options, help="only from the likeliest with this probability")
    drawn.add_argument("--min_p", type=float, default=options, help="only from those with this share of the best's")


def _add_evaluate(verbs: Commands) -> None:
    one = _add_command(verbs, "evaluate", "compare models on held-out rows and checkable instructions")
    one.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="runs' folders, model folders or hub names; the first is the baseline",
    )
    one.add_argument("--data", help="a run's folder (its held-out rows), or a file, folder or hub name of rows")
    one.add_argument("--num_prompts", type=int, default=50, help="most rows that are asked (50)")
    one.add_argument("--max_new_tokens", type=int, default=128, help="most tokens an answer may have (128)")
    one.add_argument("--few_shot", type=int, default=0, help="ask each model also with this many rows as examples")
    one.add_argument("--template", choices=("role", "chat"), default="chat", help="for models that are no run's (chat)")
    one.add_argument("--system_prompt", help="for models that are no run's")
    one.add_argument(
        "--judge_base_url", help="an OpenAI-compatible endpoint that judges pairs, as https://api.openai.com/v1"
    )
    one.add_argument("--judge_model", help="the judge's name there; its key is read from OPENAI_API_KEY")
    one.add_argument("--output", help="a folder for JSON, Markdown, picture and answers")
    one.add_argument("--json", action="store_true", help="one line of JSON in the place of the tables")


def _add_report(verbs: Commands) -> None:
    one = _add_command(verbs, "report", "write the page of a run, or one that compares runs")
    one.add_argument("folders", nargs="+", metavar="OUTPUT_DIR", help="runs' output folders; the first is the baseline")
    one.add_argument("--output", help="the page (OUTPUT_DIR/report.html; of several runs comparison.html in the first)")


def _add_dashboard(verbs: Commands) -> None:
    one = _add_command(verbs, "dashboard", "open trackio's page of the runs that --report_to trackio kept here")
    one.add_argument("project", nargs="?", default=None, help="the runs' `project` (sft_pipeline)")
    one.add_argument("--port", type=int, help="where it listens on this machine (the first free one from 7860)")
    one.add_argument("--no_browser", action="store_true", help="print the address alone")


def _add_export(verbs: Commands) -> None:
    one = _add_command(verbs, "export", "write a run's model as one folder for other tools, with a model card")
    one.add_argument("folder", metavar="OUTPUT_DIR", help="a finished run's output folder; adapters are merged")
    one.add_argument("destination", metavar="DEST", help="the folder to write, which must not be there")
    dtypes = ("float32", "bfloat16", "float16")
    one.add_argument("--dtype", choices=dtypes, default="float32", help="of the weights (float32, as trained)")
    one.add_argument("--license", help="the model's, as the hub names it: apache-2.0 (the base model's, if known)")


def _add_command(verbs: Commands, name: str, description: str, usage: str | None = None) -> CommandParser:
    """A verb's parser; one with a `usage` of its own reads a config, and any words that it does not know are keys."""
    parser = verbs.add_parser(
        name,
        help=description,
        description=f"{description}\n\nCONFIG is a YAML file and stands first" if usage else description,
        usage=usage and f"%(prog)s {usage}",
        epilog=usage and _describe_keys(),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(reads_config=usage is not None)
    return parser


def _describe_keys() -> str:
    """The config's keys for --help."""
    from sft_pipeline.config import SFTArguments

    lines = [f"  {field.name}\n      {field.metadata['help']}" for field in dataclasses.fields(SFTArguments)]
    return "\n".join(["keys, beside all of transformers.TrainingArguments':", *lines])
