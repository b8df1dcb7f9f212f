"""The container of finetune-operator: prepare, train, evaluate, publish; and ``finetune run``."""
