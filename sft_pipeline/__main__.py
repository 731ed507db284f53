"""`python -m sft_pipeline` and `accelerate launch -m sft_pipeline`."""

from sft_pipeline.cli import main

if __name__ == "__main__":
    main()
