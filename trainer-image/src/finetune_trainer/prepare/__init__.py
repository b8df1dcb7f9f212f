"""The prepare stage: turns objects in storage into token shards that training reads as they are.

    sources    → objects → input splits                                      reading/
    map        one pass over each record, by a pool of processes             mapping/
                 raw record → record                                         reading/
                 → rendered example (text, supervised segments)              rendering/
                 → checks: personal data, language                           quality/
                 → tokenized sample (token ids, supervised spans)            tokenizing/
                 → comparison with held-out samples                          quality/
                 → shards, sample statistics                                 mapping/
    reduce     statistics → duplicates → contamination → index, report       reducing/
    manifest

``pipeline.prepare`` runs the stage; later stages read ``prepared.dataset.PreparedData``.
"""
