"""Training process: ``worker`` joins the process group, ``session`` builds model and data, ``loop``
trains, ``checkpoint`` saves and restores, ``final`` evaluates."""
