"""Sensors: what starts or ends runs without a person."""
