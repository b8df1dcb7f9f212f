"""The API of finetune-operator, shared by operator and trainer.

``spec`` and ``status`` are the FineTuneJob resource; ``run_spec`` is the file that the operator
passes to the trainer; ``results`` are the trainer's reports; ``names`` and ``identity`` hold every
string that two parts share. pydantic is the only dependency.
"""
