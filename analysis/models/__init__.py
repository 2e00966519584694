"""Model execution: loading, chat templates, first-token inference, generation, cached results."""
