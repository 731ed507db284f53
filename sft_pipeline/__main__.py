"""The command line as a module: `python -m sft_pipeline`, also behind `torchrun` and `accelerate launch`."""

from sft_pipeline.cli import main

if __name__ == "__main__":
    main()
