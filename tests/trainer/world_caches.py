"""Imported by the fork server of the tests: fills what every process would otherwise fill."""

from finetune_trainer.train.process import fill_caches

fill_caches()
