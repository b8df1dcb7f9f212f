"""Trainer of finetune-operator: stages prepare, train and publish; and ``finetune run``."""

import logging
import warnings

# Silence warnings of libraries about each other: users cannot act on them.
# torchao (imported by transformers if installed) registers enums in a way that torch 2.15 warns
# about.
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
# peft reads a property of transformers 5 by its deprecated name.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
# torch.distributed.checkpoint warns about single-process use even with no_dist=True.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable", UserWarning)
