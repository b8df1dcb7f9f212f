"""The publish stage: from the chosen commit to a model that others load, with its report.

    result.json + commit + base model → adapter/ and/or merged/
        → metrics.json, report.html, README.md → manifest.json (last) → latest.json

``pipeline.publish`` is the stage; ``facts`` is what is told about its result.
"""
