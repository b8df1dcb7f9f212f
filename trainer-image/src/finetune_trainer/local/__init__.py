"""``finetune run``: the manifest, stages and outputs of a cluster on one machine; processes replace
pods.

manifest → state (which run) → run-spec.json → prepare → supervise (one per node) → publish → table
"""
