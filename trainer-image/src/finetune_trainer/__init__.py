"""The container of finetune-operator: prepare, train, evaluate, publish; and ``finetune run``."""

import logging
import warnings

# Warnings of libraries about each other, which nobody who fine-tunes a model can mend.
# torchao, which transformers imports where it is installed, registers enumerations in a way that
# torch 2.15 warns of.
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
# peft asks transformers 5 for a property by its old name.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
# torch warns of checkpoints of a single process also where one was asked for (no_dist).
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable", UserWarning)
