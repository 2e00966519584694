"""Statistics: tables in, numbers with intervals out; nothing here knows a model."""
