"""Verifiable instructions: prompts whose answers a program can check, without a reference.

    records ──► prompts of builtin://instructions.jsonl, in words of ``checks``
    checks  ◄── the same words in a prompt ──► whether an answer does what the prompt asks for

As IFEval (Zhou et al. 2023, arXiv:2311.07911) does, with prompts of our own: a measure of whether a
tuned model still follows instructions.
"""
