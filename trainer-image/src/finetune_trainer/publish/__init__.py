"""The publish stage: export the chosen checkpoint as a loadable model, with its report.

    result.json + checkpoint + base model → adapter/ and/or merged/
        → metrics.json, report.html, README.md → manifest.json (last) → latest.json

``pipeline.publish`` is the stage; ``run_facts`` gathers the figures that it reports.
"""
