"""The contract of finetune-operator: what users write, what they read back, and what the parts say.

``spec`` and ``status`` are the FineTuneJob resource; ``run_spec`` is the file the operator hands to
the trainer; ``results`` is what the trainer says back; ``names`` and ``identity`` are every string
that two parts must spell alike. Nothing here imports anything but pydantic.
"""
