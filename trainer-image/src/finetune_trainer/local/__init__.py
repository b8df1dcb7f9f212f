"""``finetune run``: the same manifest, stages and outputs on one machine, with processes for pods.

manifest → state (which run) → run-spec.json → prepare → supervise, one a node → publish → table
"""
