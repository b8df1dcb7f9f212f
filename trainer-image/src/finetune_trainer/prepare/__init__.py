"""The prepare stage: from objects in storage to token shards that training reads without a thought.

    sources    → objects → input splits                                      reading/
    map        one pass over a record, by a pool of processes                mapping/
                 raw record → record                                         reading/
                 → rendered example (text, what is learned)                  rendering/
                 → checked: personal data, language                          quality/
                 → tokenized sample (token ids, mask)                        tokenizing/
                 → compared with held-out samples                            quality/
                 → shards, sample statistics                                 mapping/
    reduce     statistics → duplicates → contamination → index, report       reducing/
    manifest

``pipeline.prepare`` is the stage; ``prepared.shards.PreparedData`` is what later stages read.
"""
