"""Statistics: functions from tables to estimates with intervals; nothing in this package uses a model."""
