"""The container of finetune-operator: prepare, train, evaluate, publish; and ``finetune run``."""

import logging

# torchao, which transformers imports where it is installed, registers enumerations in a way that
# torch 2.15 warns of. It is nobody's concern who fine-tunes a model.
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
