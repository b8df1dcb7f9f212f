"""``python -m finetune_trainer``: the same as the command ``finetune``."""

import sys

from finetune_trainer.cli import main

if __name__ == "__main__":
    sys.exit(main())
