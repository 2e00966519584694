"""Studies: one module per experiment, a RunSpec in and a StudyResult out; nothing here prints."""
