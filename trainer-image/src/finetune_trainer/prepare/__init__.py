"""The prepare stage: from objects in storage to token shards that training reads without a thought.

    sources → objects → records → drafts (text, what is learned) → samples (token ids, mask)
            → split → shards + index → report → manifest

``pipeline.prepare`` is the stage; ``prepared.shards.PreparedData`` is what later stages read.
"""
